"""Published recurrences and closed forms that the memory must equal, each written here from its paper."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from titans_lm.ops import Backend, MemoryForm, MemoryState, initial_state, memory_scan
from titans_lm.ops.chunked import scan as scan_module
from tolerance import assert_close

B, T, H, K, V = 2, 40, 2, 6, 5


def tokens(*width: int) -> Tensor:
    return torch.randn(B, T, H, *width).double()


def gates(high: float) -> Tensor:
    return high * torch.rand(B, T, H).double()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: list[Tensor],
    chunk: int,
    theta: Tensor | float,
    eta: Tensor | float = 0.0,
    alpha: Tensor | float = 0.0,
    form: MemoryForm = MemoryForm(),  # noqa: B008 - immutable
    backend: Backend = "auto",
) -> tuple[Tensor, MemoryState, Tensor]:
    """Run the memory from M_0 = `weights` -> outputs, state, each token's loss at the anchor."""
    each = (torch.as_tensor(gate, dtype=q.dtype).expand(q.shape[:3]) for gate in (theta, eta, alpha))
    state = initial_state(tuple(weights), q.shape[0])
    y, state, surprise = memory_scan(q, k, v, *each, state, chunk_size=chunk, form=form, surprise=True, backend=backend)
    return y, state, surprise.loss


def each_head(recurrence, *inputs: Tensor) -> Tensor:
    """Apply `recurrence` to the `[T, *]` of every row and head -> `[B, T, H, *]`."""
    rows = [[recurrence(*(x[b, :, h] for x in inputs)) for h in range(H)] for b in range(B)]
    return torch.stack([torch.stack(heads, 1) for heads in rows])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ linear memories


chunk_one = pytest.mark.parametrize("backend", ["linear", "chunked", "native"])
"""The backends that run a linear memory with chunk_size=1."""


@pytest.mark.parametrize("chunk", [T, 2**30])
@pytest.mark.parametrize("decays", [False, True])
def test_linear_attention(decays: bool, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scan_module, "MAX_CHUNK", 16)
    q, k, v, theta = tokens(K), tokens(K), tokens(V), gates(0.5)
    alpha = gates(0.3) if decays else torch.zeros(B, T, H).double()
    y, _, _ = scan(q, k, v, [torch.zeros(H, K, V).double()], chunk=chunk, theta=theta, alpha=alpha)

    def linear_attention(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        """o_t = sum_{s <= t} (a_{s+1} .. a_t) (q_t . k_s) v_s, term by term."""
        return torch.stack(
            [sum(a[s + 1 : t + 1].prod() * (q[t] @ k[s]) * v[s] for s in range(t + 1)) for t in range(T)]
        )

    assert_close(y, each_head(linear_attention, q, k, 2 * theta[..., None] * v, 1 - alpha))


@chunk_one
def test_delta_net(backend: Backend):
    q, k, v, theta = tokens(K), unit(tokens(K)), tokens(V), gates(0.5)
    start = torch.randn(H, K, V).double()
    y, _, _ = scan(q, k, v, [start], chunk=1, theta=theta, backend=backend)

    def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, s: Tensor) -> Tensor:
        """S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t (arXiv:2406.06484)."""
        s, out = s[0], []
        for t in range(T):
            s = s @ (torch.eye(K).double() - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
            out.append(s @ q[t])
        return torch.stack(out)

    s_0 = start.mT.expand(B, T, H, V, K)
    assert_close(y, each_head(delta_net, q, k, v, 2 * theta, s_0))


@chunk_one
def test_gated_delta_net(backend: Backend):
    q, k, v, theta, alpha = tokens(K), unit(tokens(K)), tokens(V), gates(0.3), gates(0.3)
    start = torch.randn(H, K, V).double()
    y, _, _ = scan(q, k, v, [start], chunk=1, theta=theta, alpha=alpha, backend=backend)

    def gated_delta_net(q: Tensor, k: Tensor, v: Tensor, a: Tensor, beta: Tensor, s: Tensor) -> Tensor:
        """S_t = S_{t-1} (a_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T, o_t = S_t q_t (arXiv:2412.06464)."""
        s, out = s[0], []
        for t in range(T):
            turn = a[t] * (torch.eye(K).double() - beta[t] * torch.outer(k[t], k[t]))
            s = s @ turn + beta[t] * torch.outer(v[t], k[t])
            out.append(s @ q[t])
        return torch.stack(out)

    a = 1 - alpha  # it decays before the error is taken, Titans after
    s_0 = start.mT.expand(B, T, H, V, K)
    assert_close(y, each_head(gated_delta_net, q, k, v * a[..., None], a, 2 * theta / a, s_0))


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_constant_gates_in_one_chunk_are_a_two_pole_filter(start: float):
    q, k, v = tokens(K), tokens(K), tokens(V)
    theta, eta, alpha = 0.1, 0.8, 0.05
    m_0 = start * torch.randn(H, K, V).double()
    y, state, _ = scan(q, k, v, [m_0], chunk=T, theta=theta, eta=eta, alpha=alpha)

    a, t = 1 - alpha, torch.arange(T).double()
    impulse = (a ** (t + 1) - eta ** (t + 1)) / (a - eta)  # poles a and eta
    write = 2 * theta * torch.einsum("bthk,bthv->bthkv", k, v - torch.einsum("bthk,hkv->bthv", k, m_0))
    lag = (t[:, None] - t).long()
    response = torch.where(lag >= 0, impulse[lag.clamp(min=0)], 0)
    m = a ** (t + 1)[:, None, None, None] * m_0 + torch.einsum("ts,bshkv->bthkv", response, write)
    assert_close(y, torch.einsum("bthk,bthkv->bthv", q, m))
    assert_close(state.weights[0], m[:, -1])


# ------------------------------------------------------------------------------------------------ deep memories


def mini_batches(f, loss, w_0: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rate: float, size: int) -> Tensor:
    """TTT (arXiv:2407.04620, section 2.4): W_t = W_0 - rate sum_{s <= t} grad loss(W_0; x_s), z_t = f(q_t; W_t)."""
    out, w = [], tuple(w_0)
    for start in range(0, len(q), size):
        part = slice(start, start + size)
        each = vmap(grad(loss), (None, 0, 0))(w, k[part], v[part])
        path = tuple(w_l - rate * g.cumsum(0) for w_l, g in zip(w, each, strict=True))
        out.append(vmap(f)(path, q[part]))
        w = tuple(p[-1] for p in path)
    return torch.cat(out)


def check_ttt(network, widths: list[int], activation: str) -> None:
    """f(x) = x + LN(network(x)), loss 1/2 || LN(network(k)) - (v - k) ||^2, mini-batches of 16: theta is rate / 2."""
    q, k, v = unit(tokens(K)), unit(tokens(K)), tokens(K)
    weights = [torch.randn(H, i, o).double() / i**0.5 for i, o in pairwise(widths)]
    norm = (1 + 0.3 * torch.randn(H, K).double(), 0.3 * torch.randn(H, K).double())
    rate = 0.05
    form = MemoryForm(activation=activation, norm=norm)
    y, _, _ = scan(q, k, v, weights, chunk=16, theta=rate / 2, form=form)

    def head(h: int, b: int) -> Tensor:
        def normed(w: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return F.layer_norm(network(w, x), (K,), norm[0][h], norm[1][h], eps=1e-6)

        def loss(w: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
            return 0.5 * (normed(w, k) - (v - k)).square().sum()

        def f(w: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return x + normed(w, x)

        return mini_batches(f, loss, [w[h] for w in weights], q[b, :, h], k[b, :, h], v[b, :, h], rate, 16)

    expected = torch.stack([torch.stack([head(h, b) for h in range(H)], 1) for b in range(B)])
    assert_close(y, expected)


def test_ttt_linear():
    check_ttt(lambda w, x: x @ w[0], [K, K], "silu")


def test_ttt_mlp():
    check_ttt(lambda w, x: F.gelu(x @ w[0], approximate="tanh") @ w[1], [K, 4 * K, K], "gelu")


@pytest.mark.parametrize(("chunk", "depth"), [(1, 3), (7, 3), (1, 1)])
def test_titans_with_momentum_and_forgetting(chunk: int, depth: int):
    """Equations 10 to 15 for a memory of some layers, gradients by torch.func at the weights of the chunk's start."""
    q, k, v = unit(tokens(K)), unit(tokens(K)), tokens(V)
    theta, eta, alpha = gates(0.1), gates(0.9), gates(0.1)
    widths = pairwise([K, *[8] * (depth - 1), V])
    weights = [torch.randn(H, i, o).double() / i**0.5 for i, o in widths]
    y, _, _ = scan(q, k, v, weights, chunk=chunk, theta=theta, eta=eta, alpha=alpha)

    def memory(w: tuple[Tensor, ...], x: Tensor) -> Tensor:
        for w_l in w[:-1]:
            x = F.silu(x @ w_l)
        return x @ w[-1]

    def loss(w: tuple[Tensor, ...], k: Tensor, v: Tensor) -> Tensor:
        return (memory(w, k) - v).square().sum()

    for b in range(B):
        for h in range(H):
            m = tuple(w[h] for w in weights)
            s = tuple(torch.zeros_like(w) for w in m)
            for t in range(T):
                at = (b, t, h)
                if t % chunk == 0:
                    anchor = m
                g = grad(loss)(anchor, k[at], v[at])
                s = tuple(eta[at] * s_l - theta[at] * g_l for s_l, g_l in zip(s, g, strict=True))
                m = tuple((1 - alpha[at]) * m_l + s_l for m_l, s_l in zip(m, s, strict=True))
                assert_close(y[at], memory(m, q[at]), f"y[{at}]")


# ------------------------------------------------------------------------------------------------ behaviour


def losses_of_a_repeated_key(chunk: int, theta: float, chunks: int = 8, form: MemoryForm = MemoryForm()) -> Tensor:  # noqa: B008 - immutable
    """The loss at the start of each chunk, where every token is the same association."""
    k, v = unit(torch.randn(K).double()), torch.randn(K).double()
    weights = [torch.randn(1, K, K).double()]
    shape = (1, chunk * chunks, 1, K)
    _, _, loss = scan(k.expand(shape), k.expand(shape), v.expand(shape), weights, chunk=chunk, theta=theta, form=form)
    return loss[0, ::chunk, 0]


@pytest.mark.parametrize(("chunk", "theta"), [(1, 0.2), (4, 0.1), (16, 0.02), (4, 0.23), (16, 0.1)])
def test_a_repeated_key_multiplies_its_error_by_one_minus_two_c_theta(chunk: int, theta: float):
    loss = losses_of_a_repeated_key(chunk, theta)
    assert_close(loss[1:] / loss[:-1], torch.full((7,), (1 - 2 * chunk * theta) ** 2, dtype=torch.float64))


def test_a_repeated_key_diverges_when_c_theta_is_above_one():
    assert (losses_of_a_repeated_key(16, 1.1 / 16).diff() > 0).all()
    assert (losses_of_a_repeated_key(16, 0.9 / 16).diff() < 0).all()
    norm = (torch.ones(1, K).double(), torch.zeros(1, K).double())
    bounded = losses_of_a_repeated_key(16, 1.1 / 16, chunks=64, form=MemoryForm(norm=norm, clip=1.0))
    assert (bounded <= bounded[0]).all()


def test_chunk_one_and_a_step_of_one_count_parity():
    bits = torch.randint(0, 2, (B, T, H)).double()
    one, start = torch.ones(B, T, H, 1).double(), [torch.ones(H, 1, 1).double()]
    parity = 1 - 2 * (bits.cumsum(1) % 2)
    y, _, _ = scan(one, one, 0 * one, start, chunk=1, theta=bits)  # eigenvalue 1 - 2 theta: 1 or -1
    assert torch.equal(y[..., 0].round(), parity)
    y, _, _ = scan(one, one, 0 * one, start, chunk=4, theta=bits)
    assert not torch.equal(y[..., 0].round(), parity)


def error_on_the_nonlinear_stream(depth: int, chunk: int) -> float:
    """v = |k A|, read once: || M(k) - v ||^2 / || v ||^2 over the last quarter of 1,024 tokens, 8 heads, theta = 0.018.

    Keys uniform on the unit sphere of width 16, hidden width 64, A and M_0 normal; no momentum, no forgetting.
    """
    torch.manual_seed(0)
    count, heads, width, hidden = 1024, 8, 16, 64
    widths = [width] + [hidden] * (depth - 1) + [width]
    k = unit(torch.randn(1, count, heads, width))
    v = (k @ torch.randn(width, width)).abs()
    weights = [torch.randn(heads, i, o) / i**0.5 for i, o in pairwise(widths)]
    with torch.no_grad():
        _, _, loss = scan(k, k, v, weights, chunk=chunk, theta=0.018)
    late = slice(count * 3 // 4, None)
    return float(loss[:, late].sum() / v[:, late].square().sum())


def test_on_a_nonlinear_stream_deep_beats_linear_and_a_chunk_has_its_price():
    assert error_on_the_nonlinear_stream(depth=1, chunk=1) >= 0.95
    assert error_on_the_nonlinear_stream(depth=1, chunk=16) >= 0.95
    one, sixteen, sixty_four = (error_on_the_nonlinear_stream(depth=2, chunk=chunk) for chunk in (1, 16, 64))
    assert one <= 0.45
    assert sixteen <= 0.5
    assert one <= sixteen < sixty_four
    assert 0.55 <= sixty_four <= 0.8
