"""Modules under the names that they had before the package had storeys: they still import, and warn.

`from titans_lm.reader import Reader` gives `titans_lm.inference.reader.Reader` with a DeprecationWarning that says so.
A module whose parts went to several places is looked through in their order, from the lowest storey up.
"""

import importlib
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "answer": ("inference.generate",),
    "arguments": ("models.arguments",),
    "associative": ("layers.associative",),
    "attention": ("layers.attention",),
    "baselines": ("models.baselines",),
    "block": ("models.blocks", "layers.gating"),
    "called": ("layers.module_call",),
    "checkpoint": ("models.model_files", "models.hub"),
    "config": ("models.model_files", "models.configuration", "models.presets"),
    "data": ("utils.text_file", "utils.corpora", "models.tokenizer", "training.data.blocks", "training.data.documents"),
    "demo": ("cli.demo",),
    "demo.learning": ("cli.demo.learning",),
    "demo.needle": ("cli.demo.needle",),
    "features": ("layers.short_conv", "layers.memory_state"),
    "flags": ("cli.flags",),
    "generation": ("models.generation",),
    "infer": ("cli.infer",),
    "learn": ("cli.learn",),
    "memories": ("cli.memory",),
    "memory": ("layers.memory_state", "layers.neural_memory", "layers.bypass"),
    "memory_file": ("models.cache_card", "models.cache_file"),
    "memory_lock": ("utils.memory_lock",),
    "memory_options": ("layers.memory_options",),
    "memory_state": ("layers.memory_state",),
    "model": ("models.modeling",),
    "model_files": ("models.model_files",),
    "ops.build": ("ops.cpu.build",),
    "ops.chunk": ("ops.chunked.chunk",),
    "ops.compiled": ("ops.cpu.compiled",),
    "ops.group": ("ops.chunked.group",),
    "ops.kernel_mlp": ("ops.triton.kernel_mlp",),
    "ops.kernels": ("ops.triton.kernels",),
    "ops.linear": ("ops.delta_rule",),
    "ops.naive": ("ops.reference",),
    "ops.native": ("ops.cpu.native",),
    "ops.step": ("ops.decode",),
    "packing": ("models.packing",),
    "prediction": ("layers.predictor",),
    "read": ("cli.read",),
    "reader": ("inference.generate", "inference.reader"),
    "reading": ("models.block_cache", "models.forward_context"),
    "recompute": ("layers.checkpointing",),
    "record": ("utils.record",),
    "run_folder": ("training.run_folder",),
    "serve": ("cli.serve",),
    "serve.answer": ("inference.serve.answer",),
    "serve.app": ("inference.serve.app",),
    "serve.limits": ("inference.serve.limits",),
    "serve.protocol": ("inference.serve.protocol",),
    "serve.worker": ("inference.serve.worker",),
    "settings": ("training.config",),
    "stability": ("cli.stability",),
    "state": ("models.model_identity", "models.cache"),
    "surprising": ("inference.surprising",),
    "terminal": ("utils.terminal",),
    "text_file": ("utils.text_file",),
    "token_bits": ("inference.token_bits",),
    "train": ("training.train", "cli.train"),
    "trainer": ("training.trainer",),
    "yaml_values": ("utils.yaml_values",),
}
"""Old name -> where its parts are now, both within this package."""
_PACKAGE = __name__.rpartition(".")[0]


class OldNames(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`; last of the finders, so that it is asked only for what nobody else has."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002 - its form
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=any(other.startswith(f"{name}.") for other in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Moved to {' and '.join(_places(module.__name__))}."
        module.__getattr__ = _forward(module.__name__)  # type: ignore[method-assign]


def _places(old: str) -> list[str]:
    return [f"{_PACKAGE}.{place}" for place in MOVED[old.partition(".")[2]]]


def _forward(old: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module that was called `old`."""

    def find(name: str) -> Any:
        if not name.startswith("__"):  # those are asked of every module by whoever looks through all of them
            for place in _places(old):
                module = importlib.import_module(place)
                new = getattr(getattr(module, "__getattr__", None), "names", {}).get(name, name)
                if hasattr(module, new):
                    told = f"{old}.{name} has moved: use {place}.{new}"
                    warnings.warn(told, DeprecationWarning, stacklevel=2)
                    return getattr(module, new)
        raise AttributeError(f"module {old!r} has no attribute {name!r}; it has moved to {' and '.join(_places(old))}")

    return find
