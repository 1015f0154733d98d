"""`TitansTimeSeriesConfig`: the configuration of a forecaster."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from titans_lm.models.configuration import TitansConfig, plain_errors
from titans_lm.models.model_files import TIME_SERIES_AUTO_MAP


@strict
class TitansTimeSeriesConfig(TitansConfig):
    """Configuration of `TitansForTimeSeriesPrediction`: the fields of `TitansConfig`, with defaults of a small model,
    and those of a forecast. Names are those of transformers' PatchTST.

    Raises ValueError as `TitansConfig` does.
    """

    model_type = "titans_time_series"
    auto_map: ClassVar[dict[str, str]] = TIME_SERIES_AUTO_MAP

    vocab_size: int = 1
    """No effect: a forecaster has no tokens."""
    variant: Literal["mac", "mag", "mal", "lmm", "attention"] = "lmm"
    hidden_size: int = 32
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    intermediate_size: int = 64
    memory_head_dim: int = 16
    memory_dim: int | None = 32
    memory_chunk_size: int = 4
    memory_alpha_bias: float = -4.0
    num_persistent_tokens: int = 0
    window_size: int | None = 96
    segment_size: int = 96

    num_input_channels: int = 1
    """Columns C of a series."""
    context_length: int = 96
    """Steps L of the look-back."""
    prediction_length: int = 96
    """Steps H of the forecast."""
    use: Literal["window", "stream"] = "window"
    """window: the patches of one look-back are a row of tokens, and nothing is carried. stream: each look-back is one
    token of a stream, whose memory is carried from its first one."""
    patch_length: int = 16
    """Steps of a token: of the patches of a window; or, in a stream, the last ones of each look-back."""
    patch_stride: int = 8
    """Steps from token to token."""
    channel_mixing: bool = False
    """False: each channel is a row of its own, with the same weights. True: a token holds all channels."""
    linear_skip: bool = True
    """Whether a linear map from look-back to forecast is added, so that the memory forecasts what is left of it."""
    level_half_lives: list[int | float] | None = None
    """Half-lives, in tokens, of averages of the series that a stream carries beside its memory (`models/levels.py`). A
    linear map of how far each is from the look-back's mean is added to the forecast. None: there are none."""
    head_dropout: float = 0.0
    """Dropout before the last layer, in training."""
    loss: Literal["mse", "mae", "huber"] = "mse"

    def validate_architecture(self) -> None:
        super().validate_architecture()
        for key in ("num_input_channels", "context_length", "prediction_length", "patch_length", "patch_stride"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.patch_length > self.context_length:
            raise ValueError(
                f"patch_length must be at most context_length={self.context_length}, got {self.patch_length}"
            )
        if self.level_half_lives is not None:
            self._check_levels(self.level_half_lives)
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout must be in [0, 1), got {self.head_dropout}")

    def _check_levels(self, half_lives: list[int | float]) -> None:
        if self.use != "stream":
            raise ValueError('level_half_lives needs use="stream": a window carries nothing')
        if not half_lives or min(half_lives) <= 0:
            raise ValueError(f"level_half_lives must be numbers above 0, or None, got {half_lives}")

    @property
    def num_patches(self) -> int:
        """Tokens of a window. The last patch begins before the look-back's end and repeats its last value."""
        return -(-(self.context_length - self.patch_length) // self.patch_stride) + 1


TitansTimeSeriesConfig.__init__ = plain_errors(TitansTimeSeriesConfig.__init__)  # type: ignore[method-assign]
AutoConfig.register(TitansTimeSeriesConfig.model_type, TitansTimeSeriesConfig, exist_ok=True)
