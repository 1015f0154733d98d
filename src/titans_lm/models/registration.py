"""Registers Titans models with transformers' Auto classes, without importing transformers for it.

Importing the configuration's module registers the configuration; importing the models' module registers the models.
Both are imported by name, as entry points are. The models' module loads torch, so it waits until a `TitansConfig` is
made. The configuration's module is imported at once if the process has loaded transformers, else when it loads it.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_CONFIGURATION = "titans_lm.models.configuration"
_OTHER_CONFIGURATIONS = ("titans_lm.models.time_series_configuration", "titans_lm.models.graft_config")
"""Those that derive from it."""
_MODELS = (
    "titans_lm.models.modeling", "titans_lm.models.classification", "titans_lm.models.time_series",
    "titans_lm.models.graft",
)  # fmt: skip


def register_models() -> None:
    """Register the models. They load torch, so this waits for a configuration to be made."""
    for module in _MODELS:
        importlib.import_module(module)


def register_with_transformers(finders: list[Any]) -> None:
    """Register now if transformers is loaded; else put a finder first into `finders`, which is `sys.meta_path`."""
    if sys.modules.get("transformers") is not None:
        _register()
    elif "transformers" not in sys.modules:  # a None there forbids the import
        finders.insert(0, _AfterTransformers())


def _register() -> None:
    """Register the configurations. While the module is being imported, this does nothing: that import registers it."""
    importlib.import_module(_CONFIGURATION)


def register_other_configurations() -> None:
    """Register the configurations that derive from `TitansConfig`, at the end of its module."""
    for module in _OTHER_CONFIGURATIONS:
        importlib.import_module(module)


class _AfterTransformers(MetaPathFinder):
    """Finds transformers through the other finders, and registers when its top module has run.

    At that moment no other module of transformers is half imported, so importing from it is safe. A search without an
    import, such as `importlib.util.find_spec`, changes nothing.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Make the loader register after it has run its module."""
        execute = loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = execute_and_register
