"""`titans train`: a language model from a YAML file, on transformers' `Trainer`."""

import argparse
import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from titans_lm.baselines import build
from titans_lm.checkpoint import RUN, load
from titans_lm.data import (
    Blocks,
    CarriedOrder,
    StreamedBlocks,
    load_tokenizer,
    read_text,
    split_held_out,
    streamed,
    text_files,
)
from titans_lm.record import Stopped, on_stop
from titans_lm.run_folder import (
    UNFINISHED,
    RunLock,
    check_checkpoint,
    check_names_free,
    is_begun,
    last_checkpoint,
    step_of,
)
from titans_lm.settings import Settings, check_resumed, check_same, load_settings, save_settings
from titans_lm.tasks import CarriedRows, Rows, StreamTask, make_task
from titans_lm.trainer import NotFinite, TitansTrainer

EVALUATION_SEED = 2_000_003
"""Where a search compares trials on examples of a task, they are made from this seed."""


def run(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.config, arguments.changes)
    model = train(settings)
    size = sum(p.numel() for p in model.parameters())
    print(f"{settings.training.output_dir}: a model of {size:,} parameters; titans infer --model reads with it")


def train(settings: Settings) -> PreTrainedModel:
    """Train what `settings` say, and save model, tokenizer and run.yaml in output_dir.

    Raises ValueError for settings or texts that do not work, NotFinite where the loss stops being a number, OSError
    where a file cannot be written, KeyboardInterrupt after Ctrl-C, SIGTERM or SIGHUP, when a checkpoint has been saved.
    Nothing is written before everything was checked, and nothing is removed but what this run was writing.
    """
    output = Path(settings.training.output_dir)
    _checkpoint(output, settings)
    trainer = trainer_for(settings)
    with RunLock(output), _Interruptible(trainer) as interruption:
        checkpoint = _checkpoint(output, settings)  # again: another run may have ended there meanwhile
        shutil.rmtree(output / UNFINISHED, ignore_errors=True)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if not interruption.asked:
                _save(trainer, settings, output)
        except NotFinite as error:
            raise error.after(last_checkpoint(output)) from None
    if interruption.asked:
        raise Stopped(interruption.asked, f"saved in {output}; go on with --set training.resume=true")
    model: PreTrainedModel = trainer.model
    return model


def trainer_for(settings: Settings, make: Callable[[Any], PreTrainedModel] | None = None) -> TitansTrainer:
    """The trainer of what `settings` say, all of it checked.

    `make` gives a model for each trial of a search. Trials are compared on examples that are not trained on.
    """
    tokenizer = _tokenizer(settings)
    model = model_for(settings) if make is None else make
    training_set, evaluation_set = _data(settings, tokenizer)
    if make is not None and evaluation_set is None:
        evaluation_set = _examples(settings)
    return TitansTrainer(model, settings, training_set, evaluation_set, tokenizer)


def model_for(settings: Settings) -> PreTrainedModel:
    """The model with its first weights. Raises ValueError for a vocabulary below the data's."""
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
    _check_size(config)
    transformers.set_seed(settings.training.seed)
    if settings.pretrained is None:
        return build(config)
    model, _ = load(settings.pretrained)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, key, getattr(config, key))
    return model.train()


def _check_size(config: PreTrainedConfig) -> None:
    """Raises ValueError for a model that this machine cannot hold: filling its memory first would take minutes."""
    try:
        with torch.device("meta"):
            size = sum(p.nbytes for p in build(config).parameters())
    except (RuntimeError, TypeError, OverflowError):  # a tensor of more numbers than torch can count
        size = 2**63
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else size
    if size > there:
        raise ValueError(f"model: its weights take {size / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}")


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase | None:
    """What makes the tokens of texts; None for a task whose tokens are numbers."""
    name: str | None = settings.data.tokenizer
    if settings.data.task:
        name = getattr(make_task(settings.data.task), "tokenizer", None)
    return None if name is None else load_tokenizer(name)


def _save(trainer: TitansTrainer, settings: Settings, output: Path) -> None:
    trainer.check_finite()
    try:
        trainer.save_model()
        trainer.save_state()
        save_settings(settings, output)
    except (SafetensorError, RuntimeError, OSError) as error:  # a full disk, in three libraries' words
        raise OSError(f"cannot write to {output}: {error}; the last whole checkpoint there is untouched") from error


# ------------------------------------------------------------------------------------------------ data


def _data(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, Any]:
    data = settings.data
    if data.task or tokenizer is None:
        return _rows(settings), None
    if data.dataset is not None:
        rows = streamed(data.dataset, data.dataset_config, data.dataset_split, data.data_files)
        return StreamedBlocks(rows, data.text_column, tokenizer, data.sequence_length), None
    files, held_out = split_held_out(text_files(data.files, data.suffixes), data.held_out)
    blocks = Blocks((read_text(f) for f in files), tokenizer, data.sequence_length)
    training = settings.training
    CarriedOrder(len(blocks), training.batch_size, max(training.carried_steps), training.seed)  # are they enough?
    if not held_out:
        return blocks, None
    evaluation = Blocks((read_text(f) for f in held_out), tokenizer, data.sequence_length)
    evaluation.blocks = evaluation.blocks[: settings.training.eval_blocks]
    return blocks, evaluation


def _rows(settings: Settings) -> Rows | CarriedRows:
    """Of a task; with `carried_steps` its streams go on over so many batches."""
    task, training = make_task(settings.data.task), settings.training
    if max(training.carried_steps) > 1:
        assert isinstance(task, StreamTask)  # settings were checked
        return CarriedRows(task, training.carried_steps, training.batch_size, training.seed)
    return Rows(task, training.batch_size, training.seed, settings.data.shortest)


def _examples(settings: Settings) -> list[dict[str, Any]]:
    """Of a task, for the trials of a search."""
    if not settings.data.task:
        raise ValueError("a search needs a task, or files of which some are held out (data.held_out)")
    rows = Rows(make_task(settings.data.task), settings.training.batch_size, EVALUATION_SEED)
    return list(itertools.islice(rows, settings.training.eval_blocks))


# ------------------------------------------------------------------------------------------------ checkpoints


def earlier(settings: Settings) -> Path | None:
    """What an earlier run of these settings left in output_dir: output_dir itself, with its model, where it ended; else
    its last checkpoint, where it has one. Raises ValueError for what a run of others left."""
    output = Path(settings.training.output_dir)
    found = output if (output / RUN).is_file() else last_checkpoint(output)
    if found is not None:
        check_same(found, settings)
    return found


def _checkpoint(output: Path, settings: Settings) -> Path | None:
    """The last checkpoint, to go on from, checked; None to begin. A run that is there is not overwritten."""
    training, last = settings.training, last_checkpoint(output)
    check_names_free(output)
    if training.resume and last is not None:
        check_checkpoint(last)
        if step_of(last) >= training.max_steps:
            raise ValueError(f"training.max_steps={training.max_steps} are done in {output}; give more to go on")
        check_resumed(last, settings)
        return last
    if is_begun(output):  # and killed before its first checkpoint
        return None
    if training.resume:
        raise ValueError(f"training.resume: {output} has no checkpoint to go on from")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"training.output_dir={output} is not empty; give another, or --set training.resume=true to go on there"
        )
    return None


class _Interruptible:
    """Ctrl-C, SIGTERM and SIGHUP ask the trainer to save and stop after the step; a second Ctrl-C stops at once."""

    def __init__(self, trainer: Trainer):
        self.asked = 0
        trainer.add_callback(_SaveAndStop(self))

    def __enter__(self) -> "_Interruptible":
        self.signals = on_stop(self._ask)
        self.signals.__enter__()
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise Stopped(number)
        self.asked = self.asked or number

    def __exit__(self, *error: Any) -> None:
        self.signals.__exit__(*error)


class _SaveAndStop(TrainerCallback):
    def __init__(self, interruption: _Interruptible):
        self.interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the callback's form
        if self.interruption.asked:
            control.should_save = control.should_training_stop = True
