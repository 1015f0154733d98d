"""`titans bench gpu` at toy sizes: the script is tried here, so that no minute of a GPU is lost to an error in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from titans_lm.bench.gpu.cell_worker import CellProcess, OutOfTime, order_of, run_cell
from titans_lm.bench.gpu.cells import SECTIONS, Cell, all_sections
from titans_lm.bench.gpu.report import verdicts
from titans_lm.cli import main

pytestmark = pytest.mark.usefixtures("unchecked")

TOY = {section.name: section.cells for section in all_sections("cpu", toy=True)}
FULL = {section.name: section for section in all_sections("cuda", toy=False)}
DECODE = ["bench", "gpu", "--device", "cpu", "--toy", "--minutes", "60", "--sections", "decode", "--out"]


def run(cell: Cell) -> dict[str, Any]:
    return run_cell(order_of(cell, "cpu"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "out"
    assert main([*DECODE, str(out)]) == 0
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "decode.jsonl").read_text().splitlines()][1:]


def test_results_are_written_and_judged(done: Path):
    assert [row["name"] for row in rows(done)] == [cell.name for cell in TOY["decode"]]
    assert all(row["right"] and row["actions"]["decode"]["seconds"] > 0 for row in rows(done))
    found = json.loads((done / "verdicts.json").read_text())["verdicts"]
    by = {verdict["question"]: verdict["verdict"] for verdict in found}
    assert by["decoding by a CUDA graph right?"] == "yes"
    assert by["triton right in float32?"] == "not measured"


def test_what_is_there_is_skipped_and_what_is_not_is_done(done: Path, capsys: pytest.CaptureFixture[str]):
    before = (done / "decode.jsonl").read_text()
    assert main([*DECODE, str(done)]) == 0
    assert "all 4 results are there" in capsys.readouterr().out
    assert (done / "decode.jsonl").read_text() == before
    lines = before.splitlines(keepends=True)
    (done / "decode.jsonl").write_text("".join(lines[:-1]))
    assert main([*DECODE, str(done), "--minutes", "0.1"]) == 0
    assert "time is over" in capsys.readouterr().out, "too little time: said, and not a result"
    assert (done / "decode.jsonl").read_text() == "".join(lines[:-1])
    (done / "decode.jsonl").write_text(before)


def test_results_of_another_machine_are_not_continued(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    head, *others = (done / "decode.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "decode.jsonl").write_text(head.replace("kernels interpreted", "another") + "".join(others))
    assert main([*DECODE, str(tmp_path)]) == 2
    assert "has results of other settings (device)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cpu"], "add --toy"),
        (["--device", "cpu", "--toy", "--minutes", "0"], "--minutes must be above 0"),
        (["--device", "cpu", "--toy", "--out", str(Path(__file__).with_name("conftest.py"))], "is not a folder"),
    ],
)
def test_what_cannot_be_done_is_said(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "gpu", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_cell_that_fails_or_takes_too_long_is_a_result_and_the_next_one_runs():
    good, process = TOY["op"][1]._replace(actions=[]), CellProcess("cpu")
    try:
        with pytest.raises(OutOfTime):
            process.run(good, 0.01)
        assert process.process is None, "it was ended"
        failed = process.run(good._replace(options={**good.options, "form": "plain", "depth": "unknown"}), 600)
        assert failed["error"].startswith("TypeError: ")
        number = process.process.pid
        assert not process.run(good, 600)["same_function"]
        assert process.process.pid == number, "a cell that fails does not end the process"
        process.process.kill()
        process.process.wait()
        assert not process.run(good, 600)["same_function"], "a new one"
    finally:
        process.end()


@pytest.mark.parametrize("cell", [*TOY["checks"][2:4], *TOY["compile"], TOY["model"][0]], ids=lambda cell: cell.name)
def test_checks_kernels_and_models_run(cell: Cell):
    found = run(cell)
    assert found.get("error") is None
    assert found.get("right", True)


def test_a_wrong_form_is_found(monkeypatch: pytest.MonkeyPatch):
    from titans_lm.ops.chunked import group

    cell = TOY["checks"][2]
    assert run(cell)["repeats"]
    monkeypatch.setattr(group, "NORM_EPS", 0.5)
    found = run(cell)
    assert not found["right"]
    assert found["largest_error"] > 0.02


def test_every_section_has_cells_of_every_kind_at_full_size():
    assert tuple(FULL) == SECTIONS
    for name, section in FULL.items():
        names = [cell.name for cell in section.cells]
        assert len(names) == len(set(names)), "a name is the key of a result"
        assert {(c.module, c.contender) for c in TOY[name]} <= {(c.module, c.contender) for c in section.cells}
    sizes = [cell.options for cell in FULL["op"].cells if cell.backend == "triton"]
    for key, values in {"width": {64, 128}, "hidden": {128, 256}, "chunk": {16, 64}, "tokens": {4096, 65536}}.items():
        assert {size[key] for size in sizes} == values
    compiled = [{**c.options, "tokens": 0, "rows": 0} for c in FULL["compile"].cells]
    assert all({**size, "tokens": 0, "rows": 0} in compiled for size in sizes), "each kernel is compiled before"


def op_row(name: str, training: float, **more: Any) -> dict[str, Any]:
    actions = {"matmul": {"seconds": 1.0}, "forward": {"seconds": 1.0}, "training": {"seconds": training}}
    return {"name": name, "error": None, "actions": actions, "operations": 1, **more}


def test_verdicts_follow_from_figures():
    right = {"name": "a", "dtype": "float32", "options": {"form": "triton"}, "error": None, "right": True,
             "largest_error": 1e-6, "worst": "y", "repeats": True, "actions": {}}  # fmt: skip
    wrong = {**right, "name": "b", "right": False, "largest_error": 0.5, "repeats": False}
    crashed = {key: right[key] for key in ("dtype", "options", "actions")} | {"name": "c", "error": "killed"}

    def by(rows: list[dict[str, Any]], section: str = "checks") -> dict[str, str]:
        return {verdict["question"]: verdict["verdict"] for verdict in verdicts({section: rows})}

    assert by([right])["triton right in float32?"] == "yes"
    assert by([right, wrong])["triton right in float32?"] == "no"
    assert by([right, crashed])["triton right in float32?"] == "no"
    assert by([right, wrong])["triton gives the same twice (no race seen)"] == "no"
    assert by([])["triton right in float32?"] == "not measured"
    faster = [op_row("triton, s", 1.0), op_row("chunked, s", 2.0), op_row("compiled, s", 0.5)]
    assert by(faster, "op")["triton faster than chunked?"] == "yes"
    assert by(faster, "op")["triton faster than compiled chunked?"] == "no"
    models = [
        {"name": f"{kind} {tokens}", "backend": "auto", "error": None, "options": {"kind": kind, "tokens": tokens},
         "actions": {"step": {"seconds": seconds}}}
        for kind, tokens, seconds in (("mag", 10, 1.0), ("mag", 100, 11.0), ("full attention", 100, 12.0))
    ]  # fmt: skip
    assert by(models, "model")["MAG at most attention's time at the longest text, step?"] == "yes"
    assert by(models, "model")["MAG's time a token grows by at most 5 %, step?"] == "no"
    trained = {"error": None, "tokens_per_second": 1.0, "first_loss": 5.0, "last_loss": 4.0, "steps": 3}
    learns = "a model of 20M parameters learns streams?"
    assert by([trained], "train")[learns] == "yes"
    assert by([{"error": "out of memory"}], "train")[learns] == "no"
