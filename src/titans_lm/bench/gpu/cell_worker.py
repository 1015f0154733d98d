"""Cells in a process: `python -m titans_lm.bench.gpu.cell_worker`, a line of JSON for each, answered by one.

A cell that breaks the GPU's context ends the process, one that takes too long is killed with it, and the next cell gets
a new one.
"""

import contextlib
import dataclasses
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from titans_lm.bench.gpu.cells import Cell
from titans_lm.bench.measure import Meter, Setting, summarise
from titans_lm.utils.record import cores


def order_of(cell: Cell, device: str) -> dict[str, Any]:
    """What `run_cell` takes."""
    threads = 1 if device == "cpu" else max(1, cores() // 2)
    setting = dataclasses.asdict(Setting(device, cell.dtype, cell.backend, threads))
    order = {key: getattr(cell, key) for key in ("module", "contender", "options", "actions", "runs")}
    return {**order, "setting": setting}


# ------------------------------------------------------------------------------------------------ in the process


def run_cell(order: dict[str, Any]) -> dict[str, Any]:
    """Build a cell's contender and measure its actions, in turns -> facts about it, and `actions`."""
    from titans_lm.bench.worker import build

    begun = time.perf_counter()
    contender = build(order, Setting(**order["setting"]))
    contender.small()
    built = time.perf_counter() - begun
    meter = Meter(Setting(**order["setting"]))
    repetitions: dict[str, list[dict[str, Any]]] = {action: [] for action in order["actions"]}
    for _ in range(order["runs"] + 1 if repetitions else 0):
        for action, measured in repetitions.items():
            measured.append(meter.measure(contender.actions[action]))
    return {
        **contender.about, "seconds_to_build": round(built, 2),
        "actions": {action: summarise(measured) for action, measured in repetitions.items()},
    }  # fmt: skip


def _is_broken(device: str) -> bool:
    """Free what the last cell held. Whether the GPU's context is broken, which it may report late."""
    import torch

    gc.collect()
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main() -> None:
    pipe = os.fdopen(os.dup(1), "w")  # for answers alone: a library that prints must not speak in between
    os.dup2(2, 1)
    import torch

    for line in sys.stdin:
        order = json.loads(line)
        torch.manual_seed(0)
        torch.set_num_threads(order["setting"]["threads"])
        try:
            answer = run_cell(order)
        except Exception as error:  # whatever it is, it is this cell's result
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        answer["process_ends"] = _is_broken(order["setting"]["device"])
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()
        if answer["process_ends"]:
            return


# ------------------------------------------------------------------------------------------------ from outside


class OutOfTime(Exception):
    """A cell did not answer in the time that it had."""


class CellProcess:
    """Runs cells, one after another, in a process that is started anew where the last one ended."""

    def __init__(self, device: str):
        self.device = device
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """The cell's result; {"error"} where it fails. Raises OutOfTime after `seconds`, and ends the process."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(order_of(cell, self.device)).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds)
        except BrokenPipeError:
            line = b""
        except OutOfTime:
            self.end()
            raise
        if not line:
            return {"error": self._why(process)}
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("process_ends"):
            self.end()
        return answer

    def _started(self) -> "subprocess.Popen[bytes]":
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.end()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        if self.device == "cpu":
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "titans_lm.bench.gpu.cell_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment,
            start_new_session=True,  # Ctrl-C reaches the command only, which ends this one
        )  # fmt: skip
        return self.process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, seconds)):
                raise OutOfTime
        return process.stdout.readline()

    def _why(self, process: "subprocess.Popen[bytes]") -> str:
        """Why the process has ended, by its status and the last line that it wrote."""
        code = process.wait()
        if self.log.closed:
            return f"the process ended with status {code}"
        self.log.seek(0)
        last = self.log.read().strip().splitlines()[-1:] or [""]
        return f"the process ended with status {code}: {last[0][:300]}"

    def end(self) -> None:
        """End the process, and what it has started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not sent
                if stream is not None:
                    stream.close()
        self.process = None
        self.log.close()


if __name__ == "__main__":
    main()
