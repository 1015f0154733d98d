"""The paper's equations for one stream, token by token and head by head, written without the package's functions.

Parameters come from the modules under test; the computation is here. Autograd takes the inner gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotated(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotary positions, as complex numbers: x `[T, heads, d]`, feature i the real and i + d/2 the imaginary part."""
    real, imaginary = x.chunk(2, -1)
    half = real.shape[-1]
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(len(x), half, dtype=torch.float64), position[:, None].double() * frequency)
    z = torch.complex(real.double(), imaginary.double()) * turn[:, None]
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def attend(
    layer: nn.Module,
    x: Tensor,
    position: Tensor,
    groups: list[tuple[Tensor, Tensor | None, Tensor]],
    base: float = 10000.0,
) -> Tensor:
    """Queries x `[T, D]` at `position` over `groups` of (inputs `[S, D]`, positions or None, visible `[T, S]`)."""

    def heads(y: Tensor, position: Tensor | None) -> Tensor:
        y = y.unflatten(-1, (layer.num_heads, layer.head_dim))
        return y if position is None else rotated(y, position, base)

    keys = torch.cat([heads(layer.k_proj(y), p) for y, p, _ in groups])
    values = torch.cat([heads(layer.v_proj(y), None) for y, _, _ in groups])
    visible = torch.cat([seen for _, _, seen in groups], 1)
    q, k, v = (y.transpose(0, 1) for y in (heads(layer.q_proj(x), position), keys, values))
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible[None, None])[0]
    return layer.o_proj(y.transpose(0, 1).flatten(1))


def window_mask(size: int, window: int | None) -> Tensor:
    """Token i sees token j: not later, and among the last `window` tokens, itself counted."""
    i, j = torch.arange(size)[:, None], torch.arange(size)
    return (j <= i) & (j > i - (window or size))


class Memory:
    """One stream of a `NeuralMemory`. `write_and_read(x_t)` is equations 10 to 15."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        learned = list(layer.initial_memory)
        zeros = [layer.q_proj.weight.new_zeros(shape).requires_grad_() for shape in layer.shapes[len(learned) :]]
        self.weights = [[w[head] for w in learned + zeros] for head in range(layer.num_heads)]
        self.momentum = [[torch.zeros_like(w) for w in weights] for weights in self.weights]
        self.anchor, self.count = self.weights, 0
        self.queries: list[Tensor] = []
        self.past: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
        self.last = torch.zeros_like(layer.q_proj.weight[0])
        self.errors: list[Tensor] = []
        """|f(x_{t-1}) - x_t|^2, where a prediction says what is surprising: what f is trained by."""

    def write_and_read(self, x: Tensor) -> Tensor:
        self.write(x)
        return self.read(x, self.weights, self.past[0])

    def write(self, x: Tensor) -> None:
        layer = self.layer
        if self.count % layer.chunk_size == 0:
            self.anchor, self.first = self.weights, x
        self.count += 1
        gates_from = self.first if layer.gates_of == "chunk" else x
        k, v = self._unit(self._project(x, 1, self.past[1])), self._project(x, 2, self.past[2])
        theta = layer.lr * torch.sigmoid(layer.theta(gates_from))
        if layer.predictor is not None:
            self.errors.append((layer.predictor.map(self.last) - x.detach()).square().sum())
            self.last = x.detach()
            if layer.surprise_threshold is not None and self.errors[-1] <= layer.surprise_threshold:
                theta = torch.zeros_like(theta)
        eta = torch.zeros_like(theta) if layer.eta is None else torch.sigmoid(layer.eta(gates_from))
        alpha = torch.zeros_like(theta) if layer.alpha is None else torch.sigmoid(layer.alpha(gates_from))
        momentum, weights = [], []
        for h in range(layer.num_heads):
            gradient = self._gradient(h, k[h], v[h])
            momentum.append([eta[h] * s - theta[h] * g for s, g in zip(self.momentum[h], gradient, strict=True)])
            weights.append([(1 - alpha[h]) * w + s for w, s in zip(self.weights[h], momentum[h], strict=True)])
        self.momentum, self.weights = momentum, weights

    def read(self, x: Tensor, weights: list[list[Tensor]], past: list[Tensor]) -> Tensor:
        layer = self.layer
        q = self._unit(self._project(x, 0, past))
        y = torch.stack([self._finish(h, q[h], self._mlp(q[h], weights[h])) for h in range(layer.num_heads)])
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) * layer.output_norm.weight
        return layer.o_proj.weight @ (y.flatten() * torch.sigmoid(layer.output_gate.weight @ x))

    def _project(self, x: Tensor, which: int, past: list[Tensor]) -> Tensor:
        layer = self.layer
        past.append((layer.q_proj, layer.k_proj, layer.v_proj)[which].weight @ x)
        y = past[-1]
        if layer.convs is not None:
            filters = layer.convs[which].weight
            y = sum(filters[:, -1 - age] * past[-1 - age] for age in range(min(filters.shape[1], len(past))))
        return (y * torch.sigmoid(y)).unflatten(0, (layer.num_heads, layer.head_dim))

    def _unit(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _mlp(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        activation = {"silu": F.silu, "gelu": lambda z: F.gelu(z, approximate="tanh")}[self.layer.activation]
        x = x @ weights[0]
        for w in weights[1:]:
            x = activation(x) @ w
        return x

    def _finish(self, head: int, x: Tensor, z: Tensor) -> Tensor:
        layer = self.layer
        if layer.norm_weight is None:
            return z
        return x + F.layer_norm(z, z.shape, layer.norm_weight[head], layer.norm_bias[head], 1e-6)

    def _gradient(self, head: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Of |M(k) - v|^2 at the anchor; 0 for a token that is not surprising enough."""
        layer = self.layer
        anchor = [w.view_as(w) for w in self.anchor[head]]  # not through k and v, which may have been read from it
        z = self._mlp(k, anchor)
        loss = (self._finish(head, k, z) - v).square().sum()
        (output,) = torch.autograd.grad(loss, z, create_graph=True)
        if layer.clip is not None:
            output = output * layer.clip / (output.norm() + layer.clip)
        gradient = torch.autograd.grad(z, anchor, output, create_graph=True)
        if layer.surprise_threshold is not None and layer.predictor is None and loss <= layer.surprise_threshold:
            return tuple(torch.zeros_like(g) for g in gradient)
        return gradient


def rms(norm: nn.Module, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def gate(module: nn.Module, y: Tensor, m: Tensor) -> Tensor:
    """y (x) m, or g y + (1 - g) m."""
    if not hasattr(module, "mix"):
        return rms(module.y_norm, y) * torch.sigmoid(rms(module.m_norm, m))
    g = torch.sigmoid(module.mix(torch.cat([y, m], -1)))
    return g * y + (1 - g) * m


def windowed(layer: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    """Sliding-window attention; the persistent tokens `prefix` are always visible."""
    position = torch.arange(len(x))
    everything = torch.ones(len(x), len(prefix), dtype=torch.bool)
    return attend(
        layer, x, position, [(prefix, None, everything), (x, position, window_mask(len(x), layer.window_size))]
    )


def mac(block: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    """Equations 21 to 25, segment by segment."""
    memory, size, outputs, queries = Memory(block.memory), block.segment_size, [], []
    s = rms(block.norm, x)
    for start in range(0, len(x), size):
        part = s[start : start + size]
        position = start + torch.arange(len(part))
        before = memory.weights
        h = torch.stack([memory.read(token, before, queries) for token in part])
        causal = window_mask(len(part), None)
        everything = torch.ones(len(part), len(prefix), dtype=torch.bool)
        groups = [
            (rms(block.norm, prefix), None, everything),
            (rms(block.retrieved_norm, h), None, causal),
            (part, position, causal),
        ]
        y = attend(block.attention, part, position, groups)
        m = torch.stack([memory.write_and_read(token) for token in rms(block.memory_norm, part + y)])
        outputs.append(gate(block.gate, y, m))
    return torch.cat(outputs)


def mag(block: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    """Equations 26 to 28."""
    memory, prefix, x = Memory(block.memory), rms(block.norm, prefix), rms(block.norm, x)
    m = torch.stack([memory.write_and_read(token) for token in torch.cat([prefix, x])])[len(prefix) :]
    return gate(block.gate, windowed(block.attention, prefix, x), m)


def mal(block: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    """Equations 29 to 31, the memory and the attention each with its norm and residual."""
    memory, both = Memory(block.memory), torch.cat([prefix, x])
    m = torch.stack([memory.write_and_read(token) for token in rms(block.norm, both)])
    inputs = rms(block.attention_norm, both + m)
    return m[len(prefix) :] + windowed(block.attention, inputs[: len(prefix)], inputs[len(prefix) :])


def lmm(block: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    memory = Memory(block.memory)
    return torch.stack([memory.write_and_read(t) for t in rms(block.norm, torch.cat([prefix, x]))])[len(prefix) :]


def attention(block: nn.Module, prefix: Tensor, x: Tensor) -> Tensor:
    return windowed(block.attention, rms(block.norm, prefix), rms(block.norm, x))


BRANCHES = {"mac": mac, "mag": mag, "mal": mal, "lmm": lmm, "attention": attention}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """A whole language model on one row of tokens `[T]` -> `[T, vocabulary]`."""
    x = model.model.embed_tokens.weight[ids]
    for block in model.model.layers:
        prefix = x.new_zeros(0, x.shape[1]) if block.persistent is None else block.persistent
        x = x + BRANCHES[model.config.variant](block, prefix, x)
        z, mlp = rms(block.mlp_norm, x), block.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(z)) * mlp.up_proj(z))
    return rms(model.model.norm, x) @ model.lm_head.weight.T
