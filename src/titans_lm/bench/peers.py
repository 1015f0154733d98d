"""Other implementations: titans-pytorch, and on a GPU flash-linear-attention and attention.

titans-pytorch's `NeuralMemory` takes its queries, keys, values and gates from projections of one sequence. Here that
sequence is ours, side by side: [q, k, v, theta, eta's and alpha's logits], and a projection is a slice of it. With the
sum of squares as its loss, chunk_size=1 and batch_size=C it then computes our recurrence with chunks of C tokens, which
`titans_pytorch` checks, outputs, last weights and all gradients, before anything is measured.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_lm.bench.measure import Contender, Setting, matmul
from titans_lm.bench.operation import HEADS, WIDTH, Inputs, Read, Shape, both_ways, inputs, reader

TOLERANCE = 1e-9
"""Maximum relative difference in float64 of two programs that compute the same function."""
ACROSS_CHUNKS = 3
"""Number of chunks of the check."""


class NotTheSame(ValueError):
    """A peer does not compute our function as it should; its figures must not be reported."""


def require(package: str) -> None:
    """Raises ValueError with the installation command if the package is missing."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"--peers needs {package.replace('_', '-')}: pip install 'titans-lm[peers]'")


# ------------------------------------------------------------------------------------------ titans-pytorch


class _PlainMemory(nn.Module):
    """Our plain memory of depth 2 in the form of titans-pytorch: an MLP with SiLU."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(WIDTH, hidden), torch.zeros(hidden, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weights
        return F.silu(x @ first) @ second


class _Part(nn.Module):
    """Selects channels of a sequence."""

    def __init__(self, first: int, size: int):
        super().__init__()
        self.part = slice(first, first + size)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.part]


class _Gate(_Part):
    """A channel for each head: `[B, T, H]` -> `[B H, T]`, or with further dimensions of size 1 around."""

    def __init__(self, first: int, around: str):
        super().__init__(first, HEADS)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        gate = super().forward(x).transpose(1, 2).flatten(0, 1)
        return {"": gate, "after": gate[..., None], "both": gate[None, ..., None]}[self.around]


def _squares(output: Tensor, target: Tensor) -> Tensor:
    """Eq. 12; theirs by default is the mean."""
    return (output - target).square().sum(-1)


def _memory(hidden: int, store_chunk: int, batch: int | None) -> Any:
    """Their layer, reduced to the recurrence."""
    from titans_pytorch import NeuralMemory

    inner = HEADS * WIDTH
    layer = NeuralMemory(
        dim=inner, heads=HEADS, dim_head=WIDTH, chunk_size=store_chunk, batch_size=batch, model=_PlainMemory(hidden),
        store_memory_loss_fn=_squares, adaptive_step_transform=nn.Identity(), pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    )  # fmt: skip
    layer.to_queries, layer.to_keys, layer.to_values = (_Part(i * inner, inner) for i in range(3))
    gates = 3 * inner
    layer.to_adaptive_step = _Gate(gates, "")
    layer.to_momentum, layer.to_decay_factor = _Gate(gates + HEADS, "both"), _Gate(gates + 2 * HEADS, "after")
    layer.retrieve_gate, layer.combine_heads = None, nn.Identity()
    return layer


def _sequence(x: Inputs) -> Tensor:
    tokens = [part.flatten(2) for part in (x.q, x.k, x.v)]
    return torch.cat([*tokens, x.theta, torch.logit(x.eta), torch.logit(x.alpha)], -1)


def _titans_pytorch_reader(shape: Shape, store_chunk: int, batch: int | None, setting: Setting) -> Read:
    """Their layer reads our inputs from our M_0: y and, for each layer of the memory, its weights after all tokens."""
    layer = _memory(shape.hidden, store_chunk, batch).to(setting.device)
    del layer.memory_model_parameters  # each call sets ours, so that gradients reach them

    def read(x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer.memory_model_parameters = list(x.first)
        y, state = layer(_sequence(x))
        last = [w.unflatten(0, (shape.rows, HEADS)) for w in state.states[0].values()]
        return y.unflatten(-1, (HEADS, WIDTH)), tuple(last)

    return read


def titans_pytorch(options: dict[str, Any], setting: Setting) -> Contender:
    """chunk_size=`store_chunk`, batch_size=`batch`. Raises NotTheSame if it should compute our function and does
    not."""
    own = {key: options[key] for key in Shape._fields}
    shape, variant = Shape(**own), (options["store_chunk"], options["batch"])
    same = variant == (1, shape.chunk)
    about: dict[str, Any] = {
        "same_function": same,
        "dtype": "float32",
        "difference_float64": _difference(shape, variant, setting),
    }
    if same and not about["difference_float64"] <= TOLERANCE:
        raise NotTheSame(f"titans-pytorch differs from our recurrence by {about['difference_float64']:.1e} in float64")
    read = _titans_pytorch_reader(shape, *variant, setting)
    x = inputs(shape, torch.float32, setting.device)
    with torch.no_grad():
        about["difference_float32"] = _largest([(read(x)[0], reader(shape, setting)(x)[0])])
    small = inputs(shape._replace(tokens=2 * shape.chunk), torch.float32, setting.device)

    def warm() -> None:
        for action in both_ways(read, small).values():
            action.run(action.prepare())

    large, facts = matmul(setting)
    return Contender({"matmul": large, **both_ways(read, x)}, {**about, **facts}, warm)


def _difference(shape: Shape, variant: tuple[int, int | None], setting: Setting) -> float:
    """Largest relative difference of outputs, last weights and all gradients, in float64."""
    shape = shape._replace(rows=1, tokens=ACROSS_CHUNKS * shape.chunk)
    x = inputs(shape, torch.float64, setting.device).trained()
    results = []
    for read in (_titans_pytorch_reader(shape, *variant, setting), reader(shape, setting)):
        y, after = read(x)
        last = after.weights if hasattr(after, "weights") else after
        loss = sum((part * _steady(part)).sum() for part in (y, *last))
        results.append([y, *last, *torch.autograd.grad(loss, x.flat())])
    return _largest(list(zip(*results, strict=True)))


def _steady(x: Tensor) -> Tensor:
    """Fixed weights of a loss in which every element takes part."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)


def _largest(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)


# ------------------------------------------------------------------------------------------ on a GPU


def gated_delta_rule(options: dict[str, Any], setting: Setting) -> Contender:
    """flash-linear-attention's kernel at the same heads and width: a matrix as memory, no momentum. Not our function,
    and not measured on a GPU."""
    if importlib.util.find_spec("fla") is None:
        raise ValueError("flash-linear-attention is not installed")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def read(x: Inputs) -> tuple[Tensor, None]:
        half = (part.to(torch.bfloat16) for part in (x.q, x.k, x.v))  # its kernels take no float32
        y, _ = chunk_gated_delta_rule(*half, g=torch.log1p(-x.alpha), beta=x.theta.to(torch.bfloat16))
        return y.to(x.v.dtype), None

    return _other(options, setting, read)


def attention(options: dict[str, Any], setting: Setting) -> Contender:
    """Causal attention at the same heads and width (flash attention, where the type allows it). Not our function, and
    not measured on a GPU."""

    def read(x: Inputs) -> tuple[Tensor, None]:
        q, k, v = (part.transpose(1, 2) for part in (x.q, x.k, x.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None

    return _other(options, setting, read)


def _other(options: dict[str, Any], setting: Setting, read: Read) -> Contender:
    x = inputs(Shape(**options), setting.torch_dtype(), setting.device)
    large, facts = matmul(setting)
    return Contender({"matmul": large, **both_ways(read, x)}, {"same_function": False, **facts})
