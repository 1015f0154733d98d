"""A replayed token is to the bit what the layers compute, whatever happens to them and to the state in between."""

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import SEGMENT, WINDOW, assert_bitwise, tiny_model, tokens
from test_stepping_aside import CHANGES, CHANGES_OF_MAC
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.gating import ProductGate
from titans_lm.models import replay
from titans_lm.models.replay import MAX_FAILURES, RecordedToken
from titans_lm.ops.cpu.recorder import Replay

pytestmark = pytest.mark.usefixtures("unchecked")
LONG = 2 * SEGMENT + WINDOW + 7
MODELS: dict[str, dict[str, Any]] = {
    "lmm": {}, "mac": {}, "mag": {}, "mal": {}, "window": {}, "mag convex": {"gate": "convex"},
    "mac convex": {"gate": "convex"}, "mag without persistent tokens": {"num_persistent_tokens": 0},
    "mag threshold": {"surprise_threshold": 1.0}, "lmm depth 1": {"memory_layers": 1, "memory_form": "plain"},
    "mac no momentum": {"memory_momentum": False, "memory_forgetting": False},
}  # fmt: skip
each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, **changes: Any) -> TitansForCausalLM:
    return tiny_model(name.split()[0], **{**MODELS[name], **changes})


@torch.no_grad()
def begin(model: TitansForCausalLM, rows: int = 1, replays: bool = True) -> TitansState:
    """A state that is decoding, after three tokens. Without `replays` each token runs the layers."""
    state = model.initial_state(rows)
    model(tokens(rows, 3, seed=1), past_key_values=state)
    model.begin_decoding(state)
    if not replays:
        state.replay = None
    return state


@torch.no_grad()
def decode(model: TitansForCausalLM, state: TitansState, ids: Tensor, **options: Any) -> list[Tensor]:
    return [model(ids[:, i : i + 1], past_key_values=state, **options).logits for i in range(ids.shape[1])]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[RecordedToken]:
    """The tokens that are replayed from now on."""
    seen: list[RecordedToken] = []
    run = RecordedToken.run
    monkeypatch.setattr(RecordedToken, "run", lambda self, *a: seen.append(self) or run(self, *a))
    return seen


@each_model
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (3, torch.float64)])
def test_replayed_tokens_are_those_of_the_layers(name: str, rows: int, dtype: torch.dtype, replayed):
    model, ids = make(name, dtype=dtype), tokens(rows, LONG)
    ours, expected = begin(model, rows), begin(model, rows, replays=False)
    found, wanted = decode(model, ours, ids), decode(model, expected, ids)
    assert all(map(torch.equal, found, wanted))
    assert_bitwise(ours.clone(), expected.clone())
    segments = -(-LONG // SEGMENT) if name.startswith("mac") else 0
    assert len(replayed) >= LONG - 3 - 4 * segments
    assert 3 + 4 * segments < LONG, "the test replays nothing"


@each_model
def test_what_was_returned_stays_as_it_was(name: str, replayed):
    model, ids = make(name), tokens(1, LONG)
    with torch.no_grad():
        state = begin(model)
        out = [model.model(ids[:, i : i + 1], past_key_values=state).last_hidden_state for i in range(LONG)]
        state = begin(model, replays=False)
        expected = [model.model(ids[:, i : i + 1], past_key_values=state).last_hidden_state for i in range(LONG)]
    assert replayed
    assert all(map(torch.equal, out, expected))


# ------------------------------------------------------------------------------------------------ changes


def new_data(block: nn.Module, _: ExitStack) -> None:
    block.mlp.up_proj.weight.data = block.mlp.up_proj.weight.data + 1


def transposed(block: nn.Module, _: ExitStack) -> None:
    weight = block.memory.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.T


def in_place(block: nn.Module, _: ExitStack) -> None:
    with torch.no_grad():
        block.memory.q_proj.weight.mul_(-1)


def another_module(block: nn.Module, _: ExitStack) -> None:
    other = copy.deepcopy(block.memory)
    with torch.no_grad():
        other.v_proj.weight.mul_(-1)
    block.memory = other


def setting(name: str, value: Any) -> Callable[[nn.Module, ExitStack], None]:
    return lambda block, _: setattr(block.memory, name, value)


def hook_of(name: str) -> Callable[[nn.Module, ExitStack], None]:
    def change(block: nn.Module, _: ExitStack) -> None:
        part = block.get_submodule(name) if name else block
        part.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:]))

    return change


def own_forward(block: nn.Module, _: ExitStack) -> None:
    block.mlp.down_proj.forward = lambda x: x.sum(-1, keepdim=True).expand(*x.shape[:-1], block.norm.weight.numel())


def bypassed(block: nn.Module, stack: ExitStack) -> None:
    stack.enter_context(bypass_memory(block))


def autocast(_: nn.Module, stack: ExitStack) -> None:
    stack.enter_context(torch.autocast("cpu"))


MORE: dict[str, Callable[[nn.Module, ExitStack], None]] = {
    "new data": new_data, "transposed": transposed, "in place": in_place, "another module": another_module,
    "lr": setting("lr", 0.1), "clip": setting("clip", 0.01), "threshold": setting("surprise_threshold", 1e9),
    "activation": setting("activation", "gelu"), "backend": setting("backend", "chunked"),
    "hook of the block": hook_of(""), "hook of the memory": hook_of("memory"), "hook of the MLP": hook_of("mlp"),
    "hook of the attention": hook_of("attention"), "hook of a norm": hook_of("mlp_norm"), "own forward": own_forward,
    "bypassed": bypassed, "autocast": autocast,
}  # fmt: skip
ALL = {**CHANGES, **MORE}
OF_MAC = [name for name in {**MORE, **CHANGES_OF_MAC} if name != "hook of the attention"]  # whose methods are no calls


@pytest.mark.parametrize(("kind", "change"), [*(("mag", name) for name in ALL), *(("mac", name) for name in OF_MAC)])
def test_changes_between_tokens_are_seen(kind: str, change: str, replayed):
    dtype = torch.float32 if change == "autocast" else torch.float64
    model, ids = tiny_model(kind, dtype, segment_size=16, num_hidden_layers=1), tokens(2, 12)
    other = copy.deepcopy(model)
    ours, expected, same = begin(model, 2), begin(other, 2, replays=False), begin(other, 2)
    decode(model, ours, ids[:, :6])
    decode(other, expected, ids[:, :6])
    decode(other, same, ids[:, :6])
    assert replayed
    without = decode(other, same, ids[:, 6:9])
    for own, state in ((model, ours), (other, expected)):
        with ExitStack() as stack:
            (ALL | CHANGES_OF_MAC)[change](own.model.layers[0], stack)
            logits = decode(own, state, ids[:, 6:9])
            if own is model:
                found = logits
    for ours_now, wanted, old in zip(found, logits, without, strict=True):
        torch.testing.assert_close(ours_now, wanted)
        assert not torch.equal(ours_now, old), "the change changes nothing"


def test_another_model_with_a_state_that_was_replayed(replayed):
    model, other, ids = tiny_model("mag"), tiny_model("mag", seed=1), tokens(1, 12)
    ours, expected = begin(model), begin(model, replays=False)
    for state in (ours, expected):
        decode(model, state, ids[:, :6])
    assert replayed
    assert all(map(torch.equal, decode(other, ours, ids[:, 6:]), decode(other, expected, ids[:, 6:])))


@pytest.mark.parametrize("name", ["mag", "mac", "lmm", "window"])
@pytest.mark.parametrize(
    "call", ["surprise", "hidden", "mask", "frozen", "two tokens", "inference", "threads", "eager"]
)
def test_other_calls_in_between(name: str, call: str, replayed):
    model, ids = make(name, segment_size=16), tokens(2, 14)
    found = []
    for replays in (True, False):
        state = begin(model, 2, replays)
        logits = decode(model, state, ids[:, :6])
        with torch.no_grad(), ExitStack() as stack:
            options: dict[str, Any] = {"surprise": {"output_surprise": True}, "hidden": {"output_hidden_states": True},
                                       "mask": {"attention_mask": torch.tensor([[1], [0]])}}.get(call, {})  # fmt: skip
            state.frozen = call == "frozen"
            if call == "inference":
                stack.enter_context(torch.inference_mode())
            if call == "threads":
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(2)
            if call == "eager":
                model.config._attn_implementation = "eager"
                stack.callback(setattr, model.config, "_attn_implementation", "sdpa")
            width = 2 if call == "two tokens" else 1
            logits.append(model(ids[:, 6 : 6 + width], past_key_values=state, **options).logits)
        state.frozen = False
        if call == "two tokens":
            model.begin_decoding(state)
        found.append((logits + decode(model, state, ids[:, 8:]), state.clone()))
    assert replayed
    (ours, our_state), (expected, state_of_layers) = found
    assert all(map(torch.equal, ours, expected))
    assert_bitwise(our_state, state_of_layers)


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("name", ["mag", "mac", "lmm"])
def test_forks_and_copies_of_a_state_that_is_replayed(name: str, replayed):
    model, ids = make(name), tokens(2, 24)
    expected_state = begin(model, 2, replays=False)
    expected = decode(model, expected_state, ids[:, :10])
    state = begin(model, 2)
    assert all(map(torch.equal, decode(model, state, ids[:, :10]), expected))
    forks = [state.clone(), copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.detach()]
    kept = [fork.clone() for fork in forks]
    wanted = decode(model, expected_state, ids[:, 10:])
    assert all(map(torch.equal, decode(model, state, ids[:, 10:]), wanted))
    for fork, before in zip(forks, kept, strict=True):
        assert_bitwise(fork.clone(), before)
        for ours, theirs in zip(decode(model, fork, ids[:, 10:]), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(replayed) > 8


def test_reordered_rows_are_no_longer_recorded():
    """A beam search selects rows at each token."""
    model, ids = tiny_model("mag"), tokens(2, 2 * MAX_FAILURES)
    ours, expected = begin(model, 2), begin(model, 2, replays=False)
    for i in range(ids.shape[1]):
        for state in (ours, expected):
            state.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(*(decode(model, state, ids[:, i : i + 1])[0] for state in (ours, expected)))
    assert not ours.replay.is_possible


@each_model
def test_rows_at_different_positions(name: str, replayed):
    """As a server has them: in other places of windows, segments and chunks."""
    model, ids, mask = make(name, segment_size=16), tokens(3, LONG), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :5] = 0
    found = []
    for replays in (True, False):
        with torch.no_grad():
            state = model.initial_state(3)
            model(tokens(3, 9, seed=1), attention_mask=mask, past_key_values=state)
            model.begin_decoding(state)
        state.replay = state.replay if replays else None
        found.append((decode(model, state, ids), state.clone()))
    assert len(replayed) > LONG // 5
    assert all(map(torch.equal, *(logits for logits, _ in found)))
    assert_bitwise(*(state for _, state in found))


def test_operators_beside_compiled_steps_are_not_left_out(replayed):
    """A gate that computes in PyTorch's operators: its token is no list of steps."""

    class Gate(nn.Module):
        def forward(self, y: Tensor, m: Tensor) -> Tensor:
            return y * m.tanh()

    model, ids = tiny_model("mag"), tokens(1, 8)
    for block in model.model.layers:
        block.gate = Gate()
    ours, expected = begin(model), begin(model, replays=False)
    assert all(map(torch.equal, decode(model, ours, ids), decode(model, expected, ids)))
    assert not ours.replay.is_possible
    assert not replayed


def test_after_a_hook_for_some_tokens_others_are_replayed_again(replayed):
    model, ids, found = tiny_model("mag"), tokens(1, 16), []
    for replays in (True, False):
        state = begin(model, replays=replays)
        logits = decode(model, state, ids[:, :5])
        hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:]))
        logits += decode(model, state, ids[:, 5 : 2 + MAX_FAILURES])
        hook.remove()
        before = len(replayed)
        logits += decode(model, state, ids[:, 2 + MAX_FAILURES :])
        assert (len(replayed) > before) == replays
        found.append(logits)
    assert all(map(torch.equal, *found))


class SwitchedGate(ProductGate):
    """Runs the compiled steps of its class, but of which inputs is decided in each call."""

    is_on = True

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return super().forward(y, m if self.is_on else y)


class NumpyGate(nn.Module):
    """Computes with no operator of PyTorch that could be seen."""

    is_on = True

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return torch.from_numpy(y.numpy() * np.tanh(m.numpy()))


@pytest.mark.parametrize("gate", [lambda: SwitchedGate(32, 1e-6).double(), NumpyGate])
def test_classes_of_others_are_run_at_each_token(gate: Callable[[], nn.Module], replayed):
    model, ids = tiny_model("mag"), tokens(1, 12)
    for block in model.model.layers:
        block.gate = gate()
    found = []
    for replays in (True, False):
        state = begin(model, replays=replays)
        logits = decode(model, state, ids[:, :6])
        for block in model.model.layers:
            block.gate.is_on = False
        found.append(logits + decode(model, state, ids[:, 6:]))
        for block in model.model.layers:
            block.gate.is_on = True
    assert all(map(torch.equal, *found))
    assert not replayed


def own_branch(block: nn.Module) -> None:
    branch = block.branch
    block.branch = lambda x, *inputs: branch(2 * x, *inputs)


def own_class(block: nn.Module) -> None:
    class Twice(type(block)):
        def branch(self, x: Tensor, *inputs: Any) -> Any:
            return super().branch(2 * x + 1, *inputs)

    block.__class__ = Twice


@pytest.mark.parametrize("change", [own_branch, own_class])
def test_methods_that_are_replaced_between_tokens_are_called(change, replayed):
    found, ids = [], tokens(1, 9)
    for replays in (True, False):
        model = tiny_model("mag")
        state = begin(model, replays=replays)
        logits = decode(model, state, ids[:, :6])
        change(model.model.layers[0])
        found.append(logits + decode(model, state, ids[:, 6:]))
    assert len(replayed) >= 3
    assert all(map(torch.equal, *found))


def test_a_block_that_is_compiled_between_tokens_is_called(replayed):
    model, ids = tiny_model("mag"), tokens(1, 6)
    state, calls = begin(model), []
    decode(model, state, ids)
    before = len(replayed)
    assert before

    def compiled(block: nn.Module, *args: Any) -> Any:
        calls.append(block)
        return block._call_impl(*args)

    for block in model.model.layers:
        block._compiled_call_impl = partial(compiled, block)  # as `block.compile()` sets it
    decode(model, state, ids)
    assert len(calls) == 2 * ids.shape[1]
    assert len(replayed) == before


def test_a_replay_whose_buffers_cannot_be_allocated_leaves_the_state(monkeypatch):
    model, ids = tiny_model("mag"), tokens(1, 9)
    ours, expected = begin(model), begin(model, replays=False)
    decode(model, ours, ids[:, :6])
    decode(model, expected, ids[:, :6])

    def fail(_: replay.Replay) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(replay.Replay, "run", fail)
        with pytest.raises(MemoryError):
            decode(model, ours, ids[:, :1])
    assert all(map(torch.equal, decode(model, ours, ids[:, 6:]), decode(model, expected, ids[:, 6:])))


def test_an_interrupt_while_a_token_is_changed_leaves_none_to_replay(monkeypatch, replayed):
    model, ids = make("mag"), tokens(1, LONG)
    exchange, interrupts = Replay.exchange, [True]

    def interrupted(self: Replay, addresses: dict[int, int]) -> None:
        some = dict(list(addresses.items())[::2])
        exchange(self, some if interrupts else addresses)
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(Replay, "exchange", interrupted)
    state, expected = begin(model), begin(model, replays=False)
    decode(model, state, ids[:, :1])
    with pytest.raises(KeyboardInterrupt):
        decode(model, state, ids[:, 1:2])
    found = decode(model, state, ids[:, 1:])
    assert replayed
    assert all(map(torch.equal, found, decode(model, expected, ids)[1:]))
