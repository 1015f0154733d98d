"""Where a retrieval, or the prediction of a token, comes from: the shares of the earlier tokens that were written.

A retrieval from M_t is compared with what each write left in M_t. Written token s adds -D_ts g_s to the weights, where
D_ts follows from theta, eta and alpha of the tokens s to t (eqs. 10 and 13). The share of s is the inner product of
that with the gradient of the retrieval by the weights. For a linear memory in the plain form this is exact, and the
shares of all tokens and of the memory at the start are 1 together; for a deeper one it is gradient times input.

The prediction of a token is a function of the whole model. Its share of s is the derivative of its log-probability by
the strength of the write at s, times that strength, which is 1: what not writing s takes away, to first order.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from titans_lm.analyze.recorder import features_of, gates_of, memory_blocks, memory_of, recording
from titans_lm.analyze.trace import one_stream
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.ops import MemoryState, memory_scan, retrieve
from titans_lm.ops.mlp import act_backward, activate, inner_loss
from titans_lm.ops.types import Tokens
from titans_lm.utils.nats import target_nats

EXACT, FIRST_ORDER = "closed form, exact", "gradient times input"
MOST_TOKENS = 16_384
"""Of a text whose predictions are attributed: their graph is held at once."""


@dataclass(frozen=True)
class Attribution:
    """Shares of earlier tokens in what is read at one token."""

    token: int
    shares: NDArray[np.float32]
    """By token, layer and head, `[token, L, H]`, for the tokens before `token` (and itself, for a retrieval)."""
    start: NDArray[np.float32] | None
    """The share of the memory at the start, `[L, H]`; None where only writes are known."""
    method: str
    """`EXACT` or `FIRST_ORDER`."""

    def total(self) -> NDArray[np.float32]:
        """Sum over layers and heads, by token."""
        total: NDArray[np.float32] = self.shares.sum((1, 2))
        return total

    def top(self, number: int) -> list[tuple[int, float]]:
        """The tokens with the largest shares in size, and these shares."""
        total = self.total()
        order = np.argsort(-np.abs(total), kind="stable")[:number]
        return [(int(t), float(total[t])) for t in order if total[t] != 0]


# ------------------------------------------------------------------------------------------------ predictions


def prediction_sources(
    model: TitansForCausalLM, ids: Any, tokens: Sequence[int], state: TitansState | None = None
) -> list[Attribution]:
    """Attribute the log-probability of each of `tokens` (places in ids `[T]`, at least 1) to the tokens before it.

    Gradient times input. Raises ValueError for a text of more than `MOST_TOKENS`, and for gates that belong to chunks.
    """
    stream = one_stream(ids, model.config.vocab_size)[: max(tokens, default=0)]
    for token in tokens:
        if not 1 <= token <= len(stream):
            raise ValueError(f"a token whose prediction is attributed must be in the text, and not its first: {token}")
    _check(model, len(stream))
    answers = one_stream(ids, model.config.vocab_size)
    begin = model.initial_state(1) if state is None else model.with_pending_read(state).detach()
    with torch.enable_grad(), _writes(model, None) as offsets:
        logits = model(stream[None].to(model.device), past_key_values=begin.shallow_copy()).logits[0]
        found = []
        flat = [part for layer in offsets for part, _ in layer]
        for number, token in enumerate(tokens):
            goal = -target_nats(logits[token - 1], answers[token])
            grads = torch.autograd.grad(goal, flat, retain_graph=number + 1 < len(tokens), allow_unused=True)
            found.append(Attribution(token, _strengths(offsets, grads)[:token], None, FIRST_ORDER))
    return found


@torch.no_grad()
def log_probability(
    model: TitansForCausalLM, ids: Any, token: int, without: Sequence[int] = (), state: TitansState | None = None
) -> float:
    """The log-probability of ids[`token`], where the tokens `without` are read but not written."""
    stream = one_stream(ids, model.config.vocab_size)
    _check(model, 0)
    begin = model.initial_state(1) if state is None else model.with_pending_read(state)
    with _writes(model, set(without)):
        logits = model(stream[None, :token].to(model.device), past_key_values=begin.shallow_copy()).logits[0, -1]
    return -float(target_nats(logits, stream[token]))


def _check(model: TitansForCausalLM, tokens: int) -> None:
    if model.config.memory_gates_of == "chunk":
        raise ValueError("memory_gates_of='chunk': a token has no step of its own, so its write has no share")
    if tokens > MOST_TOKENS:
        raise ValueError(f"predictions can be attributed up to token {MOST_TOKENS:,}, this text has {tokens:,}")


def _strengths(offsets: list[list[tuple[Tensor, Tensor]]], grads: Sequence[Tensor | None]) -> NDArray[np.float32]:
    """The derivatives by the strength of each write, `[T, L, H]`, from those by the step before its sigmoid.

    d theta / dz = theta (1 - sigma), and d theta / dw = theta, so the one is the other over 1 - sigma."""
    rest, layers = list(grads), []
    for layer in offsets:
        parts = []
        for offset, z in layer:
            grad = rest.pop(0)
            left = 1 - torch.sigmoid(z)
            grad = torch.zeros_like(offset) if grad is None else grad
            parts.append(torch.where(left > 0, grad / left.clamp(min=1e-30), 0)[0])
        layers.append(torch.cat(parts))
    return torch.stack(layers, 1).float().cpu().numpy()


@contextmanager
def _writes(model: TitansForCausalLM, without: set[int] | None) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """A context in which the tokens `without` of a call are not written; yields, by layer, an offset of 0 in each step
    before its sigmoid, `[1, T, H]`, and that step. Persistent tokens are left as they are."""
    blocks, handles = memory_blocks(model), []
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in blocks]
    for layer, block in enumerate(blocks):
        reading = [False]

        def begin(_module: nn.Module, _inputs: Any, options: dict[str, Any], reading: list[bool] = reading) -> None:
            if options.get("method") is not None:
                reading[0] = "surprise" in options

        def change(
            _module: nn.Module, _inputs: Any, z: Tensor, layer: int = layer, reading: list[bool] = reading
        ) -> Any:
            if not reading[0]:
                return None
            first = sum(part.shape[1] for part, _ in found[layer])
            offset = torch.zeros_like(z).requires_grad_(without is None)
            found[layer].append((offset, z.detach()))
            gone = [t - first for t in without or () if first <= t < first + z.shape[1]]
            return (z + offset).index_fill(1, torch.tensor(gone, dtype=torch.long, device=z.device), -torch.inf)

        memory = memory_of(block)
        handles.append(memory.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(memory.theta.register_forward_hook(change))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ retrievals


@torch.no_grad()
def retrieval_sources(model: TitansForCausalLM, ids: Any, token: int, state: TitansState | None = None) -> Attribution:
    """Attribute what each head retrieves at `token`, as a share along the retrieval itself. See this module's text."""
    stream = one_stream(ids, model.config.vocab_size)
    if not 0 <= token < len(stream):
        raise ValueError(f"the text has tokens 0 to {len(stream) - 1}, not {token}")
    begin = model.initial_state(1) if state is None else model.with_pending_read(state)
    with recording(model) as recorder:
        model(stream[None, : token + 1].to(model.device), past_key_values=begin.shallow_copy())
    shares, starts = [], []
    for calls in recorder.calls:
        memory, first = calls[0].memory, calls[0].before.whole_memory()
        parts = [features_of(call) for call in calls]
        q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        gates = [torch.cat(part) for part in zip(*map(gates_of, calls), strict=True)][:3]
        with torch.autocast(q.device.type, enabled=False):  # it would round the shares, which are exact otherwise
            share, start = _shares(memory, first, q, k, v, gates, calls[-1].after.whole_memory())
        shares.append(share)
        starts.append(start)
    exact = all(call[0].memory.norm_weight is None and len(call[0].memory.shapes) == 1 for call in recorder.calls)
    return Attribution(
        token,
        torch.stack(shares, 1).float().numpy(),
        torch.stack(starts).float().numpy(),
        EXACT if exact else FIRST_ORDER,
    )


def _shares(
    memory: NeuralMemory, state: MemoryState, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], after: MemoryState
) -> tuple[Tensor, Tensor]:
    """The shares of writes `[T, H]`, and of the memory at the start `[H]`, in the last token's retrieval."""
    form, start = memory.form(), state
    with torch.enable_grad():
        weights = tuple(w.detach().requires_grad_() for w in after.weights)
        y = retrieve(q[None, -1:], weights, form)[0, 0]
        size = y.detach().square().sum(-1, keepdim=True).clamp(min=1e-30)
        slope = torch.autograd.grad((y * y.detach() / size).sum(), weights)
    theta, decays, from_momentum, from_weights = gates[0].clone(), *_decays(*gates)
    products, loss = [], []
    for first, end in _chunks(int(state.position[0]), len(k), memory.chunk_size):
        anchor = state.anchor if int(state.position[0]) else state.weights
        product, found = _inner_products(memory, anchor, slope, k[first:end], v[first:end])
        products.append(product)
        loss.append(found)
        tokens = Tokens(*(x[None, first:end] for x in (q, k, v, *gates)))
        _, state = memory_scan(*tokens, state, chunk_size=memory.chunk_size, form=form, backend=memory.backend)
    if form.threshold is not None:
        theta = theta * (torch.cat(loss) > form.threshold)
    shares = -decays * theta * torch.cat(products)

    def along(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(g[0] * w[0]).sum((-2, -1)) for g, w in zip(slope, parts, strict=True)]).sum(0)

    return shares.cpu(), (from_weights * along(start.weights) + from_momentum * along(start.momentum)).cpu()


def _decays(theta: Tensor, eta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each token's step is in the last weights, `[T, H]`, and how much of momentum and weights at the
    start, `[H]`: eqs. 10 and 13, from the last token back."""
    in_weights, in_momentum = torch.ones_like(theta[0]), torch.zeros_like(theta[0])
    found = []
    for t in range(len(theta) - 1, -1, -1):
        in_momentum = in_momentum + in_weights  # S_t is added to M_t
        found.append(in_momentum)
        in_weights = in_weights * (1 - alpha[t])
        in_momentum = in_momentum * eta[t]
    return torch.stack(found[::-1]), in_momentum, in_weights


def _chunks(position: int, tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """The chunks of some tokens, of which the first may have begun before."""
    edges = [0, *range(size - position, tokens, size), tokens]
    return ((a, b) for a, b in itertools.pairwise(edges) if b > a)


def _inner_products(
    memory: NeuralMemory, anchor: tuple[Tensor, ...], slope: Sequence[Tensor], k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """For each token of a chunk, `[C, H]`: the inner product of its inner gradient (eq. 12) with `slope`; its loss."""
    form = memory.form()
    x, inputs, sums = k.transpose(0, 1).to(anchor[0].dtype), list[Tensor](), list[Tensor]()
    v = v.transpose(0, 1).to(x.dtype)
    h = x
    for layer, w in enumerate(anchor):
        h = activate(h, form) if layer else h
        inputs.append(h)
        h = h @ w[0]
        sums.append(h)
    weight, shift = None, -v
    if form.norm is not None:
        weight, shift = form.norm[0].to(x.dtype)[:, None], x + form.norm[1].to(x.dtype)[:, None] - v
    inner, delta = inner_loss(h, shift, weight, form.clip)
    total = torch.zeros_like(delta[..., 0])
    for layer in range(len(anchor) - 1, -1, -1):
        total = total + ((inputs[layer] @ slope[layer][0]) * delta).sum(-1)
        if layer:
            delta = act_backward(delta @ anchor[layer][0].transpose(-1, -2), sums[layer - 1], form)
    return total.transpose(0, 1), inner.error.square().sum(-1).transpose(0, 1)
