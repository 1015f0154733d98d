"""The folder of a training run: checkpoints, leftovers of an interrupted run, and the lock against a second run.

Only files that a run wrote are ever removed: folders such as `checkpoint-best` belong to the user.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from titans_lm.models.hub import RUN
from titans_lm.models.model_files import DIGESTS, check_digests
from titans_lm.training.processes import Processes
from titans_lm.training.sharded_checkpoint import SHARDS
from titans_lm.utils.memory_lock import FileLock, beside

STATE = "trainer_state.json"
"""The last file of a checkpoint: a checkpoint without it is incomplete."""
LOCK = ".training.lock"
UNFINISHED = ".unfinished-checkpoint"
"""A checkpoint is written in this folder, then moved out of it: one with its final name is complete."""
STATE_DIGESTS = "training_digests.json"
"""File in a checkpoint: the SHA-256 of the states of optimizer, scheduler and random generators."""
LOGS = "runs"
PROGRESS = "progress.json"
"""File in the folder that says how far the run is."""
ROWS = "processes.json"
"""File in a checkpoint: the rows in the batch of all processes. Without it: `training.batch_size`."""
_PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""Files that torch reads without executing what is in them (`weights_only`)."""
_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja",
    "training_args.bin", "modeling_titans.py", STATE, RUN, DIGESTS,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ checkpoints


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _numbered(output: Path) -> list[Path]:
    """Folders named `checkpoint-NUMBER`, by step."""
    folders = (p for p in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir())
    return sorted(folders, key=step_of)


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    return [p for p in _numbered(output) if (p / STATE).is_file()]


def last_checkpoint(output: Path) -> Path | None:
    """The last complete checkpoint, if any."""
    return max(checkpoints(output), key=step_of, default=None)


def check_names_free(output: Path) -> None:
    """Raises ValueError for an incomplete checkpoint folder, which may be the user's and would be overwritten."""
    last = last_checkpoint(output)
    for folder in _numbered(output):
        if not (folder / STATE).is_file() and (last is None or step_of(folder) > step_of(last)):
            raise ValueError(f"{folder} is not a whole checkpoint; move it away, its name is needed")


def check_checkpoint(folder: Path) -> None:
    """Raises ValueError, naming the file, for a checkpoint that is damaged or incomplete. Executes nothing in it."""
    shards = folder / SHARDS
    for digested in (folder, shards):
        check_digests(digested)
        check_digests(digested, STATE_DIGESTS)
    needed = [STATE, "scheduler.pt", "rng_state*.pth", *([] if shards.is_dir() else ["optimizer.pt"])]
    for pattern in needed:
        if not any(folder.glob(pattern)):
            raise ValueError(f"{folder} is damaged: {pattern.replace('*', '')} is missing")
    try:
        json.loads((folder / STATE).read_text())["global_step"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is damaged: {STATE} is not what a training run wrote") from None
    for weights in [*folder.glob("*.safetensors"), *shards.glob("*.safetensors")]:
        try:
            with safe_open(weights, "pt"):  # reads the header, and compares it with the file's size
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder} is damaged: {weights.name} cannot be loaded ({error})") from error
    for path in (path for pattern in _PICKLES for path in folder.glob(pattern)):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds; all mean that the file is damaged
            reason = str(error).split(". ")[0].split("\n")[0]
            raise ValueError(f"{folder} is damaged: {path.name} cannot be read ({reason})") from error


def rows_of(checkpoint: Path, alone: int) -> int:
    """Rows in a batch of all processes that wrote the checkpoint; `alone`: those in one of one process. Raises
    ValueError for a damaged file."""
    if not (checkpoint / ROWS).is_file():
        return alone
    try:
        return int(json.loads((checkpoint / ROWS).read_text())["rows"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{checkpoint} is damaged: {ROWS} is not what a training run wrote") from None


def write_rows(checkpoint: Path, rows: int, processes: Processes) -> None:
    """Write how many `rows` the processes have together in a batch."""
    (checkpoint / ROWS).write_text(json.dumps({"processes": processes.count, "rows": rows}) + "\n")


@contextlib.contextmanager
def unfinished(output: Path, step: int, keep: int, processes: Processes) -> Iterator[Path]:
    """Yields the folder of the checkpoint of `step`, made inside a folder of its own, for all processes to write in. On
    success moves it to `output` and removes all checkpoints but the last `keep`.

    Raises OSError if it cannot be written, and then leaves nothing behind. On several machines `output` has to be on a
    file system that they share, or this is an OSError too.
    """
    folder = output / UNFINISHED
    checkpoint = folder / f"checkpoint-{step}"
    try:
        with processes.together():
            if processes.is_first:
                shutil.rmtree(folder, ignore_errors=True)
                checkpoint.mkdir(parents=True)
        with processes.together():
            if not checkpoint.is_dir():
                raise OSError(f"process {processes.index} does not see it: all machines have to share this folder")
        with processes.together():
            yield checkpoint
        with processes.together():
            if processes.is_first:
                _finish(checkpoint)
                os.replace(checkpoint, output / checkpoint.name)
                _sync(output)
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk, as three libraries report it
        raise OSError(f"cannot write to {output}: {error}; the last whole checkpoint there is untouched") from error
    finally:
        if processes.is_first:
            shutil.rmtree(folder, ignore_errors=True)
    if processes.is_first:
        for old in checkpoints(output)[:-keep]:
            os.replace(old, output / UNFINISHED)  # half removed, it would be taken for a damaged checkpoint
            shutil.rmtree(output / UNFINISHED)


def _finish(checkpoint: Path) -> None:
    """Write the digests, and flush all files to the disk."""
    for folder in [path for path in checkpoint.iterdir() if path.is_dir()] + [checkpoint]:
        digests = {}
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                if folder != checkpoint or any(path.match(pattern) for pattern in _PICKLES):
                    digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        listed = folder / STATE_DIGESTS
        listed.write_text(json.dumps(digests, indent=1) + "\n")
        _sync(listed)
        _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------------ the folder


def is_begun(output: Path) -> bool:
    """Whether the folder holds only what a run killed before its first checkpoint leaves."""
    paths = list(output.iterdir()) if output.is_dir() else []
    return bool(paths) and all(map(_is_leftover, paths))


def _is_leftover(path: Path) -> bool:
    if path.name == LOGS and path.is_dir():
        return all(p.name.startswith("events.out.tfevents") for p in path.rglob("*") if not p.is_dir())
    return path.name in (LOCK, UNFINISHED, PROGRESS, beside(path.with_name(PROGRESS), "part").name)


def remove_run(output: Path, model: bool = True) -> None:
    """Remove a run's checkpoints and logs, and its `model`. Keeps all other files."""
    for folder in [*checkpoints(output), output / UNFINISHED]:
        shutil.rmtree(folder, ignore_errors=True)
    for trial in (p for p in output.glob("run-*") if re.fullmatch(r"run-\d+", p.name) and p.is_dir()):  # of a search
        remove_run(trial)
    if _is_leftover(output / LOGS):
        shutil.rmtree(output / LOGS, ignore_errors=True)
    (output / PROGRESS).unlink(missing_ok=True)
    if model:
        for path in {path for pattern in _MODEL_FILES for path in output.glob(pattern) if path.is_file()}:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            output.rmdir()


class RunLock(FileLock):
    """A context that keeps a second run out of a folder, which it creates. Raises as `FileLock` does."""

    def __init__(self, output: Path):
        super().__init__(output / LOCK, output)

    def __enter__(self) -> "RunLock":
        self.target.mkdir(parents=True, exist_ok=True)
        super().__enter__()
        return self
