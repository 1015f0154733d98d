"""The inputs and outputs of the memory operation: tokens, state, form of the memory, surprise."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

Activation = Literal["silu", "gelu"]


class MemoryState(NamedTuple):
    """The memory after any number of tokens, also in the middle of a chunk. Its size does not depend on that number.

    Each tuple has one float32 or float64 tensor `[B, H, in, out]` for each layer of the memory.
    """

    anchor: tuple[Tensor, ...]
    """The weights at the start of the current chunk. Every gradient of the chunk is taken at them."""
    weights: tuple[Tensor, ...]
    """M_t, the weights after the last token. At a chunk start they equal the anchor."""
    momentum: tuple[Tensor, ...]
    """S_t, the momentum: the decaying sum of past gradients."""
    position: Int[Tensor, " B"]
    """Tokens of the current chunk so far, 0 <= position < chunk_size. Rows with different padding differ here."""

    def detach(self) -> "MemoryState":
        """The same memory, cut off from the autograd graph."""
        anchor, weights, momentum = (tuple(w.detach() for w in part) for part in self[:3])
        return MemoryState(anchor, weights, momentum, self.position)


class MemoryForm(NamedTuple):
    """The function M(k), apart from its weights, and the rule that selects the tokens to write.

    `norm=None` is the paper's plain MLP. `norm=(weight, bias)`, each `[H, V]`, is the residual form of TTT
    (arXiv:2407.04620, section 2.7): M(k) = k + layer_norm(MLP(k)). It needs V == K.
    """

    activation: Activation = "silu"
    """The activation between the layers. "gelu" is its tanh approximation."""
    norm: tuple[Float[Tensor, "H V"], Float[Tensor, "H V"]] | None = None
    clip: float | None = None
    """c > 0 scales each token's gradient G at the MLP's output to G c / (|G| + c), so that |G| < c. None: no clip."""
    threshold: float | None = None
    """A token is written only if its loss (eq. 12) is above this; else its theta is 0. None: all tokens are written."""


class Tokens(NamedTuple):
    """Queries, keys, values and gates: `[B, T, H, *]`, or chunk by chunk `[N, R, C, *]` with R = B * H rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor  # step size; gates have no last dimension
    eta: Tensor  # momentum
    alpha: Tensor  # forgetting


class ScanInputs(NamedTuple):
    """The arguments of `memory_scan`, checked: what every backend is called with."""

    tokens: Tokens
    state: MemoryState
    chunk_size: int
    form: MemoryForm
    mask: Bool[Tensor, "B T"] | None
    surprise: bool
    max_saved_bytes: int


class Surprise(NamedTuple):
    """How unexpected each token was before it was written; 0 where masked."""

    loss: Float[Tensor, "B T H"]
    """|| M(k) - v ||^2 at the anchor (eq. 12)."""
    gradient_norm: Float[Tensor, "B T H"]
    """Frobenius norm of the gradient of that loss by all weights of the head's memory, after the clip."""


class ScanOutput(NamedTuple):
    """What every backend returns for `ScanInputs`."""

    y: Float[Tensor, "B T H V"]
    state: MemoryState
    """The memory after the last token."""
    surprise: Surprise | None
    """None where it was not asked for."""


NORM_EPS = 1e-6
"""The epsilon of the residual form's layer norm (TTT's value)."""


def initial_state(weights: tuple[Float[Tensor, "H _i _o"], ...], batch: int) -> MemoryState:
    """The state before the first token: M_0 = `weights` in each of `batch` rows, S_0 = 0.

    Gradients flow back to `weights`. Half precision is cast to float32.
    """
    wide = tuple(w if w.dtype == torch.float64 else w.float() for w in weights)
    rows = tuple(w.expand(batch, *w.shape) for w in wide)
    zeros = tuple(torch.zeros_like(w) for w in rows)
    return MemoryState(rows, rows, zeros, torch.zeros(batch, dtype=torch.long, device=wide[0].device))


def where_rows(rows: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For each layer `[B, ...]`: `yes` in the rows where `rows` `[B]` is True, `no` in the others."""
    return tuple(torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(yes, no, strict=True))


def select_rows(rows: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`where_rows`, which on a CPU copies nothing if all rows agree, and reads no more than it has to if they do not.
    On a GPU a look at `rows` would wait for the device, and a traced call has no values."""
    if rows.device.type != "cpu" or is_traced(rows):
        return where_rows(rows, yes, no)
    values = rows.tolist()
    if all(values) or not any(values):
        return yes if all(values) else no
    if torch.is_grad_enabled() or any(a.dtype != b.dtype for a, b in zip(yes, no, strict=True)):
        return where_rows(rows, yes, no)
    chosen = tuple(x.clone() for x in no)
    for row in (i for i, value in enumerate(values) if value):
        for new, x in zip(chosen, yes, strict=True):
            new[row] = x[row]
    return chosen


def is_traced(x: Tensor) -> bool:
    """Whether `torch.compile`, `torch.export` or a fake tensor mode looks at a call with x: x may have no values."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor | FunctionalTensor)


def has_values(x: Tensor) -> bool:
    """Whether the values of x can be looked at: it is neither traced nor on the meta device, which has shapes alone."""
    return not (x.is_meta or is_traced(x))


def is_autocast(x: Tensor) -> bool:
    """Whether autocast acts on operations with x. The meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def for_all_lengths(x: Tensor) -> bool:
    """Whether `torch.export` traces a call with x `[B, ..., T, D]` or `[B, T, D]`: its one graph is for every T > 1."""
    return torch.compiler.is_exporting() and x.shape[-2] != 1


def assert_traced(condition: Tensor, message: str) -> None:
    """Put a check into a traced call: it raises RuntimeError where a run of the graph finds `condition` False."""
    torch._assert_async(condition, message)


def is_watched() -> bool:
    """Whether a mode, such as `FlopCounterMode`, looks at every operator that runs, or at every function."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if not all(getattr(mode, "knows_compiled_steps", False) for mode in modes):
        return True
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # a default device
