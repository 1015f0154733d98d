"""lm-evaluation-harness with our models: the numbers of a plain forward pass, and of lm-eval's own class for models."""

import json
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import nltk
import pytest
import torch
import wonderwords
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from conftest import tiny_config, tiny_model
from test_layout import run_without
from test_likelihood import greedily, plainly
from titans_lm import TitansForCausalLM
from titans_lm.cli import main
from titans_lm.data import byte_tokenizer
from titans_lm.evaluate.harness import _results
from titans_lm.evaluate.likelihood import Request
from titans_lm.evaluate.lm_eval_model import TitansLM

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. "
pytestmark = pytest.mark.usefixtures("unchecked")  # shapes are checked where these parts are tested
EOS = 258  # of the byte tokenizer
PIECE = 11


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    return tiny_model("mag", vocab_size=260, num_hidden_layers=1)


@pytest.fixture(scope="module")
def lm(model) -> TitansLM:
    return TitansLM(model, byte_tokenizer(), batch_size=3, piece=PIECE)


@pytest.fixture(scope="module")
def theirs(model) -> HFLM:
    """lm-eval's own class, which reads everything in one call without a state."""
    return HFLM(pretrained=model, tokenizer=byte_tokenizer(), max_length=10**6, prefix_token_id=EOS, batch_size=2)


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


# ------------------------------------------------------------------------------------------------ as a model of lm-eval

QUESTION = TEXT * 3 + "Question:"
PAIRS = [
    (QUESTION, " yes"), ("", "a beginning"), (TEXT, "no"), (TEXT + "   ", "spaces go to what follows"), (TEXT, "yes"),
    ("naïve — ", "façade"), (QUESTION, " no"), ("a", "b"),
]  # fmt: skip


def test_log_likelihoods_are_those_of_lm_eval_s_own_class(lm, theirs):
    found = lm.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    assert len({total for total, _ in found}) == len(PAIRS)  # so an order that is wrong would be seen


def test_a_document_is_one_stream_without_windows(lm, theirs, model):
    documents = [("short",), (TEXT * 4,), ("é" * 30,)]
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *documents, ("",)), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *documents), disable_tqdm=True)
    assert found == pytest.approx([*expected, 0.0], rel=1e-9)
    assert found[1] == pytest.approx(plainly(model, Request([EOS], list((TEXT * 4).encode())))[0], rel=1e-9)


def test_answers_are_those_of_generate(lm, model, theirs):
    contexts = [TEXT, "It", "naïve", "x"]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    found = lm.generate_until(instances("generate_until", *((c, options) for c in contexts)), disable_tqdm=True)
    for context, answer in zip(contexts, found, strict=True):
        ids = torch.tensor([list(context.encode())])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=256)
        assert answer == byte_tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(found)) == len(contexts)
    stops = [next(c for c in answer[3:] if 32 < ord(c) < 127) for answer in (found[0], found[2])]
    until = {**options, "until": [*stops, "\n\n"]}
    again = [(contexts[1], options), *((c, until) for c in contexts)]
    expected = theirs.generate_until(instances("generate_until", *again), disable_tqdm=True)
    assert lm.generate_until(instances("generate_until", *again), disable_tqdm=True) == expected
    assert expected[1] == found[0][: min(found[0].index(s) for s in stops if s in found[0])]
    assert ask(lm, "", **options) == [byte_tokenizer().decode(greedily(model, [EOS], 12), skip_special_tokens=True)]


def test_an_answer_ends_at_its_strings_and_at_the_end_token_not_in_the_prompt(lm, model):
    (whole,) = ask(lm, "It was", until=[], max_gen_toks=30)
    half = "s" + whole[0]  # begins in the prompt, ends in the answer
    assert ask(lm, "It was", until=[half], max_gen_toks=30) == [whole.split(half)[0]]
    assert len(ask(lm, "It was", until=[half], max_gen_toks=30)[0]) > 1
    ids, steps = greedily(model, list(b"It was"), 30), []
    stop = next(byte for byte in ids[5:] if 32 < byte < 127)
    hook = model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    assert ask(lm, "It was", until=[chr(stop)], max_gen_toks=30) == [whole.split(chr(stop))[0]]
    hook.remove()
    assert len(steps) == ids.index(stop) + 1  # and nothing is generated after it
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = chr(stop)
    alone = TitansLM(model, tokenizer, piece=PIECE)
    assert ask(alone, "It was", until=[], max_gen_toks=30) == [whole.split(chr(stop))[0]]


def test_a_special_token_ends_an_answer_only_where_a_task_names_it(model):
    ids = greedily(model, list(b"It was"), 8)
    tokenizer = byte_tokenizer()
    name = tokenizer.bos_token = tokenizer.convert_ids_to_tokens(ids[3])
    lm = TitansLM(model, tokenizer, piece=PIECE)
    assert ask(lm, "It was", until=[name], max_gen_toks=8) == [byte_tokenizer().decode(ids[: ids.index(ids[3])])]
    assert ask(lm, "It was", until=[], max_gen_toks=8) == [tokenizer.decode(ids, skip_special_tokens=True)]


def ask(lm: TitansLM, *prompts: str, **options) -> list[str]:
    return lm.generate_until(instances("generate_until", *((p, options) for p in prompts)), disable_tqdm=True)


def test_sampling_is_passed_on(lm):
    options = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 5.0}
    torch.manual_seed(0)
    first = ask(lm, "It was", **options)
    assert ask(lm, "It was", **options) != first
    torch.manual_seed(0)
    assert ask(lm, "It was", **options) == first


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Words of two letters are one token, and a beginning token comes before every text."""
    vocabulary = {"<s>": 0, "</s>": 1, " ": 2, "a": 3, "b": 4, "ab": 5, "a ": 6, " b": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "b")]))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_tokens_at_the_border_are_those_of_the_whole():
    lm = TitansLM(tiny_model("lmm"), merging_tokenizer())
    assert merging_tokenizer().encode("ab") == [0, 5]
    assert lm.tok_encode("ab b") == [5, 7]
    assert lm._encode_pair("ab ", "b") == ([5], [7])  # the space belongs to the word after it
    pairs = [("ab ", "b"), ("", "ab"), ("  ", "ab")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    expected = [Request([5], [7]), Request([1], [5]), Request([1], [2, 2, 5])]
    assert found == [pytest.approx(plainly(lm.model, request), rel=1e-9) for request in expected]
    with pytest.raises(ValueError, match="'b' after 'a' has no tokens of its own"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b")), disable_tqdm=True)  # "ab" is one token


def test_the_prefix_is_the_end_token_of_training_unless_told_otherwise(model):
    tokenizer = byte_tokenizer()
    assert TitansLM(model, tokenizer).prefix_token_id == EOS
    assert TitansLM(model, tokenizer, prefix_token_id=7).prefix_token_id == 7
    tokenizer.eos_token = None
    assert TitansLM(model, tokenizer).prefix_token_id == 257
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="give prefix_token_id"):
        _ = TitansLM(model, tokenizer).prefix_token_id


@pytest.mark.parametrize(
    "wrong", [{"batch_size": "auto"}, {"batch_size": 0}, {"piece": 0}, {"tokenizer": None}], ids=str
)
def test_a_model_says_what_is_wrong_with_its_arguments(model, wrong):
    with pytest.raises(ValueError, match=r"at least 1|pass tokenizer"):
        TitansLM(model, **{"tokenizer": byte_tokenizer(), **wrong})


# ------------------------------------------------------------------------------------------------ the command

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
import pathlib

def process(doc, results):
    if pathlib.Path(__file__).with_name("stop").exists():
        raise KeyboardInterrupt
    return {"bits_per_byte": (results[0], len(doc["text"].encode()))}
"""
ELSEWHERE = "task: tiny_elsewhere\ndataset_path: nobody/nothing\noutput_type: generate_until\ntest_split: test\n"
GROUP = "group: tiny_group\ntask: [tiny_choice]\naggregate_metric_list: [{metric: acc}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    TitansForCausalLM(tiny_config("mag", vocab_size=260, num_hidden_layers=1)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder) -> TitansLM:
    return TitansLM(str(folder), piece=PIECE)


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
    (path / "elsewhere.yaml").write_text(ELSEWHERE)
    (path / "group.yaml").write_text(GROUP)
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
    assert all(word in table for word in ("tiny_choice", "2.5", "exact_match", f"{bits:.4f}"))


def test_what_is_done_is_not_done_again(folder, tasks, tmp_path, capsys):
    out, stop = tmp_path / "out.jsonl", tasks / "stop"
    stop.touch()
    names = ("tiny_answer", "tiny_rolling")
    assert evaluate(folder, tasks, out, *names) == 130
    stop.unlink()
    assert "the same command goes on" in capsys.readouterr().err
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


def test_the_limit_and_the_seed_are_kept(folder, tasks, tmp_path):
    out = tmp_path / "out.jsonl"
    assert evaluate(folder, tasks, out, "tiny_choice", limit=3, seed=5) == 0
    head, row = rows_of(out)
    assert row["results"][0]["documents"] == 3
    kept = head["settings"]
    assert kept["limit"] == 3
    assert {kept[f"{kind}random_seed"] for kind in ("", "numpy_", "torch_", "fewshot_")} == {5}


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


def test_the_name_that_lm_eval_s_own_command_knows(folder, loaded):
    assert get_model("titans") is TitansLM
    pairs = instances("loglikelihood", *PAIRS[:3])
    arguments = f"pretrained={folder},piece=7"
    made = get_model("titans").create_from_arg_string(arguments, {"batch_size": 1, "device": "cuda:0"})
    assert made.piece == 7
    if not torch.cuda.is_available():
        assert made.device == torch.device("cpu")
    found = made.loglikelihood(pairs, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx(
        [total for total, _ in loaded.loglikelihood(pairs, disable_tqdm=True)], rel=1e-4
    )


def test_a_group_has_results_of_its_own(loaded, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(loaded, tasks=["tiny_group"], limit=2, task_manager=manager, log_samples=False)
    one, group = sorted(_results(found), key=lambda result: result["name"])
    assert (one["name"], group["name"]) == ("tiny_choice", "tiny_group")
    assert (one["version"], one["documents"], group["documents"]) == (2.5, 2, None)
    assert group["metrics"]["acc"] == one["metrics"]["acc"]
