"""Benchmarks run end to end on small shapes, say what they should, and survive what fails. No times are asserted."""

import json
import os
import signal
import sys

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from conftest import TITANS, exhaustive, tiny_config, tiny_model
from titans_lm import TitansForCausalLM
from titans_lm.bench import decode, measure, model, op, operation, race, write
from titans_lm.bench.measure import Action, Contender, Meter, Setting
from titans_lm.bench.race import Dead, Entrant, Heat, Worker
from titans_lm.cli import main
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import memories
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.ops import initial_state, memory_scan

SMALL_OP = {"rows": 1, "tokens": 32, "hidden": 16, "chunk": 8, "form": "plain"}
PROVENANCE = {"command", "date", "commit", "machine", "threads", "torch", "setting", "complete", "summary", "rows"}


def bench(*arguments, out):
    """`titans bench`: what it wrote."""
    assert main(["bench", *arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result.keys() >= PROVENANCE
    assert result["complete"]
    assert all(row["error"] is None for row in result["rows"])
    return result


def check_measured(row, actions):
    for action in actions:
        found = row["actions"][action]
        assert 0 < found["least"] <= found["seconds"] <= found["most"]
        assert found["cpu_seconds"] > 0
        assert found["peak_bytes"] is None or found["peak_bytes"] >= 0
        assert found["runs"] == len(found["each"]) == len(row["repetitions"][action]) - 1


# ------------------------------------------------------------------------------------------ the four, end to end


@pytest.mark.slow
def test_op(tmp_path):
    shapes = ["--tokens", "40", "--hidden", "16", "--chunk", "8", "--forms", "residual", "--depth", "2", "3"]
    result = bench("op", *shapes, "--runs", "2", out=tmp_path / "op.json")
    assert [row["name"] for row in result["rows"]] == ["residual, depth 2", "residual, depth 3"]
    for row in result["rows"]:
        check_measured(row, op.ACTIONS)
        assert all(row["actions"][a]["part_of_matmul_rate"] > 0 for a in ("forward", "training"))
    two = 22 * 64 * 16 + 4 * 8 * (64 + 16)
    assert {row["backend"] for row in result["rows"]} == {"native"}
    assert [row["operations"] for row in result["rows"]] == [240 * two, 240 * (two + 12 * 16 * 16 + 4 * 8 * 16)]


@pytest.mark.slow
def test_model(tmp_path):
    arguments = ["--lengths", "32", "--variants", "mag", "--compile", "eager", "--runs", "1"]
    result = bench("model", *arguments, out=tmp_path / "model.json")
    found = [(row["kind"], row["compile"], row["tokens"]) for row in result["rows"]]
    assert found == [("mag", None, 32), ("mag", "eager", 32)]
    for row in result["rows"]:
        check_measured(row, ["prefill", "step", *([model.WITHOUT] if row["compile"] is None else [])])
    assert list(result["summary"]["compiled_over_eager"]) == ["mag 32"]


@pytest.mark.slow
def test_decode(tmp_path):
    arguments = ["--positions", "5000000", "--read-up-to", "30", "--tokens", "2", "--variants", "mag"]
    result = bench("decode", *arguments, "--size", "tiny", "--runs", "1", out=tmp_path / "decode.json")
    assert [row["kind"] for row in result["rows"]] == ["mag", "sliding window"]
    for row in result["rows"]:
        check_measured(row, ["decode"])
        assert row["read"] == 30
        assert row["state_bytes"] > 0
    assert result["summary"]["last_over_first"] == {"mag": 1, "sliding window": 1}
    assert result["summary"]["over_sliding_window"]["sliding window at 5000000"] == 1


@pytest.mark.parametrize("kind", ["mag", "sliding window", "full attention"])
def test_a_position_that_was_not_read_has_the_shapes_of_one_that_was(kind):
    net = decode.lm.build(kind, "tiny", Setting()).eval()
    real = net.initial_state(1)
    net(decode.lm.ids(150, net), past_key_values=real)
    synthetic, read = decode._state(net, 150, 20, Setting())
    assert read == (0 if kind == "full attention" else 20)
    shapes = [[t.shape for _, t in sorted(s.tensors().items())] for s in (real, synthetic)]
    assert shapes[0] == shapes[1]
    assert (synthetic.position.tolist(), synthetic.columns) == (real.position.tolist(), real.columns) == ([150], 150)


def test_mamba2_goes_on_from_what_it_has_read():
    net = decode.lm.build("mamba2", "tiny", Setting()).eval()
    tokens = decode.lm.ids(9, net)
    with torch.no_grad():
        out = decode._step_mamba2(net, tokens[:, :8], None)
        out = net(tokens[:, 8:], use_cache=True, **{decode.lm.MAMBA_CACHE: out})
        whole, last = net(tokens).logits[:, -1], out.logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


READ = ["read", "--tokens", "90", "--stretches", "3", "--piece", "20"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("mag", []), exhaustive("operation", ["--operation"])])
def test_read(name, more, tmp_path):
    result = bench(*READ, *more, out=tmp_path / "read.json")
    stretches = result["rows"][0]["repetitions"]["stretch"]
    assert len(stretches) == 3
    for stretch in stretches:
        assert stretch["finite"] is True
        assert stretch["calls"] == 1
        assert stretch["weights_norm"] > 0 < stretch["momentum_norm"]
        assert stretch["state_bytes"] == stretches[0]["state_bytes"] > 0
    assert result["summary"][name]["tokens"] == 90
    assert (tmp_path / "read.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_write(tmp_path):
    folder = writing_model(tmp_path, "reconstruction")
    command = ["write", "--model", str(folder), "--thresholds", "14", "1e9", "--texts", "log", "--runs", "1"]
    summary = bench(*command, "--tokens", "300", out=tmp_path / "write.json")["summary"]["log"]
    every, some, none = (summary[name] for name in ("all written", "above 14", "above 1e+09"))
    assert every["written"] == 1 > some["written"] >= none["written"] == 0
    assert every["bits_per_byte"] != none["bits_per_byte"]
    assert summary["no memory"]["written"] is None
    assert all(s["bits_per_byte"] > 0 and s["tokens_per_second"] > 0 for s in summary.values())


def writing_model(folder, on):
    torch.manual_seed(0)
    TitansForCausalLM(tiny_config("mag", vocab_size=260, surprise_threshold_on=on)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_what_is_written_may_depend_on_a_prediction(tmp_path):
    options = {"model": str(writing_model(tmp_path, "prediction")), "text": "log", "tokens": 300, "without": False}
    found = {}
    for tau in (None, 110.0, 1e9):
        contender = write.reading({**options, "threshold": tau}, Setting())
        action = contender.actions["read"]
        found[tau] = (contender.about["written"], action.report(action.run(None))["bits_per_byte"])
    assert found[None][0] == 1 > found[110.0][0] >= found[1e9][0] == 0
    assert found[None][1] != found[1e9][1] > 0


def test_texts_are_as_long_as_asked():
    assert all(len(make(5000)) == 5000 for make in write.TEXTS.values())


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    turn, turns = race.Lane.turn, []

    def interrupted(lane, patience):
        if len(turns) == 2:
            raise KeyboardInterrupt
        turns.append(lane)
        turn(lane, patience)

    monkeypatch.setattr(race.Lane, "turn", interrupted)
    out = tmp_path / "read.json"
    assert main(["bench", *READ, "--out", str(out)]) == 130
    assert str(out) in capsys.readouterr().err
    result = json.loads(out.read_text())
    assert not result["complete"]
    assert len(result["rows"][0]["repetitions"]["stretch"]) == 2
    assert turns[0].worker.process.poll() is not None


# ------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["op", "--runs", "0"], "--runs must be at least 1"),
        (["op", "--threads", "100000"], "--threads must be from 1 to"),
        (["op", "--chunk", "0"], "must be at least 1"),
        (["op", "--depth", "0"], "must be at least 1"),
        (["op", "--depth", "1", "2", "--peers"], "--peers are measured at --depth 2, got 1 2"),
        (["model", "--lengths", "1"], "--lengths must be at least 2"),
        (["decode", "--tokens", "0"], "must be at least 1"),
        (["read", "--stretches", "0"], "must be at least 1"),
        (["read", "--model", "/nowhere"], "/nowhere is not a model"),
        (["op", "--out", "/nowhere/op.json"], "the folder /nowhere does not exist"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(arguments, words, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out.json")]
    assert main(["bench", *arguments, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.startswith("titans bench: ")
    assert "\n" not in error


def test_without_the_peers_package_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    assert main(["bench", "op", "--peers", "--out", str(tmp_path / "op.json")]) == 2
    assert "pip install 'titans-lm[peers]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_contender_that_dies_is_a_row_and_the_others_go_on():
    large = {**SMALL_OP, "tokens": 10**13}
    entrants = [Entrant(str(o["tokens"]), "op", "ours", op.ACTIONS, o) for o in (large, SMALL_OP)]
    rows = []
    race.run_heats([Heat("heat", entrants, 2)], Setting(), rows, Console(quiet=True))
    assert [row["error"] is None for row in rows] == [False, True]
    assert "memory" in rows[0]["error"]
    assert rows[0]["actions"] == {}
    check_measured(rows[1], op.ACTIONS)
    assert op.table(rows, op.summary(rows))[0].row_count == 3


def test_a_process_that_is_killed_is_told_as_such():
    worker = Worker(Entrant("ours", "op", "ours", op.ACTIONS, SMALL_OP), Setting())
    try:
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(Dead, match="killed"):
            worker.begin()
    finally:
        worker.end()


def test_a_peer_that_differs_is_an_error_after_all_is_written(tmp_path, monkeypatch, capsys):
    row = {"heat": "h", "name": "peer", "error": "NotTheSame: by 0.1", "actions": {}, "repetitions": {}}
    monkeypatch.setattr(race, "run_heats", lambda _heats, _setting, rows, _console: rows.append(row))
    assert main(["bench", "op", "--out", str(tmp_path / "op.json")]) == 2
    assert json.loads((tmp_path / "op.json").read_text())["rows"][0]["error"] == row["error"]
    assert "h, peer: NotTheSame" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize(("hidden", "chunk", "depth"), [(128, 64, 2), (256, 16, 2), (128, 16, 4), (128, 16, 1)])
def test_operations_are_those_that_run(hidden, chunk, depth):
    shape = operation.Shape(1, 4 * chunk, hidden, chunk, depth=depth)
    x = operation.inputs(shape, torch.float32, "cpu")
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        memory_scan(*x[:6], initial_state(x.first, 1), chunk_size=chunk, backend="chunked")  # the counter sees it
    assert shape.operations() <= counter.get_total_flops() <= 1.01 * shape.operations()


def test_a_memory_left_out_learns_nothing_and_comes_back():
    for kind in TITANS:
        net = tiny_model(kind)
        tokens = torch.randint(23, (1, 20))
        before = net(tokens).logits
        with bypass_memory(net):
            net(tokens).logits.sum().backward()
        grads = [p.grad for m in memories(net) for p in m.parameters()]
        assert all(g is None or not g.any() for g in grads), kind
        assert torch.equal(net(tokens).logits, before)


def test_the_meter_sees_the_memory_that_an_action_takes():
    meter = Meter(Setting())
    size = 64 * 2**20
    found = meter.measure(Action(lambda _: torch.ones(size // 4).sum(), report=lambda x: {"sum": float(x)}))
    assert found["sum"] == size // 4
    if found["peak_bytes"] is not None:
        assert 0.9 * size < found["peak_bytes"] < 2 * size


def test_what_is_short_is_done_several_times_but_not_what_is_to_be_done_once():
    for once, calls in ((True, [1, 1]), (False, [1, 1000])):
        done = []
        action, meter = Action(done.append, once=once), Meter(Setting())
        assert [meter.measure(action)["calls"] for _ in "ab"] == calls
        assert len(done) == sum(calls)


def test_medians_leave_the_warm_up_out_and_the_peak_is_its():
    repetitions = [
        {"seconds": s, "cpu_seconds": 2 * s, "peak_bytes": p} for s, p in ((9.0, 5), (3.0, 7), (1.0, 7), (2.0, 7))
    ]
    found = measure.summarise(repetitions)
    assert [found[key] for key in ("seconds", "least", "most", "cpu_seconds")] == [2, 1, 3, 4]
    assert (found["peak_bytes"], found["runs"], found["warm_up_seconds"]) == (5, 3, 9)
    assert measure.summarise(repetitions[:1])["seconds"] == 9


def test_who_needs_patience_is_measured_once(monkeypatch):
    monkeypatch.setattr(race, "Worker", _Slow)
    rows = []
    entrants = [Entrant("slow", "op", "ours", ["forward"])]
    race.run_heats([Heat("heat", entrants, 5, patience=-1.0)], Setting(), rows, Console(quiet=True))
    assert rows[0]["actions"]["forward"]["runs"] == 1


class _Slow:
    def __init__(self, entrant, setting):
        pass

    def begin(self):
        return {}

    def measure(self, _action):
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 0}

    def end(self):
        pass


def test_ratios_of_models():
    def row(kind, tokens, step, peak, without=None, backend=None):
        actions = {"step": {"seconds": step, "cpu_seconds": 2 * step, "peak_bytes": peak}}
        if without is not None:
            actions[model.WITHOUT] = {"seconds": without, "cpu_seconds": 2 * without, "peak_bytes": peak}
        return {"kind": kind, "tokens": tokens, "compile": backend, "actions": actions}

    found = model.summary([
        row("mag", 10, 1.0, 10, without=0.4), row("mag", 40, 6.0, 20, without=3.0), row("mac", 40, 9.0, 10),
        row("full attention", 40, 12.0, 10), row("sliding window", 40, 2.0, 5),
        row("mac", 40, 4.5, 10, backend="inductor"),
    ])  # fmt: skip
    growth = found["time_per_token_longest_over_shortest"]["mag"]
    assert (growth["from"], growth["to"], growth["step"]) == (10, 40, 1.5)
    assert found["mac_over_mag"] == {"40": {"step": 1.5, "step, CPU": 1.5}}
    assert found["compiled_over_eager"]["mac 40"] == {"step": 0.5, "step, CPU": 0.5}
    assert found["full_attention_over_mag"]["40"]["step"] == 2
    assert found["mag_over_sliding_window"]["40"]["step"] == 3
    assert found["mag_peak_over_sliding_window"] == {"40": {"step": 4}}
    assert found["memory_part_of_step"]["mag 10"]["step"] == pytest.approx(0.6)
    assert found["memory_part_of_step"]["mag 40"]["step, CPU"] == pytest.approx(0.5)


def test_who_died_has_no_part_in_the_ratios_of_decoding():
    def row(position, seconds, error=None):
        return {"kind": "mag", "position": position, "error": error, "actions": {"decode": {"seconds": seconds}}}

    found = decode.summary([row(1, 9.0, "died"), row(2, 2.0), row(3, 3.0)])
    assert found["last_over_first"] == {"mag": 1.5}


def test_a_rate_is_over_the_matmul_of_its_own_repetition():
    def repetitions(*seconds):
        return [{"seconds": s, "cpu_seconds": s, "peak_bytes": 0} for s in seconds]

    done = {"matmul": repetitions(5.0, 1.0, 2.0), "forward": repetitions(5.0, 1.0, 2.0)}
    row = {"heat": "h", "name": "plain", "error": "died in training", "operations": measure.MATMUL_OPERATIONS / 2,
           "actions": {a: measure.summarise(r) for a, r in done.items()}, "repetitions": done}  # fmt: skip
    op.summary([row])
    assert row["actions"]["forward"]["part_of_matmul_rate"] == 0.5
    assert row["actions"]["forward"]["operations_per_second"] == row["operations"] / 1.5
    op.summary([row | {"matmul_operations": measure.MATMUL_OPERATIONS // 8}])
    assert row["actions"]["forward"]["part_of_matmul_rate"] == 4


def test_a_contender_s_facts_and_actions_are_what_the_command_asks_for():
    made = op.BUILD["ours"](SMALL_OP, Setting())
    assert isinstance(made, Contender)
    assert list(made.actions) == [*op.ACTIONS, "profile"]
