"""`titans train`: a language model from a YAML file, on transformers' `Trainer`."""

import argparse
import itertools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from titans_lm.baselines import build
from titans_lm.checkpoint import RUN
from titans_lm.data import Blocks, StreamedBlocks, load_tokenizer, read_text, split_held_out, streamed, text_files
from titans_lm.settings import Settings, TrainingSettings, check_same, load_settings, save_settings
from titans_lm.tasks import Rows, make_task
from titans_lm.trainer import TitansTrainer, step_of

EVALUATION_SEED = 2_000_003
"""Where a search compares trials on examples of a task, they are made from this seed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/titans.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="change one value, such as training.max_steps=100; may be repeated")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.config, arguments.changes)
    model = train(settings)
    size = sum(p.numel() for p in model.parameters())
    print(f"{settings.training.output_dir}: a model of {size:,} parameters; titans infer --model reads with it")


def train(settings: Settings) -> PreTrainedModel:
    """Train what `settings` say, and save model, tokenizer and run.yaml in output_dir.

    Raises ValueError for settings or texts that do not work, NotFinite where the loss stops being a number, OSError
    where a file cannot be written, KeyboardInterrupt after Ctrl-C, when a checkpoint has been saved. Nothing is written
    before everything was checked.
    """
    output = Path(settings.training.output_dir)
    checkpoint = _checkpoint(output, settings.training)
    trainer = trainer_for(settings)
    with _Interruptible(trainer) as interruption:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if not interruption.asked:
                _save(trainer, settings, output)
        except (SafetensorError, RuntimeError, OSError) as error:
            _remove_partial(output)
            raise _as_disk_error(error, output) from error
    if interruption.asked:
        raise KeyboardInterrupt(f"saved in {output}; go on with --set training.resume=true")
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
        setattr(config, key, None if tokenizer is None else getattr(tokenizer, key))
    transformers.set_seed(settings.training.seed)
    return build(config)


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase | None:
    """What makes the tokens of texts; None for a task whose tokens are numbers."""
    name: str | None = settings.data.tokenizer
    if settings.data.task:
        name = getattr(make_task(settings.data.task), "tokenizer", None)
    return None if name is None else load_tokenizer(name)


def _save(trainer: TitansTrainer, settings: Settings, output: Path) -> None:
    trainer.save_model()
    trainer.save_state()
    save_settings(settings, output)


# ------------------------------------------------------------------------------------------------ data


def _data(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, Any]:
    data = settings.data
    if data.task or tokenizer is None:
        training = settings.training
        return Rows(make_task(data.task), training.batch_size, training.seed, data.shortest), None
    if data.dataset is not None:
        rows = streamed(data.dataset, data.dataset_config, data.dataset_split, data.data_files)
        return StreamedBlocks(rows, data.text_column, tokenizer, data.sequence_length), None
    files, held_out = split_held_out(text_files(data.files, data.suffixes), data.held_out)
    blocks = Blocks((read_text(f) for f in files), tokenizer, data.sequence_length)
    if not held_out:
        return blocks, None
    evaluation = Blocks((read_text(f) for f in held_out), tokenizer, data.sequence_length)
    evaluation.blocks = evaluation.blocks[: settings.training.eval_blocks]
    return blocks, evaluation


def _examples(settings: Settings) -> list[dict[str, Any]]:
    """Of a task, for the trials of a search."""
    if not settings.data.task:
        raise ValueError("a search needs a task, or files of which some are held out (data.held_out)")
    rows = Rows(make_task(settings.data.task), settings.training.batch_size, EVALUATION_SEED)
    return list(itertools.islice(rows, settings.training.eval_blocks))


# ------------------------------------------------------------------------------------------------ checkpoints


def last_checkpoint(output: Path) -> Path | None:
    """The last whole one, where there is one."""
    whole = [p for p in output.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(whole, key=step_of, default=None)


def earlier(settings: Settings) -> Path | None:
    """What an earlier run of these settings left in output_dir: output_dir itself, with its model, where it ended; else
    its last checkpoint, where it has one. Raises ValueError for what a run of others left."""
    output = Path(settings.training.output_dir)
    found = output if (output / RUN).is_file() else last_checkpoint(output)
    if found is not None:
        check_same(found, settings)
    return found


def _checkpoint(output: Path, training: TrainingSettings) -> Path | None:
    """The last whole checkpoint, to go on from; None to begin. A run that is there is not overwritten."""
    if training.resume:
        last = last_checkpoint(output)
        if last is None:
            raise ValueError(f"training.resume: {output} has no checkpoint to go on from")
        if step_of(last) >= training.max_steps:
            raise ValueError(f"training.max_steps={training.max_steps} are done in {output}; give more to go on")
        return last
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"training.output_dir={output} is not empty; give another, or --set training.resume=true to go on there"
        )
    return None


def _remove_partial(output: Path) -> None:
    """A checkpoint whose last file was not written is no checkpoint."""
    for folder in output.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _as_disk_error(error: Exception, output: Path) -> Exception:
    """torch and safetensors say in their own words that a disk is full; other errors stay what they are."""
    words = (
        "PytorchStreamWriter",
        "inline_container",
        "No space left",
        "File too large",
        "I/O error",
        "os error",
        "Disk quota",
    )
    if isinstance(error, OSError) or any(word in str(error) for word in words):
        return OSError(f"cannot write to {output}: {error}; the last whole checkpoint there is untouched")
    return error


class _Interruptible:
    """Ctrl-C asks the trainer to save and stop after the step; a second one stops at once."""

    def __init__(self, trainer: Trainer):
        self.asked = False
        trainer.add_callback(_SaveAndStop(self))

    def __enter__(self) -> "_Interruptible":
        self.before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)


class _SaveAndStop(TrainerCallback):
    def __init__(self, interruption: _Interruptible):
        self.interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 - the callback's form
        if self.interruption.asked:
            control.should_save = control.should_training_stop = True
