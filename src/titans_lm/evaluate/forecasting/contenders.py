"""The models of `titans evaluate forecast`: how each is built and trained."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from titans_lm.evaluate.forecasting.fit import Recipe
from titans_lm.evaluate.forecasting.rivals import DLinear, NLinear, RLinear, SeasonalNaive


class Task(NamedTuple):
    """The sizes of a forecast."""

    look_back: int
    horizon: int
    columns: int
    season: int


class Contender(NamedTuple):
    """A model by its task, and its training."""

    build: Callable[[Task], nn.Module]
    recipe: Recipe = Recipe()


class Prediction(nn.Module):
    """The forecast of a model of transformers, `[B, L, C]` -> `[B, H, C]`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, past: Tensor) -> Tensor:
        out: Tensor = self.model(past_values=past).prediction_outputs
        return out


def _patch_tst(task: Task) -> nn.Module:
    """The small size that its paper takes for ETTh."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    return Prediction(PatchTSTForPrediction(PatchTSTConfig(
        num_input_channels=task.columns, context_length=task.look_back, prediction_length=task.horizon,
        patch_length=16, patch_stride=8, d_model=16, num_attention_heads=4, num_hidden_layers=3, ffn_dim=128,
        attention_dropout=0.0, ff_dropout=0.3, path_dropout=0.0, head_dropout=0.0, scaling="std", loss="mse",
    )))  # fmt: skip


def _patch_tsmixer(task: Task) -> nn.Module:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    return Prediction(PatchTSMixerForPrediction(PatchTSMixerConfig(
        num_input_channels=task.columns, context_length=task.look_back, prediction_length=task.horizon,
        patch_length=16, patch_stride=8, d_model=32, num_layers=3, dropout=0.2, head_dropout=0.2,
        mode="common_channel", scaling="std", loss="mse",
    )))  # fmt: skip


_LINEAR = Recipe(rates=(1e-3, 5e-3))
_PATCHES = Recipe(rates=(1e-3,), batch_size=64, epochs=12, decay=0.8, windows=2048, val_stride=4)
"""An epoch is a random quarter of ETTh's training windows: the study has to run on two CPU cores."""

CONTENDERS: dict[str, Contender] = {
    "seasonal_naive": Contender(lambda t: SeasonalNaive(t.horizon, t.season)),
    "dlinear": Contender(lambda t: DLinear(t.look_back, t.horizon), _LINEAR),
    "nlinear": Contender(lambda t: NLinear(t.look_back, t.horizon), _LINEAR),
    "rlinear": Contender(lambda t: RLinear(t.look_back, t.horizon, t.columns), _LINEAR),
    "patchtst": Contender(_patch_tst, _PATCHES),
    "patchtsmixer": Contender(_patch_tsmixer, _PATCHES),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build(name: str, task: Task, seed: int) -> nn.Module:
    """The model `name` with random weights of `seed`."""
    torch.manual_seed(seed)
    return CONTENDERS[name].build(task)
