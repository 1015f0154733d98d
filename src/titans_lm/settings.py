"""What a training run is told, from a YAML file and `--set`: strict, every error with the key's full name."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from titans_lm.baselines import BASELINES, MAMBA2, NAMES, mamba2_config
from titans_lm.checkpoint import RUN
from titans_lm.config import SIZES, TitansConfig, fitted, known_keys, preset, unknown_key
from titans_lm.tasks import make_task, with_length


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
        _at_least("data.held_out", self.held_out, 0)
        _at_least("data.sequence_length", self.sequence_length, 2)

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
        for key in ("learning_rate", "max_grad_norm", "max_minutes"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"training.{key} must be above 0, got {value}")
        for key in ("final_rate", "warmup"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"training.{key} must be in [0, 1], got {getattr(self, key)}")
        _at_least("training.weight_decay", self.weight_decay, 0)
        _at_least("training.core_steps", self.core_steps, 0)
        if self.core_steps >= self.max_steps:
            raise ValueError(f"training.core_steps must be below max_steps={self.max_steps}, got {self.core_steps}")
        if not 1 <= len(self.carried_steps) <= self.batch_size:
            many = f"one number, or at most one for each of training.batch_size={self.batch_size} rows"
            raise ValueError(f"training.carried_steps must be {many}, got {self.carried_steps}")
        _at_least("training.carried_steps", min(self.carried_steps), 1)


_COUNTS = (
    "max_steps", "batch_size", "accumulation", "logging_steps", "eval_steps", "eval_blocks", "save_steps",
)  # fmt: skip


@dataclass
class Settings:
    """A whole run: `model`, `data`, `training`.

    `model` has fields of TitansConfig, and may have a `size` of the presets, a `baseline` (`baselines.NAMES`), and
    `parameters`, to which the MLP's width brings it.
    """

    model: dict[str, Any]
    data: DataSettings
    training: TrainingSettings

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises ValueError with the key's full name."""
        fields = dict(self.model)
        for key in fields:
            if key not in (*_MODEL_KEYS, *known_keys()):
                raise ValueError(unknown_key(key, [*_MODEL_KEYS, *known_keys()], "model"))
        if self.data.task:
            fields.setdefault("vocab_size", make_task(self.data.task).vocab_size)
        try:
            return _config(fields)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error


_MODEL_KEYS = ("size", "baseline", "parameters")
_WITH_CORE = ("mac", "mag", "mal")


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


def read_yaml(path: Path, example: str) -> Any:
    """What a YAML file says. Raises ValueError naming it, and an `example` where it does not exist."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file; give a YAML file such as {example}")
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


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
    (folder / RUN).write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))


def check_same(folder: Path, settings: Settings) -> None:
    """Raises ValueError where what a run left in `folder` is not of these settings, or does not say of which."""
    ours, theirs = _flat(settings), _flat(load_settings(folder / RUN, []))
    other = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if other:
        raise ValueError(f"{folder} is of a run of other settings ({', '.join(other)}); remove it, or run elsewhere")


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
    if max(training.carried_steps) > 1 and not data.files:
        raise ValueError("training.carried_steps above 1 needs data.files: other data has no such order")
    settings = Settings(tree.get("model", {}), data, training)
    size = settings.model.get("size")
    if size is not None and size not in SIZES:
        raise ValueError(f"model.size={size!r} is not one of {', '.join(SIZES)}")
    kind = getattr(settings.config(), "variant", "mamba2")
    if training.core_steps and kind not in _WITH_CORE:
        raise ValueError(f"training.core_steps is for a core beside a memory ({', '.join(_WITH_CORE)}), got {kind}")
    return settings


def change_tree(tree: dict[str, Any], change: str) -> None:
    """Set `section.key=value` in sections. Raises ValueError for what is not of that form."""
    key, equals, value = change.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ValueError(f"--set {change!r} must be section.key=value, such as training.max_steps=100")
    try:
        tree.setdefault(section, {})[name] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--set {change!r}: the value is not YAML") from None


def _build(kind: type[Any], section: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in section.items():
        if key not in hints:
            raise ValueError(unknown_key(str(key), list(hints), where))
        values[key] = _typed(value, hints[key], f"{where}.{key}")
    return kind(**values)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` if it is of the type, where a whole number or a text such as 1e-3 is a number as well."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    wanted = next(o for o in options if o is not type(None))
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a text
        except ValueError:
            pass
    elif typing.get_origin(wanted) is dict:
        if isinstance(value, dict) and all(isinstance(v, str) for v in value):
            return value
    elif typing.get_origin(wanted) is list:
        (kind,) = typing.get_args(wanted)
        values = value if isinstance(value, list) else [value]
        if all(type(v) is kind for v in values):
            return values
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_NAMES.get(wanted) or _NAMES[typing.get_origin(wanted)]}, got {value!r}")


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list[str]: "a list of texts",
    list[int]: "a whole number, or a list of them",
    dict: "keys and values, such as {name: mqar}",
}


def _at_least(name: str, value: int | float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
