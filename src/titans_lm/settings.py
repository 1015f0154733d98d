"""What a training run is told, from a YAML file and `--set`: strict, every error with the key's full name."""

import dataclasses
import logging
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from titans_lm.baselines import BASELINES, MAMBA2, NAMES, mamba2_config
from titans_lm.checkpoint import RUN
from titans_lm.config import SIZES, TitansConfig, fitted, known_keys, preset, unknown_key
from titans_lm.model_files import find
from titans_lm.tasks import StreamTask, make_task, with_length
from titans_lm.yaml_values import Dumper, parse_yaml, read_yaml, typed


@dataclass
class DataSettings:
    """Where the tokens come from: `files`, `dataset`, or a `task` that makes them."""

    files: list[str] = field(default_factory=list)
    """Text files, folders, or "python-stdlib"."""
    suffixes: list[str] = field(default_factory=lambda: [".txt"])
    """Which files of a folder."""
    held_out: int = 1
    """How many of the files, the last in order, are for evaluation only. 0: no evaluation."""
    dataset: str | None = None
    """A Hugging Face data set, streamed; "json" or "parquet" with data_files for local ones."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    data_files: list[str] | None = None
    text_column: str = "text"
    tokenizer: str = "bytes"
    """ "bytes", or any Hugging Face tokenizer."""
    sequence_length: int = 1024
    task: dict[str, Any] = field(default_factory=dict)
    """A synthetic task and its options, such as {name: mqar, pairs: 8} (`titans_lm.tasks`)."""
    shortest: int | None = None
    """With a task: each batch has a length drawn between this and the task's, evenly in its logarithm."""

    def check(self) -> None:
        if sum(map(bool, (self.files, self.dataset, self.task))) != 1:
            raise ValueError("give one of data.files, data.dataset and data.task")
        if self.task:
            self._check_task()
        elif self.shortest is not None:
            raise ValueError(f"data.shortest={self.shortest} is for data.task; other rows all have sequence_length")
        if not self.dataset:
            self._refuse_given(("dataset_config", "data_files", "text_column"), "data.dataset")
        if not self.files:
            self._refuse_given(("suffixes",), "data.files")
        _at_least("data.held_out", self.held_out, 0)
        _at_least("data.sequence_length", self.sequence_length, 2)

    def _refuse_given(self, keys: tuple[str, ...], needed: str) -> None:
        """Refuse settings that would have no effect."""
        defaults = DataSettings()
        for key in keys:
            if getattr(self, key) != getattr(defaults, key):
                raise ValueError(f"data.{key}={getattr(self, key)!r} has an effect only with {needed}")

    def _check_task(self) -> None:
        try:
            task = make_task(self.task)
        except ValueError as error:
            raise ValueError(f"data.task: {error}") from error
        if self.shortest is None:
            return
        if not 1 <= self.shortest <= task.length:
            raise ValueError(f"data.shortest must be from 1 to the task's length={task.length}, got {self.shortest}")
        try:
            with_length(task, self.shortest)
        except ValueError as error:
            raise ValueError(f"data.shortest: {error}") from error


@dataclass
class TrainingSettings:
    """How it is trained: AdamW, warm-up, cosine down to a part of the rate."""

    output_dir: str = ""
    max_steps: int = 1000
    max_minutes: float | None = None
    """Stop, with the schedule at its end, when this time is over (or max_steps are done)."""
    batch_size: int = 8
    """Sequences a device and step."""
    accumulation: int = 1
    """Steps whose gradients make one update."""
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    """The last learning rate, as a part of the first."""
    warmup: float = 0.01
    """The part of the run in which the rate rises."""
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    carried_steps: list[int] = field(default_factory=lambda: [1])
    """For so many batches the memory goes on, each the next part of its rows' texts, gradients cut between them; then
    it begins anew. 1: every batch begins anew. Of several the rows take one each, in turn: some learn to begin, others
    to have read much."""
    core_steps: int = 0
    """For so many steps attention and MLPs learn alone, the memory bypassed: it says 0, and stays as it began. Then
    all of the model learns."""
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int = 200
    eval_blocks: int = 32
    """At most so many held-out sequences an evaluation."""
    save_steps: int = 200
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""

    def check(self) -> None:
        if not self.output_dir:
            raise ValueError("training.output_dir is missing: say which folder the model goes to")
        for key in _COUNTS:
            _at_least(f"training.{key}", getattr(self, key), 1)
        self._check_rates()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed must be from 0 to 2**32 - 1, got {self.seed}")
        _at_least("training.core_steps", self.core_steps, 0)
        if self.core_steps >= self.max_steps:
            raise ValueError(f"training.core_steps must be below max_steps={self.max_steps}, got {self.core_steps}")
        if not 1 <= len(self.carried_steps) <= self.batch_size:
            many = f"one number, or at most one for each of training.batch_size={self.batch_size} rows"
            raise ValueError(f"training.carried_steps must be {many}, got {self.carried_steps}")
        _at_least("training.carried_steps", min(self.carried_steps), 1)

    def _check_rates(self) -> None:
        for key in ("learning_rate", "max_grad_norm", "max_minutes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"training.{key} must be above 0, got {value}")
        for key in ("learning_rate", "weight_decay", "max_minutes"):
            if math.isinf(getattr(self, key) or 0):
                raise ValueError(f"training.{key} must be a finite number, got {getattr(self, key)}")
        for key in ("final_rate", "warmup"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"training.{key} must be in [0, 1], got {getattr(self, key)}")
        _at_least("training.weight_decay", self.weight_decay, 0)


_COUNTS = (
    "max_steps", "batch_size", "accumulation", "logging_steps", "eval_steps", "eval_blocks", "save_steps",
)  # fmt: skip


@dataclass
class Settings:
    """A whole run: `model`, `data`, `training`.

    `model` has fields of TitansConfig, and may have a `size` of the presets, a `baseline` (`baselines.NAMES`), and
    `parameters`, to which the MLP's width brings it. Or it has `pretrained` alone: the folder, or the name, of the
    model whose weights training begins with.
    """

    model: dict[str, Any]
    data: DataSettings
    training: TrainingSettings

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises ValueError with the key's full name."""
        fields = dict(self.model)
        if self.pretrained is not None:
            return _pretrained_config(self.pretrained, sorted(fields.keys() - {"pretrained"}))
        for key in fields:
            if key not in (*_MODEL_KEYS, *known_keys()):
                raise ValueError(unknown_key(key, [*_MODEL_KEYS, *known_keys()], "model"))
        fields = {key: _typed_field(key, value) for key, value in fields.items()}
        if self.data.task:
            fields.setdefault("vocab_size", make_task(self.data.task).vocab_size)
        try:
            return _config(fields)
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"model: {error.__cause__ or error}") from error


    @property
    def pretrained(self) -> str | None:
        """The model whose weights training begins with, if one is given."""
        return self.model.get("pretrained")


_MODEL_KEYS = ("size", "baseline", "parameters", "pretrained")
_WITH_CORE = ("mac", "mag", "mal")


def _typed_field(key: str, value: Any) -> Any:
    """The value of a number of the model's section. Raises ValueError for what is none; other types are checked by
    TitansConfig."""
    hint: Any = float | None if key == "parameters" else _FIELDS.get(TitansConfig.attribute_map.get(str(key), str(key)))
    options = set(typing.get_args(hint) or [hint]) - {type(None)}
    if options not in ({int}, {float}):
        return value
    number = typed(value, hint, f"model.{key}")
    if number is not None and (math.isinf(number) or (key == "parameters" and number < 1)):
        least = " of at least 1" if key == "parameters" else ""
        raise ValueError(f"model.{key} must be a finite number{least}, got {value}")
    return number


_FIELDS = {f.name: f.type for f in dataclasses.fields(TitansConfig)}


def _config(fields: dict[str, Any]) -> PreTrainedConfig:
    baseline = fields.pop("baseline", None)
    if baseline == MAMBA2:
        return mamba2_config(fields)
    if baseline is not None:
        if baseline not in NAMES:
            raise ValueError(f"baseline {baseline!r} is not one of: {', '.join(NAMES)}")
        fields = {**fields, **BASELINES[baseline]}  # what makes it what it is, no other key changes
    size, parameters = fields.pop("size", None), fields.pop("parameters", None)
    if parameters is not None:
        fields = fields if size is None else {**SIZES[size], **fields}
        return fitted(parameters, **fields)
    return TitansConfig(**fields) if size is None else preset(size, **fields)


def _pretrained_config(model: Any, others: list[str]) -> PreTrainedConfig:
    """The configuration that weights were saved with; no key changes it, because the weights would not fit."""
    if not isinstance(model, str) or not model:
        raise ValueError(f"model.pretrained must be a folder or a shipped model's name, got {model!r}")
    if others:
        raise ValueError(f"model.{others[0]} has no effect beside model.pretrained={model}; leave it out")
    try:
        config: PreTrainedConfig = TitansConfig.from_pretrained(find(model), local_files_only=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"model.pretrained: {error}") from error
    return config


def load_settings(path: Path, changes: list[str]) -> Settings:
    """A YAML file, with `section.key=value` changes on top. Raises ValueError naming the file and the key."""
    tree = read_yaml(path, "configs/titans.yaml")
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must have the sections model, data and training")
    for change in changes:
        change_tree(tree, change)
    try:
        return parse_settings(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_settings(settings: Settings, folder: Path) -> None:
    """As `run.yaml`, which `load_settings` reads."""
    (folder / RUN).write_text(yaml.dump(dataclasses.asdict(settings), Dumper=Dumper, sort_keys=False))


def check_same(folder: Path, settings: Settings) -> None:
    """Raises ValueError where what a run left in `folder` is not of these settings, or does not say of which."""
    ours, theirs = _flat(settings), _flat(load_settings(folder / RUN, []))
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        raise ValueError(f"{folder} is of a run of other settings ({', '.join(other)}); remove it, or run elsewhere")


MAY_CHANGE = (
    "max_steps", "max_minutes", "learning_rate", "final_rate", "warmup", "weight_decay", "max_grad_norm", "bf16",
    "activation_checkpointing", "logging_steps", "eval_steps", "eval_blocks", "save_steps",
)  # fmt: skip
"""Of `training`: what a run that goes on may have other than the run before. It takes effect from there on."""


def check_resumed(checkpoint: Path, settings: Settings) -> None:
    """Raises ValueError where a run of these settings cannot go on from `checkpoint`: another model or other data, or
    another order of it, would be two runs in one."""
    if not (checkpoint / RUN).is_file():  # of an early version
        logging.getLogger(__name__).warning("%s does not say with which settings it was made", checkpoint)
        return
    before = load_settings(checkpoint / RUN, [])
    ours, theirs = _flat(settings), _flat(before)
    other = {key: theirs.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    if settings.config().to_dict() == before.config().to_dict():  # the same model, in other words
        other = {key: value for key, value in other.items() if not key.startswith("model.")}
    fixed = {key: value for key, value in other.items() if key not in {f"training.{name}" for name in MAY_CHANGE}}
    if fixed:
        words = ", ".join(f"{key}={ours.get(key)!r} (was {value!r})" for key, value in fixed.items())
        raise ValueError(f"{words} cannot change on resume; keep it, or train in another training.output_dir")


def _flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value; but where the run is and whether it goes on."""
    sections = dataclasses.asdict(settings)
    del sections["training"]["output_dir"], sections["training"]["resume"]
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def parse_settings(tree: dict[str, Any]) -> Settings:
    """Sections to `Settings`, everything checked."""
    sections = [f.name for f in dataclasses.fields(Settings)]
    for name, section in tree.items():
        if name not in sections:
            raise ValueError(unknown_key(str(name), sections, "the run"))
        if not isinstance(section, dict):
            raise ValueError(f"{name} must be a section of keys and values, got {section!r}")
    data = _build(DataSettings, tree.get("data", {}), "data")
    training = _build(TrainingSettings, tree.get("training", {}), "training")
    data.check()
    training.check()
    if max(training.carried_steps) > 1:
        _check_carried(data, tree.get("model", {}))
    settings = Settings(tree.get("model", {}), data, training)
    size = settings.model.get("size")
    if size is not None and size not in list(SIZES):  # a list: a size that a user typed may not be hashable
        raise ValueError(f"model.size={size!r} is not one of {', '.join(SIZES)}")
    kind = getattr(settings.config(), "variant", "mamba2")
    if training.core_steps and kind not in _WITH_CORE:
        raise ValueError(f"training.core_steps is for a core beside a memory ({', '.join(_WITH_CORE)}), got {kind}")
    return settings


def _check_carried(data: DataSettings, model: dict[str, Any]) -> None:
    if model.get("baseline") == MAMBA2:
        raise ValueError(
            f"training.carried_steps must be 1 with model.baseline={MAMBA2}: transformers' class takes one token a call "
            "after its first"
        )
    goes_on = data.task and isinstance(make_task(data.task), StreamTask)
    if not data.files and not goes_on:
        raise ValueError(
            "training.carried_steps above 1 needs data.files, or a data.task whose rows go on ({name: streams}): "
            "other data has no such order"
        )
    if goes_on and data.shortest is not None:
        raise ValueError("training.carried_steps above 1 does not go with data.shortest: streams go on by whole rows")


def change_tree(tree: dict[str, Any], change: str) -> None:
    """Set `section.key=value` in sections. Raises ValueError for what is not of that form."""
    key, equals, value = change.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ValueError(f"--set {change!r} must be section.key=value, such as training.max_steps=100")
    keys = tree.setdefault(section, {})
    if not isinstance(keys, dict):
        raise ValueError(f"{section} must be a section of keys and values, got {keys!r}")
    try:
        keys[name] = parse_yaml(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {change!r}: the value is not YAML") from None


def _build(kind: type[Any], section: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in section.items():
        if key not in hints:
            raise ValueError(unknown_key(str(key), list(hints), where))
        values[key] = typed(value, hints[key], f"{where}.{key}")
    return kind(**values)


def _at_least(name: str, value: int | float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
