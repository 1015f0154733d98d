"""`titans train`: a language model from a YAML file, on transformers' `Trainer`."""

import argparse
import math
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from rich.progress import Progress, TextColumn
from safetensors import SafetensorError
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback

from titans_lm.baselines import build
from titans_lm.data import (
    Blocks,
    CarriedOrder,
    StreamedBlocks,
    is_bytes,
    load_tokenizer,
    read_text,
    split_held_out,
    streamed,
    text_files,
)
from titans_lm.settings import Settings, TrainingSettings, load_settings
from titans_lm.state import TitansState
from titans_lm.tasks import Rows, make_task

CARRIED = "memory.safetensors"
"""In a checkpoint: the memory that goes on, with `carried_steps`."""


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
    config, tokenizer = settings.config(), _tokenizer(settings)
    _check_vocabulary(config, settings, tokenizer)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, None if tokenizer is None else getattr(tokenizer, key))
    training_set, evaluation_set = _data(settings, tokenizer)
    transformers.set_seed(settings.training.seed)
    model = build(config)
    trainer = TitansTrainer(model, settings, training_set, evaluation_set, tokenizer)
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
    return model


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase | None:
    """What makes the tokens of texts; None for a task whose tokens are numbers."""
    name: str | None = settings.data.tokenizer
    if settings.data.task:
        name = getattr(make_task(settings.data.task), "tokenizer", None)
    return None if name is None else load_tokenizer(name)


def _check_vocabulary(config: PreTrainedConfig, settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> None:
    least = make_task(settings.data.task).vocab_size if settings.data.task else len(tokenizer or ())
    if least > config.vocab_size:
        what = "task's" if settings.data.task else "tokenizer's"
        raise ValueError(f"model.vocab_size={config.vocab_size} is below the {what} {least}")


def _save(trainer: "TitansTrainer", settings: Settings, output: Path) -> None:
    trainer.save_model()
    trainer.save_state()
    sections = {"model": settings.model, "data": asdict(settings.data), "training": asdict(settings.training)}
    (output / "run.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))


# ------------------------------------------------------------------------------------------------ data


def _data(settings: Settings, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Any, Blocks | None]:
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


# ------------------------------------------------------------------------------------------------ checkpoints


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _checkpoint(output: Path, training: TrainingSettings) -> Path | None:
    """The last whole checkpoint, to go on from; None to begin. A run that is there is not overwritten."""
    whole = [p for p in output.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    if training.resume:
        if not whole:
            raise ValueError(f"training.resume: {output} has no checkpoint to go on from")
        last = max(whole, key=_step_of)
        if _step_of(last) >= training.max_steps:
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


class _Clock(TrainerCallback):
    """Stops when the time is over; says, and where there is a time limit shows, how much of the run is done."""

    def __init__(self, max_steps: int, max_minutes: float | None):
        self.max_steps, self.limit, self.begun = max_steps, (max_minutes or math.inf) * 60, time.monotonic()
        self.bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[found]}"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.begun = time.monotonic()
        if self.limit < math.inf:
            self.bar.start()
            self.bar.add_task("training", total=self.limit, found="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        elapsed = time.monotonic() - self.begun
        if elapsed > self.limit:
            control.should_training_stop = True
        for task in self.bar.task_ids:
            self.bar.update(task, completed=min(elapsed, self.limit))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            words = f"step {state.global_step}, loss {logs['loss']:.3f}, {logs['tokens_per_second']:,} tokens/s"
            for task in self.bar.task_ids:
                self.bar.update(task, found=words)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.bar.stop()

    def progress(self, step: int) -> float:
        return min(1.0, max(step / self.max_steps, (time.monotonic() - self.begun) / self.limit))


# ------------------------------------------------------------------------------------------------ the trainer


class NotFinite(ValueError):
    """The loss is not a number."""

    def __init__(self, step: int):
        super().__init__(
            f"the loss is not a number at step {step}: lower training.learning_rate, or model.memory_lr, or keep "
            "model.memory_clip and the residual form"
        )


class TitansTrainer(Trainer):
    """`Trainer` with our schedule, our weight decay, memory carried across pieces, and rates in the log."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        training_set: Any,
        evaluation_set: Blocks | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.settings = settings.training
        self.clock = _Clock(self.settings.max_steps, self.settings.max_minutes)
        self.bytes = tokenizer is not None and is_bytes(tokenizer) and not settings.data.task
        self.tokens = 0  # read in training
        self.logged = (0, time.monotonic())
        self.batches = 0  # read so far
        self.carried: TitansState | None = None  # the memory after the last of them
        super().__init__(
            model,
            _arguments(settings, evaluation_set is not None),
            train_dataset=training_set,
            eval_dataset=evaluation_set,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[self.clock],
        )
        self.remove_callback(PrinterCallback)  # where the clock shows the progress

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """Linear warm-up, then a cosine, over the steps or the minutes, whichever end first."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: self._rate(step),  # a plain function is not put into checkpoints
            )
        return self.lr_scheduler

    def _rate(self, step: int) -> float:
        s, done = self.settings, self.clock.progress(step)
        rise = min(1.0, max(done, (step + 1) / s.max_steps) / s.warmup) if s.warmup else 1.0
        return rise * (s.final_rate + (1 - s.final_rate) * (1 + math.cos(math.pi * done)) / 2)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The weights of linear maps; not norms, biases, embeddings, convolutions, persistent tokens, nor M_0."""
        tied = model.get_input_embeddings().weight  # type: ignore[operator]
        return [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight is not tied
        ]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002 - as Trainer calls it
        if not isinstance(self.train_dataset, Blocks):
            return None
        s = self.settings
        return CarriedOrder(len(self.train_dataset), s.batch_size, s.carried_steps, s.seed)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; with `carried_steps` the memory goes on from the batch before, without its gradients."""
        if model.training:
            self.tokens += inputs["input_ids"].numel()
        if self.settings.carried_steps == 1 or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.batches % self.settings.carried_steps == 0:
            self.carried = None
        self.batches += 1
        kwargs["return_outputs"] = True
        loss, out = super().compute_loss(
            model, {**inputs, "past_key_values": self.carried, "use_cache": True}, *args, **kwargs
        )
        self.carried = out.past_key_values.detach()
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.carried is not None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.carried.save(folder / CARRIED)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.settings.carried_steps > 1:
            self.batches = _step_of(Path(checkpoint)) * self.settings.accumulation
            self.carried = TitansState.load(Path(checkpoint) / CARRIED, self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second, and bits per byte where tokens are bytes."""
        for name in ("loss", "eval_loss"):
            if self.bytes and name in logs:
                logs[name.replace("loss", "bits_per_byte")] = round(logs[name] / math.log(2), 4)
        if "loss" in logs:
            (tokens, then), now = self.logged, time.monotonic()
            logs["tokens_per_second"] = round((self.tokens - tokens) / (now - then))
            self.logged = (self.tokens, now)
            if not math.isfinite(logs["loss"]):
                raise NotFinite(self.state.global_step)
        super().log(logs, start_time)


def _arguments(settings: Settings, evaluate: bool) -> TrainingArguments:
    s = settings.training
    return TrainingArguments(
        output_dir=s.output_dir,
        max_steps=s.max_steps,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=s.max_grad_norm,
        bf16=s.bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=s.activation_checkpointing,
        logging_steps=s.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # what is not a number is to be seen
        eval_strategy="steps" if evaluate else "no",
        eval_steps=s.eval_steps,
        save_steps=s.save_steps,
        save_total_limit=2,
        seed=s.seed,
        disable_tqdm=s.max_minutes is not None,
        report_to="tensorboard",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
