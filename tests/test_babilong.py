"""Facts in a long text: each once and in order, nothing of the text lost, lengths exact; scores as published."""

import dataclasses
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import of_other_configuration, tiny_config, tiny_model
from titans_lm import TitansForCausalLM
from titans_lm.cli import main
from titans_lm.evaluate.babilong import TOKENS, babilong_rule, exact, score, substring
from titans_lm.models.tokenizer import byte_tokenizer, load_tokenizer
from titans_lm.tasks import IGNORED, Task, make_task
from titans_lm.tasks.babilong import Babilong, Example, Question, parse, sentences

QA1 = """\
1 Zoe went to the attic.
2 Where is Zoe? \tattic\t1
3 Xavier moved to the cellar.
4 Yves travelled to the loft.
5 Where is Xavier? \tcellar\t3
1 Yves journeyed to the porch.
2 Xavier went back to the attic.
3 Zoe moved to the porch.
4 Xavier travelled to the loft.
5 Where is Xavier? \tloft\t2 4
"""
QA8 = """\
1 Zoe took the lamp.
2 Zoe took the vase there.
3 What is Zoe carrying? \tlamp,vase\t1 2
4 What is Yves carrying? \tnothing\t
"""
BOOK = (
    'It was dark. Mr. Quill said: "Who\'s there?" Nobody answered! The rain fell in torrents, '
    "and\nthe wind blew (as ever). J. Quill lit a candle...\n\nChapter Two\n\n'Tis late, he thought. "
) * 3 + "The end."
PIECES = sentences("\n\n" + BOOK)


def write_babi(folder: Path) -> Path:
    for name in ("qa1_one-fact_train.txt", "qa1_one-fact_test.txt"):
        (folder / name).write_text(QA1)
    (folder / "qa8_lists_test.txt").write_text(QA8)
    return folder


@pytest.fixture(scope="module")
def babi(tmp_path_factory) -> str:
    return str(write_babi(tmp_path_factory.mktemp("babi")))


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text(BOOK)
    return str(path)


@pytest.fixture(scope="module")
def task(babi, book) -> Babilong:
    return Babilong(babi, "qa1", 300, background=(book,))


def text(ids: np.ndarray) -> str:
    return bytes(ids.astype(np.uint8)).decode()


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------ bAbI


def test_each_question_has_the_facts_of_its_story_before_it():
    assert [example._replace(earlier=()) for example in parse(QA1, "qa1")] == [
        Example(("Zoe went to the attic.",), "Where is Zoe?", "attic"),
        Example(
            ("Zoe went to the attic.", "Xavier moved to the cellar.", "Yves travelled to the loft."),
            "Where is Xavier?", "cellar",
        ),
        Example(
            ("Yves journeyed to the porch.", "Xavier went back to the attic.", "Zoe moved to the porch.",
             "Xavier travelled to the loft."),
            "Where is Xavier?", "loft",
        ),
    ]  # fmt: skip


def test_a_question_has_those_of_its_story_before_it_and_no_others():
    assert [example.earlier for example in parse(QA1, "qa1")] == [(), (Question(1, "Where is Zoe?", "attic"),), ()]


def test_labels_are_what_the_files_answer(babi):
    assert Babilong(babi, "qa1").labels == ("attic", "cellar", "loft")
    assert Babilong(babi, "qa8", split="test").labels == ("lamp", "nothing", "vase")


def test_an_archive_is_read_as_it_is_and_the_larger_english_folder_first(babi, book, tmp_path):
    for folder, content in (("en", "en"), ("en-10k", "ten"), ("hn", "hn"), ("a", "a")):
        (tmp_path / "tasks" / folder).mkdir(parents=True)
        (tmp_path / "tasks" / folder / "qa2_two_test.txt").write_text(f"1 A.\n2 B? \t{content}\t1\n")
    (tmp_path / "tasks" / "en" / "qa3_three_test.txt").write_text("1 A.\n2 B? \tonly\t1\n")
    write_babi(tmp_path / "tasks" / "en")
    archive = tmp_path / "tasks.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "tasks", "tasks_1-20")
    for path in (archive, tmp_path / "tasks"):
        assert Babilong(str(path), "qa2", split="test").labels == ("ten",)
        assert Babilong(str(path), "qa3", split="test").labels == ("only",)
    assert Babilong(str(tmp_path / "tasks" / "hn"), "qa2", split="test").labels == ("hn",)
    ours, theirs = (Babilong(str(path), "qa1", 200, background=(book,)).batch(draw(), 3) for path in (archive, babi))
    assert np.array_equal(ours.input_ids, theirs.input_ids)


# ------------------------------------------------------------------------------------------------ rows


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(170, 2500))
def test_rows_hold_the_facts_in_order_and_a_stretch_of_the_text(task, seed, length):
    rows = dataclasses.replace(task, length=length).batch(draw(seed), 2)
    assert rows.input_ids.shape == rows.labels.shape == (2, length)
    assert rows.input_ids.dtype == rows.labels.dtype == np.int64
    for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
        context, _, asked = text(ids).partition("\n\nQuestion: ")
        example = next(e for e in task.examples if asked == f"{e.question}\nAnswer: {e.answer}.")
        assert text(labels[labels != IGNORED]) == f" {example.answer}."
        assert (labels[: length - len(example.answer) - 2] == IGNORED).all()
        at = [context.index(fact) for fact in example.facts]
        assert at == sorted(at)
        for fact in example.facts:
            assert context.count(fact) == 1
            context = context.replace(f" {fact}", "")
        assert context in ("\n\n" + BOOK) * 20


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(170, 900))
def test_all_questions_of_a_story_are_asked_where_it_asks_them_if_there_is_room(task, seed, length):
    whole = dataclasses.replace(task, length=length, questions="all")
    rows, last = whole.batch(draw(seed), 4), dataclasses.replace(task, length=length)
    for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
        *earlier, asked = text(ids).split("\n\nQuestion: ")
        example = next(e for e in task.examples if asked == f"{e.question}\nAnswer: {e.answer}.")
        said = [text(np.array(list(run))) for named, run in itertools.groupby(labels, lambda x: x != IGNORED) if named]
        if len(earlier) == 1:
            assert said == [f" {example.answer}."]
            size = sum(len(f" {fact}") for fact in example.facts) + len(asked) + len("\n\nQuestion: ")
            asked_before = sum(len(f"\n\nQuestion: {q}\nAnswer: {a}.") for _, q, a in example.earlier)
            assert not example.earlier or length < size + asked_before + last.answer_tokens
        else:
            assert said == [" attic.", f" {example.answer}."]
            assert earlier[0].endswith(" Zoe went to the attic.")
            assert earlier[1].startswith("Where is Zoe?\nAnswer: attic.")
            assert (labels == IGNORED).sum() == length - len(" attic.") - len(f" {example.answer}.")
            assert (ids[labels != IGNORED] == labels[labels != IGNORED]).all()


def test_a_prompt_asks_one_question_whatever_rows_of_training_ask(task):
    story = task.examples[1]
    everything = dataclasses.replace(task, questions="all").prompt(story, draw())
    assert np.array_equal(everything, task.prompt(story, draw()))


def test_facts_stand_between_sentences_anywhere(task):
    """Before, between and after the sentences that are there, all places as often."""
    seen = np.zeros(3)
    story = task.examples[0]
    task = dataclasses.replace(task, length=400)
    for seed in range(300):
        before, fact, after = text(task.prompt(story, draw(seed))).partition(" Zoe went to the attic.")
        after = after.removesuffix("\n\nQuestion: Where is Zoe?\nAnswer:")
        assert fact
        assert not before or not after or before.endswith(tuple(PIECES))
        seen += [not before, bool(before and after), not after]
    assert (seen > [10, 200, 10]).all(), seen  # of about eleven places, as there are about ten sentences
    assert (seen < [60, 280, 60]).all(), seen


def test_the_background_begins_at_any_sentence(task):
    begun = set()
    for seed in range(400):
        context = text(dataclasses.replace(task, length=400).prompt(task.examples[0], draw(seed)))
        begun.add(next(i for i, s in enumerate(PIECES) if context.replace(" Zoe went to the attic.", "").startswith(s)))
    assert {PIECES[i] for i in begun} == set(PIECES)


def test_facts_of_one_story_scatter(task):
    """Four facts stand together only by chance."""
    gaps = []
    for seed in range(100):
        context = text(dataclasses.replace(task, length=2000).prompt(task.examples[2], draw(seed)))
        at = [context.index(fact) for fact in task.examples[2].facts]
        gaps.append((at[3] - at[0]) / 2000)
    assert 0.5 < np.mean(gaps) < 0.7  # three fifths, of places drawn evenly


def test_sentences_end_where_they_do():
    told = 'It was dark. Mr. Quill said: "Who?" Nobody (J. Q.) came! 3.5 of 7 is half...\n\nOne\n two.  '
    assert sentences(told) == [
        "It was dark.", ' Mr. Quill said: "Who?"', " Nobody (J. Q.) came!", " 3.5 of 7 is half...", "\n\nOne\n two.  ",
    ]  # fmt: skip
    assert "".join(sentences(BOOK)) == BOOK
    assert sentences("no end") == ["no end"]


def test_the_same_seed_gives_the_same_rows(task):
    first, same, other = (task.batch(draw(seed), 4) for seed in (1, 1, 2))
    assert np.array_equal(first.input_ids, same.input_ids)
    assert np.array_equal(first.labels, same.labels)
    assert not np.array_equal(first.input_ids, other.input_ids)


def test_a_task_as_any_other(task, babi, book):
    options = {"babi": babi, "task": "qa1", "length": 300, "background": [book]}
    made = make_task({"name": "babilong", **options})
    assert isinstance(made, Task)
    assert np.array_equal(made.batch(draw(), 2).input_ids, task.batch(draw(), 2).input_ids)
    assert made.vocab_size == 259


def test_lengths_are_exact_with_tokens_of_many_bytes(babi, book, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([BOOK, QA1], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    read = load_tokenizer(str(tmp_path))
    for length in range(60, 80):
        task = Babilong(babi, "qa1", length, background=(book,), tokenizer=str(tmp_path))
        ids, labels = (rows[0] for rows in task.batch(draw(length), 1))
        told = read.decode(ids)
        assert len(ids) == length < len(told) - 20
        assert told.endswith(read.decode(labels[labels != IGNORED]))
        assert read.decode(labels[labels != IGNORED]) in (" attic.", " cellar.", " loft.")
        assert ids.max() < task.vocab_size <= 400


def test_without_a_background_there_are_the_facts_alone(babi):
    task = Babilong(babi, "qa1", 0, background=())
    whole = " Zoe went to the attic.\n\nQuestion: Where is Zoe?\nAnswer:"
    assert text(task.prompt(task.examples[0], draw())) == whole
    rows = task.batch(draw(), 30)
    told = [text(row) for row in rows.input_ids]
    longest = " ".join(["", *task.examples[2].facts]) + "\n\nQuestion: Where is Xavier?\nAnswer: loft."
    assert {len(row) for row in told} == {task.length} == {len(longest) + len("cellar") - len("loft")}
    assert {row.lstrip("\n") for row in told} >= {f"{whole} attic.", longest}
    assert [text(row[row != IGNORED]) for row in rows.labels[:3]] == [row.rpartition(":")[2] for row in told[:3]]


def test_examples_that_do_not_fit_are_left_out(task):
    sizes = [len(" ".join(["", *e.facts])) + len(f"\n\nQuestion: {e.question}\nAnswer: cellar.") for e in task.examples]
    assert sizes == sorted(sizes)
    for count, size in enumerate(sizes, 1):
        fitting = dataclasses.replace(task, length=size)
        assert len(fitting.examples) == count
        assert len({text(row).rpartition("Question")[2] for row in fitting.batch(draw(), 20).input_ids}) == count
        assert len(fitting.prompt(fitting.examples[-1], draw())) == size - len(" cellar.")
    with pytest.raises(ValueError, match=rf"length={sizes[0] - 1} is too short for qa1: .* takes {sizes[0]} tokens"):
        dataclasses.replace(task, length=sizes[0] - 1)


# ------------------------------------------------------------------------------------------------ scores

LABELS = ("Bill", "Fred", "apple", "milk", "football")
WHO = Example((), "Who gave the football to Bill?", "Fred")


@pytest.mark.parametrize(
    ("said", "theirs", "loose", "alone"),
    [
        (" Fred.", True, True, True),
        ("FRED", True, True, True),
        (" It was Fred. Or the apple.", True, True, False),
        (" It was Fred who gave the football to Bill.", True, True, False),  # these are in the question
        (" Fred or the apple.", False, True, False),
        (" milk", False, False, False),
        (" Nobody. Fred.", False, True, False),
        ("", False, False, False),
        (" Fre", False, False, False),
        (" Frederick.", True, True, False),
        ("fred<example> milk", True, True, False),
        ("fred\nQuestion: Who has the milk?", False, True, True),
    ],
)
def test_scores_of_one_answer(said, theirs, loose, alone):
    assert babilong_rule(said, WHO, LABELS) is theirs
    assert substring(said, WHO) is loose
    assert exact(said, WHO) is alone


def test_scores_of_lists_and_ways():
    carrying = Example((), "What is Zoe carrying?", "lamp,vase")
    labels = ("lamp", "nothing", "vase")
    for said, right in (("vase and lamp", True), ("lamp,vase", True), ("lamp", False), ("nothing, lamp, vase", False)):
        assert babilong_rule(said, carrying, labels) is right, said
        assert substring(said, carrying) is ("lamp,vase" in said)
    way = Example((), "How do you go from the attic to the loft?", "n,w")
    for said, right in ((" n,w.", True), (" w,n.", False), (" n,w,n", False)):
        assert babilong_rule(said, way, ("n,n", "n,w", "w,n")) is right, said
    none = Example((), "How many?", "none")
    assert not babilong_rule(" none.", none, ("none", "one"))  # as published: see there
    assert exact(" none.", none)


@pytest.mark.usefixtures("unchecked")
def test_what_is_asked_is_the_prompt_and_what_is_said_is_the_model_s(task):
    model, task = tiny_model("mag", vocab_size=260), dataclasses.replace(task, length=200)
    asked: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    found = score(model, task, samples=5, seed=3, rows=2)
    asked = [ids for ids in asked if ids.shape[1] > 1]  # all but a prompt's last token are read at once
    assert [len(ids) for ids in asked] == [2, 2, 1]
    assert (found["samples"], found["examples"]) == (5, 3)
    assert len({a["question"] + a["target"] for a in found["answers"][:3]}) == 3
    for i, (answer, ids) in enumerate(zip(found["answers"], torch.cat(asked), strict=True)):
        example = next(e for e in task.examples if (e.question, e.answer) == (answer["question"], answer["target"]))
        prompt = torch.from_numpy(task.prompt(example, np.random.default_rng([3, i])))
        assert torch.equal(ids, prompt[:-1])
    said = model.generate(prompt[None], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    assert byte_tokenizer().decode(said[0, len(prompt) :], skip_special_tokens=True) == answer["said"]


@pytest.mark.usefixtures("unchecked")
def test_a_seed_decides_and_the_rows_do_not(task):
    model, task = tiny_model("mag", vocab_size=260), dataclasses.replace(task, length=200)
    found = score(model, task, samples=3, seed=3, rows=2)
    assert found == score(model, task, samples=3, seed=3, rows=3)
    assert found != score(model, task, samples=3, seed=4, rows=2)


def test_a_model_that_was_trained_on_the_task_is_right(book, tmp_path):
    """Where the answer is always the same: batches teach what is scored."""
    (tmp_path / "qa1_one_train.txt").write_text(QA1.replace("cellar", "attic").replace("loft", "attic"))
    (tmp_path / "qa1_one_test.txt").write_text(QA1)
    task = Babilong(str(tmp_path), "qa1", 200, background=(book,))
    torch.manual_seed(0)
    model = TitansForCausalLM(tiny_config("window", vocab_size=260, window_size=16, initializer_range=0.05))
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-2), draw()
    for _ in range(40):
        rows = task.batch(rng, 4)
        loss = model(torch.from_numpy(rows.input_ids), labels=torch.from_numpy(rows.labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = score(model, task, samples=6)
    assert found["babilong"] == found["substring"] == found["exact"] == 1.0
    other = score(model, dataclasses.replace(task, split="test"), samples=6)
    assert other["babilong"] == other["exact"] == round(2 / 6, 4)  # one example of three
    alone = score(model, dataclasses.replace(task, length=0, background=()), samples=4)
    assert alone["samples"] == len(alone["answers"]) == 4


# ------------------------------------------------------------------------------------------------ titans evaluate


def test_the_command_goes_on_where_it_was(folder, babi, book, tmp_path, capsys):
    out = tmp_path / "found.jsonl"
    arguments = ["evaluate", "babilong", "--model", str(folder), "--babi", babi, "--background", book, "--samples", "3"]
    arguments += ["--out", str(out), "--tasks", "qa1"]
    assert main([*arguments, "--lengths", "0"]) == 0
    first = out.read_text()
    assert main([*arguments, "qa8", "--lengths", "0", "250"]) == 0
    assert out.read_text().startswith(first)
    head, *rows = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("titans evaluate babilong --model")
    assert head["settings"].keys() >= {"babi", "background", "samples", "seed", "weights"}
    cells = [("qa1", 0), ("qa1", 250), ("qa8", 0), ("qa8", 250)]
    assert [(row["task"], row["length"]) for row in rows] == cells
    assert all(
        0 <= row[s] <= 1 and len(row["answers"]) == 3 for row in rows for s in ("babilong", "substring", "exact")
    )
    capsys.readouterr()
    assert main([*arguments, "--lengths", "0", "250"]) == 0
    assert [line.split()[1:4:2] for line in capsys.readouterr().out.splitlines() if "qa" in line] == [
        ["qa1", "0"], ["qa1", "250"],
    ]  # fmt: skip
    assert len(out.read_text().splitlines()) == 5
    assert main([*arguments, "--lengths", "0", "--seed", "1"]) == 2
    assert "results of other settings (seed)" in capsys.readouterr().err.replace("\n", " ")
    arguments[3] = str(of_other_configuration(folder, tmp_path / "other"))
    assert main([*arguments, "--lengths", "0"]) == 2
    assert "results of other settings (configuration)" in capsys.readouterr().err.replace("\n", " ")


def test_what_is_wrong_is_one_line(folder, babi, book, tmp_path, capsys):
    empty, damaged, odd = tmp_path / "empty.txt", tmp_path / "damaged.tar.xz", tmp_path / "qa2_odd_test.txt"
    empty.write_text(" \n")
    damaged.write_bytes(b"nothing of the kind")
    odd.write_text("1 A.\nB?\tc\n")
    options = {
        "--babi": babi, "--background": book, "--tasks": "qa1", "--lengths": "300", "--samples": "2", "--batch": "2",
        "--out": str(tmp_path / "out.jsonl"),
    }  # fmt: skip
    for changed, words in [
        ({"--babi": str(tmp_path / "no")}, "does not exist; give a folder with bAbI's files"),
        ({"--babi": str(damaged)}, "neither a folder nor an archive"),
        ({"--babi": str(tmp_path), "--tasks": "qa2"}, "qa2_odd_test.txt, line 2: not a numbered fact"),
        ({"--tasks": "qa5"}, "has no file of qa5"),
        ({"--tasks": "qa21"}, "task must be one of qa1 to qa20, got 'qa21'"),
        ({"--background": str(empty)}, "is empty"),
        ({"--background": str(tmp_path / "no.txt")}, "does not exist"),
        ({"--lengths": "20"}, "length=20 is too short for qa1"),
        ({"--lengths": "-1"}, "length must be a whole number of at least 1, got -1"),
        ({"--samples": "0"}, "--samples must be at least 1, got 0"),
        ({"--batch": "0"}, "--batch must be at least 1, got 0"),
        ({"--out": str(tmp_path / "no" / "out.jsonl")}, "folder"),
    ]:
        given_ = [word for pair in {**options, **changed}.items() for word in pair]
        assert main(["evaluate", "babilong", "--model", str(folder), *given_]) == 2
        *_, error = capsys.readouterr().err.splitlines()  # behind what loading a model says
        assert error.startswith("titans evaluate: ")
        assert words in error, error
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match="there is no qa8_"):
        Babilong(babi, "qa8", split="train")
    with pytest.raises(ValueError, match="split='dev' is not one of: train, test"):
        Babilong(babi, split="dev")
