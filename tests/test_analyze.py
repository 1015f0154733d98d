"""`titans analyze`: the command, its files and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from titans_lm import Trace, cli, load, trace
from titans_lm.analyze.figures import half_life
from titans_lm.analyze.report import other_model_bits
from titans_lm.analyze.trace import read_bits
from titans_lm.cli.memory import head_changes
from titans_lm.models.cache_file import load_file
from titans_lm.models.tokenizer import byte_characters, byte_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")
TEXT = "One line.\nAnother line with é.\n\nOne line.\n" * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def meta_of(folder: Path) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="meta">(.*?)</script>', (folder / "index.html").read_text())[1]
    )


def test_it_writes_a_page_and_the_numbers(folder, text, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    out = tmp_path / "out"
    command = ["analyze", "--model", str(folder), "--text", str(text), str(other), "--out", str(out)]
    command += ["--what-if", "frozen:50", "skip:10-20"]
    assert cli.main(command) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    model, _ = load(folder)
    ids = np.frombuffer((TEXT + "something else\n").encode(), np.uint8).astype(np.int64)
    found, expected = Trace.from_npz(out / "trace.npz"), trace(model, ids)
    assert (found["token_id"] == ids).all()
    assert np.array_equal(found["bits_frozen"], expected["bits_frozen"], equal_nan=True)
    meta = meta_of(out)
    assert [one["start"] for one in meta["texts"]] == [0, len(TEXT.encode())]
    assert [one["label"] for one in meta["others"]] == ["memory frozen from 50", "10 to 20 not written"]
    assert [one["start"] for one in meta["others"]] == [50, 10]
    lines = {(token, line) for token, line, _ in meta["lines"]}
    assert (0, 1) in lines
    assert (len(TEXT.encode()), 1) in lines
    assert len(lines) == 13  # blank lines are not listed
    starts = [token for token, *_ in sorted(meta["lines"])]
    first = float(np.nansum(expected["bits"][: starts[1]])) / (starts[1] - 1)
    assert {token: bits for token, _, bits in meta["lines"]}[0] == pytest.approx(first, abs=1e-3)
    best = int(np.nanargmin(expected.helped))
    assert meta["helped"][0][0] == best
    about = json.loads((out / "analyze.json").read_text())
    assert about["command"].startswith("titans analyze")
    assert about["command"].split("--what-if ")[1].startswith("frozen:50 skip:10-20")
    assert about["page_bytes"] == (out / "index.html").stat().st_size
    skipped = read_bits(model, torch.from_numpy(ids), None, [(10, 20)])[0]
    assert about["what_if"][1]["bits_from_there"] == pytest.approx(float(skipped[10:].mean()))
    assert cli.main(command) == 0  # over its own files


def test_it_begins_with_a_memory_and_stops_after_some_tokens(folder, text, tmp_path, capsys):
    memory, out = tmp_path / "m.memory", tmp_path / "out"
    assert cli.main(["read", "--model", str(folder), "--memory", str(memory), str(text)]) == 0
    before = memory.read_bytes()
    command = ["analyze", "--model", str(folder), "--text", str(text), "--memory", str(memory), "--out", str(out)]
    assert cli.main([*command, "--tokens", "30"]) == 0
    assert "first 30 tokens" in capsys.readouterr().err
    found = Trace.from_npz(out / "trace.npz")
    assert len(found) == 30
    assert found.attributes["position"] == len(TEXT.encode())
    assert memory.read_bytes() == before
    assert meta_of(out)["texts"][0]["start"] == 0


def test_it_refuses_what_cannot_be(folder, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("mine")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/held.png").write_text("mine")
    base = {"--model": str(folder), "--text": str(text), "--out": str(tmp_path / "out")}
    for changes, words in (
        ({"--text": str(tmp_path / "none.txt")}, "none.txt does not exist"),
        ({"--text": str(tmp_path / "one.txt")}, "one.txt has one token; give a text with more"),
        ({"--out": str(tmp_path / "file")}, "is not a folder"),
        ({"--out": str(tmp_path / "site")}, "not of this command"),
        ({"--out": str(tmp_path / "pictures"), "--passage": "2-4"}, "held.png is not of this command"),
        ({"--tokens": "1"}, "--tokens must be at least 2"),
        ({"--what-if": "frozen"}, "--what-if frozen: give frozen:START"),
        ({"--what-if": "skip:9-5"}, "--what-if skip:9-5: give"),
        ({"--what-if": "frozen:900"}, "only 172 tokens"),
        ({"--what-if": "skip:5-900"}, "only 172 tokens"),
        ({"--sources": "5"}, "--sources 5: give A-B"),
        ({"--passage": "170-180"}, "--passage 170-180: the text has only 172 tokens"),
        ({"--sources": "0-5"}, "not its first"),
        ({"--compare": "nothing"}, "nothing"),
        ({"--memory": str(tmp_path / "none.memory")}, "none.memory"),
    ):
        flags = [word for pair in {**base, **changes}.items() for word in pair]
        assert cli.main(["analyze", *flags]) == 2, changes
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("titans analyze: "), said
        assert words in said
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "site/index.html").read_text() == (tmp_path / "pictures/held.png").read_text() == "mine"


def test_all_flags_at_once(folder, text, tmp_path):
    """Figures as PNG and SVG, sources, a passage, and another model beside."""
    out = tmp_path / "out"
    command = ["analyze", "--model", str(folder), "--text", str(text), "--out", str(out), "--figures"]
    assert cli.main([*command, "--compare", str(folder), "--sources", "60-62", "--passage", "10-18"]) == 0
    names = ("along", "norms", "span", "singular_values", "similarity", "overview", "sources", "held")
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert b"<svg" in (out / f"{name}.svg").read_bytes(), name
    meta, about = meta_of(out), json.loads((out / "analyze.json").read_text())
    assert meta["compared"] == folder.name
    assert about["compared"]["bits"] == pytest.approx(about["bits"]["bits"], rel=1e-5)  # it is the same model
    assert [one["token"] for one in meta["sources"]] == [60, 61]
    assert all(source < one["token"] for one in meta["sources"] for source, _ in one["sources"])
    assert about["passage"]["tokens"] == [10, 18]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_another_model_s_bits_are_placed_by_bytes(model):
    """Tokens of two bytes against tokens of one: the bits of both bytes."""
    vocabulary = {**{c: i for i, c in enumerate(byte_characters())}, "ab": 256}
    pairs = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs.decoder = decoders.ByteLevel()
    content = b"xabyab"
    found = other_model_bits("o", model, byte_tokenizer(), [b"x", b"ab", b"y", b"ab"])
    single, _ = read_bits(model, torch.tensor(list(content)), None, [])
    assert found.bits[1:] == pytest.approx([single[1] + single[2], single[3], single[4] + single[5]], rel=1e-5)
    found = other_model_bits("o", model, PreTrainedTokenizerFast(tokenizer_object=pairs), [bytes([b]) for b in content])
    double, _ = read_bits(model, torch.tensor([120, 256, 121, 256]), None, [])
    assert found.bits[1:] == pytest.approx([double[1], 0, double[2], double[3], 0], rel=1e-5)
    unknown = other_model_bits("o", model, PreTrainedTokenizerFast(tokenizer_object=pairs), [b"a", b"b", b"y"]).bits
    assert np.isnan(unknown).tolist() == [True, True, False]  # both bytes of the other's first token
    with pytest.raises(ValueError, match="special tokens"):
        other_model_bits("o", model, byte_tokenizer(), [b"x", "<eos>"])


@pytest.mark.parametrize(("eta", "alpha"), [(0.0, 0.1), (0.9, 0.01), (0.5, 0.5), (0.9, 0.1), (0.99, 0.3)])
def test_the_half_life_is_that_of_a_write_followed_step_by_step(eta, alpha):
    memory, momentum, left = 0.0, 1.0, []
    for _ in range(3000):
        memory = (1 - alpha) * memory + momentum
        momentum *= eta
        left.append(memory)
    peak = int(np.argmax(left))
    below = next(n for n in range(peak, 3000) if left[n] < max(left) / 2)
    assert half_life(eta, alpha) == pytest.approx(below, abs=1.2)
    assert half_life(0.9, 0.0) == np.inf


def test_a_picture_of_two_memories(folder, tmp_path, capsys):
    one, two, picture = (tmp_path / name for name in ("one.memory", "two.memory", "diff.png"))
    for file, count in ((one, 1), (two, 2)):
        texts = [tmp_path / f"{count}-{i}.txt" for i in range(count)]
        for path in texts:
            path.write_text(TEXT * count)
        assert cli.main(["read", "--model", str(folder), "--memory", str(file), *map(str, texts)]) == 0
    assert cli.main(["memory", "diff", str(one), str(two), "--picture", str(picture)]) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    a, b = load_file(one)[0], load_file(two)[0]
    changes = head_changes(a, b)
    parts = [f"layers.1.memory.memory.weights.{i}" for i in range(2)]
    apart = sum(float((a[n] - b[n])[0, 1].double().square().sum()) for n in parts)
    size = sum(float(a[n][0, 1].double().square().sum()) for n in parts)
    assert changes.shape == (2, 2)
    assert float(changes[1, 1]) == pytest.approx((apart / size) ** 0.5)
    capsys.readouterr()
    picture.write_bytes(b"mine")
    assert cli.main(["memory", "diff", str(one), str(two), "--picture", str(picture)]) == 2
    assert "not a picture of this command" in capsys.readouterr().err
    assert picture.read_bytes() == b"mine"
    assert cli.main(["memory", "diff", str(one), str(two), "--picture", str(tmp_path / "x.jpg")]) == 2
