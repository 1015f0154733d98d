"""The folder of a training run: its checkpoints, what an interrupted run left there, and the lock against a second run.

Only what a run wrote itself is ever removed: folders such as `checkpoint-best` are the user's.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from titans_lm.models.hub import RUN
from titans_lm.models.model_files import DIGESTS, check_digests

STATE = "trainer_state.json"
"""The last file of a checkpoint: without it the checkpoint is not whole."""
LOCK = ".training.lock"
UNFINISHED = ".unfinished-checkpoint"
"""A checkpoint is written within this folder, then moved out of it: one with its final name is whole."""
STATE_DIGESTS = "training_digests.json"
"""In a checkpoint: the SHA-256 of the optimizer's, the scheduler's and the random generators' states."""
LOGS = "runs"
KEPT = 2
"""Checkpoints that a run keeps."""
_STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja",
    "training_args.bin", "modeling_titans.py", STATE, RUN, DIGESTS,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ checkpoints


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _numbered(output: Path) -> list[Path]:
    """Folders with a checkpoint's name, by their steps. `checkpoint-best` is not such a name."""
    folders = (p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())
    return sorted(folders, key=step_of)


def checkpoints(output: Path) -> list[Path]:
    """The whole ones, by their steps."""
    return [p for p in _numbered(output) if (p / STATE).is_file()]


def last_checkpoint(output: Path) -> Path | None:
    """The last whole one, where there is one."""
    return max(checkpoints(output), key=step_of, default=None)


def check_names_free(output: Path) -> None:
    """Raises ValueError for a folder in the way of a checkpoint: it is not whole, so it may be anyone's."""
    last = last_checkpoint(output)
    for folder in _numbered(output):
        if not (folder / STATE).is_file() and (last is None or step_of(folder) > step_of(last)):
            raise ValueError(f"{folder} is not a whole checkpoint; move it away, its name is needed")


def check_checkpoint(folder: Path) -> None:
    """Raises ValueError for a checkpoint that is damaged or lacks a file, naming it. Nothing in it is executed."""
    check_digests(folder)
    check_digests(folder, STATE_DIGESTS)
    for name in (STATE, *_STATES):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
    try:
        json.loads((folder / STATE).read_text())["global_step"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is damaged: {STATE} is not what a training run wrote") from None
    for weights in folder.glob("*.safetensors"):
        try:
            with safe_open(weights, "pt"):  # reads the header, and compares it with the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder} is damaged: {weights.name} cannot be loaded ({error})") from error
    for name in _STATES:
        try:
            with safe_globals():
                torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds; all mean that this is not such a file
            reason = str(error).split(". ")[0].split("\n")[0]
            raise ValueError(f"{folder} is damaged: {name} cannot be read ({reason})") from error


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A folder in which a checkpoint is written; on success what is in it is moved to `output`, and of older
    checkpoints only the last `KEPT` stay.

    Raises OSError where it cannot be written, and then leaves nothing behind.
    """
    folder = output / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for made in _numbered(folder):
            _finish(made)
            os.replace(made, output / made.name)
    except (RuntimeError, OSError) as error:  # torch and safetensors say in their own words that a disk is full
        raise OSError(f"cannot write to {output}: {error}; the last whole checkpoint there is untouched") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for old in checkpoints(output)[:-KEPT]:
        shutil.rmtree(old)


def _finish(checkpoint: Path) -> None:
    """Write the digests, and all of it to the disk."""
    digests = {}
    for path in sorted(checkpoint.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if path.name in _STATES:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    (checkpoint / STATE_DIGESTS).write_text(json.dumps(digests, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ the folder


def is_begun(output: Path) -> bool:
    """Whether a run was killed there before its first checkpoint, and nothing else is in the folder."""
    paths = list(output.iterdir()) if output.is_dir() else []
    return bool(paths) and all(map(_is_leftover, paths))


def _is_leftover(path: Path) -> bool:
    if path.name == LOGS and path.is_dir():
        return all(p.name.startswith("events.out.tfevents") for p in path.rglob("*") if not p.is_dir())
    return path.name in (LOCK, UNFINISHED)


def remove_run(output: Path, model: bool = True) -> None:
    """Remove a run's checkpoints and logs, and its `model`. What else is in the folder stays."""
    for folder in [*checkpoints(output), output / UNFINISHED]:
        shutil.rmtree(folder, ignore_errors=True)
    for trial in (p for p in output.glob("run-*") if re.fullmatch(r"run-\d+", p.name) and p.is_dir()):  # of a search
        remove_run(trial)
    if _is_leftover(output / LOGS):
        shutil.rmtree(output / LOGS, ignore_errors=True)
    if model:
        for path in {path for pattern in _MODEL_FILES for path in output.glob(pattern) if path.is_file()}:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            output.rmdir()


class RunLock:
    """Keeps a second run out of a folder while the first one writes there. The lock ends with the process, however that
    ends.

    Raises ValueError where another process has the lock, naming it; OSError where the folder cannot be made.
    """

    def __init__(self, output: Path):
        self.output, self.path = output, output / LOCK
        self.file: Any = None

    def __enter__(self) -> "RunLock":
        self.output.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = self.path.open("a+")
            self._take()
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
            self.file.close()  # the run before removed the file while it was opened here
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.file.flush()
        return self

    def _take(self) -> None:
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read() or "another process"
            self.file.close()
            raise ValueError(f"{self.output} is in use: {holder} is training there") from None
        except OSError as error:
            logging.getLogger(__name__).warning("%s cannot be locked: %s", self.output, error.strerror)

    def __exit__(self, *_: Any) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()
