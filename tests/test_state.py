"""`TitansState` is a value: saved and loaded to the last bit, forked, reset and reordered whole, constant in size."""

import copy
import gc
import hashlib
import json
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import SEGMENT, assert_bitwise, each_kind, each_titan, state_tensors, tiny_config, tiny_model, tokens
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.models import cache_file
from titans_lm.models.model_identity import _NOT_IDENTITY, identity
from tolerance import assert_close

READ = 2 * SEGMENT + 3
"""In the middle of a segment, of a chunk and of a window."""
pytestmark = pytest.mark.usefixtures("unchecked")  # shapes are checked in the tests of the model
bounded = pytest.mark.parametrize("kind", ["mac", "mag", "mal", "lmm", "window"])


@torch.no_grad()
def read(model: TitansForCausalLM, ids: Tensor, state: TitansState | None = None, mask: Tensor | None = None):
    """-> logits, state"""
    out = model(ids, past_key_values=state, attention_mask=mask, use_cache=True)
    return out.logits, out.past_key_values


def ragged(model: TitansForCausalLM) -> TitansState:
    """Three rows at different places."""
    mask = torch.arange(READ) < torch.tensor([[READ], [5], [SEGMENT]])
    return read(model, tokens(3, READ), mask=mask.long())[1]


def parts(state: TitansState) -> list[Tensor]:
    return list(state_tensors(state).values())


# ------------------------------------------------------------------------------------------------ files


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_saved_state_is_loaded_to_the_last_bit_and_goes_on(kind, dtype, tmp_path):
    model = tiny_model(kind, dtype)
    state = ragged(model)
    state.save(tmp_path / "memory")
    loaded = TitansState.load(tmp_path / "memory", model)
    assert_bitwise(loaded, state)
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]
    expected, _ = read(model, tokens(3, 9, seed=1), state)
    logits, _ = read(model, tokens(3, 9, seed=1), loaded)
    assert torch.equal(logits, expected)
    assert_bitwise(loaded, state)


@each_titan
def test_generation_goes_on_from_a_file(kind, tmp_path):
    model, ids = tiny_model(kind), tokens(2, READ)
    _, state = read(model, ids[:, :-1])
    state.save(tmp_path / "memory")
    loaded = TitansState.load(tmp_path / "memory", model)
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, past_key_values=state, **options)
    assert torch.equal(model.generate(ids, past_key_values=loaded, **options), expected)


def test_the_same_weights_in_another_object_load_the_file(tmp_path):
    """A memory belongs to what the model is and has learned, not to the process."""
    model = tiny_model("mag", torch.float32)
    state = ragged(model)
    state.save(tmp_path / "memory")
    model.save_pretrained(tmp_path / "model")
    again = TitansForCausalLM.from_pretrained(tmp_path / "model")
    assert_bitwise(TitansState.load(tmp_path / "memory", again), state)
    assert_bitwise(TitansState.load(str(tmp_path / "memory"), again.model), state)


@bounded
def test_size_does_not_depend_on_what_was_read(kind, tmp_path):
    model = tiny_model(kind, torch.float32, num_hidden_layers=1, memory_chunk_size=64, segment_size=64)
    sizes, files = [], []
    for length in (1_000, 10_000):
        with torch.no_grad():
            state = model(tokens(1, length), use_cache=True, logits_to_keep=1).past_key_values
        state.save(tmp_path / "memory")
        sizes.append(state.nbytes)
        files.append((tmp_path / "memory").stat().st_size)
    assert sizes[0] == sizes[1] == sum(t.nbytes for t in parts(state))
    assert abs(files[1] - files[0]) <= 8  # the header's alignment: the count of tokens is written in digits


def saved(folder: Path) -> tuple[TitansForCausalLM, Path]:
    model = tiny_model("mag", torch.float32)
    ragged(model).save(folder / "memory")
    return model, folder / "memory"


def refused(path: Path, model: TitansForCausalLM, reason: str | None = None) -> None:
    """One line that names the file and says why."""
    with pytest.raises((ValueError, OSError), match=reason) as error:
        TitansState.load(path, model)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"memory_chunk_size": 8}, {"window_size": 6}, {"variant": "mal"}, {"memory_lr": 0.25}, {"rope_theta": 5000.0}],
    ids=str,
)
def test_another_configuration_is_refused(changes, tmp_path):
    _, path = saved(tmp_path)
    refused(path, tiny_model("mag", torch.float32, **changes), "its configuration differs")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.memory.theta.bias", "model.layers.0.memory.initial_memory.0"]
)
def test_other_weights_are_refused(name, tmp_path):
    model, path = saved(tmp_path)
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))
    refused(path, model, "its weights differs")


def test_weights_of_another_precision_are_refused(tmp_path):
    model, path = saved(tmp_path)
    refused(path, model.double(), "its weights differs")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 1000, -1000, -1])
def test_a_truncated_file_is_refused(length, tmp_path):
    model, path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    refused(path, model, "damaged")


@pytest.mark.parametrize("place", [0, 3, 7, 8, 20, 60, 200, 900])
def test_a_flipped_bit_of_the_header_is_refused(place, tmp_path):
    model, path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    refused(path, model)


def header_changed(path: Path, change: Callable[[dict], None]) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def swap(header: dict) -> None:
    a, b = "layers.0.memory.memory.weights.0", "layers.1.memory.memory.weights.0"
    header[a], header[b] = header[b], header[a]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].update(columns="-3"),
        lambda header: header["__metadata__"].update(format="titans-lm memory 0"),
        lambda header: header["__metadata__"].pop("weights"),
        lambda header: header.pop("__metadata__"),
        lambda header: header["layers.0.memory.memory.weights.0"].update(shape=[3, 2, 24, 16]),
        lambda header: header["layers.0.memory.memory.weights.0"].update(dtype="I32"),
        lambda header: header.update({"another": header.pop("layers.0.memory.memory.weights.0")}),
    ],
    ids=["columns", "format", "no weights", "no metadata", "shape", "type", "name"],
)
def test_a_header_that_does_not_fit_is_refused(change, tmp_path):
    model, path = saved(tmp_path)
    header_changed(path, change)
    refused(path, model)


def test_a_file_of_something_else_is_refused(tmp_path):
    model, path = saved(tmp_path)
    path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes())
    refused(path, model, "damaged")
    path.write_bytes(pickle.dumps({"position": [1]}))
    refused(path, model, "damaged")
    torch.save({"position": torch.ones(1)}, path)
    refused(path, model, "damaged")
    save_file({"position": torch.ones(1)}, path)
    refused(path, model, "not a memory file")
    path.unlink()
    refused(path, model)
    path.mkdir()
    refused(path, model)


def test_a_file_holds_no_pickle(tmp_path):
    _, path = saved(tmp_path)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    assert json.loads(content[8 : 8 + size])["__metadata__"]["format"].startswith("titans-lm memory")
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """Where the disk is full: the earlier file is as it was, and nothing is left beside it."""
    model, path = saved(tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="memory"):
            read(model, tokens(3, 9))[1].save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["memory"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    model = tiny_model("mag", torch.float32)
    _, state = read(model, tokens(1, 3))
    with pytest.raises(OSError, match="nowhere"):
        state.save(tmp_path / "nowhere" / "memory")
    assert not list(tmp_path.iterdir())


def test_saving_again_replaces_and_keeps_ordinary_permissions(tmp_path):
    model, path = saved(tmp_path)
    _, state = read(model, tokens(1, 3))
    state.save(path)
    assert_bitwise(TitansState.load(path, model), state)
    (tmp_path / "other").write_text("")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_state_is_saved_after_its_model_went(tmp_path):
    model = tiny_model("mag", torch.float32)
    _, state = read(model, tokens(1, 3))
    again = copy.deepcopy(model)
    del model
    gc.collect()
    state.save(tmp_path / "memory")
    assert_bitwise(TitansState.load(tmp_path / "memory", again), state)


def unpickled(value, folder: Path):
    torch.save(value, folder / "pickled")
    return torch.load(folder / "pickled", weights_only=False)


@each_kind
def test_a_pickled_state_goes_on_and_is_saved(kind, tmp_path):
    model, ids = tiny_model(kind, torch.float32), tokens(3, 9, seed=1)
    state = ragged(model)
    for again in (unpickled(state, tmp_path), pickle.loads(pickle.dumps(state))):
        assert_bitwise(again, state)
        again.save(tmp_path / "memory")
        assert_bitwise(TitansState.load(tmp_path / "memory", model), state)
        assert torch.equal(read(model, ids, again)[0], read(model, ids, state.clone())[0])


def test_a_file_is_of_the_weights_when_it_is_written(tmp_path):
    """Training changes them while a state is carried, also one that was pickled in between."""
    model = tiny_model("mag", torch.float32)
    state = ragged(model)
    carried = unpickled(state, tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    read(model, tokens(3, 9), carried)
    for each in (state, carried):
        each.save(tmp_path / "memory")
        TitansState.load(tmp_path / "memory", model)
    unpickled(state, tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_begins_with_a_memory_is_copied(copied, tmp_path):
    model = tiny_model("mag", torch.float32)
    model.begin_with(ragged(model).select([0]))
    ids = tokens(1, 9)
    expected, _ = read(model, ids)
    other = copied(model)
    assert torch.equal(read(other, ids)[0], expected)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    read(other, ids)[1].save(tmp_path / "memory")
    TitansState.load(tmp_path / "memory", other)
    refused(tmp_path / "memory", model, "its weights differs")


W0 = "layers.1.memory.memory.weights.0"
WEIGHTS = W0.replace(".", r"\.")
FORGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nan": (lambda t: {W0: t[W0].where(t[W0] != t[W0].max(), torch.nan)}, f"{WEIGHTS} has numbers that are not finite"),
    "inf": (lambda t: {W0: t[W0] / 0}, f"{WEIGHTS} has numbers that are not finite"),
    "double": (lambda t: {W0: t[W0].double()}, "mixes types: .*memory.memory"),
    "half": (lambda t: {W0: t[W0].half()}, "mixes types: .*memory.memory"),
    "all double": (
        lambda t: {name: value.double() for name, value in t.items() if ".memory.memory." in name},
        r"does not fit this model: .* is torch\.float64",
    ),
    "no rows": (lambda t: {name: value[:0] for name, value in t.items()}, "it has 0 rows"),
    "other rows": (lambda t: {W0: t[W0][:1]}, f"{WEIGHTS} is .* of 3 rows"),
    "before the start": (lambda t: {"position": t["position"] - 99}, "at positions"),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_file_made_by_hand_is_refused(forged, tmp_path):
    """Whole, with its right digest."""
    model, path = saved(tmp_path)
    tensors, card = cache_file.load_file(path)
    change, reason = FORGED[forged]
    cache_file.save_file(path, {**tensors, **change(tensors)}, card)
    refused(path, model, reason)


def test_a_state_that_is_no_numbers_leaves_the_file_as_it_was(tmp_path):
    model, path = saved(tmp_path)
    before, state = path.read_bytes(), ragged(model)
    state._apply(lambda t: t * torch.nan if t.is_floating_point() else t)
    with pytest.raises(ValueError, match="has numbers that are not finite"):
        state.save(path)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------ values


@each_kind
@pytest.mark.parametrize("fork", [TitansState.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_a_fork_is_independent(kind, fork):
    model = tiny_model(kind)
    state = ragged(model)
    other = fork(state)
    assert_bitwise(other, state)
    untouched = [t.clone() for t in parts(state)]
    a, _ = read(model, tokens(3, 9, seed=1), other)
    assert all(torch.equal(x, y) for x, y in zip(parts(state), untouched, strict=True))
    for tensor in parts(other):
        tensor.zero_()
    b, _ = read(model, tokens(3, 9, seed=1), state)
    assert torch.equal(a, b)


@each_kind
def test_reading_writes_no_tensor_in_place(kind):
    model = tiny_model(kind)
    state = ragged(model)
    held, copies = parts(state), [t.clone() for t in parts(state)]
    read(model, tokens(3, 9), state)
    assert all(torch.equal(x, y) for x, y in zip(held, copies, strict=True))


@each_kind
@pytest.mark.parametrize("rows", [[0], [2, 1], [], torch.tensor([1])])
def test_a_reset_row_begins_anew_and_the_others_go_on(kind, rows):
    model, ids = tiny_model(kind), tokens(3, 9, seed=1)
    state = ragged(model)
    expected, _ = read(model, ids, state.clone())
    fresh, _ = read(model, ids)
    state.reset(rows)
    assert [int(state.position[row]) == 0 for row in range(3)] == [row in list(rows) for row in range(3)]
    logits, _ = read(model, ids, state)
    for row in range(3):
        assert_close(logits[row], (fresh if row in list(rows) else expected)[row])


@each_kind
@pytest.mark.parametrize("how", ["all", "continuation", "select", "saved", "twice", "token by token", "padding first"])
def test_a_reset_holds_whatever_comes_next(kind, how, tmp_path):
    """All rows, a fork of new length 0, a file: what was reset is as new."""
    model, ids = tiny_model(kind), tokens(3, 9, seed=1)
    fresh, fresh_state = read(model, ids)
    state = ragged(model)
    state.reset(None if how == "all" else [0, 1, 2])
    if how == "continuation":
        state = state.continuation()
    elif how == "select":
        state = state.select([2, 0, 1])
    elif how == "saved":
        state.save(tmp_path / "memory")
        state = TitansState.load(tmp_path / "memory", model)
    elif how == "twice":
        read(model, ids, state)
        state.reset()
    elif how == "padding first":
        read(model, ids, state, torch.zeros(3, 9))
    pieces = ids.split(1, 1) if how == "token by token" else [ids]
    assert_close(torch.cat([read(model, piece, state)[0] for piece in pieces], 1), fresh)
    if kind != "full":  # attention over everything keeps the empty slots
        for name, tensor in state_tensors(state).items():
            assert_close(tensor, state_tensors(fresh_state)[name], name)


@each_kind
def test_nothing_of_what_was_read_is_left_after_a_reset(kind):
    """Also not where no later token would see it: a file of the state holds nothing of it."""
    model = tiny_model(kind)
    (_, one), (_, other) = (read(model, tokens(2, READ, seed=seed)) for seed in (1, 2))
    one.reset([1])
    other.reset([1])
    for name, tensor in state_tensors(one).items():
        assert torch.equal(tensor[1], state_tensors(other)[name][1]), name


def test_an_ended_segment_leaves_no_keys_and_values():
    model = tiny_model("mac")
    _, state = read(model, tokens(2, 2 * SEGMENT))
    assert all((t == 0).all() for name, t in state_tensors(state).items() if ".attention." in name)


@each_titan
def test_gradients_of_a_reset_row_flow_to_the_first_memory(kind):
    model = tiny_model(kind)
    state = ragged(model)
    state.reset()
    model(tokens(3, 9), past_key_values=state).logits.square().sum().backward()
    for layer in model.model.layers:
        assert all(w.grad.abs().sum() > 0 for w in layer.memory.initial_memory)


@each_kind
def test_rows_are_taken_repeated_and_reordered_whole(kind):
    model = tiny_model(kind)
    state = ragged(model)

    def changed(change: Callable[[TitansState], object]) -> TitansState:
        fork = state.clone()
        return change(fork) or fork

    for actual, rows in (
        (changed(lambda s: s.select([2, 0])), [2, 0]),
        (changed(lambda s: s.select(torch.tensor([1, 1, 2]))), [1, 1, 2]),
        (changed(lambda s: s.batch_select_indices(torch.tensor([0, 2]))), [0, 2]),
        (changed(lambda s: s.batch_repeat_interleave(2)), [0, 0, 1, 1, 2, 2]),
        (changed(lambda s: s.reorder_cache(torch.tensor([2, 2, 0]))), [2, 2, 0]),
    ):
        for name, tensor in state_tensors(actual).items():
            assert torch.equal(tensor, state_tensors(state)[name][rows]), name
        assert actual.batch_size == actual.max_batch_size == len(rows)
        ids = tokens(3, 9, seed=1)[rows]
        logits, _ = read(model, ids, actual)
        for row, origin in enumerate(rows):
            expected, _ = read(model, ids[row : row + 1], state.select([origin]))
            assert_close(logits[row], expected[0])


@each_kind
def test_to_a_device_is_a_state(kind):
    state = ragged(tiny_model(kind))
    assert state.to("cpu") is state  # as a tensor is, for hooks that pass on what they move
    moved = state.to("meta")
    assert moved is not state
    assert {t.device.type for t in state_tensors(moved).values()} == {"meta"}
    assert {t.device.type for t in state_tensors(state).values()} == {"cpu"}


@each_titan
def test_a_frozen_memory_is_read_and_not_written(kind):
    model, ids = tiny_model(kind), tokens(3, 2 * SEGMENT, seed=1)
    state = ragged(model)
    learning, _ = read(model, ids, state.clone())
    before = {name: t.clone() for name, t in state_tensors(state).items()}
    state.frozen = True
    logits, _ = read(model, ids, state)
    assert not torch.equal(logits, learning)
    changed = {name for name, t in state_tensors(state).items() if not torch.equal(t, before[name])}
    assert not {name for name in changed if ".memory.memory." in name}
    assert {name for name in changed if ".conv_state." in name}
    assert kind == "lmm" or {name for name in changed if ".attention." in name}
    assert torch.equal(state.position, before["position"] + 2 * SEGMENT)


@each_titan
def test_a_frozen_memory_reads_the_same_in_any_cut(kind):
    model, ids = tiny_model(kind), tokens(3, 2 * SEGMENT, seed=1)
    state = ragged(model)
    state.frozen = True
    expected, _ = read(model, ids, state.clone())
    assert_close(torch.cat([read(model, token, state)[0] for token in ids.split(1, 1)], 1), expected)
    assert state.clone().frozen
    assert state.select([0]).frozen


@each_kind
def test_a_state_that_was_copied_before_the_first_token_is_a_new_stream(kind):
    """With gradients on, too."""
    model, ids = tiny_model(kind), tokens(2, 9)
    fresh, _ = read(model, ids)
    for state in (
        model.initial_state(2).clone(),
        model.initial_state(1).select([0, 0]),
        model.initial_state(2).detach(),
    ):
        assert_close(model(ids, past_key_values=state).logits, fresh)


def test_a_state_with_a_history_of_gradients_is_deep_copied():
    model = tiny_model("mag")
    state = model(tokens(2, 9), use_cache=True).past_key_values
    assert_bitwise(copy.deepcopy(state), state)


def test_a_state_says_what_it_is():
    state = ragged(tiny_model("mag"))
    assert f"position=[{READ}, 5, {SEGMENT}]" in repr(state)
    assert len(state) == 2
    assert state.get_seq_length() == READ


@pytest.mark.parametrize("kind", ["mac", "mag", "mal", "lmm"])
def test_what_the_next_token_is_predicted_from_is_part_of_the_state(kind, tmp_path):
    changes = {"surprise_threshold": 50.0, "surprise_threshold_on": "prediction"}
    model = tiny_model(kind, torch.float32, **changes)
    ids = tokens(2, 2 * READ)
    expected, whole = read(model, ids)
    first, state = read(model, ids[:, :READ])
    state.save(tmp_path / "memory")
    loaded = TitansState.load(tmp_path / "memory", model)
    assert any(name.endswith(".prev_input") for name in state_tensors(loaded))
    second, loaded = read(model, ids[:, READ:], loaded)
    assert_close(torch.cat([first, second], 1), expected)
    for name, value in state_tensors(loaded).items():
        assert_close(value, state_tensors(whole)[name], name)
    always, _ = read(tiny_model(kind, torch.float32, **(changes | {"surprise_threshold": None})), ids)
    assert not torch.allclose(always, expected, rtol=1e-3)  # the threshold matters
    loaded.reset()
    again, _ = read(model, ids, loaded)
    assert_close(again, expected)


@pytest.mark.parametrize("kind", ["mac", "mag", "mal", "lmm"])
def test_a_chunk_s_gates_are_part_of_the_state(kind, tmp_path):
    model = tiny_model(kind, torch.float32, memory_gates_of="chunk", memory_chunk_size=7)
    ids = tokens(2, 2 * READ)
    expected, _ = read(model, ids)
    first, state = read(model, ids[:, :READ])  # ends within a chunk
    state.save(tmp_path / "memory")
    second, _ = read(model, ids[:, READ:], TitansState.load(tmp_path / "memory", model))
    assert_close(torch.cat([first, second], 1), expected)


def test_files_written_before_a_key_existed_belong_to_their_model_still():
    own = tiny_config("mag").own_fields()
    for key in _NOT_IDENTITY | {"memory_gates_of"}:
        del own[key]
    before = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    assert identity(tiny_model("mag"))["configuration"] == before
    assert identity(tiny_model("mag", memory_gates_of="chunk"))["configuration"] != before


def test_a_state_knows_that_its_rows_have_begun_until_one_is_reset():
    """So that a compiled call can leave out the first memory."""
    model = tiny_model("lmm")
    new, empty_row = model.initial_state(2), model.initial_state(2)
    read(model, tokens(2, 3), empty_row, mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert not new.has_begun()
    assert not empty_row.has_begun()
    state = read(model, tokens(2, 3), new)[1]
    read(model, tokens(2, 3), state, mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    for begun in (state, state.clone(), state.detach(), state.select([1, 0, 1])):
        assert begun.has_begun()
        assert all(begun.position > 0)
    state.reorder_cache(torch.tensor([1, 0]))
    assert state.has_begun()
    assert pickle.loads(pickle.dumps(state)).has_begun()
    state.reset([0])
    assert not state.has_begun()


def test_pending_tokens_are_joined_with_their_rows(tmp_path):
    model = tiny_model("mag", torch.float32)
    one, two = model.initial_state(1), model.initial_state(2)
    model(tokens(1, 4), past_key_values=one)
    model(tokens(2, 4), past_key_values=two)
    one.set_pending(torch.tensor([7]), True)
    whole = TitansState.concat([two, one])
    whole.save(tmp_path / "three.memory")
    assert TitansState.load(tmp_path / "three.memory", model).pending.tolist() == [-1, -1, 7]
    assert TitansState.concat([two, two]).pending is None


def test_positions_of_a_continuation_count_the_pending_token():
    model, ids = tiny_model("mag"), tokens(1, 20)
    state = model(ids[:, :10], use_cache=True).past_key_values
    state.set_pending(ids[:, 10], True)
    positions = torch.arange(11, 16)[None]
    out = model(ids[:, 11:16], position_ids=positions, past_key_values=state.continuation()).logits
    assert_close(out, model(ids[:, :16]).logits[:, 11:])
    with pytest.raises(ValueError, match="begins at 10 in row 0, which has read 11 tokens"):
        model(ids[:, 11:16], position_ids=positions - 1, past_key_values=state.continuation())
    again = model(ids[:, 10:16], position_ids=torch.arange(10, 16)[None], past_key_values=state).logits
    assert_close(again[:, 1:], out)


def test_a_state_whose_pending_tokens_were_read_has_none():
    model, ids = tiny_model("mag", torch.float32), tokens(2, 5)
    state = model.initial_state(2)
    model(ids[:, :3], past_key_values=state)
    state.set_pending(ids[:, 3], torch.tensor([True, False]))
    model(ids[:, 3:], past_key_values=state)
    assert state.pending is None
