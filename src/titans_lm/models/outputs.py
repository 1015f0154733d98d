"""What the models return."""

from dataclasses import dataclass

from torch import Tensor

from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import CacheOutput
from titans_lm.ops import Surprise


@dataclass
class TitansModelOutput(CacheOutput):
    """`surprise` (output_surprise=True): `loss` and `gradient_norm`, each `[B, T, H]`, of each layer with a memory."""

    last_hidden_state: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[Surprise, ...] | None = None


@dataclass
class TitansCausalLMOutput(CacheOutput):
    """`loss` includes `memory_loss_weight * memory_loss`. `memory_loss` is the mean reconstruction loss before each
    write: the mean of each row, and of rows weighted by their number of labels, as in the rest of the loss."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[Surprise, ...] | None = None
    memory_loss: Tensor | None = None
