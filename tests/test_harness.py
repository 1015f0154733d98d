"""`titans evaluate harness`: tasks of others, kept when they are done; what is said where something is wrong."""

import json
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import nltk
import pytest
import torch
import wonderwords
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from test_layout import run_without
from test_likelihood import plainly
from test_lm_eval_model import EOS, TEXT, ask
from titans_lm.cli import main
from titans_lm.evaluate.harness import _results
from titans_lm.evaluate.likelihood import Request
from titans_lm.evaluate.lm_eval_model import TitansLM

pytestmark = pytest.mark.usefixtures("unchecked")  # shapes are checked where these parts are tested

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: CHOICE_FILE}
output_type: multiple_choice
test_split: train
doc_to_text: "{{q}}"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.5}
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {data_files: ANSWER_FILE}
output_type: generate_until
test_split: train
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: [], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: ROLLING_FILE}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{text}}"
process_results: !function code.process
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
CODE = """
import pathlib, random
import datasets

def made(**metadata):
    return {"test": datasets.Dataset.from_list([{"q": "a", "number": random.random()} for _ in range(3)])}

def number(doc, results):
    return {"number": doc["number"]}

def process(doc, results):
    if pathlib.Path(__file__).with_name("stop").exists():
        raise KeyboardInterrupt
    return {"bits_per_byte": (results[0], len(doc["text"].encode()))}
"""
MADE = """
task: tiny_made
custom_dataset: !function code.made
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{q}}"
generation_kwargs: {until: [], max_gen_toks: 1}
process_results: !function code.number
metric_list: [{metric: number, aggregation: mean, higher_is_better: true}]
"""
ELSEWHERE = "task: tiny_elsewhere\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n"
GROUP = "group: tiny_group\ntask: [tiny_choice]\naggregate_metric_list: [{metric: acc}]\n"


@pytest.fixture(scope="module")
def loaded(folder) -> TitansLM:
    return TitansLM(str(folder), piece=11)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, loaded) -> Path:
    """A folder of tasks; of two questions the model answers one as it should."""
    path = tmp_path_factory.mktemp("tasks")
    (right,) = ask(loaded, "It was", until=[], max_gen_toks=6)
    data = {
        "choice": [{"q": TEXT * n, "choices": [" a", " bb", " ccc"], "label": n % 3} for n in range(1, 5)],
        "answer": [{"q": "It was", "a": right}, {"q": "It", "a": "never"}],
        "rolling": [{"text": TEXT}, {"text": "é" * 20}],
    }
    for (name, rows), task in zip(data.items(), (CHOICE, ANSWER, ROLLING), strict=True):
        file = path / f"{name}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache = f"{file}, cache_dir: {path / 'cache'}"
        (path / f"{name}.yaml").write_text(task.replace(f"{name.upper()}_FILE", cache))
    (path / "code.py").write_text(CODE)
    for name, task in {"elsewhere": ELSEWHERE, "group": GROUP, "made": MADE}.items():
        (path / f"{name}.yaml").write_text(task)
    return path


def evaluate(model: Path, tasks: Path, to: Path, *names: str, **more) -> int:
    options = {"model": model, "include-path": tasks, "out": to, "batch": 2, **more}
    return main(["evaluate", "harness", "--tasks", *names, *(f"--{k}={v}" for k, v in options.items())])


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_tasks_of_three_kinds_from_the_command_line(folder, tasks, loaded, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert evaluate(folder, tasks, out, "tiny_choice", "tiny_answer", "tiny_rolling", "tiny_choice") == 0
    head, *rows = rows_of(out)
    assert head["settings"]["lm_eval"] == lm_eval.__version__
    assert head["command"].startswith("titans evaluate harness ")
    assert [row["task"] for row in rows] == ["tiny_choice", "tiny_answer", "tiny_rolling"]
    choice, answer, rolling = (row["results"][0] for row in rows)
    assert (choice["version"], choice["documents"], choice["shots"]) == (2.5, 4, 0)
    right = 0
    for row in rows_of(tasks / "choice.json"):
        pairs = [Request(list(row["q"].strip().encode()), list(f" {c}".encode())) for c in row["choices"]]
        totals = [plainly(loaded.model, pair)[0] for pair in pairs]
        right += totals.index(max(totals)) == row["label"]
    assert choice["metrics"]["acc"]["value"] == right / 4
    assert answer["metrics"] == {"exact_match": {"value": 0.5, "stderr": 0.5}}
    nats = sum(plainly(loaded.model, Request([EOS], list(text.encode())))[0] for text in (TEXT, "é" * 20))
    bits = -nats / len((TEXT + "é" * 20).encode()) / torch.log(torch.tensor(2.0)).item()
    assert rolling["metrics"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    table = capsys.readouterr().out
    assert table.count("tiny_choice") == 1
    assert all(word in table for word in ("tiny_choice", "2.5", "exact_match", f"{bits:.4f}"))


def test_what_is_done_is_not_done_again(folder, tasks, tmp_path, capsys):
    out, stop = tmp_path / "out.jsonl", tasks / "stop"
    stop.touch()
    names = ("tiny_answer", "tiny_rolling")
    assert evaluate(folder, tasks, out, *names) == 130
    stop.unlink()
    assert "the same command continues" in capsys.readouterr().err
    before = out.read_text()
    assert [row["task"] for row in rows_of(out)[1:]] == ["tiny_answer"]
    assert evaluate(folder, tasks, out, *names) == 0
    assert out.read_text().startswith(before)
    assert "tiny_answer" in capsys.readouterr().out
    assert [row["task"] for row in rows_of(out)[1:]] == list(names)
    whole = out.read_text()
    assert evaluate(folder, tasks, out, *names, limit=1) == 2  # other numbers are not mixed with these
    assert "results of other settings (limit)" in capsys.readouterr().err
    assert out.read_text() == whole


def test_the_limit_is_kept_and_the_seed_makes_the_data(folder, tasks, tmp_path):
    found = []
    for number, seed in enumerate((5, 5, 6)):
        out = tmp_path / f"{number}.jsonl"
        assert evaluate(folder, tasks, out, "tiny_made", limit=2, seed=seed) == 0
        head, row = rows_of(out)
        assert row["results"][0]["documents"] == head["settings"]["limit"] == 2
        assert {head["settings"][f"{kind}random_seed"] for kind in ("", "numpy_", "torch_", "fewshot_")} == {seed}
        found.append(row["results"][0]["metrics"]["number"]["value"])
    assert found[0] == found[1] != found[2]


def test_ruler_s_needles_without_a_network(folder, tmp_path, monkeypatch):
    """Their data is made with a tokenizer that lm-eval loads by name, with the code that is beside it."""
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)  # not needed here; else it is downloaded
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    few = {"nouns": ["stone", "river"], "adjectives": ["old", "green"], "verbs": []}  # all pairs of all take seconds
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))
    code, marker = tmp_path / "model", tmp_path / "marker"
    code.mkdir()
    for file in folder.iterdir():
        (code / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "strange.Strange"]}
    (code / "tokenizer_config.json").write_text(json.dumps(config))
    (code / "strange.py").write_text(f"open({str(marker)!r}, 'w')\nclass Strange: pass\n")
    own, out = tmp_path / "tasks", tmp_path / "out.jsonl"
    own.mkdir()
    niah = Path(lm_eval.__file__).parent / "tasks" / "ruler" / "niah_single_1.yaml"
    (own / "niah.yaml").write_text(f"include: {niah}\ntask: short_niah\n")
    assert evaluate(code, own, out, "short_niah", limit=2, metadata='{"max_seq_lengths": [1024]}') == 0
    (result,) = rows_of(out)[1]["results"]
    assert result["documents"] == 2
    assert result["metrics"] == {"1024": {"value": 0.0, "stderr": 0.0}}
    assert not marker.exists()


def test_what_is_wrong_is_one_line(folder, tasks, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    (tmp_path / "other.jsonl").write_text("{}\n")
    for names, options, words in (
        (["tiny_choise"], {}, "lm-eval has no task 'tiny_choise'; near it are tiny_choice"),
        (["tiny_choice", "tiny_elsewhere"], {}, "task 'tiny_elsewhere' cannot be loaded: Couldn't reach"),
        (["tiny_choice"], {"model": tmp_path}, "is not a model"),
        (["tiny_choice"], {"limit": 0}, "--limit must be at least 1, got 0"),
        (["tiny_choice"], {"batch": 0}, "--batch must be at least 1, got 0"),
        (["tiny_choice"], {"include-path": tmp_path / "no"}, "is not a folder"),
        (["tiny_choice"], {"to": tmp_path / "no" / "out.jsonl"}, "does not exist"),
        (["tiny_choice"], {"to": tmp_path / "other.jsonl"}, "not a result file"),
        (["tiny_choice"], {"metadata": "{"}, "--metadata is not JSON"),
        (["tiny_choice"], {"metadata": "[1]"}, "--metadata must be a JSON object"),
    ):
        changed = {"model": folder, "to": out, **options}
        assert evaluate(changed.pop("model"), tasks, changed.pop("to"), *names, **changed) == 2, words
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("titans evaluate: ")
        assert words in line
    assert not out.exists()


def test_without_lm_eval_it_says_how_to_get_it(folder, tmp_path):
    arguments = ["evaluate", "harness", "--model", str(folder), "--tasks", "piqa", "--out", str(tmp_path / "x.jsonl")]
    run_without(
        ["lm_eval", "datasets"],
        "import contextlib, io\n"
        "from titans_lm.cli import main\n"
        "with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        f"    assert main({arguments!r}) == 2\n"
        "(line,) = said.getvalue().splitlines()\n"
        "assert line == \"titans evaluate: lm-evaluation-harness is not installed: pip install 'titans-lm[eval]'\"\n",
    )


def test_a_group_has_results_of_its_own(loaded, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(loaded, tasks=["tiny_group"], limit=2, task_manager=manager, log_samples=False)
    one, group = sorted(_results(found), key=lambda result: result["name"])
    assert (one["name"], group["name"]) == ("tiny_choice", "tiny_group")
    assert (one["version"], one["documents"], group["documents"]) == (2.5, 2, None)
    assert group["metrics"]["acc"] == one["metrics"]["acc"]
