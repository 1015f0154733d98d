"""`trace`: the numbers of a memory's layers, noted without changing any."""

import math

import numpy as np
import pytest
import torch

import titans_lm
from conftest import PERSISTENT, TITANS, VOCABULARY, assert_bitwise, each_titan, tiny_model, tokens
from titans_lm import Trace, trace
from titans_lm.analyze.arrays import AXES, BY_HEAD
from titans_lm.analyze.trace import read_bits
from titans_lm.inference.reader import Reader
from titans_lm.layers.neural_memory import memories


def plain(model, ids, state, piece, frozen=False):
    """Logits and state of a reading that nobody watches."""
    state = model.initial_state(1) if state is None else state.shallow_copy()
    state.frozen = frozen
    with torch.no_grad():
        logits = [model(part, past_key_values=state).logits[0] for part in ids.split(piece, 1)]
    state.frozen = False
    return torch.cat(logits), state


def bits_of(logits, ids):
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return (nats.double().numpy() / math.log(2)).astype(np.float32)


CHANGES = {
    "usual": {},
    "chunk gates": {"memory_gates_of": "chunk"},
    "convex, threshold": {"gate": "convex", "surprise_threshold": 20.0},
    "prediction": {"surprise_threshold": 1.0, "surprise_threshold_on": "prediction"},
    "linear": {"memory_layers": 1, "memory_form": "plain", "memory_momentum": False, "num_persistent_tokens": 0},
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, "usual") for kind in TITANS), ("mac", "chunk gates"), ("mag", "convex, threshold"),
     ("mal", "prediction"), ("lmm", "linear"), ("mac", "linear")],
)  # fmt: skip
def test_it_changes_no_bit_of_a_reading(kind, change):
    model, ids = tiny_model(kind, torch.float32, **CHANGES[change]), tokens(1, 33)
    _, begun = plain(model, tokens(1, 9, seed=1), None, 9)
    hooks = [len(part._forward_hooks) for part in model.modules()]
    for state, piece in ((None, 40), (begun, 5)):
        before = None if state is None else state.clone()
        logits, after = plain(model, ids, state, piece)
        found = trace(model, ids, state, piece=piece, snapshots=3)
        assert_bitwise(found.state, after)
        assert (found["bits"][1:] == bits_of(logits, ids)).all()
        still, _ = plain(model, ids, state, piece, frozen=True)
        assert (found["bits_frozen"][1:] == bits_of(still, ids)).all()
        if state is not None:
            assert_bitwise(state, before)
    assert [len(part._forward_hooks) for part in model.modules()] == hooks


@each_titan
def test_its_numbers_do_not_depend_on_the_calls(kind):
    model, ids = tiny_model(kind), tokens(1, 29)
    whole, parts = (trace(model, ids, piece=piece, snapshots=2) for piece in (29, 4))
    for name in ("bits", "bits_frozen", "probability", "memory_gate", *BY_HEAD):
        if name in whole:
            assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6, nan_ok=True), name
    for name in ("memory_norm", "momentum_norm", "memory_change"):
        assert parts[name][[0, -1]] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    assert (parts["prediction"] == whole["prediction"]).all()
    assert parts["checkpoint"].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 29]


def test_a_memory_alone_says_the_same():
    """Surprise, gates and norms from the layers' own parts, for a model whose first block is the memory alone."""
    model, ids = tiny_model("lmm", memory_gates_of="chunk"), tokens(1, 13)
    found = trace(model, ids, piece=6)
    memory, block = memories(model)[0], model.model.blocks()[0]
    with torch.no_grad():
        x = block.norm(model.model.embed_tokens(ids))
        _, state = memory(block.norm(block.persistent)[None])
        _, after, surprise = memory(x, state, surprise=True)
        both = torch.cat([block.norm(block.persistent)[None], x], 1)
        theta = memory.lr * torch.sigmoid(memory.theta(both))[0]
        first = [t - t % memory.chunk_size for t in range(PERSISTENT, PERSISTENT + 13)]
        gate = torch.sigmoid(memory.output_gate(x)).unflatten(-1, (2, 16)).mean(-1)[0]
    assert found["surprise"][:, 0] == pytest.approx(surprise.loss[0].numpy(), rel=1e-5)
    assert found["gradient_norm"][:, 0] == pytest.approx(surprise.gradient_norm[0].numpy(), rel=1e-5)
    assert found["theta"][:, 0] == pytest.approx(theta[first].numpy(), rel=1e-5)
    assert found["theta"][:, 0] == pytest.approx(surprise.theta[0].numpy(), rel=1e-5)
    assert found["output_gate"][:, 0] == pytest.approx(gate.numpy(), rel=1e-5)
    squares = [sum(w[0].square().sum((1, 2)) for w in part) for part in (after.memory.weights, after.memory.momentum)]
    assert found["memory_norm"][-1, 0] == pytest.approx(squares[0].sqrt().numpy(), rel=1e-5)
    assert found["momentum_norm"][-1, 0] == pytest.approx(squares[1].sqrt().numpy(), rel=1e-5)
    change = sum(
        (a - b)[0].square().sum((1, 2)) for a, b in zip(after.memory.weights, state.memory.weights, strict=True)
    )
    assert found["memory_change"][-1, 0] == pytest.approx(change.sqrt().numpy(), rel=1e-5)
    values = torch.linalg.svdvals(after.memory.weights[0][0]).numpy()
    assert found["singular_values"][-1, 0, :, 0] == pytest.approx(values, rel=1e-4)
    assert found["similarity"][-1, -1] == pytest.approx(1)
    assert np.isnan(found["similarity"][0]).all()


@each_titan
def test_it_traces_under_autocast(kind):
    model, ids = tiny_model(kind, torch.float32), tokens(1, 33)
    with torch.autocast("cpu", torch.bfloat16):
        logits, after = plain(model, ids, None, 8)
        found = trace(model, ids, piece=8)
    assert_bitwise(found.state, after)
    assert (found["bits"][1:] == bits_of(logits.float(), ids)).all()
    assert found["similarity"].dtype == np.float32
    learned = np.diagonal(found["similarity"], axis1=0, axis2=1)[..., 1:]
    assert learned == pytest.approx(1, abs=1e-5)  # bfloat16 would be off by 1e-3
    assert all(np.isfinite(found[name]).all() for name in (*BY_HEAD, "memory_norm", "momentum_norm"))


def test_theta_is_zero_where_nothing_is_written():
    free = tiny_model("mag", torch.float32)
    loss = trace(free, tokens(1, 40), frozen=False)["surprise"]
    model = tiny_model("mag", torch.float32, surprise_threshold=float(np.median(loss[:, 0])))
    found = trace(model, tokens(1, 40), frozen=False)
    written = found["surprise"] > model.config.surprise_threshold
    assert ((found["theta"] > 0) == written).all()
    assert 0 < written[:, 0].mean() < 1


@each_titan
def test_predictions_are_of_the_token_that_they_stand_at(kind):
    model, ids = tiny_model(kind, torch.float32), tokens(1, 21)
    found = trace(model, ids, piece=8, top=VOCABULARY + 5)
    probability = torch.softmax(plain(model, ids, None, 8)[0], -1).numpy()
    assert found["prediction"].shape == (21, VOCABULARY)
    assert (found["prediction"][0] == -1).all()
    for t in range(1, 21):
        assert found["probability"][t] == pytest.approx(np.sort(probability[t - 1])[::-1], rel=1e-4)
        assert found["prediction"][t, 0] == probability[t - 1].argmax()
        at = found["prediction"][t].tolist().index(int(ids[0, t]))
        assert -np.log2(found["probability"][t, at]) == pytest.approx(found["bits"][t], rel=1e-4)


def test_bits_are_the_reader_s(model):
    ids, seen = np.arange(60) % 200, []
    Reader(model, piece=16, on_tokens=lambda _source, _ids, bits: seen.append(bits)).read(ids)
    found = trace(model, ids, piece=16, frozen=False)
    assert found["bits"][1:] == pytest.approx(np.concatenate(seen)[1:], rel=1e-6)


def test_what_is_frozen_is_not_written(model):
    ids = tokens(1, 40)[0]
    with torch.no_grad():
        state = model.initial_state(1)
        rows = []
        for first, end, still in ((0, 10, False), (10, 25, True), (25, 40, False)):
            state.frozen = still
            rows.append(model(ids[None, first:end], past_key_values=state).logits[0])
    bits, predictions = read_bits(model, ids, None, [(10, 25)], top=2, piece=64)
    assert bits[1:] == pytest.approx(bits_of(torch.cat(rows), ids[None]), rel=1e-5)
    assert predictions["prediction"].shape == (40, 2)
    everything = read_bits(model, ids, None, [])[0]
    assert everything[:11] == pytest.approx(bits[:11], nan_ok=True)
    assert everything[12:] != pytest.approx(bits[12:])
    assert read_bits(model, ids, None, [(0, 40)])[0] == pytest.approx(trace(model, ids)["bits_frozen"], nan_ok=True)


def test_a_frozen_reading_has_no_surprise(model):
    found = trace(model, tokens(1, 20), mode="frozen")
    assert "surprise" not in found
    assert "bits_frozen" not in found
    assert (found["memory_change"] == 0).all()
    with pytest.raises(KeyError, match="it has: token_id, bits"):
        found["surprise"]


def test_files_hold_all_of_it(model, tmp_path):
    found = trace(model, tokens(1, 20), piece=7)
    assert found.arrays.keys() <= AXES.keys()
    data = found.to_xarray()
    assert data["theta"].dims == ("token", "layer", "head")
    assert data["memory_norm"].sel(checkpoint=14).shape == (2, 2)
    found.to_npz(tmp_path / "t.npz")
    again = Trace.from_npz(tmp_path / "t.npz")
    assert again.attributes == found.attributes
    assert len(again) == 20
    assert again.arrays.keys() == found.arrays.keys()
    for name, array in found.arrays.items():
        assert np.array_equal(again[name], array, equal_nan=array.dtype.kind == "f"), name
    found.to_netcdf(tmp_path / "t.nc")
    import xarray

    with xarray.open_dataset(tmp_path / "t.nc") as file:
        assert np.array_equal(file["theta"].values, found["theta"])
        assert file.attrs["variant"] == "mag"
    found.to_parquet(tmp_path / "t.parquet")
    import pandas

    table = pandas.read_parquet(tmp_path / "t.parquet")
    assert len(table) == 20
    assert np.array_equal(table["theta.layer1.head0"].to_numpy(), found["theta"][:, 1, 0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_traced_is_refused(model, tmp_path):
    for ids, options, words in (
        ([], {}, "empty"),
        ([[1, 2], [3, 4]], {}, r"\[T\]"),
        ([1.5], {}, "whole numbers"),
        ([1, 999], {}, "0 to 259"),
        ([1], {"piece": 0}, "piece"),
        ([1], {"mode": "reset"}, "learning, frozen"),
        ([1], {"state": model.initial_state(2)}, "2 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            trace(model, ids, **options)
    with pytest.raises(ValueError, match="no memory"):
        trace(tiny_model("window"), [1])
    with pytest.raises(ValueError, match="within the 4 tokens"):
        read_bits(model, torch.arange(4), None, [(2, 5)])
    (tmp_path / "odd.npz").write_bytes(b"PK\3\4 no")
    for name in ("odd.npz", "missing.npz"):
        with pytest.raises(ValueError, match=name):
            Trace.from_npz(tmp_path / name)
    np.savez(tmp_path / "pickle.npz", attributes=np.array([{}], object))
    with pytest.raises(ValueError, match="not a trace"):
        Trace.from_npz(tmp_path / "pickle.npz")


def test_it_is_public():
    assert titans_lm.trace is trace
    assert {"trace", "Trace"} <= set(titans_lm.__all__)


@pytest.mark.parametrize(("threshold", "written"), [(1e-9, True), (1e9, False)])
def test_theta_shows_what_a_predictor_s_threshold_leaves_out(threshold, written):
    options = {"surprise_threshold": threshold, "surprise_threshold_on": "prediction"}
    found = trace(tiny_model("mag", torch.float32, **options), tokens(1, 12), frozen=False)
    assert ((found["theta"] > 0) == written).all()
