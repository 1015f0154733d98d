"""The programs that show a run while it trains: TensorBoard, W&B, Trackio. transformers writes a run's log to them;
here are figures by layer, histograms and texts, which its log does not have."""

import difflib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import Trainer

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name in `training.report_to` -> the package that has to be installed."""
BINS = 64
"""Of a histogram in Trackio and W&B."""


def check_names(names: list[str]) -> None:
    """Raises ValueError for a name that is no tracker's."""
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"training.report_to: {name!r} is not one of {', '.join(TRACKERS)}{hint}")
    if len(set(names)) != len(names):
        raise ValueError(f"training.report_to names a tracker twice: {', '.join(names)}")


def check_installed(names: list[str]) -> None:
    """Raises ValueError for a tracker that is not installed, with what to install."""
    for name in names:
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise ValueError(f"training.report_to: {name} is not installed; pip install {TRACKERS[name]}")


class Trackers:
    """Writes to the trackers of a trainer, in its first process only."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def scalars(self, values: dict[str, float]) -> None:
        """Write numbers at the current step."""
        for writer in self._tensorboards():
            for name, value in values.items():
                writer.add_scalar(name, value, self.trainer.state.global_step)
        for module in [*self._modules("Wandb"), *self._modules("Trackio")]:
            self._log_to(module, values)

    def histograms(self, values: dict[str, Tensor]) -> None:
        """Write the distribution of each tensor's numbers, of those that are finite: a run that diverges ends with its
        own error."""
        finite = {name: value[value.isfinite()] for name, value in values.items()}
        arrays = {name: value.float().cpu().numpy() for name, value in finite.items() if len(value)}
        for writer in self._tensorboards():
            for name, array in arrays.items():
                writer.add_histogram(name, array, self.trainer.state.global_step)
        for module in [*self._modules("Wandb"), *self._modules("Trackio")]:
            self._log_to(module, {name: module.Histogram(array, num_bins=BINS) for name, array in arrays.items()})

    def texts(self, values: dict[str, str]) -> None:
        """Write texts."""
        for writer in self._tensorboards():
            for name, value in values.items():
                writer.add_text(name, _as_code(value), self.trainer.state.global_step)
        for module in self._modules("Wandb"):
            rows = [[name, value] for name, value in values.items()]
            self._log_to(module, {"samples": module.Table(columns=["sample", "text"], data=rows)})
        for module in self._modules("Trackio"):
            self._log_to(module, {name: module.Markdown(_as_code(value)) for name, value in values.items()})

    def _callbacks(self, name: str) -> list[Any]:
        """transformers' callbacks of one tracker; none in other processes than the first."""
        from transformers import integrations  # takes a second, and settings are checked without it

        kind = getattr(integrations, f"{name}Callback")
        found = self.trainer.callback_handler.callbacks if self.trainer.state.is_world_process_zero else []
        return [callback for callback in found if isinstance(callback, kind)]

    def _tensorboards(self) -> list[Any]:
        writers = [callback.tb_writer for callback in self._callbacks("TensorBoard")]
        return [writer for writer in writers if writer is not None]

    def _modules(self, name: str) -> list[Any]:
        """The module of a tracker whose run has begun."""
        return [getattr(found, f"_{name.lower()}") for found in self._callbacks(name) if found._initialized]

    def _log_to(self, module: Any, values: Mapping[str, Any]) -> None:
        """`train/global_step` is the axis that transformers' callbacks define."""
        module.log({**values, "train/global_step": self.trainer.state.global_step})


def _as_code(text: str) -> str:
    """Markdown that shows `text` as it is: each line indented, and nothing in it is a link or markup."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
