"""What a `NeuralMemory` carries from call to call, and how it goes on."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from titans_lm.ops import MemoryState, gather_tokens


class NeuralMemoryState(NamedTuple):
    """What a `NeuralMemory` carries from call to call: constant size, whatever was read."""

    memory: MemoryState
    tails: tuple[Float[Tensor, "B R I"], ...]
    """For q, k, v: the last projected inputs, `R` = conv_size - 1 of them, that the convolutions still see."""
    last: Float[Tensor, "B D"] | None = None
    """The last input, from which the next is predicted, where there is a predictor."""
    gates: Float[Tensor, "B H 3"] | None = None
    """theta, eta and alpha of the current chunk, where they are a chunk's."""

    def detach(self) -> "NeuralMemoryState":
        """The same memory without its history of gradients: what the next training step goes on from."""
        last, gates = (None if x is None else x.detach() for x in (self.last, self.gates))
        return NeuralMemoryState(self.memory.detach(), tuple(t.detach() for t in self.tails), last, gates)


def last_input(x: Tensor, last: Tensor | None, present: Tensor | None) -> Tensor | None:
    """The last input of each row, `[B, D]`, `last` where there is none among x."""
    if last is None or x.shape[1] == 0:
        return last
    if present is None:
        return x[:, -1].detach()
    return gather_tokens(torch.cat([last[:, None].to(x.dtype), x.detach()], 1), present.sum(1)[:, None])[:, 0]


def gates_of_chunks(
    gates: tuple[Tensor, ...], held: Tensor, position: Tensor, size: int, present: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """For each token the gates of its chunk's first token, `held` `[B, H, 3]` where that was read before; and what is
    held after. `position` `[B]` in the current chunk of `size` tokens."""
    own = torch.cat([held[:, None], torch.stack(gates, -1)], 1)  # [B, 1 + T, H, 3]
    token = torch.arange(gates[0].shape[1], device=position.device)
    first = token - (position[:, None] + token) % size  # [B, T], below 0 where it was read before
    of_chunks = torch.cat([held[:, None], gather_tokens(own, (first + 1).clamp(min=0))], 1)
    read = torch.full_like(position, len(token)) if present is None else present.sum(1)
    return of_chunks[:, 1:].unbind(-1), gather_tokens(of_chunks, read[:, None])[:, 0]
