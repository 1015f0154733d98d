"""Programs of `torch.export`: one reads a prompt, one reads a token after it. They run without this package's models.

A program's state is a dict of tensors, with the names that they have in memory files. Its graph calls this package's
operators, so a process that loads it imports this module first.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM

Tensors = dict[str, Tensor]


class _Prefill(nn.Module):
    def __init__(self, model: TitansForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensors]:
        out = self.model(input_ids, use_cache=True)
        return out.logits, out.cache.tensors()


class _Step(nn.Module):
    def __init__(self, model: TitansForCausalLM, state: TitansState):
        super().__init__()
        self.model, self.like = model, state

    def forward(self, input_ids: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        before = self.like.shallow_copy()
        before.set_tensors(state)
        before.assume_begun()
        out = self.model(input_ids, past_key_values=before)
        return out.logits, before.tensors()


def export_prefill(model: TitansForCausalLM) -> ExportedProgram:
    """The program of a prompt: `logits, state = program.module()(input_ids)`, for `[B, T]` tokens without padding.

    B is any number of rows, and T any number of tokens from 2 on. The logits are `[B, T, V]`. Its rows begin with the
    learned first memory, or that of `model.begin_with`.
    """
    example = torch.zeros(2, 3 * _longest(model), dtype=torch.long, device=model.device)
    shapes = {0: Dim("rows", min=1), 1: Dim("tokens", min=2)}
    return _export(model, _Prefill(model), (example,), (shapes,))


def export_step(model: TitansForCausalLM) -> ExportedProgram:
    """The program of one more token: `logits, state = program.module()(input_ids, state)`, for `[B, 1]` tokens.

    `state` is that of the program of a prompt, or `TitansState.tensors()`; none of its rows may be at its first token,
    which raises RuntimeError. Raises ValueError for a model whose attention is unlimited, because its state grows.
    """
    if model.config.variant == "attention" and model.config.window_size is None:
        raise ValueError("export_step needs a state of constant size: window_size is None")
    example = torch.zeros(2, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        state = model(example, use_cache=True).cache
    rows = Dim("rows", min=1)
    tensors = {name: t.clone() for name, t in state.tensors().items()}  # one tensor of two names would be one input
    shapes = ({0: rows}, {name: {0: rows} for name in tensors})
    return _export(model, _Step(model, state), (example[:, :1], tensors), shapes)


def _export(model: TitansForCausalLM, program: nn.Module, example: Any, shapes: Any) -> ExportedProgram:
    """Export in evaluation mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(program, example, dynamic_shapes=shapes, strict=False)
    finally:
        model.train(training)


def _longest(model: TitansForCausalLM) -> int:
    config = model.config
    return max(config.segment_size, config.window_size or 0, config.memory_chunk_size)
