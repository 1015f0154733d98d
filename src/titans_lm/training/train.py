"""Train a language model from its settings, with transformers' `Trainer`."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from titans_lm.models.baselines import build
from titans_lm.models.graft_config import GraftConfig
from titans_lm.models.graft_files import check_tokenizer, make_graft
from titans_lm.models.growth import grow_memory
from titans_lm.models.hub import RUN, load
from titans_lm.models.presets import build_on_meta
from titans_lm.models.tokenizer import load_tokenizer
from titans_lm.tasks import make_task
from titans_lm.training.config import Settings, save_settings
from titans_lm.training.data.build import data_of, examples
from titans_lm.training.not_finite import NotFinite
from titans_lm.training.processes import Processes
from titans_lm.training.resume import check_resumed, check_same
from titans_lm.training.run_folder import (
    UNFINISHED,
    RunLock,
    check_checkpoint,
    check_names_free,
    is_begun,
    last_checkpoint,
    step_of,
)
from titans_lm.training.trainer import Resume, TitansTrainer
from titans_lm.utils.record import Stopped, on_stop


def train(settings: Settings) -> PreTrainedModel:
    """Train a model and save model, tokenizer and run.yaml in output_dir.

    Checks everything before it writes anything, and removes nothing but its own unfinished files. Raises ValueError for
    invalid settings or texts, NotFinite if the loss becomes NaN or infinite, OSError if a file cannot be written, and
    KeyboardInterrupt after Ctrl-C, SIGTERM or SIGHUP, once a checkpoint is saved.
    """
    output, processes = Path(settings.training.output_dir), Processes()
    rows = settings.training.batch_size * processes.count
    processes.of_first(lambda: _checkpoint(output, settings, rows))
    with processes.together():
        trainer = trainer_for(settings)
    interruption = _SaveAndStop(processes)
    trainer.add_callback(interruption)
    with _lock(output, processes), on_stop(interruption.ask):
        checkpoint = processes.of_first(lambda: _begin(output, settings, rows))
        if checkpoint is not None:
            trainer.add_callback(Resume(trainer, checkpoint))
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if not interruption.number:
                _save(trainer, settings, output)
        except NotFinite as error:
            raise processes.said_once(error.after(last_checkpoint(output))) from None
    if interruption.number:
        stopped = Stopped(interruption.number, f"saved in {output}; continue with --set training.resume=true")
        raise processes.said_once(stopped, Stopped.status(stopped))
    model: PreTrainedModel = trainer.model
    return model


def trainer_for(settings: Settings, make: Callable[[Any], PreTrainedModel] | None = None) -> TitansTrainer:
    """Build the trainer. Raises ValueError for invalid settings.

    `make` returns a model for each trial of a search. Trials are compared on examples that are not trained on.
    """
    tokenizer = _tokenizer(settings)
    model = model_for(settings) if make is None else make
    training_set, evaluation_set = data_of(settings, tokenizer, settings.training.batch_size * Processes().count)
    if make is not None and evaluation_set is None:
        evaluation_set = examples(settings)
    return TitansTrainer(model, settings, training_set, evaluation_set, tokenizer)


def model_for(settings: Settings) -> PreTrainedModel:
    """Build the model with its initial weights. Raises ValueError for a vocabulary smaller than the data's."""
    config, tokenizer, task = settings.config(), _tokenizer(settings), settings.data.task
    least = make_task(task).vocab_size if task else len(tokenizer or ())
    if least > config.vocab_size:
        whose = "task's" if task else "tokenizer's"
        raise ValueError(f"model.vocab_size={config.vocab_size} is below the {whose} {least}")
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        own = None if tokenizer is None else getattr(tokenizer, key)
        if settings.model.get(key, own) != own:
            raise ValueError(f"model.{key}={settings.model[key]} is not the tokenizer's, {own}; leave it out")
        setattr(config, key, own)
    if isinstance(config, GraftConfig):
        check_tokenizer(config, tokenizer)
    else:
        _check_size(config)
    transformers.set_seed(settings.training.seed)
    if settings.pretrained is None:
        return make_graft(config).train() if isinstance(config, GraftConfig) else build(config)
    model, own = load(settings.pretrained)
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(
            f"data.tokenizer={settings.data.tokenizer} is not the one that model.pretrained={settings.pretrained} "
            f"learned with; name that one: a folder of it can be given"
        )
    if isinstance(config, GraftConfig):
        model.config.distillation = config.distillation
    if settings.growth:
        model = grow_memory(model, **settings.growth)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, key, getattr(config, key))
    return model.train()


def _check_size(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model larger than this machine's memory, before minutes are spent on filling it."""
    try:
        size = sum(p.nbytes for p in build_on_meta(build, config).parameters())
    except (RuntimeError, TypeError, OverflowError):  # a tensor of more numbers than torch can count
        size = 2**63
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > available:
        raise ValueError(f"model: its weights take {size / 2**30:,.0f} GiB, this machine has {available / 2**30:,.0f}")


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the data; None for a task whose tokens are numbers."""
    name: str | None = settings.data.tokenizer
    if settings.data.task:
        name = getattr(make_task(settings.data.task), "tokenizer", None)
    return None if name is None else load_tokenizer(name)


def _save(trainer: TitansTrainer, settings: Settings, output: Path) -> None:
    trainer.check_finite()
    try:
        trainer.save_model()
        with trainer.processes.together():
            if trainer.processes.is_first:
                trainer.save_state()
                save_settings(settings, output)
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk, as three libraries report it
        raise OSError(f"cannot write to {output}: {error}; the last whole checkpoint there is untouched") from error


# ------------------------------------------------------------------------------------------------ checkpoints


def earlier(settings: Settings) -> Path | None:
    """What an earlier run of these settings saved: output_dir if it ended, its last checkpoint if not, or None. Raises
    ValueError for a run of other settings."""
    output = Path(settings.training.output_dir)
    saved = output if (output / RUN).is_file() else last_checkpoint(output)
    if saved is not None:
        check_same(saved, settings)
    return saved


def _begin(output: Path, settings: Settings, rows: int) -> Path | None:
    """As `_checkpoint`, once the folder is locked: another run may have ended there since. Removes leftovers."""
    checkpoint = _checkpoint(output, settings, rows)
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    return checkpoint


@contextlib.contextmanager
def _lock(output: Path, processes: Processes) -> Iterator[None]:
    """A context in which the first process holds the folder's lock, for all."""
    with contextlib.ExitStack() as stack:
        processes.of_first(lambda: stack.enter_context(RunLock(output)) and None)
        yield


def _checkpoint(output: Path, settings: Settings, rows: int) -> Path | None:
    """The checkpoint to resume from, checked; None to start. Raises ValueError rather than overwrite another run."""
    training, last = settings.training, last_checkpoint(output)
    check_names_free(output)
    if training.resume and last is not None:
        check_checkpoint(last)
        if step_of(last) >= training.max_steps:
            raise ValueError(f"training.max_steps={training.max_steps} are done in {output}; give more to continue")
        check_resumed(last, settings, rows)
        return last
    if is_begun(output):  # and killed before its first checkpoint
        return None
    if training.resume:
        raise ValueError(f"training.resume: {output} has no checkpoint to resume from")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"training.output_dir={output} is not empty; give another, or --set training.resume=true to resume there"
        )
    return None


class _SaveAndStop(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP (`ask`) the trainer saves and stops after the step; a second Ctrl-C stops
    at once."""

    number = 0
    """Of the signal received."""

    def __init__(self, processes: Processes):
        self.processes = processes

    def ask(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise Stopped(number)
        self.number = self.number or number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the callback's form
        self.number = max(self.processes.gather(self.number))
        if self.number:
            control.should_save = control.should_training_stop = True
