"""A group of chunks, forward and backward: work that does not depend on the state for all of them at once, then chunk
after chunk."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_lm.ops.chunked.chunk import (
    ChunkBuffers,
    ChunkOptions,
    Layers,
    WeightsAndMomentum,
    chunk_backward,
    chunk_forward,
    scale_backward,
)
from titans_lm.ops.decays import Decays, chunk_decays, decays_backward
from titans_lm.ops.mlp import layer_norm_backward
from titans_lm.ops.types import NORM_EPS, MemoryForm, Tokens

NormParams = tuple[Tensor, Tensor]
"""Weight and bias of the residual form, `[R, 1, V]`."""


class ChunkRun(NamedTuple):
    """How to process a run of chunks of one size, or a group of them."""

    form: MemoryForm
    surprise: bool
    chunk_size: int  # C, slots of a chunk, or of a part where a long chunk is cut
    at_boundary: bool  # True: every C slots begin a chunk. False: all belong to one chunk, whose anchor is given
    valid: Tensor | None  # [B, S], in a group [N, R, C]: which slots hold a token; None: all
    fraction: float  # of the call's slots


class GroupOutput(NamedTuple):
    """What a group returns for its tokens `[N, R, C, *]`, or a run for its tokens `[B, S, H, *]`."""

    y: Tensor
    loss: Tensor | None  # None where no surprise was asked for
    gradient_norm: Tensor | None


class ChunkGroup:
    """Consecutive chunks. What does not depend on the state is computed for all of them when the group is made.

    `save`: whether each chunk has buffers of its own, for a backward pass.
    """

    def __init__(
        self, tokens: Tokens, run: ChunkRun, norm: NormParams | None, shapes: list[tuple[int, int]], save: bool
    ):
        self.tokens, self.run, self.norm, self.shapes, self.save = tokens, run, norm, shapes, save
        may_skip = not save and not run.surprise and tokens.q.device.type == "cpu"  # a GPU would be waited for
        self.options = ChunkOptions(run.form, None if norm is None else norm[0], run.surprise, may_skip)
        self.writes = [True] * len(tokens.q)  # for each chunk, whether any token may be written
        if may_skip:
            self.writes = tokens.theta.flatten(1).any(1).tolist()
        self.decay, self.saved_decays = chunk_decays(*tokens[3:], run.valid)
        q, k, v = tokens[:3]
        a, b, _, d, em = self.decay
        self.shift = -v if norm is None else k - v + norm[1]
        self.raw = q @ k.mT
        self.first_layer = (q, k, a * q, b * q, d[..., -1, :, None] * k, em * k, self.raw, self.raw * d)
        self.y = q.new_empty(*q.shape[:3], shapes[-1][1])  # Y_L

    def valid_rows(self) -> Tensor | None:
        """Which rows have a token in each chunk, `[N, R, 1, 1]`; None: all."""
        return None if self.run.valid is None else self.run.valid.any(-1)[..., None, None]

    def chunks(self) -> list[ChunkBuffers]:
        """The buffers of each chunk; without `save` all chunks share one set."""
        slots = len(self.y) if self.save else 1
        return _chunk_buffers(self.first_layer, self.shift, self.decay, self.y, self.shapes, slots)

    def gradients(self, grad_y: Tensor) -> "GradientBuffers":
        """Buffers for the backward pass, which begins with the gradient by Y_L."""
        first_layer = tuple(torch.empty_like(x) for x in self.first_layer)
        shift, decay = torch.empty_like(self.shift), Decays(*(torch.zeros_like(x) for x in self.decay))
        chunks = _chunk_buffers(first_layer, shift, decay, grad_y, self.shapes, 1)
        return GradientBuffers(chunks, first_layer, shift, decay)


class GradientBuffers(NamedTuple):
    """The outer loss's gradients by what a group's forward pass computed."""

    chunks: list[ChunkBuffers]
    first_layer: tuple[Tensor, ...]
    shift: Tensor
    decay: Decays


def _chunk_buffers(
    first_layer: tuple[Tensor, ...], shift: Tensor, decay: Decays, y: Tensor, shapes: list[tuple[int, int]], slots: int
) -> list[ChunkBuffers]:
    """Views of what is given for all chunks, and new buffers for the rest: `slots` sets, used in turn.

    `first_layer` are the first layer's h, x, reads, writes, raw and scores `[N, R, C, *]`, `y` is Y_L.
    """
    n, r, c, _ = y.shape

    def buffers(widths: list[int]) -> list[list[Tensor]]:
        layers = [y.new_empty(slots, r, c, width).unbind(0) for width in widths]
        return [[layer[i % slots] for layer in layers] for i in range(n)]

    in_, out = [i for i, _ in shapes], [o for _, o in shapes]
    widths = (in_, in_, out, out, out, out, [c] * len(in_), [c] * len(in_))
    later_layers = [buffers(w[1:]) for w in widths]
    z, dloss_dx, g, inner_y = buffers(out), buffers(out[:-1]), buffers(out), buffers(out[:-1])
    first = [x.unbind(0) for x in first_layer]
    chunks = []
    for i in range(n):
        h, x, reads_w, reads_s, writes_w, writes_s, raw, scores = (
            [of_first[i], *of_later[i]] for of_first, of_later in zip(first, later_layers, strict=True)
        )
        inputs = (shift[i], Decays(*(x[i] for x in decay)))
        layers = (h, x, reads_w, reads_s, writes_w, writes_s, raw, scores)
        chunks.append(ChunkBuffers(*inputs, *layers, z=z[i], dloss_dx=dloss_dx[i], g=g[i], y=[*inner_y[i], y[i]]))
    return chunks


class SavedActivations(NamedTuple):
    """What a group's forward pass saves for its backward pass, and where it ends."""

    chunks: list[ChunkBuffers]
    starts: list[tuple[Layers, WeightsAndMomentum]]  # anchor and state of each chunk, with `save`
    anchor: Layers  # of the last chunk
    state: WeightsAndMomentum  # after the last chunk


def group_forward(group: ChunkGroup, anchor: Layers, state: WeightsAndMomentum) -> SavedActivations:
    """Process a group's chunks from `anchor` and `state`, which are left unchanged."""
    n, valid_rows = len(group.y), group.valid_rows()
    chunks, starts = group.chunks(), []
    reused = None if group.save else _empty_like(state)  # overwritten by every chunk
    for i, c in enumerate(chunks):
        if group.run.at_boundary:  # a row with no token left keeps the anchor of its last chunk
            anchor = state.w if valid_rows is None else _where_layers(valid_rows[i], state.w, anchor)
        after = reused if reused is not None and i < n - 1 else _empty_like(state)  # the last anchor is returned
        chunk_forward(c, anchor, state, after, group.options, group.writes[i])
        if group.save:
            starts.append((anchor, state))
        state = after
    return SavedActivations(chunks, starts, anchor, state)


def _empty_like(state: WeightsAndMomentum) -> WeightsAndMomentum:
    return WeightsAndMomentum(*([torch.empty_like(x) for x in part] for part in state))


def _where_layers(rows: Tensor, yes: Layers, no: Layers) -> Layers:
    return [torch.where(rows, a, b) for a, b in zip(yes, no, strict=True)]


def group_output(group: ChunkGroup, saved: SavedActivations) -> GroupOutput:
    """y `[N, R, C, V]`, and with surprise the loss and the gradient norm, `[N, R, C]` each."""
    y = group.y
    if group.norm is not None:
        normed = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS)
        y = torch.addcmul(group.tokens.q + group.norm[1], normed, group.norm[0])
    if not group.run.surprise:
        return GroupOutput(y, None, None)
    loss = torch.stack([c.loss for c in saved.chunks if c.loss is not None])
    norm = torch.stack([c.gradient_norm for c in saved.chunks if c.gradient_norm is not None])
    return GroupOutput(y, loss, norm)


class GroupGradients(NamedTuple):
    """The outer loss's gradients by a group's tokens, and by the norm's weight and bias, `[R, 1, V]` each."""

    tokens: Tokens
    norm: NormParams | None


def group_backward(
    group: ChunkGroup,
    saved: SavedActivations,
    grad_output: Tensor,
    grad_loss: Tensor | None,
    grad_anchor: Layers,
    grad_state: WeightsAndMomentum,
) -> GroupGradients:
    """From the gradients by y `[N, R, C, V]`, by the loss `[N, R, C, 1]`, by the last anchor and the state after.

    `grad_anchor` and `grad_state` become, in place, the gradients by the first anchor and the state before.
    """
    valid_rows = group.valid_rows()
    grad_y, grad_weight = _residual_backward(group, grad_output)
    grads = group.gradients(grad_y)
    grad_anchor_of_chunk = [torch.empty_like(w) for w in grad_anchor]
    for i in range(len(grads.chunks) - 1, -1, -1):
        anchor, state = saved.starts[i]
        weight = chunk_backward(
            saved.chunks[i], grads.chunks[i], anchor, state, grad_anchor_of_chunk, grad_state, group.options,
            None if grad_loss is None else grad_loss[i],
        )  # fmt: skip
        if grad_weight is not None and weight is not None:
            grad_weight += weight
        for total, of_chunk, grad_w in zip(grad_anchor, grad_anchor_of_chunk, grad_state.w, strict=True):
            total += of_chunk
            if group.run.at_boundary:  # in rows with a token the anchor is W', the weights before the chunk
                grad_w += total if valid_rows is None else total * valid_rows[i]
                total *= 0 if valid_rows is None else ~valid_rows[i]
    return _first_layer_backward(group, grads, grad_output, grad_weight)


def _residual_backward(group: ChunkGroup, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients by Y_L and by the norm's weight, from that by y: the residual form's last step."""
    if group.options.weight is None:
        return grad_output, None
    normed, mean, rstd = torch.native_layer_norm(group.y, group.y.shape[-1:], None, None, NORM_EPS)
    grad_y = layer_norm_backward(grad_output * group.options.weight, group.y, mean, rstd)
    return grad_y, (grad_output * normed).sum((0, 2)).unsqueeze(1)


def _first_layer_backward(
    group: ChunkGroup, grads: GradientBuffers, grad_output: Tensor, grad_weight: Tensor | None
) -> GroupGradients:
    """The gradients by the tokens, from those by the first layer's reads, writes and scores, by shift and decays."""
    (q, k), (a, b, _, d, em) = group.tokens[:2], group.decay
    grad_shift, grad_decay = grads.shift, grads.decay
    _, grad_k, reads_w, reads_s, writes_w, writes_s, _, scores = grads.first_layer
    raw = scores * d
    grad_decay.d.addcmul_(scores, group.raw)
    grad_q = scale_backward((reads_w, reads_s), q, (a, b), (grad_decay.a, grad_decay.b)) + raw @ k
    scales, grad_scales = (d[..., -1, :, None], em), (grad_decay.d[..., -1, :, None], grad_decay.em)
    grad_k += scale_backward((writes_w, writes_s), k, scales, grad_scales) + raw.mT @ q
    grad_norm = None
    if grad_weight is not None:
        grad_q, grad_k = grad_q + grad_output, grad_k + grad_shift
        grad_norm = (grad_weight, (grad_output + grad_shift).sum((0, 2)).unsqueeze(1))
    gates = decays_backward(grad_decay, group.saved_decays)
    return GroupGradients(Tokens(grad_q, grad_k, -grad_shift, *gates), grad_norm)
