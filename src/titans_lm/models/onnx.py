"""Programs of `torch.export` as ONNX: the memory's operators become operators of ONNX, token by token."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch.export import ExportedProgram

from titans_lm.layers.short_conv import eager_features
from titans_lm.ops.decode import decode_token, update_token
from titans_lm.ops.operators import Arguments, Outputs

NEW = "new_"
"""What the names of a state's outputs begin with; its inputs have the same names without it."""


def to_onnx(program: ExportedProgram) -> "torch.onnx.ONNXProgram":
    """The ONNX program of one that `export_prefill` or `export_step` made; `.save(path)` writes it.

    Its input is `input_ids`, and in the program of a token the state, by the names in memory files; its outputs are
    `logits` and the state, the same names after `new_`. It runs without this package. Tokens are written one after
    another, by the equations, so a prompt takes as long as its tokens one by one.

    Raises ValueError where `onnxscript` is not installed.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ValueError("to_onnx needs onnxscript: pip install 'titans-lm[onnx]'")
    ops = torch.ops.titans_lm
    written_out = {ops.scan.default: _scan, ops.step.default: _step, ops.features.default: _features}
    outputs = program.call_spec.out_spec
    _, state = outputs.unflatten([""] * outputs.num_leaves)
    inputs = ["input_ids", *(state if len(program.graph_signature.user_inputs) > 1 else ())]
    with torch.no_grad():
        plain = program.run_decompositions(written_out)
        made = torch.onnx.export(
            plain, input_names=inputs, output_names=["logits", *(NEW + name for name in state)], dynamo=True,
            verbose=False,
        )  # fmt: skip
    assert made is not None  # as it is with dynamo
    return made


def _features(past: Tensor, filters: Tensor, heads: int, head_dim: int) -> list[Tensor]:
    """`titans_lm::features`."""
    return list(eager_features(past, filters, heads=heads, head_dim=head_dim))


def _step(*arguments: Any) -> list[Tensor]:
    """`titans_lm::step`."""
    a = Arguments(*arguments)
    y, weights, momentum, surprise = update_token(a.inputs(), tuple(a.anchor))
    return Outputs(y.to(a.tokens[2].dtype), surprise, (), weights, momentum).flatten()


def _scan(*arguments: Any) -> list[Tensor]:
    """`titans_lm::scan` as a loop over tokens, without surprise, which no exported program asks for."""
    a = Arguments(*arguments)
    assert not a.surprise
    state = [*a.anchor, *a.weights, *a.momentum, a.position]
    tokens = [*a.tokens] if a.mask is None else [*a.tokens, a.mask]
    norm = [x for x in (a.norm_weight, a.norm_bias) if x is not None]

    def token(*tensors: Tensor) -> list[Tensor]:  # a loop sees no other tensors than its arguments
        first, last = len(state), len(tensors) - len(norm)
        return _token(a, tensors[:first], tensors[first:last], tensors[last:])

    if a.tokens[0].shape[1] == 0:
        return [a.tokens[2].clone(), *(x.clone() for x in state[:-1])]
    if a.tokens[0].shape[1] == 1:
        *state, _, y = token(*state, *(x[:, 0] for x in tokens), *norm)
        return [y[:, None], *state]
    begin, in_time = [x.clone() for x in state], [x.movedim(1, 0) for x in tokens]
    *state, _, y = scan_op(token, begin, in_time, tuple(norm))
    return [y.movedim(0, 1), *state]


def _token(a: Arguments, state: Sequence[Tensor], token: Sequence[Tensor], norm: Sequence[Tensor]) -> list[Tensor]:
    """The state `[*anchor, *weights, *momentum, position]` after one token, and what was read at it."""
    layers, rows = len(a.weights), [x[:, None] for x in token]
    anchor, weights, momentum = (list(state[i * layers : (i + 1) * layers]) for i in range(3))
    now = a._replace(tokens=rows[:6], anchor=anchor, weights=weights, momentum=momentum, position=state[-1])
    if norm:
        now = now._replace(norm_weight=norm[0], norm_bias=norm[1])
    if a.mask is not None:
        now = now._replace(mask=rows[6])
    y, after, _ = decode_token(now.inputs(), update_token)
    return [x.clone() for x in (*after.anchor, *after.weights, *after.momentum, after.position, y[:, 0])]
