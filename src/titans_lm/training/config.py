"""The settings of a training run, from a YAML file and `--set`. Every key is checked; an error gives its full name.

jsonargparse and tyro would replace `change_tree`, `_build` and `utils.yaml_values.typed` (about 70 lines). They are not
used: their errors are usages of many lines rather than one with the key's name, and the checks, the model's section and
the comparison on resume, which are the rest of this file, would stay.
"""

import dataclasses
import math
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from titans_lm.models.baselines import BASELINES, MAMBA2, NAMES, mamba2_config
from titans_lm.models.configuration import TitansConfig, known_keys, unknown_key
from titans_lm.models.graft_config import GraftConfig, graft_config, saved_config
from titans_lm.models.growth import GROWTH, grown_config
from titans_lm.models.hub import RUN
from titans_lm.models.model_files import find
from titans_lm.models.presets import SIZES, fitted, preset
from titans_lm.tasks import make_task
from titans_lm.training.combinations import check_data, check_distillation, check_length, check_model, check_model_keys
from titans_lm.training.data_settings import RESET, DataSettings
from titans_lm.training.trackers import check_names
from titans_lm.utils.yaml_values import Dumper, at_least, parse_yaml, read_yaml, typed

OPTIMIZERS = ("adamw", "muon")
RENAMED = {"training": {"carried_steps": "tbptt_steps"}}
"""Section -> old key -> its name now. Old keys are still read."""


@dataclass
class TrainingSettings:
    """The optimization: linear warm-up, cosine decay to `final_rate`."""

    output_dir: str = ""
    max_steps: int = 1000
    max_minutes: float | None = None
    """Time limit. The schedule ends with it, or at max_steps if that comes first."""
    batch_size: int = 8
    """Sequences per device and forward pass."""
    accumulation: int = 1
    """Gradient accumulation: batches per update."""
    optimizer: str = "adamw"
    """muon: Muon for the matrices of the blocks and AdamW for all other weights, at one learning rate."""
    learning_rate: float = 1e-3
    final_rate: float = 0.1
    """The last learning rate as a fraction of the peak."""
    warmup: float = 0.01
    """Fraction of the run in which the learning rate rises."""
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bf16: bool = False
    activation_checkpointing: bool = False
    fsdp: bool = False
    """Shard weights, gradients and optimizer state over the processes of torchrun or accelerate (FSDP2, by block)."""
    compile: bool = False
    """Compile each block with torch.compile."""
    compile_backend: str = "inductor"
    """Of torch.compile: a name of `torch.compiler.list_backends(())`."""
    tbptt_steps: list[int] = field(default_factory=lambda: [1])
    """Carry the memory across N batches (truncated BPTT). Each batch continues its rows' texts, and gradients stop at
    the batch's start. After N batches the memory is reset. 1: reset before every batch. Several values: row i takes
    value i, in turn, so that some rows learn to start and others to have read much."""
    core_steps: int = 0
    """Bypass the memory in the first N steps: its output is 0 and its weights stay."""
    memory_steps: int = 0
    """After the core_steps, train the memory alone for N steps: all other weights stay. Then the whole model learns."""
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int = 200
    eval_blocks: int = 32
    """Maximum number of held-out sequences in an evaluation."""
    save_steps: int = 200
    keep: int = 2
    """Number of checkpoints that are kept: the last ones."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where the run is shown while it trains: tensorboard, wandb, trackio, several, or none ([])."""
    sample_steps: int = 0
    """Write what the model answers to sample_prompts to the trackers, each N steps. 0: never."""
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64
    """Tokens of each sample."""
    progress_seconds: float = 60.0
    """Where no terminal shows a bar: a line of progress each N seconds."""
    resume: bool = False
    """Resume from the last checkpoint in output_dir."""

    def check(self) -> None:
        if not self.output_dir:
            raise ValueError("training.output_dir is missing: say which folder the model goes to")
        for key in _COUNTS:
            at_least(f"training.{key}", getattr(self, key), 1)
        self._check_rates()
        self._check_watching()
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"training.optimizer={self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if self.optimizer == "muon" and self.fsdp:
            raise ValueError("training.fsdp shards matrices, and training.optimizer=muon needs them whole: use adamw")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed must be from 0 to 2**32 - 1, got {self.seed}")
        at_least("training.core_steps", self.core_steps, 0)
        if self.core_steps >= self.max_steps:
            raise ValueError(f"training.core_steps must be below max_steps={self.max_steps}, got {self.core_steps}")
        at_least("training.memory_steps", self.memory_steps, 0)
        if self.core_steps + self.memory_steps > self.max_steps:
            left = self.max_steps - self.core_steps
            raise ValueError(
                f"training.memory_steps must be at most max_steps - core_steps={left}, got {self.memory_steps}"
            )
        if not self.tbptt_steps:
            raise ValueError("training.tbptt_steps must be one number, or at most one for each row of a batch, got []")
        at_least("training.tbptt_steps", min(self.tbptt_steps), 1)

    def _check_watching(self) -> None:
        check_names(self.report_to)
        at_least("training.sample_steps", self.sample_steps, 0)
        if self.sample_steps and not (self.sample_prompts and self.report_to):
            raise ValueError(
                f"training.sample_steps={self.sample_steps} needs training.sample_prompts, texts to go on from, and "
                f"training.report_to, where samples go"
            )
        if self.sample_prompts and not self.sample_steps:
            raise ValueError("training.sample_prompts has an effect only with training.sample_steps above 0")
        if not all(self.sample_prompts):
            raise ValueError("training.sample_prompts has an empty text; a sample goes on from at least one token")
        if not self.progress_seconds > 0:
            raise ValueError(f"training.progress_seconds must be above 0, got {self.progress_seconds}")

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
        at_least("training.weight_decay", self.weight_decay, 0)


_COUNTS = (
    "max_steps", "batch_size", "accumulation", "logging_steps", "eval_steps", "eval_blocks", "save_steps",
    "sample_tokens", "keep",
)  # fmt: skip


@dataclass
class Settings:
    """A whole run: `model`, `data`, `training`.

    `model` has fields of TitansConfig and may have a `size` of the presets, a `baseline` (`baselines.NAMES`), and
    `parameters`: the MLP's width is chosen to reach this count. Or it has `pretrained`, folder or name of the model
    whose weights training starts from, and beside it at most the sizes to which its memory grows
    (`growth.grow_memory`). Or it has `graft`, a pretrained model that gets a memory, and fields of GraftConfig.
    """

    model: dict[str, Any]
    data: DataSettings
    training: TrainingSettings

    def config(self) -> PreTrainedConfig:
        """The model's configuration. Raises ValueError with the key's full name."""
        fields = dict(self.model)
        if "pretrained" in fields:
            return _pretrained_config(dict(fields))
        if "graft" in fields:
            return _graft_config(fields)
        for key in fields:
            if key not in (*_MODEL_KEYS, *known_keys()):
                raise ValueError(unknown_key(key, [*_MODEL_KEYS, *known_keys()], "model"))
        fields = {key: _typed_field(key, value) for key, value in fields.items()}
        check_model_keys(fields)
        if self.data.task:
            fields.setdefault("vocab_size", make_task(self.data.task).vocab_size)
        try:
            return _config(fields)
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"model: {error.__cause__ or error}") from error

    @property
    def pretrained(self) -> str | None:
        """Folder or name of the model whose weights training starts from, if any."""
        return self.model.get("pretrained")

    @property
    def growth(self) -> dict[str, int]:
        """The keys of `GROWTH` that are given beside `pretrained`, as arguments of `grow_memory`."""
        return _growth(self.model) if self.pretrained else {}


_MODEL_KEYS = ("size", "baseline", "parameters", "pretrained")
_WITH_CORE = ("mac", "mag", "mal")


def _typed_field(key: str, value: Any) -> Any:
    """Parse a number of the model's section. Raises ValueError for another value; TitansConfig checks other types."""
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
        fields = {**fields, **BASELINES[baseline]}  # no other key changes these
    size, parameters = fields.pop("size", None), fields.pop("parameters", None)
    if parameters is not None:
        fields = fields if size is None else {**SIZES[size], **fields}
        return fitted(parameters, **fields)
    return TitansConfig(**fields) if size is None else preset(size, **fields)


def _pretrained_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The configuration that the weights were saved with. No other key may change it, because the weights would not
    fit, but those of `GROWTH`, and a graft's `distillation`, which is of its training."""
    model = fields.pop("pretrained")
    if not isinstance(model, str) or not model:
        raise ValueError(f"model.pretrained must be a folder or a shipped model's name, got {model!r}")
    growth, fields = _growth(fields), {key: value for key, value in fields.items() if value is not None}
    try:
        config: PreTrainedConfig = saved_config(find(model))
        if isinstance(config, GraftConfig) and "distillation" in fields:
            config = GraftConfig.from_dict({**config.to_dict(), "distillation": fields.pop("distillation")})
        if growth and isinstance(config, TitansConfig):
            config = grown_config(config, **growth)
            fields = {key: value for key, value in fields.items() if key not in growth}
    except (ValueError, OSError) as error:
        raise ValueError(f"model.pretrained: {error}") from error
    if fields:
        raise ValueError(f"model.{min(fields)} has no effect beside model.pretrained={model}; leave it out")
    return config


def _growth(fields: dict[str, Any]) -> dict[str, int]:
    """The keys of `GROWTH`, without those that are null."""
    return {key: _typed_field(key, fields[key]) for key in GROWTH if fields.get(key) is not None}


def _graft_config(fields: dict[str, Any]) -> PreTrainedConfig:
    try:
        return graft_config({key: _typed_field(key, value) for key, value in fields.items()})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"model: {error.__cause__ or error}") from error


def load_settings(path: Path, changes: list[str]) -> Settings:
    """Read a YAML file and apply `section.key=value` changes. Raises ValueError naming the file and the key."""
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
    """Write `run.yaml`, which `load_settings` reads."""
    (folder / RUN).write_text(yaml.dump(dataclasses.asdict(settings), Dumper=Dumper, sort_keys=False))


def parse_settings(tree: dict[str, Any]) -> Settings:
    """Build `Settings` from sections and check everything. Raises ValueError with the key's full name."""
    sections = [f.name for f in dataclasses.fields(Settings)]
    for name, section in tree.items():
        if name not in sections:
            raise ValueError(unknown_key(str(name), sections, "the run"))
        if not isinstance(section, dict):
            raise ValueError(f"{name} must be a section of keys and values, got {section!r}")
    tree = {name: with_current_keys(section, name) for name, section in tree.items()}
    data = _build(DataSettings, tree.get("data", {}), "data")
    training = _build(TrainingSettings, tree.get("training", {}), "training")
    data.check()
    check_data(data)
    training.check()
    data.check_batches(training.batch_size, training.max_minutes is not None)
    if max(training.tbptt_steps) > 1:
        _check_tbptt(data, tree.get("model", {}))
    if training.sample_prompts and data.task and getattr(make_task(data.task), "tokenizer", None) is None:
        raise ValueError("training.sample_prompts are texts, and the tokens of this data.task are numbers")
    settings = Settings(tree.get("model", {}), data, training)
    size = settings.model.get("size")
    if size is not None and size not in list(SIZES):  # a list: a size that a user typed may not be hashable
        raise ValueError(f"model.size={size!r} is not one of {', '.join(SIZES)}")
    _check_model(settings.config(), settings)
    if training.fsdp and data.documents == RESET:
        raise ValueError(f"training.fsdp gathers weights as often in each process: data.documents={RESET} needs DDP")
    if training.compile_backend != TrainingSettings.compile_backend and not training.compile:
        raise ValueError(f"training.compile_backend={training.compile_backend} has an effect only with compile: true")
    return settings


def _check_model(config: PreTrainedConfig, settings: Settings) -> None:
    """Raises ValueError for what this model cannot do."""
    training = settings.training
    check_model(settings.model, config)
    check_length(settings.data, config, training.tbptt_steps)
    check_distillation(settings.data, config)
    if isinstance(config, GraftConfig):
        _check_graft(training)
    kind = getattr(config, "variant", "mamba2")
    if settings.data.documents == RESET and kind == "mamba2":
        raise ValueError(f"data.documents={RESET} needs a Titans model: {config.model_type} cannot reset within a row")
    for key in ("core_steps", "memory_steps"):
        if getattr(training, key) and kind not in _WITH_CORE:
            raise ValueError(f"training.{key} is for a core beside a memory ({', '.join(_WITH_CORE)}), got {kind}")


def _check_graft(training: TrainingSettings) -> None:
    for key in ("core_steps", "memory_steps"):
        if getattr(training, key):
            raise ValueError(f"training.{key}: the core of a graft is its base, which is trained and stays frozen")
    if training.compile:
        raise ValueError("training.compile is for blocks of a Titans model; the layers of a graft are its base's")
    if training.activation_checkpointing:
        raise ValueError("training.activation_checkpointing: transformers drops the cache then, and a graft needs it")


def _check_tbptt(data: DataSettings, model: dict[str, Any]) -> None:
    if model.get("baseline") == MAMBA2:
        raise ValueError(
            f"training.tbptt_steps must be 1 with model.baseline={MAMBA2}: its class cannot continue a row"
        )
    data.check_continued()


def current_key(section: str, key: str) -> str:
    """The name that `key` has now."""
    return RENAMED.get(section, {}).get(key, key)


def with_current_keys(values: dict[str, Any], section: str) -> dict[str, Any]:
    """The values of a section, old keys renamed. Warns of each; raises ValueError where a key has both its names."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = current_key(section, key)
        if name != key:
            warnings.warn(f"{section}.{key} is now {section}.{name}", FutureWarning, stacklevel=2)
        if name in renamed:
            raise ValueError(f"{section}.{name} is given twice, once under its old name; leave one out")
        renamed[name] = value
    return renamed


def change_tree(tree: dict[str, Any], change: str) -> None:
    """Set `section.key=value` in sections. Raises ValueError for another form."""
    key, equals, value = change.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise ValueError(f"--set {change!r} must be section.key=value, such as training.max_steps=100")
    keys = tree.setdefault(section, {})
    if not isinstance(keys, dict):
        raise ValueError(f"{section} must be a section of keys and values, got {keys!r}")
    keys = tree[section] = with_current_keys(keys, section)
    try:
        keys |= with_current_keys({name: parse_yaml(value)}, section)
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
