"""`TitansForTimeSeriesPrediction`: forecasts of a series, with a memory as sequence model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForTimeSeriesPrediction
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import CacheOutput, given_state
from titans_lm.models.levels import LevelState, follow_levels
from titans_lm.models.modeling import TitansModel, TitansPreTrainedModel
from titans_lm.models.rev_in import RevIN, Scale
from titans_lm.models.time_series_configuration import TitansTimeSeriesConfig

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss}


@dataclass
class TitansTimeSeriesOutput(CacheOutput):
    """`prediction_outputs` `[B, H, C]`, in the units of the input, as transformers' PatchTST has them."""

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None


class TitansForTimeSeriesPrediction(TitansPreTrainedModel):
    """RevIN, patches, a Titans model without tokens, a linear head; and beside them a linear map of the look-back.

    *window*: `forward(past_values [B, L, C])`, as PatchTST is used. *stream*: one token for each look-back, and a
    memory that is carried on: `forward` over a whole history, or `stream` step by step.
    """

    config: TitansTimeSeriesConfig
    main_input_name = "past_values"

    def __init__(self, config: TitansTimeSeriesConfig):
        super().__init__(config)
        c, channels = config, config.num_input_channels if config.channel_mixing else 1
        self.rev_in = RevIN(c.num_input_channels)
        self.embed = nn.Linear(c.patch_length * channels, c.hidden_size)
        self.model = self._sequence_model()
        tokens = 1 if c.use == "stream" else c.num_patches
        self.dropout = nn.Dropout(c.head_dropout)
        self.head = nn.Linear(tokens * c.hidden_size, c.prediction_length * channels)
        self.skip = nn.Linear(c.context_length, c.prediction_length) if c.linear_skip else None
        half_lives = c.level_half_lives
        self.levels = None if half_lives is None else nn.Linear(len(half_lives), c.prediction_length, bias=False)
        self.post_init()

    def _sequence_model(self) -> nn.Module:
        """What maps embeddings `[R, N, D]` to hidden states."""
        model = TitansModel(self.config)
        model.register_module("embed_tokens", None)  # patches are embedded here
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RevIN):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if module is getattr(self, "head", None) and self.config.linear_skip:
            init.zeros_(module.weight)  # it begins as the linear map alone
        if module is getattr(self, "levels", None):
            init.zeros_(module.weight)

    @can_return_tuple
    def forward(
        self,
        past_values: Float[Tensor, "B T C"],
        future_values: Float[Tensor, "B H C"] | None = None,
        past_observed_mask: Tensor | None = None,
        past_key_values: TitansState | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: TitansState | None = None,
    ) -> TitansTimeSeriesOutput:
        """Forecast the `prediction_length` steps after `past_values`. `future_values` give the loss.

        *window*: T = context_length. *stream*: T = context_length + n * patch_stride; the memory reads n + 1
        look-backs, after those of `past_key_values` (or `cache`, which is the same), which it updates.

        Raises ValueError for another length or number of channels, for values that are missing or not finite, and for
        a state without a stream.
        """
        c = self.config
        past_key_values = given_state(past_key_values, cache)
        self._check(past_values, past_observed_mask, past_key_values)
        hidden: tuple[Tensor | None, ...] | None = None
        if c.use == "stream":
            windows = past_values.unfold(1, c.context_length, c.patch_stride).transpose(2, 3)  # [B, N, L, C]
            predicted, state, hidden = self._stream(windows, past_key_values, bool(output_hidden_states))
            predicted = predicted[:, -1]
        else:
            predicted, hidden = self._window(past_values, bool(output_hidden_states))
            state = None
        keep = past_key_values is not None or (c.use_cache if use_cache is None else use_cache)
        return TitansTimeSeriesOutput(
            loss=None if future_values is None else self._loss(predicted, future_values),
            prediction_outputs=predicted,
            cache=state if keep else None,
            hidden_states=hidden,
        )

    def stream(
        self,
        windows: Float[Tensor, "B N L C"],
        past_key_values: TitansState | None = None,
        cache: TitansState | None = None,
    ) -> tuple[Float[Tensor, "B N H C"], TitansState]:
        """Read N successive look-backs of each stream, `patch_stride` steps apart -> the forecast after each, from it
        and all before it; and the state, with one row for each channel. `past_key_values` (or `cache`, which is the
        same) is updated.

        Raises ValueError for a model whose `use` is "window", for look-backs of another length or number of channels or
        that are not finite, and for a state without a stream.
        """
        if self.config.use != "stream":
            raise ValueError(
                'this model was made with use="window", which carries no memory; make one with use="stream"'
            )
        past_key_values = given_state(past_key_values, cache)
        c = self.config
        if windows.dim() != 4 or windows.shape[2] != c.context_length or not windows.shape[1]:
            raise ValueError(
                f"windows must be [B, N, L, C] with L = context_length = {c.context_length}, got {list(windows.shape)}"
            )
        self._check(windows.flatten(0, 1), None, past_key_values)
        predicted, state, _ = self._stream(windows, past_key_values, False)
        return predicted, state

    def initial_state(self, batch: int) -> TitansState:
        """The state of `batch` series before their first look-back."""
        rows = batch * (1 if self.config.channel_mixing else self.config.num_input_channels)
        assert isinstance(self.model, TitansModel)
        state, half_lives = self.model.initial_state(rows), self.config.level_half_lives
        if half_lives is None:
            return state
        channels = batch * self.config.num_input_channels // rows
        return LevelState.begin(state, self.rev_in.weight.new_zeros(rows, channels, len(half_lives)).detach())

    # ------------------------------------------------------------------------------------------------ details

    def _window(self, past: Tensor, output_hidden: bool) -> tuple[Tensor, Any]:
        """Past `[B, L, C]` -> forecast `[B, H, C]`, hidden states."""
        c = self.config
        x, scale = self.rev_in(past)
        rows = x.transpose(1, 2)  # [B, C, L]
        missing = c.patch_length + (c.num_patches - 1) * c.patch_stride - c.context_length
        patches = F.pad(rows, (0, missing), mode="replicate").unfold(-1, c.patch_length, c.patch_stride)  # [B, C, N, P]
        patches = patches.transpose(1, 2).flatten(2) if c.channel_mixing else patches.flatten(0, 1)
        y, _, hidden = self._run(patches, None, False, output_hidden)
        y = self.head(self.dropout(y.flatten(1)))
        return self._inverse(y.view(len(past), -1, c.prediction_length), rows, scale), hidden

    def _stream(
        self, windows: Tensor, state: TitansState | None, output_hidden: bool
    ) -> tuple[Tensor, TitansState, Any]:
        """Look-backs `[B, N, L, C]` -> forecasts `[B, N, H, C]`, the state after, hidden states."""
        c, (batch, tokens) = self.config, windows.shape[:2]
        x, scale = self.rev_in(windows.flatten(0, 1))
        rows = x.transpose(1, 2)  # [B N, C, L]
        state = self.initial_state(batch) if state is None else state
        patches = rows[..., -c.patch_length :].unflatten(0, (batch, tokens))  # [B, N, C, P]
        patches = patches.flatten(2) if c.channel_mixing else patches.transpose(1, 2).flatten(0, 1)
        y, state, hidden = self._run(patches, state, True, output_hidden)
        y = self.head(self.dropout(y))  # [B C, N, H]
        if not c.channel_mixing:
            y = y.unflatten(0, (batch, c.num_input_channels)).transpose(1, 2)
        y = y.reshape(batch * tokens, c.num_input_channels, c.prediction_length)
        assert state is not None
        if self.levels is not None:
            y = y + self._level(windows, state, scale)
        return self._inverse(y, rows, scale).unflatten(0, (batch, tokens)), state, hidden

    def _level(self, windows: Tensor, state: TitansState, scale: Scale) -> Tensor:
        """Look-backs `[B, N, L, C]` that the state has just read -> what its levels add to the normalised forecasts,
        `[B N, C, H]`. Updates the levels."""
        c, (batch, tokens), rows = self.config, windows.shape[:2], len(state.position)
        assert isinstance(state, LevelState)
        assert self.levels is not None
        levels = state.levels.view(batch, c.num_input_channels, -1)
        read = (state.position.view(batch, -1)[:, 0] - tokens).to(windows.dtype)
        found = follow_levels(windows, levels, read, windows.new_tensor(c.level_half_lives), c.patch_stride)
        state.levels = found[:, -1].reshape(rows, -1, found.shape[-1])
        from_mean = (found.flatten(0, 1) - scale.mean.transpose(1, 2)) / scale.std.transpose(1, 2)
        out: Tensor = self.levels(from_mean * self.rev_in.weight[:, None])
        return out

    def _run(
        self, patches: Tensor, state: TitansState | None, use_cache: bool, output_hidden: bool
    ) -> tuple[Tensor, TitansState | None, Any]:
        """Patches `[R, N, P]` through the sequence model."""
        out = self.model(
            inputs_embeds=self.embed(patches), past_key_values=state, use_cache=use_cache,
            output_hidden_states=output_hidden,
        )  # fmt: skip
        return out.last_hidden_state, out.cache, out.hidden_states

    def _inverse(self, y: Tensor, rows: Tensor, scale: Scale) -> Tensor:
        """The head's `[B, C, H]` and normalised look-backs `[B, C, L]` -> the forecast `[B, H, C]`."""
        y = y if self.skip is None else y + self.skip(rows)
        return self.rev_in.inverse(y.transpose(1, 2), scale)

    def _loss(self, predicted: Tensor, future: Tensor) -> Tensor:
        if future.shape != predicted.shape:
            raise ValueError(f"future_values must be [B, H, C] = {list(predicted.shape)}, got {list(future.shape)}")
        return LOSSES[self.config.loss](predicted, future)

    def _check(self, past: Tensor, observed: Tensor | None, state: TitansState | None) -> None:
        c, steps = self.config, past.shape[1] if past.dim() == 3 else 0
        if past.dim() != 3 or past.shape[2] != c.num_input_channels:
            raise ValueError(
                f"past_values must be [B, T, C] with C = {c.num_input_channels} channels, got {list(past.shape)}"
            )
        if c.use == "window" and steps != c.context_length:
            raise ValueError(f"past_values must have context_length={c.context_length} steps, got {steps}")
        if c.use == "window" and state is not None:
            raise ValueError('past_key_values has no effect with use="window"')
        if state is not None and isinstance(state, LevelState) != (self.levels is not None):
            raise ValueError("past_key_values is of a model with another level_half_lives; take model.initial_state(B)")
        if steps < c.context_length or (steps - c.context_length) % c.patch_stride:
            raise ValueError(f"past_values must have {c.context_length} steps and any number of times {c.patch_stride} "
                             f"more, got {steps}")  # fmt: skip
        if past.is_meta:  # shapes alone
            return
        if observed is not None and not bool(observed.bool().all()):
            raise ValueError(
                "past_observed_mask marks missing values; fill them in before, this model has no rule for them"
            )
        if not self.training and not bool(past.isfinite().all()):
            row, step, channel = (~past.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"past_values is not finite in row {row}, step {step}, channel {channel}")


AutoModelForTimeSeriesPrediction.register(TitansTimeSeriesConfig, TitansForTimeSeriesPrediction, exist_ok=True)
