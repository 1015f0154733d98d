"""Needles: there once, where they were asked for, in rows of exactly so many tokens of any tokenizer."""

import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from titans_lm.tasks import IGNORED, Task, make_task
from titans_lm.tasks.haystack import NOISE
from titans_lm.tasks.needle import Needle
from titans_lm.tasks.words import ADJECTIVES, NOUNS, prose
from titans_lm.utils.corpora import is_held_out, stdlib_files, stdlib_held_out

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
LONGEST_WORD = 16
TEXT = "".join(
    f"{'Abcdefghij'[i % 10].upper()}{' lantern river and 42 owls'[: 3 + 7 * i % 23]} x. " + "\n" * (i % 3)
    for i in range(400)
)
"""Every sentence has one capital letter, and begins with it."""


def trained(tokenizer: Tokenizer, folder: Path, special: list[str]) -> str:
    texts = [sentence.replace("\n", " ") for sentence in prose(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if tokenizer.normalizer is None else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    told = json.loads(tokenizer.to_str())
    told["added_tokens"] = told["added_tokens"][:1]  # a byte is no special token
    tokenizer = Tokenizer.from_str(json.dumps(told))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0]).save_pretrained(folder)
    return str(folder)


def byte_level() -> Tokenizer:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def marked() -> Tokenizer:
    """As Llama 2's: a text begins with a mark, other letters are bytes. Here words may be joined, too."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, str]:
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    return {
        "bytes": "bytes",
        "byte_level": trained(byte_level(), tmp_path_factory.mktemp("byte_level"), ["<unk>"]),
        "marked": trained(marked(), tmp_path_factory.mktemp("marked"), pieces),
    }


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(TEXT)
    return str(path)


def least(**options) -> int:
    with pytest.raises(ValueError, match="must be at least") as error:
        Needle(length=1, **options)
    return int(re.findall(r"at least (\d+)", str(error.value))[0])


def context_of(text: str, task: Needle, value: str) -> tuple[str, str]:
    """What stands before the needle and after it in a prompt, whose other words are as they should be."""
    one = "uuid" if task.kind == "uuid" else "number"
    key = re.search(rf"([a-z]+-[a-z]+)(?: is: |=){value}\.", text)[1]
    adjective, noun = key.split("-")
    assert adjective in ADJECTIVES
    assert noun in NOUNS
    intro, needle, question = "", f"{key}={value}.", f"{key}="
    if task.style == "ruler":
        intro = (
            f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {one} afterwards.\n"
        )
        needle = f"One of the special magic {one}s for {key} is: {value}."
        question = (
            f"\nWhat is the special magic {one} for {key} mentioned in the provided text? "
            f"The special magic {one} for {key} mentioned in the provided text is"
        )
    assert text.startswith(intro)
    assert text.endswith(question)
    assert text.count(key) == (3 if task.style == "ruler" else 2)
    before, after = text.removeprefix(intro).removesuffix(question).split(needle)
    return before, after


def sentences(part: str, task: Needle) -> int:
    """How many begin in it."""
    hay = task.haystack or ("noise" if task.kind == "passkey" else "text")
    if hay == "noise":
        return len([line for line in part.split("\n") if line.strip()])
    return len(part.split()) if hay == "words" else len(re.findall("[A-Z]", part))


# ------------------------------------------------------------------------------------------------ the task


@settings(deadline=None, max_examples=70, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokenizer=st.sampled_from(["bytes", "byte_level", "marked"]),
    kind=st.sampled_from(["passkey", "number", "uuid"]),
    hay=st.sampled_from([None, "noise", "words", "text"]),
    style=st.sampled_from(["ruler", "short"]),
    digits=st.integers(3, 18),
    more=st.integers(0, 900),
    depth=st.none() | st.floats(0, 100) | st.sampled_from([0, 50, 100]),
    seed=st.integers(0, 2**32),
)
def test_every_row_keeps_its_promises(tokenizers, book, tokenizer, kind, hay, style, digits, more, depth, seed):
    options = {"kind": kind, "haystack": hay, "style": style, "digits": digits, "files": [book]}
    options["tokenizer"] = tokenizers[tokenizer]
    task = Needle(length=least(**options) + more, depth=depth, **options)
    ids, labels = task.batch(np.random.default_rng(seed), 2)
    assert ids.shape == labels.shape == (2, task.length)
    assert ids.max() < task.vocab_size
    for row, label in zip(ids, labels, strict=True):
        asked = np.flatnonzero(label != IGNORED)
        assert list(asked) == list(range(asked[0], task.length))
        assert (label[asked] == row[asked]).all()
        text, answer = task.decode(row), task.decode(label[asked])
        value = answer.strip()
        assert re.fullmatch(UUID if kind == "uuid" else rf"[1-9]\d{{{digits - 1}}}", value)
        assert text.count(value) == 2  # in the needle, and the answer
        assert text.endswith(f" {value}" if style == "ruler" else f"={value}")
        before, after = context_of(text.removesuffix(value).rstrip(" "), task, value)
        assert len(after) - len(after.rstrip("\n")) <= LONGEST_WORD
        one, other = sentences(before, task), sentences(after, task)
        if depth is not None:
            assert one == int((one + other) * depth / 100)
        words = f"{before} {after}".split()  # with the needle taken out it is what it was
        source = {"noise": NOISE, "text": TEXT}.get(hay or ("noise" if kind == "passkey" else "text"))
        if source is not None:
            repeated = source.split() * (len(words) // len(source.split()) + 2)
            assert " ".join(words) in " ".join(repeated)


@pytest.mark.parametrize("tokenizer", ["bytes", "byte_level", "marked"])
@pytest.mark.parametrize("style", ["ruler", "short"])
@pytest.mark.parametrize("depth", [None, 0, 40, 100])
def test_several_needles_have_keys_and_values_of_their_own(tokenizers, book, tokenizer, style, depth):
    options = {"kind": "number", "style": style, "files": [book], "tokenizer": tokenizers[tokenizer], "keys": 5}
    task = Needle(length=least(**options) + 900, depth=depth, **options)
    sentence = r"\s?(?:One of the special magic numbers for )?([a-z]+-[a-z]+)(?: is: |=)(\d{7})\."
    for row, label in zip(*task.batch(np.random.default_rng(0), 8), strict=True):
        assert len(row) == task.length
        text, value = task.decode(row), task.decode(label[label != IGNORED]).strip()
        keys, values = zip(*re.findall(sentence, text), strict=True)
        assert len(set(keys)) == len(set(values)) == 5
        assert value in values
        asked = keys[values.index(value)]
        text = text.removesuffix(value).rstrip(" ")
        alone = re.sub(sentence, lambda match, asked=asked: match[0] if match[1] == asked else "", text)
        before, after = context_of(alone if style == "short" else re.sub(r"afterwards\.\s*", "afterwards.\n", alone),
                                   task, value)  # fmt: skip
        one, other = sentences(before, task), sentences(after, task)
        assert depth is None or one == int((one + other) * depth / 100)
        words = f"{before} {after}".split()
        assert " ".join(words) in " ".join(TEXT.split() * (len(words) // len(TEXT.split()) + 2))


@pytest.mark.parametrize(("options", "length"), [({}, 300), ({"kind": "number"}, 300), ({"haystack": "words"}, 1000)])
def test_the_needle_that_is_asked_for_may_be_any(options, length):
    task = Needle(length=length, style="short", keys=4, **options)
    ranks = []
    for row, label in zip(*task.batch(np.random.default_rng(0), 200), strict=True):
        value = task.decode(label[label != IGNORED])
        ranks.append(re.findall(r"[a-z]=(\d+)\.", task.decode(row)).index(value))
    assert min(np.bincount(ranks, minlength=4)) > 30


@pytest.mark.parametrize("tokenizer", ["bytes", "byte_level", "marked"])
@pytest.mark.parametrize("style", ["ruler", "short"])
def test_what_is_asked_is_the_row_without_its_answer(tokenizers, book, tokenizer, style):
    options = {"kind": "uuid", "style": style, "files": [book], "tokenizer": tokenizers[tokenizer]}
    task = Needle(length=700, **options)
    prompts, values = task.examples(np.random.default_rng(1), 4)
    kept = 128 if style == "ruler" else 36
    assert prompts.shape == (4, 700 - kept)
    for prompt, value in zip(prompts, values, strict=True):
        text = task.decode(prompt)
        assert text.count(value) == 1
        context_of(text, task, value)
    rng = np.random.default_rng(1)
    twos = [task.examples(rng, 2) for _ in range(2)]
    assert np.array_equal(np.concatenate([two.prompts for two in twos]), prompts)
    assert [value for two in twos for value in two.values] == values
    assert replace(task, answer=50).examples(np.random.default_rng(1), 1).prompts.shape == (1, 650)


def test_a_seed_is_a_row(book):
    for kind in ("passkey", "number", "uuid"):
        task = Needle(length=512, kind=kind, files=[book])
        one, same, other = (task.batch(np.random.default_rng(seed), 3) for seed in (3, 3, 4))
        assert one.input_ids.tobytes() == same.input_ids.tobytes()
        assert one.labels.tobytes() == same.labels.tobytes()
        assert not (one.input_ids == other.input_ids).all(1).any()
        assert len({row.tobytes() for row in one.input_ids}) == 3


def test_every_token_is_asked_where_that_is_wanted():
    ids, labels = Needle(length=128, style="short", everywhere=True).batch(np.random.default_rng(0), 2)
    assert np.array_equal(ids, labels)
    assert np.array_equal(ids, Needle(length=128, style="short").batch(np.random.default_rng(0), 2).input_ids)


def places(task: Needle, rows: int) -> list[tuple[int, int]]:
    """Sentences before the needle, and all."""
    found = []
    prompts, values = task.examples(np.random.default_rng(0), rows)
    for prompt, value in zip(prompts, values, strict=True):
        before, after = (sentences(part, task) for part in context_of(task.decode(prompt), task, value))
        found.append((before, before + after))
    return found


def test_a_depth_that_is_not_given_is_drawn_as_ruler_draws_it(book):
    lines = places(Needle(length=1200), 200)
    assert all(before < count for before, count in lines)
    assert {before for before, _ in lines} == set(range(max(count for _, count in lines)))
    words = places(Needle(length=80, haystack="words", style="short"), 200)
    assert any(before == count for before, count in words)
    assert any(before == 0 for before, _ in words)
    text = places(Needle(length=9000, kind="number", files=[book]), 200)
    depths = [round(100 * i / 39) for i in range(40)]
    assert all(before in {int(count * depth / 100) for depth in depths} for before, count in text)
    assert len({round(before / count, 2) for before, count in text}) > 30


def test_a_value_that_the_haystack_has_is_not_taken(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text("1 2 3 4 5 6 7 8. " * 50)
    task = Needle(length=128, kind="number", style="short", digits=1, files=[str(path)])
    assert set(task.examples(np.random.default_rng(0), 30).values) == {"9"}
    path = tmp_path / "more.txt"
    path.write_text("19 28 37 46 5. " * 50)
    with pytest.raises(ValueError, match="digits=1 is too few"):
        replace(task, files=[str(path)]).examples(np.random.default_rng(0), 1)


def test_a_text_goes_on_from_its_beginning_and_rows_begin_anywhere(book):
    task = Needle(length=3 * len(TEXT), kind="number", files=[book], depth=0)
    text = task.decode(task.batch(np.random.default_rng(0), 1).input_ids[0])
    assert text.count(" ".join(TEXT.split())) >= 1
    rows = Needle(length=600, kind="number", files=[book], depth=100).batch(np.random.default_rng(0), 20).input_ids
    assert len({task.decode(row)[131:160] for row in rows}) > 10


def test_sentences_of_a_log_are_its_lines_and_of_prose_end_with_a_full_stop(tmp_path):
    log, letter = tmp_path / "a.log", tmp_path / "b.txt"
    log.write_text("".join(f"{i} request served\n" for i in range(500)))
    letter.write_text('He said "No."  She\nleft. Why?\n\nA title\n\nThen')
    task = Needle(length=2000, kind="number", files=[str(log)], depth=50)
    (prompt,), (value,) = task.examples(np.random.default_rng(0), 1)
    before, after = context_of(task.decode(prompt), task, value)
    assert abs(before.count("request") - after.count("request")) <= 1
    from titans_lm.tasks.haystack import make_haystack

    found = make_haystack("text", (str(letter),), "bytes", 0)
    starts = [found.letters[word] for word in found.sentences]
    parts = [found.text[a:b] for a, b in itertools.pairwise(starts)]
    assert parts == [' He said "No."', " She left.", " Why?", " A title", " Then"]


@pytest.mark.slow
def test_code_is_lines_of_modules_that_are_not_held_out():
    from titans_lm.tasks.haystack import make_haystack

    text = make_haystack("text", ("python-code",), "bytes", 0).text

    def lines(files: list[Path]) -> set[str]:
        return {" ".join(line.split()) for file in files for line in file.read_text().splitlines()}

    own = lines(stdlib_held_out()) - lines([file for file in stdlib_files() if not is_held_out(file)])
    own = {line for line in own if len(line) > 70}
    assert sum(map(str.isdigit, text)) > len(text) / 60  # docstrings have half as many
    assert own
    assert len([line for line in own if line in text]) < len(own) / 50  # some modules wrap the same words elsewhere


def test_numbers_are_many_and_none_is_a_value_after_a_key():
    from titans_lm.tasks.haystack import make_haystack

    docstrings, text = (make_haystack("text", (name,), "bytes", 0).text for name in ("python-stdlib", "numbers"))
    digits = [sum(map(str.isdigit, some)) / len(some) for some in (docstrings, text)]
    assert 8 < digits[1] / digits[0] < 24
    assert {len(number) for number in re.findall(r"(?<= )\d+(?= )", text)} >= set(range(1, 7))
    values = [len(re.findall(r"[a-z]-[a-z]+=\d+\.", some)) for some in (docstrings, text)]
    assert values == [0, 0]
    row = Needle(512, kind="number", style="short", digits=5, files=["numbers"]).examples(np.random.default_rng(0), 1)
    assert len(row.values[0]) == 5


def test_what_a_key_and_prose_are_made_of():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) >= 60
    assert len(set(NOUNS)) == len(NOUNS) >= 60
    made = prose(2000)
    assert made == prose(2000) != prose(2000, seed=1)
    assert len(set(made)) > 1900
    assert all(re.fullmatch(r"[A-Z][A-Za-z', ]+[.?]", sentence) for sentence in made)
    assert not [sentence for sentence in made if re.search(r"\ba [aeiou]", sentence)]


def test_the_default_text_is_there_on_every_machine_and_quickly_made():
    task = make_task({"name": "needle", "kind": "number"})
    assert isinstance(task, Task)
    assert (task.length, task.vocab_size) == (1024, 259)
    task.batch(np.random.default_rng(0), 8)
    begun = time.process_time()
    task.batch(np.random.default_rng(0), 200)
    assert time.process_time() - begun < 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "key"}, "kind='key' is not one of: passkey, number, uuid"),
        ({"haystack": "hay"}, "haystack='hay' is not one of: noise, words, text"),
        ({"style": "long"}, "style='long' is not one of: ruler, short"),
        ({"length": 0}, "length must be a whole number of at least 1"),
        (
            {"length": 370},
            "length=370 is too short for needle, question and 8 tokens of answer; it must be at least 371",
        ),
        ({"length": 50, "style": "short"}, "at least 51"),
        ({"digits": 19}, "digits must be at most 18"),
        ({"digits": 0}, "digits must be a whole number of at least 1"),
        ({"keys": 0}, "keys must be a whole number of at least 1"),
        ({"keys": 10, "digits": 1}, "keys must be at most 9"),
        ({"keys": 10**6}, "keys must be at most"),
        ({"length": 400, "keys": 2}, "it must be at least"),
        ({"depth": 101}, "depth must be from 0 to 100 percent, got 101"),
        ({"digits": "7"}, "digits must be a whole number"),
        ({"everywhere": "no"}, "everywhere must be true or false, got 'no'"),
        ({"tokenizer": 5}, "tokenizer and files must be texts, got 5"),
        ({"depth": float("nan")}, "depth must be from 0 to 100 percent, got nan"),
        ({"depth": "50"}, "depth must be from 0 to 100 percent, got '50'"),
        ({"answer": 0}, "answer must be a whole number of at least 1"),
        ({"tokenizer": "/no/such"}, "tokenizer '/no/such' cannot be loaded"),
        ({"kind": "number", "files": ["/no/such"]}, "/no/such does not exist"),
        ({"kind": "number", "files": []}, "at least one"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        make_task({"name": "needle", **options})


def test_the_answer_has_to_fit_only_where_it_is_kept():
    task = Needle(length=400)
    assert task.batch(np.random.default_rng(0), 1).input_ids.shape == (1, 400)
    with pytest.raises(ValueError, match="128 tokens of answer; it must be at least 491"):
        task.examples(np.random.default_rng(0), 1)
    assert Needle(length=491).examples(np.random.default_rng(0), 1).prompts.shape == (1, 363)


def test_a_tokenizer_that_loses_the_text_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    name = trained(tokenizer, tmp_path, ["<unk>"])
    with pytest.raises(ValueError, match="does not give back the text"):
        Needle(tokenizer=name)
