"""One token of attention in compiled code, in one call: projections, rotary positions, buffers, softmax."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from titans_lm.layers.few_rows import few_rows_weights
from titans_lm.layers.key_values import Places, SegmentBuffers, WindowBuffers
from titans_lm.layers.weight_addresses import WeightAddresses
from titans_lm.ops.cpu.compiled import as_contiguous, recording, run_step, thread_count


@runtime_checkable  # the tests check annotations as they run
class StepAttention(Protocol):
    """The parts of an `Attention` that a step uses."""

    num_heads: int
    head_dim: int
    q_proj: nn.Linear


class StepInputs(NamedTuple):
    """What a step reads beside the weights."""

    x: Tensor
    """`[B, 1, D]`."""
    before: Tensor | None
    """`[B, 1, D]`, a token without position, whose keys and values come before those of x."""
    cos: Tensor
    """`[B or 1, 1, head_dim / 2]`, of x's angles."""
    sin: Tensor


def attention_step(
    attention: StepAttention, inputs: StepInputs, cache: WindowBuffers | SegmentBuffers, places: Places
) -> Tensor | None:
    """Write a token into the `cache`, and attend: the output `[B, 1, D]`. None where compiled code cannot run."""
    x, keys, values = inputs.x, cache.keys[0], cache.values[0]
    found = few_rows_weights(x, attention, _describe)
    if found is None or not keys.dtype == values.dtype == x.dtype:
        return None
    assert keys.is_contiguous()  # a copy would be written, not they
    assert values.is_contiguous()
    batch, heads, slots, width = keys.shape
    if (batch, heads, width) != (len(x), attention.num_heads, attention.head_dim) or max(places.ends) > slots:
        return None  # of another model: the operations raise
    x, cos, sin = (as_contiguous(t, x.dtype) for t in (x, inputs.cos, inputs.sin))
    before = None if inputs.before is None else as_contiguous(inputs.before, x.dtype)
    room, output = x.new_empty(6, batch, heads * width), x.new_empty(x.shape)
    numbers = (
        batch, heads, width, found.width, slots, thread_count(4 * found.width * heads * width),
        cos[0].numel() if len(cos) > 1 else 0,
        x.data_ptr(), 0 if before is None else before.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(),
        values.data_ptr(), *(part.data_ptr() for part in room.unbind()), output.data_ptr(), *found.numbers,
        *places.slots, *places.ends,
    )  # fmt: skip
    run_step("titans_attention_step", x.dtype, numbers)
    if (recorder := recording.get()) is not None:
        recorder.note_places(cache)
    return output


def _describe(attention: StepAttention, found: WeightAddresses) -> None:
    assert isinstance(attention, nn.Module)
    inner, found.width = attention.num_heads * attention.head_dim, found.shape(attention, "q_proj", nn.Linear)[-1]
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (inner, found.width)) | {"o_proj": (found.width, inner)}
    found.numbers = [found.linear(attention, name, shape) for name, shape in shapes.items()]
