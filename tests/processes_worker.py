"""Runs settings in processes that it forks, as torchrun would start them: `processes_worker.py PLAN`.

PLAN is JSON: a list of [number of processes, {name: settings}]. Prints what each process raised, by name and process.
"""

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from titans_lm.training.config import parse_settings
from titans_lm.training.train import train


def run(index: int, count: int, port: int, runs: dict) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    for name, settings in runs.items():
        if name == "skewed" and index:
            time.monotonic = lambda now=time.monotonic: now() * 1000
        try:
            train(parse_settings(settings))
        except (Exception, SystemExit) as error:
            print("raised", name, index, type(error).__name__, error, flush=True)
            if isinstance(error, RuntimeError):
                traceback.print_exc()


def main() -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    for count, runs in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
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
        for child in children:
            assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
