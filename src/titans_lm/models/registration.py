"""Makes transformers' Auto classes know Titans models without importing transformers for it.

Importing the module of the configuration registers it, and importing the module of the models registers these. Both are
imported by name, as entry points are: the models when a `TitansConfig` is made, because they load torch; the
configuration at once in a process that has loaded transformers, else as soon as transformers is loaded.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_CONFIGURATION = "titans_lm.models.configuration"
_MODELS = "titans_lm.models.modeling"


def register_models() -> None:
    """Make Auto classes find the models. They load torch, so this waits for a configuration to be made."""
    importlib.import_module(_MODELS)


def register_with_transformers(finders: list[Any]) -> None:
    """Register now where transformers is loaded; else put a finder first into `finders`, which is `sys.meta_path`."""
    if sys.modules.get("transformers") is not None:
        _register()
    elif "transformers" not in sys.modules:  # None there: someone forbids to import it
        finders.insert(0, _AfterTransformers())


def _register() -> None:
    """Register the configuration; nothing happens while its module is being imported, which will do it."""
    importlib.import_module(_CONFIGURATION)


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as the other finders do, and registers when its top module has run.

    At that moment no other module of transformers is half imported, so importing from it is safe. To look for
    transformers without importing it, as `importlib.util.find_spec` does, changes nothing.
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
        """The loader of one module, which registers after it has run that module."""
        execute = loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = execute_and_register
