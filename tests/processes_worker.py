"""Runs settings in processes that it forks, as torchrun would start them: `processes_worker.py PLAN`.

PLAN is JSON: a list of [number of processes, {name: settings}, {copy: the folder it is of, made before}]. Prints what
each process raised, by name and process.
"""

import json
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from pathlib import Path

from titans_lm.training.config import parse_settings
from titans_lm.training.train import train

FULL = 6000
"""Bytes of a file, beyond which the disk is full: fewer than every checkpoint has in each process's files."""


def run(index: int, count: int, port: int, runs: dict) -> None:
    if count > 1:
        os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, settings in runs.items():
        if name == "skewed" and index:
            time.monotonic = lambda now=time.monotonic: now() * 1000
        if name in (f"full-ddp-{index}", f"full-fsdp-{index}"):  # this process's disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, limits[1]))
        try:
            train(parse_settings(settings))
        except (Exception, SystemExit) as error:
            line = f"raised {name} {index} {type(error).__name__} {error}\n"
            os.write(1, line.encode())  # at once: processes that print piece by piece mix their lines
            if isinstance(error, RuntimeError):
                traceback.print_exc()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(count: int, runs: dict) -> list[int]:
    """The process ids of `count` processes of the same runs."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    port, children = free_port(), []
    for index in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(index, count, port, runs)
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return children


def main() -> None:
    for count, runs, copies in json.loads(Path(sys.argv[1]).read_text()):
        for goal, source in copies.items():
            shutil.copytree(source, goal)
        children = started(count, runs)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
