"""A study's grid, its scheduler, its report and its search; what a cell makes of failure."""

import argparse
import copy
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from rich.console import Console

import commands
from titans_lm import cli
from titans_lm.evaluate.cell import run_test
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.study.grid import load_study
from titans_lm.study.report import collect, label_of, markdown, mean_and_spread, tables
from titans_lm.study.scheduler import run_cells
from titans_lm.study.search import search_cell
from titans_lm.utils.record import Lines
from titans_lm.utils.terminal import PlainConsole

ROOT = Path(__file__).parents[1]
STUDY: dict[str, Any] = {
    "shared": {
        "model": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16,
            "window_size": 4, "num_persistent_tokens": 0, "memory_head_dim": 8, "memory_dim": 8,
        },
        "data": {"task": {"name": "parity", "length": 12}},
        "training": {"max_steps": 6, "batch_size": 4, "save_steps": 3, "logging_steps": 2},
    },
    "models": {"lmm": {"model.variant": "lmm"}, "window": {"model.baseline": "sliding_window"}},
    "seeds": [0, 1],
    "tests": [{"length": [8, 16], "samples": 8}],
    "figure": "length",
}  # fmt: skip


ADAPT = {"measure": "adapt", "files": ["nowhere.txt"]}
PERPLEXITY = {"measure": "perplexity", "files": ["a.txt"]}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes STUDY with changes to a file in an empty folder with `results`, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()

    def write(**changes: Any) -> str:
        Path("small.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
        return "small.yaml"

    return write


def lines(name: str = "small") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"results/{name}.jsonl").read_text().splitlines()][1:]


def figures(rows: list[dict[str, Any]]) -> list[Any]:
    return sorted((r["model"], r["seed"], json.dumps(r["scores"]), r["loss"], r["status"]) for r in rows)


# ------------------------------------------------------------------------------------------------ the whole command


@pytest.mark.slow
def test_a_study_is_made_once_goes_on_and_tells(write, capsys):
    study = write()
    assert cli.main(["study", study, "--processes", "2"]) == 0
    rows = lines()
    assert [(r["model"], r["seed"]) for r in sorted(rows, key=lambda r: (r["model"], r["seed"]))] == [
        ("lmm", 0), ("lmm", 1), ("window", 0), ("window", 1),
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "ok"
        assert row["steps"] == 6
        assert [s["length"] for s in row["scores"]] == [8, 16]
        assert all(0 <= s["score"] <= 1 for s in row["scores"])
        assert {"commit", "date", "machine", "seconds", "parameters", "settings", "loss"} <= row.keys()
    assert len({json.dumps(r["scores"]) for r in rows if r["model"] == "lmm"}) == 2  # seeds differ
    assert not list(Path("runs/small").glob("*/"))  # models are not kept
    text = Path("results/small.md").read_text()
    assert "| lmm |" in text
    assert "length 16" in text
    assert Path("results/small.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    before = Path("results/small.jsonl").read_text()
    assert cli.main(["study", study]) == 0  # nothing to do, the table again
    assert "4 runs, 0 to do" in capsys.readouterr().out
    assert Path("results/small.jsonl").read_text() == before

    study = write(models={**STUDY["models"], "attention": {"model.baseline": "full_attention"}}, seeds=[1])
    assert cli.main(["study", study, "--keep"]) == 0
    assert lines()[:4] == rows
    assert [(r["model"], r["seed"]) for r in lines()[4:]] == [("attention", 1)]
    assert Path("runs/small/attention-1/model.safetensors").is_file()
    assert "| lmm |" in Path("results/small.md").read_text()


@pytest.mark.slow
def test_a_run_that_fails_is_a_result(write):
    models = {
        "wild": {"model.variant": "lmm", "training.learning_rate": 1e30},
        "tame": {"model.variant": "lmm"},
        "none": {"model.variant": "lmm", "data.task": {"name": "mqar"}, "model.vocab_size": 4},
    }
    study = write(models=models, seeds=[0], tests=[{"samples": 4}], figure=None)
    assert cli.main(["study", study]) == 0
    status = {row["model"]: (row["status"], row["error"], row["scores"]) for row in lines()}
    assert status["wild"][0] == "not finite"
    assert "not a number at step" in status["wild"][1]
    assert status["tame"][0] == "ok"
    assert status["none"][0] == "failed"
    assert "model.vocab_size=4 is below the task's" in status["none"][1]
    text = Path("results/small.md").read_text()
    assert "0/1" in text
    assert "not finite" in text


def die(cell: Any, runs: Path, command: str) -> dict[str, Any]:  # noqa: ARG001 - a job
    if cell.model == "lmm":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": "ok", "error": None, "scores": [], "loss": 1.0, "large": "x" * 10**6}


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_with_it(write, tmp_path):
    study = load_study(Path(write(seeds=[0])), [])
    made = Lines(tmp_path / "lines.jsonl", {}, "")
    run_cells(study.cells, die, argparse.Namespace(processes=1, runs=tmp_path, keep=False), "", made, PlainConsole())
    assert {row["model"]: row["status"] for row in made.rows} == {"lmm": "failed", "window": "ok"}
    assert "killed" in made.rows[0]["error"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_to_the_same_results(write):
    training = {**STUDY["shared"]["training"], "max_steps": 60, "save_steps": 5}
    study = write(shared={**STUDY["shared"], "training": training}, seeds=[0], models={"lmm": {"model.variant": "lmm"}})
    folders = ["--runs", str(Path("a").absolute()), "--results", str(Path("results").absolute())]
    process = commands.started(["study", str(Path(study).absolute()), *folders], Path("said").absolute(), os.setsid)
    deadline = time.monotonic() + 120
    while not list(Path("a").glob("small/*/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert commands.ended(process) == 130
    assert "the same command continues" in Path("said").read_text()
    assert not Path("results/small.jsonl").exists()
    assert cli.main(["study", study, "--runs", "a"]) == 0
    interrupted = figures(lines())
    Path("results/small.jsonl").unlink()
    assert cli.main(["study", study, "--runs", "b"]) == 0
    assert figures(lines()) == interrupted


@pytest.mark.parametrize("ended", [True, False])
def test_what_a_run_of_other_settings_left_is_not_taken_for_this_one_s(write, capsys, ended):
    from titans_lm.training.train import train

    study = write(seeds=[0], models={"lmm": {"model.variant": "lmm"}})
    folder = Path("runs/small/lmm-0")
    train(load_study(Path(study), []).cells[0].settings(folder.parent))
    if not ended:
        (folder / "run.yaml").unlink()
    left = sorted(folder.rglob("*"))
    capsys.readouterr()
    other = ["--set", "training.learning_rate=0.01", "--set", "model.memory_dim=16"]
    assert cli.main(["study", study, *other]) == 2
    error = capsys.readouterr().err
    assert str(folder if ended else folder / "checkpoint-6") in error
    assert "of other settings (model.memory_dim, training.learning_rate)" in error
    assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == left
    assert not Path("results/small.jsonl").exists()


@pytest.mark.slow
def test_a_kept_model_is_taken_and_one_with_a_broken_run_yaml_is_named(write, capsys):
    study = write(seeds=[0], models={"lmm": {"model.variant": "lmm"}})
    assert cli.main(["study", study, "--keep"]) == 0
    weights, rows = Path("runs/small/lmm-0/model.safetensors"), lines()
    made = weights.stat().st_mtime_ns
    Path("results/small.jsonl").unlink()
    assert cli.main(["study", study, "--keep"]) == 0
    assert figures(lines()) == figures(rows)
    assert weights.stat().st_mtime_ns == made
    Path("results/small.jsonl").unlink()
    weights.with_name("run.yaml").write_text("model: [")
    capsys.readouterr()
    assert cli.main(["study", study]) == 2
    error = capsys.readouterr().err
    assert "runs/small/lmm-0/run.yaml is not YAML" in error
    assert error.count("\n") == 1
    assert weights.exists()


def linger(cell: Any, runs: Path, command: str) -> dict[str, Any]:  # noqa: ARG001 - a job
    Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
    return {}


LINGER = """
import argparse, sys
from pathlib import Path
from rich.console import Console
from titans_lm.utils.record import Lines
from titans_lm.study.grid import load_study
from titans_lm.study.scheduler import run_cells
from test_study import linger
if __name__ == "__main__":
    cells = load_study(Path("small.yaml"), []).cells
    arguments = argparse.Namespace(processes=1, runs=Path("runs"), keep=False)
    run_cells(cells, linger, arguments, "", Lines(Path("x.jsonl"), {}, ""), Console())
"""


@pytest.mark.slow
def test_what_a_killed_study_began_ends_with_it(write):
    write(seeds=[0])
    Path("main.py").write_text(LINGER)
    folder = str(Path(__file__).parent)
    path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen([sys.executable, "main.py"], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 120
    while not (Path("pid").exists() and Path("pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = Path("/proc") / Path("pid").read_text()
    process.kill()
    process.wait()
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.slow
def test_a_search_finds_each_model_s_values(write):
    space = {"training.learning_rate": [1e-4, 1e-1, "log"], "model.memory_lr": {"choices": [0.1, 0.5]}}
    study = write(search=space, seeds=[0], models={"lmm": {"model.variant": "lmm"}})
    assert cli.main(["study", study, "--search", "3"]) == 0
    (row,) = lines("small_search")
    assert row["best"].keys() == space.keys()
    assert len(row["trials"]) == 3
    assert row["loss"] == min(trial["loss"] for trial in row["trials"])
    assert len({trial["loss"] for trial in row["trials"]}) == 3  # what is tried makes a difference
    assert all(1e-4 <= trial["training.learning_rate"] <= 1e-1 for trial in row["trials"])
    again = load_study(Path(study), [])
    assert search_cell(again.cells[0], Path("runs"), "", again.search, 3)["trials"] == row["trials"]  # not by chance


@pytest.mark.slow
def test_an_interrupted_trial_of_a_search_is_made_again_and_whole_numbers_are_drawn(write):
    study = load_study(Path(write(search={"model.memory_dim": [8, 32]}, seeds=[0])), [])
    cell, runs = study.cells[0], Path("runs")
    storage = f"sqlite:///{(runs / cell.name).absolute()}.db"
    runs.mkdir()
    optuna.create_study(study_name="search", storage=storage).ask()  # a trial that its process did not end
    row = search_cell(cell, runs, "", study.search, 2)
    assert [trial["state"] for trial in row["trials"]] == ["complete"] * 2
    assert all(trial["model.memory_dim"] in range(8, 33) for trial in row["trials"])


# ------------------------------------------------------------------------------------------------ the grid


def test_the_grid_is_every_combination_with_the_changes_of_each(write):
    study = load_study(
        Path(
            write(
                tasks={
                    "short": {"data.task": {"name": "parity", "length": 8}, "tests": [{"samples": 2}]},
                    "usual": None,
                }
            )
        ),
        ["training.max_steps=9"],
    )
    assert len(study.cells) == 2 * 2 * 2
    cell = next(c for c in study.cells if (c.model, c.task, c.seed) == ("window", "short", 1))
    assert cell.name == "window-short-1"
    assert cell.sections["data"]["task"] == {"name": "parity", "length": 8}
    assert cell.sections["model"]["baseline"] == "sliding_window"
    assert cell.tests == [{"samples": 2}]
    settings = cell.settings(Path("runs"))
    assert (settings.training.seed, settings.training.max_steps) == (1, 9)
    assert settings.training.output_dir == "runs/window-short-1"
    assert next(c for c in study.cells if c.task == "usual").tests == STUDY["tests"]


STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", [p for p in STUDIES if p.stem != "forecast"], ids=lambda path: path.stem)
def test_every_study_is_whole(path, tmp_path, monkeypatch):
    """`forecast.yaml` has the candidates of `titans evaluate forecast`, whose test reads it."""
    monkeypatch.chdir(tmp_path)
    write_babilong_files(tmp_path)
    assert load_study(path, []).cells


def write_babilong_files(folder: Path) -> None:
    """What `babilong.yaml` reads, in place of the archive a folder."""
    for name in ("babi.tar.xz", "novels", "held_out"):
        (folder / name).mkdir()
    for task in range(1, 6):
        for split in ("train", "test"):
            (folder / "babi.tar.xz" / f"qa{task}_one_{split}.txt").write_text("1 A\n2 C \td\t1\n")
    for name in ("novels", "held_out"):
        (folder / name / "book.txt").write_text("It was dark. The rain fell.")
    byte_tokenizer().save_pretrained(folder / "tokenizer")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "unknown key 'model' in the study; did you mean 'models'?"),
        ({"models": {}}, "models must name at least one"),
        ({"models": {"a": {"variant": "lmm"}}}, "'variant' must be section.key"),
        ({"models": {"a": {"model.varian": "lmm"}}}, "unknown key 'varian' in model; did you mean 'variant'?"),
        ({"models": {"a": {"model.baseline": "rnn"}}}, "baseline 'rnn' is not one of"),
        ({"models": {"a": 3}}, "models.a must be keys and values, got 3"),
        ({"models": {"a/b": {}}}, "models: the name 'a/b' cannot have a slash"),
        ({"seeds": [0.5]}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, 1, 0]}, "seeds must be a list of whole numbers, each once"),
        ({"models": {1: {}, "1": {}}}, "models: the names must differ as texts, got [1, '1']"),
        (
            {"models": {"a-b": {}, "a": {}}, "tasks": {"c": {}, "b-c": {}}},
            "model 'a', task 'b-c' and model 'a-b', task 'c' would share the folder a-b-c-0; rename one",
        ),
        ({"models": {"LMM": {}, "lmm": {}}}, "model 'LMM' and model 'lmm' would share the folder lmm-0"),
        ({"tests": [{"length": [1]}]}, "length"),
        ({"tests": [{"lenght": [8]}]}, "has no option 'lenght'"),
        ({"tests": [{"measure": "taste"}]}, "measure 'taste' is not one of"),
        ({"tests": [{"measure": "perplexity"}]}, "needs files"),
        ({"tests": [{"measure": "adapt"}]}, "adapt needs files"),
        ({"tests": [{**ADAPT, "token": 9}]}, "adapt has no option 'token'; it has called, files"),
        ({"tests": [{**ADAPT, "modes": ["hot"]}]}, "tests: modes must be a list of"),
        ({"tests": [{**ADAPT, "bucket": 0}]}, "bucket must be a whole number of at least 1, got 0"),
        ({"tests": {}}, "tests must be a list"),
        ({"tests": [{"samples": 0}]}, "samples must be a whole number of at least 1, got 0"),
        ({"tests": [{"rows": -1}]}, "rows must be a whole number of at least 1, got -1"),
        ({"tests": [{"length": "text"}]}, "length must be a whole number of at least 2, got 'text'"),
        ({"tests": [{"length": []}]}, "tests: length is an empty list"),
        ({"tests": [{**PERPLEXITY, "tokens": 1}]}, "tokens must be a whole number of at least 2, got 1"),
        ({"tests": [{**PERPLEXITY, "bucket": 0}]}, "bucket must be a whole number of at least 1, got 0"),
        ({"tests": [{**PERPLEXITY, "reset_every": "x"}]}, "reset_every must be a whole number of at least 1, got 'x'"),
        ({"tests": [{**PERPLEXITY, "modes": ["on", "of"]}]}, "tests: modes must be a list of"),
        ({"tests": [{**PERPLEXITY, "modes": [True]}]}, "got [True]"),
        ({"tests": [{**PERPLEXITY, "modes": []}]}, "got []"),
        ({"figure": "lenght"}, "figure: 'lenght' must be an option of the tests with numbers; they have: length"),
        ({"tests": [{}]}, "figure: 'length' must be an option of the tests with numbers; they have: none"),
        ({"tests": [PERPLEXITY], "figure": "mode"}, "with numbers; they have: until"),
        ({"shared": {"modell": {}}}, "unknown key 'modell' in shared; did you mean 'model'?"),
        ({"shared": {"data": {"task": {"name": "parrot"}}}}, "task 'parrot' is not one of"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_study_is_one_line(write, capsys, changes, words):
    assert cli.main(["study", write(**changes)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "small.yaml" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.yaml"], "missing.yaml does not exist"),
        (["small.yaml", "--processes", "0"], "--processes must be at least 1"),
        (["small.yaml", "--results", "nowhere"], "--results nowhere"),
        (["small.yaml", "--search", "2"], "has no search section"),
        (["small.yaml", "--set", "training.max_step=3"], "did you mean 'max_steps'?"),
        (["small.yaml", "--set", "max_steps"], "must be section.key=value"),
    ],
)
def test_a_wrong_argument_is_one_line(write, capsys, arguments, words):
    write()
    assert cli.main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_search_of_what_cannot_be_searched_is_one_line(write, capsys):
    for space, told in (
        ({"training.max_steps": [1, 2]}, "training.max_steps"),
        ({"model.memory_lr": [0.5, 0.1]}, "model.memory_lr must be [low, high]"),
        ({"data.task": {"choices": [1]}}, "data.task"),
        ({"model.num_memory_heads": [1.5, 8]}, "search: model.num_memory_heads must be a whole number, got 1.5"),
        ({"model.memory_lr": [0.1, 2]}, "search: model: memory_lr must be in (0, 1], got 2.0"),
        ({"model.variant": {"choices": ["lmm", "mga"]}}, "mga"),
    ):
        assert cli.main(["study", write(search=space), "--search", "2"]) == 2
        assert told in capsys.readouterr().err


def test_a_search_without_optuna_is_one_line(write):
    study = write(search={"model.memory_lr": [0.1, 0.5]})
    code = f"import sys; sys.modules['optuna'] = None; sys.argv[1:] = ['study', {study!r}, '--search', '2']\n"
    code += "import importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *rest: None if name == 'optuna' else find(name, *rest)\n"
    code += "from titans_lm.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'titans-lm[search]'" in done.stderr


# ------------------------------------------------------------------------------------------------ the report


def test_the_table_has_means_and_spreads_by_hand():
    assert mean_and_spread([0.5]) == "0.500"
    assert mean_and_spread([0.25, 0.75]) == f"0.500 ± {math.sqrt(0.125):.3f}"
    rows = [
        {"task": "t", "model": "m", "scores": [{"length": 8, "samples": 4, "score": 0.25, "whole": 0.5}]},
        {"task": "t", "model": "m", "scores": [{"length": 8, "samples": 4, "score": 0.75, "whole": 0.5}]},
        {"task": "t", "model": "dead", "scores": []},
    ]
    assert collect(rows) == {("t", "m"): {"length 8": [0.25, 0.75]}, ("t", "dead"): {}}
    assert label_of({"mode": "on", "length": 8, "bits_per_byte": 2.0}) == "mode on, length 8"


@pytest.mark.parametrize("name", ["needle", "parity", "ablation"])
@pytest.mark.parametrize("width", [80, 300])
def test_every_figure_is_read_on_screen(name, width):
    told = (ROOT / f"results/{name}.jsonl").read_text().splitlines()[1:]
    rows = [json.loads(line) for line in told]
    scores = collect(rows)
    screen = Console(file=io.StringIO(), width=width)
    for task in dict.fromkeys(task for task, _ in scores):
        screen.print(*tables(task, scores, rows, width))
    text = screen.file.getvalue()
    figure = re.compile(r"\d\.\d{3} ± \d\.\d{3}|\d+,\d{3}|\d/\d")
    written = "".join(line for line in markdown(name, scores, rows).splitlines(True) if line.startswith("| "))
    assert sorted(figure.findall(text)) == sorted(figure.findall(written))
    assert "…" not in text


def test_a_test_s_lists_are_tried_one_by_one(write):
    from titans_lm.training.train import model_for

    settings = load_study(Path(write()), []).cells[0].settings(Path("runs"))
    rows = run_test(model_for(settings), settings, {"name": "modular", "modulus": [2], "length": [4, 6], "samples": 4})
    assert [(row["modulus"], row["length"], row["samples"]) for row in rows] == [(2, 4, 4), (2, 6, 4)]


def test_results_written_under_a_key_s_old_name_are_this_cell_s(write):
    cell = load_study(Path(write()), ["training.tbptt_steps=1"]).cells[0]
    row = copy.deepcopy(cell.about())
    row["settings"]["training"]["carried_steps"] = row["settings"]["training"].pop("tbptt_steps")
    assert cell.result([{**row, "seed": 99}, row]) is row
    row["settings"]["training"]["carried_steps"] = 2
    assert cell.result([row]) is None


def test_texts_of_a_test_that_are_missing_are_told_before_anything_is_trained(write, capsys):
    assert cli.main(["study", write(tests=[ADAPT], figure=None)]) == 2
    assert "nowhere.txt does not exist" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("model", [{"variant": "mag"}, {"baseline": "mamba2"}])
def test_streams_are_read_by_every_model_as_evaluate_adapt_reads_them(write, model):
    """Mamba2's in one call; the mean is that of the streams."""
    from titans_lm.training.train import model_for

    Path("a.txt").write_text("one and one and one")
    Path("b.txt").write_bytes(bytes(range(40)))
    sections = {**STUDY["shared"], "data": {"task": {"name": "streams", "length": 16}}}
    sections["model"] = {"size": "tiny", "num_hidden_layers": 1, **model}
    settings = (
        load_study(Path(write(shared=sections, models={"a": {}}, tests=[{}], figure=None)), [])
        .cells[0]
        .settings(Path("runs"))
    )
    language_model = model_for(settings)
    test = {"called": "both", "measure": "adapt", "files": ["a.txt", "b.txt"], "modes": ["on", "reset"], "bucket": 8}
    rows = run_test(language_model, settings, test)
    modes = ["on", "reset"] if "variant" in model else ["on"]
    assert [(row["stream"], row["mode"]) for row in rows] == [(s, m) for s in ("a.txt", "b.txt") for m in modes] + [
        ("mean", mode) for mode in modes
    ]
    ids = torch.tensor([list(Path("a.txt").read_bytes())])
    logits = language_model.eval()(ids).logits[0, :-1].log_softmax(-1)
    nats = -logits.gather(1, ids[0, 1:, None])[:, 0].detach()
    assert rows[0]["bits_per_byte"] == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-5)
    assert rows[0]["first_bucket"] == pytest.approx(float(nats[:7].mean()) / math.log(2), rel=1e-5)
    assert rows[0]["last_half"] == pytest.approx(float(nats[8:].mean()) / math.log(2), rel=1e-5)
    own = [row["bits_per_byte"] for row in rows if row["mode"] == "on"]
    assert own[2] == pytest.approx((own[0] + own[1]) / 2)


@pytest.mark.parametrize("data", [{"files": ["text"]}, {"task": {"name": "streams", "length": 16}}])
def test_streams_are_read_by_the_tokenizer_of_the_data(write, data):
    from titans_lm.training.train import model_for

    Path("text").mkdir()
    for name in ("text/a.txt", "text/b.txt"):
        Path(name).write_text("one and one and one " * 20)
    sections = {**STUDY["shared"], "data": {**data, "sequence_length": 16} if "files" in data else data}
    sections["model"] = {"size": "tiny", "num_hidden_layers": 1, "variant": "lmm"}
    study = load_study(Path(write(shared=sections, models={"a": {}}, tests=[ADAPT], figure=None)), [])
    settings = study.cells[0].settings(Path("runs"))
    model = model_for(settings)
    for measure in ("adapt", "perplexity"):
        rows = run_test(model, settings, {"measure": measure, "files": ["text/a.txt"], "modes": ["on"], "tokens": 40})
        assert all(row["bits_per_byte"] > 0 for row in rows)


def test_a_test_that_is_called_something_tells_that_and_its_lists(write):
    """Of another task than the one trained, whose options do not apply."""
    from titans_lm.training.train import model_for

    data = {"task": {"name": "mqar", "length": 12, "pairs": 2, "vocab_size": 16}}
    settings = load_study(Path(write(shared={**STUDY["shared"], "data": data})), []).cells[0].settings(Path("runs"))
    test = {"called": "sums", "name": "modular", "modulus": 2, "length": [4, 6], "samples": 4}
    rows = run_test(model_for(settings), settings, test)
    assert [label_of({**row, "score": 0.0, "whole": 0.0}) for row in rows] == ["sums, length 4", "sums, length 6"]
    assert [set(row) for row in rows] == [{"test", "length", "score", "whole", "samples"}] * 2


def test_a_second_study_of_the_same_results_is_refused_and_adds_no_line(write, capsys):
    study = write(seeds=[0])
    with Lines(Path("results/small.jsonl"), {"study": "small"}, ""):
        assert cli.main(["study", study]) == 2
    error = capsys.readouterr().err
    assert "results/small.jsonl is in use by" in error
    assert error.count("\n") == 1
    assert list(Path("results").iterdir()) == []  # no line, no lock
