"""`TitansTrainer`: transformers' `Trainer` with truncated BPTT for the memory and a time limit."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback

from titans_lm.models.cache import TitansState
from titans_lm.models.configuration import unknown_key
from titans_lm.models.model_files import DIGESTS, add_digests
from titans_lm.models.tokenizer import is_bytes
from titans_lm.tasks import StreamTask, make_task
from titans_lm.training import sharded_checkpoint
from titans_lm.training.arguments import trainer_arguments
from titans_lm.training.carried_memory import CarriedMemory
from titans_lm.training.clock import Clock
from titans_lm.training.config import Settings, save_settings
from titans_lm.training.data import Blocks, TBPTTSampler
from titans_lm.training.data.continued import continue_documents
from titans_lm.training.data.loader import Loader, Stream
from titans_lm.training.data_settings import RESET
from titans_lm.training.fsdp import prepare_fsdp, reshard
from titans_lm.training.muon import muon
from titans_lm.training.needed_logits import only_needed_logits
from titans_lm.training.not_finite import NotFinite
from titans_lm.training.processes import OwnOrder, Processes
from titans_lm.training.progress import Progress
from titans_lm.training.run_folder import step_of, unfinished, write_rows
from titans_lm.training.stages import Stages
from titans_lm.training.trackers import Trackers
from titans_lm.training.watch import Watch


class Resume(TrainerCallback):
    """Completes what `Trainer` loads from a checkpoint, after the optimizer and the scheduler."""

    def __init__(self, trainer: "TitansTrainer", checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.trainer.resume(self.checkpoint)


class TitansTrainer(Trainer):
    """`Trainer` with a schedule that may end by time, weight decay for linear maps only, the memory carried across
    batches (truncated BPTT), and tokens per second in the log.

    `model` may be a function that returns one for a trial (`Trainer.hyperparameter_search`).
    """

    def __init__(
        self,
        model: PreTrainedModel | Callable[[Any], PreTrainedModel],
        settings: Settings,
        training_set: Any,
        evaluation_set: Any,
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        self.run, self.settings = settings, settings.training
        self.processes = Processes()
        self.rows = self.settings.batch_size * self.processes.count  # of the batch of all processes
        if len(self.settings.tbptt_steps) > self.rows:
            many = f"one number, or at most one for each of the {self.rows} rows of a batch (training.batch_size)"
            raise ValueError(f"training.tbptt_steps must be {many}, got {self.settings.tbptt_steps}")
        known = torch.compiler.list_backends(()) if self.settings.compile else []
        if self.settings.compile and self.settings.compile_backend not in known:
            raise ValueError(unknown_key(self.settings.compile_backend, known, "training.compile_backend"))
        self.clock = Clock(self.settings.max_steps, self.settings.max_minutes, self.processes)
        self.bytes = tokenizer is not None and is_bytes(tokenizer) and not _labels_some_tokens(settings)
        self.tokens = 0  # read in training
        self.logged = (0, time.monotonic())
        self.writing: Path | None = None  # where the checkpoint is that is being written
        self._reset_run_state()
        whole = isinstance(model, nn.Module)
        super().__init__(
            model if whole else None,
            trainer_arguments(settings, evaluation_set is not None),
            train_dataset=training_set,
            eval_dataset=evaluation_set,
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[
                self.clock,
                Progress(Path(self.settings.output_dir), self.clock, self.settings.progress_seconds),
                Watch(self, Trackers(self)),
            ],
            model_init=None if whole else model,
        )
        if self.is_fsdp_enabled and settings.data.documents == RESET:
            raise ValueError(f"FSDP gathers weights as often in each process: data.documents={RESET} needs DDP")
        self.args.ignore_data_skip = isinstance(training_set, Stream)  # it goes to its place by itself
        if self.settings.compile:
            for block in self.model.base_model.layers:
                block.compile(backend=self.settings.compile_backend)  # in place: its name in checkpoints stays
        self.remove_callback(PrinterCallback)  # `Clock` and `Progress` show how far the run is

    optimizer: Any

    def _reset_run_state(self) -> None:
        s = self.settings
        self.clock.now = 0.0  # the first learning rate is computed before the clock starts
        self.carried = CarriedMemory(s.tbptt_steps, s.batch_size, self.processes)
        self.last_batch: Any = None  # on the model's device
        self.last_state: TitansState | None = None  # the memory before it
        self.loss_sum = torch.zeros(())  # of all batches; it stays NaN or infinite once a loss was

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s. Each trial of a search starts anew."""
        self._reset_run_state()
        return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer of `training.optimizer`."""
        if self.settings.optimizer == "adamw":
            return super().create_optimizer(model)
        if self.optimizer is None:
            model, s = self.model if model is None else model, self.args
            decayed = set(self.get_decay_parameter_names(model))
            self.optimizer = muon(model, decayed, s.learning_rate, s.weight_decay, (s.adam_beta1, s.adam_beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002
        """Linear warm-up, then cosine decay, over the steps or the minutes, whichever ends first."""
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: self._lr_factor(step),  # a plain function is not saved in checkpoints
            )
        return self.lr_scheduler

    def _lr_factor(self, step: int) -> float:
        s, done = self.settings, self.clock.progress(step)
        rise = min(1.0, max(done, (step + 1) / s.max_steps) / s.warmup) if s.warmup else 1.0
        return rise * (s.final_rate + (1 - s.final_rate) * (1 + math.cos(math.pi * done)) / 2)

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`'s. With FSDP, weights are gathered in float32 and half precision is autocast's, as without it:
        the memory's state, its first memory M_0 and its gates stay float32."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = prepare_fsdp(self.accelerator, self.args.fsdp_plugin_args)

    def compute_loss_context_manager(self) -> Any:
        """As `Trainer`'s, with autocast where FSDP is on: accelerate then leaves it out."""
        context = super().compute_loss_context_manager()
        if self.is_fsdp_enabled:
            context.enter_context(self.accelerator.autocast())  # no-op without training.bf16
        return context

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The weights of linear maps: no norms, biases, embeddings, convolutions, persistent tokens, nor M_0."""
        tied = model.get_input_embeddings().weight  # type: ignore[operator]
        return [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight is not tied
        ]

    def get_train_dataloader(self) -> DataLoader[Any] | Loader:
        """This process's rows of the batches of all: of blocks in the order of `TBPTTSampler`, or as a stream makes
        them."""
        if isinstance(self.train_dataset, Stream):
            return self.train_dataset.begin(self.processes.index, self.processes.count)
        sampler, rows = self._sampler(), self.settings.batch_size
        if sampler is None:
            return super().get_train_dataloader()
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_size=rows,
            sampler=OwnOrder(sampler, rows, self.processes),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )  # as if this process were the only one: accelerate would give each every second batch of all rows
        return prepare_data_loader(loader, self.args.device, 1, 0, put_on_device=True, dispatch_batches=False)

    def _sampler(self) -> TBPTTSampler | None:
        """The order of the blocks; None for a task or a streamed data set, which have an order of their own."""
        if not isinstance(self.train_dataset, Blocks):
            return None
        s = self.settings
        return TBPTTSampler(len(self.train_dataset), self.rows, max(s.tbptt_steps), s.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._bypass_in_core_steps():
            loss: Tensor = super().training_step(*args, **kwargs)
        self._stages.drop_gradients(self.model, self.state.global_step)
        self.loss_sum = self.loss_sum + loss
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._bypass_in_core_steps():
            return super().prediction_step(*args, **kwargs)

    def _bypass_in_core_steps(self) -> AbstractContextManager[None]:
        """Bypasses the memory in the first `core_steps` steps."""
        return self._stages.forward(self.model, self.state.global_step)

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """The context of a forward pass beside training: the stage's memory, the run's precision."""
        with self._bypass_in_core_steps(), self.compute_loss_context_manager():
            yield

    @property
    def _stages(self) -> Stages:
        return Stages(self.settings.core_steps, self.settings.memory_steps)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch. With `tbptt_steps` above 1 it begins with the previous batch's memory, detached."""
        if model.training:
            self.tokens += inputs["input_ids"].numel()
            self.last_batch, self.last_state = inputs, None
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.carried.is_on:
            return super().compute_loss(model, only_needed_logits(self.model, inputs), *args, **kwargs)
        before = self.carried.next()
        self.last_batch = inputs = continue_documents(inputs, before)
        self.last_state = None if before is None else before.shallow_copy()
        # a state of its own, because transformers leaves out `use_cache` with activation checkpointing
        state = self.model.initial_state(len(inputs["input_ids"])) if before is None else before
        loss: Tensor = super().compute_loss(model, {**inputs, "past_key_values": state}, *args, **kwargs)
        self.carried.keep(state)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s, with digests of the tokenizer's files too."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        with self.processes.together():
            named = self.processes.is_first and self.processing_class is not None
            if named and (folder / DIGESTS).is_file():  # models of transformers have none
                add_digests(folder, self.processing_class.save_pretrained(folder))

    # Trainer has no public hook around the writing of a checkpoint (`on_save` comes after it). These two methods write
    # it to a folder of its own, which is moved into place when it is whole.

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return folder if self.writing is None else str(self.writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_finite()
        reshard(self.model)
        output, keep = Path(self._get_output_dir(trial)), self.settings.keep
        with unfinished(output, self.state.global_step, keep, self.processes) as folder:
            self.writing = folder.parent
            with self.processes.together():
                if self.processes.is_first:
                    save_settings(self.run, folder)
                    write_rows(folder, self.rows, self.processes)
                self.carried.save(folder)
                if isinstance(self.train_dataset, Stream) and self.train_dataset.loader is not None:
                    self.train_dataset.loader.save(folder)
            super()._save_checkpoint(model, trial)
        self.writing = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:  # gathered from shards, where tied weights are no longer one tensor
            twice = sharded_checkpoint.tied(self.model)
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        with self.processes.together():  # a full disk ends all
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        with self.processes.together():
            super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            with self.processes.together():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded_checkpoint.save(Path(output_dir), self.model, self.optimizer.optimizer)
        with self.processes.together():
            if self.processes.is_first:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # else they are loaded with the optimizer's state
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: bfloat16 has no scaler, so a file of that name is not a run's."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = Path(checkpoint or "")
        if checkpoint is None or not (self.is_fsdp_enabled or (folder / sharded_checkpoint.SHARDS).is_dir()):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded_checkpoint.load(folder, self.model, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        for group, rate, base in zip(
            self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), self.lr_scheduler.base_lrs, strict=True
        ):
            group["lr"], group["initial_lr"] = rate, base

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raises NotFinite where a weight or a loss is not finite, also the loss of the last batch with the weights as
        they are now, which no step has computed yet. So what is saved is good."""
        weights = (t for t in self.model.state_dict().values() if t.is_floating_point())
        own = all(bool(sharded_checkpoint.local(t).isfinite().all()) for t in weights)
        finite = all(self.processes.gather(own))
        if finite and self.last_batch is not None:
            self.model.eval()
            with self._bypass_in_core_steps(), self.compute_loss_context_manager():
                loss = self.model(**self.last_batch).loss
            finite = all(self.processes.gather(bool((loss + self.loss_sum).isfinite())))
        if not finite:
            raise NotFinite(self.state.global_step)

    def resume(self, checkpoint: Path) -> None:
        """Take the carried memory of `checkpoint`, and this run's learning rate and weight decay, not those of the run
        that wrote it. `Trainer` has loaded its optimizer and scheduler."""
        self._apply_settings()
        if isinstance(self.train_dataset, Stream) and self.train_dataset.loader is not None:
            self.train_dataset.loader.load(checkpoint, self._batches_of(step_of(checkpoint)))
        if self.carried.is_on:
            self.carried.load(checkpoint, self.model, self._batches_of(step_of(checkpoint)))

    def _apply_settings(self) -> None:
        s = self.settings
        groups = self.optimizer.param_groups
        for group in groups:
            decay = 0.0 if group is groups[-1] else s.weight_decay
            if s.max_minutes is None:
                scale = self._lr_factor(self.lr_scheduler.last_epoch)
            else:  # the rate depends on the time, of which the scheduler knows nothing yet
                scale = group["lr"] / group["initial_lr"]
            group["lr"], group["initial_lr"], group["weight_decay"] = s.learning_rate * scale, s.learning_rate, decay
        self.lr_scheduler.base_lrs = [s.learning_rate] * len(groups)
        self.lr_scheduler._last_lr = [group["lr"] for group in groups]  # the log shows it; torch has no setter

    def _batches_of(self, steps: int) -> int:
        """Batches of the first `steps` updates: the last of an epoch has those that are left. A task has no epochs."""
        accumulation, sampler = self.settings.accumulation, self._sampler()
        if sampler is None:
            return steps * accumulation
        epoch = len(sampler) // self.rows
        epochs, rest = divmod(steps, math.ceil(epoch / accumulation))
        return epochs * epoch + rest * accumulation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens per second, and bits per byte where tokens are bytes."""
        for name in ("loss", "eval_loss"):
            if self.bytes and name in logs:
                logs[name.replace("loss", "bits_per_byte")] = round(logs[name] / math.log(2), 4)
        if "loss" in logs:
            (tokens, then), now = self.logged, time.monotonic()
            read = sum(self.processes.gather(self.tokens - tokens))
            logs["tokens_per_second"] = round(read / (now - then))
            self.logged = (self.tokens, now)
            if skipped := getattr(self.train_dataset, "skipped", 0):
                logs["rows_without_text"] = skipped
        if not all(math.isfinite(logs[name]) for name in ("loss", "eval_loss") if name in logs):
            raise NotFinite(self.state.global_step)
        super().log(logs, start_time)


def _labels_some_tokens(settings: Settings) -> bool:
    """Whether only some tokens have labels, as in most tasks."""
    return bool(settings.data.task) and not isinstance(make_task(settings.data.task), StreamTask)
