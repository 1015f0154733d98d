"""The models of `titans evaluate forecast`: how each is built and trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from titans_lm.evaluate.forecasting.fit import Recipe
from titans_lm.evaluate.forecasting.rivals import DLinear, NLinear, RLinear, SeasonalNaive
from titans_lm.models.baselines import BASELINES
from titans_lm.models.time_series import TitansForTimeSeriesPrediction
from titans_lm.models.time_series_configuration import TitansTimeSeriesConfig


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
    stream: bool = False
    """Whether it reads the whole series in order, with a memory carried from its first row."""
    fields: dict[str, Any] | None = None
    """Of ours: those of its configuration that are not the defaults."""


class Prediction(nn.Module):
    """The forecast of a model of transformers, `[B, L, C]` -> `[B, H, C]`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, past: Tensor) -> Tensor:
        out: Tensor = self.model(past_values=past).prediction_outputs
        return out


def _patch_tst(task: Task) -> nn.Module:
    """The small size that its paper takes for ETTh. Its head reads all patches; transformers' default is their mean."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    return Prediction(PatchTSTForPrediction(PatchTSTConfig(
        num_input_channels=task.columns, context_length=task.look_back, prediction_length=task.horizon,
        patch_length=16, patch_stride=8, d_model=16, num_attention_heads=4, num_hidden_layers=3, ffn_dim=128,
        attention_dropout=0.0, ff_dropout=0.3, path_dropout=0.0, head_dropout=0.0, scaling="std", loss="mse",
        pooling_type=None,
    )))  # fmt: skip


def _patch_tsmixer(task: Task) -> nn.Module:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    return Prediction(PatchTSMixerForPrediction(PatchTSMixerConfig(
        num_input_channels=task.columns, context_length=task.look_back, prediction_length=task.horizon,
        patch_length=16, patch_stride=8, d_model=32, num_layers=3, dropout=0.2, head_dropout=0.2,
        mode="common_channel", scaling="std", loss="mse",
    )))  # fmt: skip


def ours(recipe: Recipe, fields: dict[str, Any]) -> Contender:
    """Our forecaster with changed fields. Tokens of a stream are a season apart."""
    stream = fields.get("use") == "stream"

    def make(task: Task) -> nn.Module:
        if not stream:
            return Prediction(TitansForTimeSeriesPrediction(_config(task, fields)))
        length = min(fields.get("patch_length", task.look_back), task.look_back)
        return TitansForTimeSeriesPrediction(
            _config(task, fields | {"patch_stride": task.season, "patch_length": length})
        )

    return Contender(make, recipe, stream, fields)


def _config(task: Task, fields: dict[str, Any]) -> TitansTimeSeriesConfig:
    return TitansTimeSeriesConfig(
        num_input_channels=task.columns, context_length=task.look_back, prediction_length=task.horizon, **fields
    )


class _Mamba2(nn.Module):
    """transformers' Mamba2 as sequence model: embeddings `[R, N, D]` to hidden states."""

    def __init__(self, width: int):
        from transformers import Mamba2Config, Mamba2Model

        super().__init__()
        self.mamba = Mamba2Model(Mamba2Config(
            vocab_size=1, hidden_size=width, num_hidden_layers=1, expand=2, head_dim=16, num_heads=width // 8,
            n_groups=1, state_size=64, chunk_size=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        ))  # fmt: skip
        self.mamba.embeddings = nn.Identity()  # patches are embedded before

    def forward(self, inputs_embeds: Tensor, **options: Any) -> ModelOutput:  # noqa: ARG002 - of a stream
        out = self.mamba(inputs_embeds=inputs_embeds, use_cache=False)
        return ModelOutput(last_hidden_state=out.last_hidden_state, cache=None, hidden_states=None)


class _Mamba2Forecaster(TitansForTimeSeriesPrediction):
    """Our forecaster with Mamba2 in place of the memory."""

    def _sequence_model(self) -> nn.Module:
        return _Mamba2(self.config.hidden_size)


def _mamba2(task: Task) -> nn.Module:
    return Prediction(_Mamba2Forecaster(_config(task, _WINDOW)))


_LINEAR = Recipe(rates=(1e-3, 5e-3))
_PATCHES = Recipe(rates=(1e-3,), batch_size=64, epochs=12, decay=0.8, windows=2048, val_stride=4)
"""An epoch is a random quarter of ETTh's training windows: the study has to run on two CPU cores."""
_TWO_RATES = _PATCHES._replace(rates=(1e-3, 3e-3))
_OURS = {"variant": "lmm", "hidden_size": 16, "head_dropout": 0.5}
_STREAM = _OURS | {"use": "stream", "patch_length": 24, "level_half_lives": [7, 90]}
_STREAM_RECIPE = Recipe(rates=(3e-3,), epochs=12, patience=3, decay=0.85, loss="huber")
_WINDOW = _OURS | {"memory_chunk_size": 16}
_WINDOW_RECIPE = _STREAM_RECIPE._replace(batch_size=64, windows=2048, val_stride=4)
"""Of the candidates in studies/forecast.yaml, those with the lowest validation error: results/forecast_search.jsonl."""

CONTENDERS: dict[str, Contender] = {
    "seasonal_naive": Contender(lambda t: SeasonalNaive(t.horizon, t.season)),
    "dlinear": Contender(lambda t: DLinear(t.look_back, t.horizon), _LINEAR),
    "nlinear": Contender(lambda t: NLinear(t.look_back, t.horizon), _LINEAR),
    "rlinear": Contender(lambda t: RLinear(t.look_back, t.horizon, t.columns), _LINEAR),
    "patchtst": Contender(_patch_tst, _TWO_RATES),
    "patchtsmixer": Contender(_patch_tsmixer, _TWO_RATES),
    "mamba2": Contender(_mamba2, _WINDOW_RECIPE, fields=_WINDOW),
    "gated_delta_net": ours(_WINDOW_RECIPE, _WINDOW | BASELINES["gated_delta_net"]),
    "titans_lmm": ours(_WINDOW_RECIPE, _WINDOW | {"variant": "lmm"}),
    "titans_mag": ours(_WINDOW_RECIPE, _WINDOW | {"variant": "mag"}),
    "titans_mal": ours(_WINDOW_RECIPE, _WINDOW | {"variant": "mal"}),
    "titans_stream": ours(_STREAM_RECIPE, _STREAM),
    "stream_no_memory": ours(_STREAM_RECIPE, _STREAM | {"variant": "attention", "window_size": 1}),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build(name: str, task: Task, seed: int) -> nn.Module:
    """The model `name` with random weights of `seed`."""
    return seeded(CONTENDERS[name], task, seed)


def seeded(contender: Contender, task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return contender.build(task)
