"""What the models return."""

from dataclasses import dataclass

from torch import Tensor

from titans_lm.layers.memory_state import LayerSurprise
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import CacheOutput


@dataclass
class TitansModelOutput(CacheOutput):
    """`surprise` (output_surprise=True): `loss`, `gradient_norm` and `theta`, each `[B, T, H]`, of each layer with a
    memory."""

    last_hidden_state: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[LayerSurprise, ...] | None = None


@dataclass
class TitansTokenClassifierOutput(CacheOutput):
    """`logits` `[B, T, num_labels]`; `cache` with use_cache=True or where a state was passed."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None


@dataclass
class TitansCausalLMOutput(CacheOutput):
    """In training, `loss` includes `memory_loss_weight * memory_loss` and `memory_theta_weight * memory_theta`.
    `memory_loss` is the mean reconstruction loss before each write, and `memory_theta` the mean step: of each row, and
    of rows weighted by their number of labels, as in the rest of the loss. None without labels, without a weight, and
    where no memory writes."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[LayerSurprise, ...] | None = None
    memory_loss: Tensor | None = None
    memory_theta: Tensor | None = None
