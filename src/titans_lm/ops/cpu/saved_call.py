"""A whole call in C++ that saves its activations in buffers whose number and size depend on the shapes alone.

Which runs of chunks a call has depends on the state's position, a value. An operator of PyTorch must know the shapes of
what it returns without values, so the buffers are as large as the largest of these layouts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans_lm.ops.chunked.group import ChunkRun
from titans_lm.ops.chunked.scan import MAX_CHUNK, RunInputs, RunOutput, scan_runs, split_outputs, split_state
from titans_lm.ops.cpu import native
from titans_lm.ops.types import ScanInputs, ScanOutput

MAX_RUNS = 3
"""Runs of a call whose chunks are at most `MAX_CHUNK`: what completes a chunk, whole chunks, an unfinished chunk."""


class SavedShapes(NamedTuple):
    """The buffers of a call."""

    blocks: int
    rows: int  # of a block
    scalars: int  # of a row

    def borders(self, weights: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        """The shapes of the states between runs: anchor, weights and momentum of each layer, `[R, in, out]`."""
        return [(w.shape[0] * w.shape[1], w.shape[2], w.shape[3]) for w in weights] * 3 * (MAX_RUNS - 1)


def saved_shapes(inputs: ScanInputs, max_saved_bytes: int) -> SavedShapes | None:
    """The buffers of a call; None where they would take more than `max_saved_bytes`, or have no bound."""
    if inputs.chunk_size > MAX_CHUNK:
        return None
    batch, tokens, heads, _ = inputs.tokens.q.shape
    weights = inputs.state.weights
    chunks = tokens // inputs.chunk_size + 2  # and a part of one at each end
    scalars = chunks * native.saved_size(weights, int(inputs.chunk_size))
    total = batch * heads * scalars * weights[0].element_size()
    if total > max_saved_bytes:
        return None
    if total <= native.SAVED_BLOCK_BYTES:
        return SavedShapes(1, batch * heads, scalars)
    return SavedShapes(int(batch * heads), 1, scalars)


def empty(weights: Sequence[Tensor], shapes: SavedShapes) -> list[Tensor]:
    """The buffers: blocks of activations, then the states between runs."""
    blocks = [weights[0].new_empty(shapes.rows, shapes.scalars) for _ in range(shapes.blocks)]
    return [*blocks, *(weights[0].new_empty(shape) for shape in shapes.borders(weights))]


class _Runs:
    """The runs of a call in turn, each with its part of the buffers."""

    def __init__(self, shapes: SavedShapes, saved: list[Tensor]):
        self.blocks, self.borders = saved[: shapes.blocks], saved[shapes.blocks :]
        self.used = self.run = 0

    def next_blocks(self, run: ChunkRun, inputs: RunInputs) -> list[Tensor]:
        scalars = inputs.slots() // run.chunk_size * native.saved_size(inputs.anchor, run.chunk_size)
        self.used += scalars
        return [block[:, self.used - scalars : self.used] for block in self.blocks]

    def forward(self, run: ChunkRun, inputs: RunInputs) -> RunOutput:
        out = native.scan_run_into(run, inputs, self.next_blocks(run, inputs))
        state = [*out.state.anchor, *out.state.w, *out.state.s]
        if self.run < MAX_RUNS - 1:  # the call goes on from these very tensors, if it goes on
            self.borders[self.run * len(state) : (self.run + 1) * len(state)] = state
        self.run += 1
        return out

    def forward_again(self, run: ChunkRun, inputs: RunInputs) -> RunOutput:
        """The run as a node of autograd, without computing it: outputs that only a backward pass follows."""
        layers, blocks = len(inputs.anchor), self.next_blocks(run, inputs)
        state, self.borders = self.borders[: 3 * layers], self.borders[3 * layers :]
        if not state:  # after the last run, nobody reads it
            state = [torch.empty_like(w) for w in inputs.anchor * 3]
        finished = native.FinishedRun(blocks, split_state(state))
        return split_outputs(native.ScanRun.apply(run, 0, finished, *inputs.flatten()))


def scan_and_save(inputs: ScanInputs, shapes: SavedShapes) -> tuple[ScanOutput, list[Tensor]]:
    """`native_scan`, and the buffers. What this call does not need of them is 0."""
    runs = _Runs(shapes, empty(inputs.state.weights, shapes))
    out = scan_runs(inputs, runs.forward)
    for block in runs.blocks:
        block[:, runs.used :].zero_()
    first = max(runs.run - 1, 0) * 3 * len(inputs.state.weights)  # the last run's end is the call's
    borders = [x if i < first else torch.zeros_like(x) for i, x in enumerate(runs.borders)]
    return out, [*runs.blocks, *borders]


def scan_again(inputs: ScanInputs, shapes: SavedShapes, saved: list[Tensor]) -> ScanOutput:
    """What `scan_and_save` returned as nodes of autograd: with the right backward pass, but empty numbers."""
    return scan_runs(inputs, _Runs(shapes, saved).forward_again)
