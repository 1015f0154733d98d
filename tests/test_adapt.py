"""How fast a model learns a stream: code lengths that add up, rivals that are what they say, a command that goes on."""

import bz2
import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import of_other_configuration, tiny_model
from titans_lm.cli import main
from titans_lm.evaluate import perplexity
from titans_lm.evaluate.adapt import Stream, code_lengths, read_stream
from titans_lm.evaluate.compressors import compressed_bits, installed
from titans_lm.evaluate.dynamic import dynamic_nats
from titans_lm.evaluate.rereading import reread
from titans_lm.layers.bypass import bypass_memory
from titans_lm.models.tokenizer import byte_tokenizer

LOG = b"".join(b"%03d service started, id=%d\n" % (n, n * n % 97) for n in range(12))
OPTIONS = {"bucket": 16, "reset_every": 32}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a service.log"
    path.write_bytes(LOG)
    return path


@pytest.fixture(scope="module")
def stream(file):
    return read_stream(file, byte_tokenizer(), 200)


def nats_of(read):
    """What `read` yields, by position."""
    return {t: nats for first, part in read for t, nats in enumerate(part.tolist(), first)}


# ------------------------------------------------------------------------------------------------ code lengths


@pytest.mark.parametrize("predictor", ["on", "frozen", "reset", "off", "dynamic 0.1", "zlib", "bz2", "lzma"])
def test_buckets_and_halves_add_up(model, stream, predictor):
    found = code_lengths(model, stream, predictor, OPTIONS)
    edges = [0, *(end for _, end, _ in found["buckets"])]
    assert edges == [0, 16, 32, 64, 128, 200]
    counted = [end - max(first, 1) for first, end, _ in found["buckets"]]
    total = sum(n * bits for n, (*_, bits) in zip(counted, found["buckets"], strict=True))
    if predictor not in installed():
        assert total / 199 == pytest.approx(found["bits_per_byte"])
    halves = 99 * found["first_half"] + 100 * found["last_half"]
    assert halves / 199 == pytest.approx(found["bits_per_byte"])


def test_a_mode_is_what_perplexity_measures(model, stream):
    rows = perplexity.measure(model, stream.ids, ["reset"], sizes=stream.sizes, bucket=16, reset_every=32)
    found = code_lengths(model, stream, "reset", OPTIONS)
    assert [bits for *_, bits in found["buckets"]] == pytest.approx([row["bits_per_byte"] for row in rows])


@pytest.mark.parametrize(("name", "compress"), [("zlib", lambda d: zlib.compress(d, 9)), ("bz2", bz2.compress)])
def test_compressors_spend_what_their_prefixes_take(name, compress):
    spent = compressed_bits(name, LOG, [10, 100, len(LOG)])
    assert spent[0] == 8 * len(compress(LOG[:10]))
    assert sum(spent) == 8 * len(compress(LOG))
    assert sum(spent[:2]) == 8 * len(compress(LOG[:100]))


def test_halves_of_a_compressor_are_those_of_its_prefixes(model):
    data = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8).tobytes() * 2
    stream = Stream("twice", torch.tensor([list(data)]), torch.ones(1000, dtype=torch.float64), data)
    found = code_lengths(model, stream, "zlib", {"bucket": 1024, "reset_every": 4096})
    half, whole = (8 * len(zlib.compress(data[:end], 9)) for end in (500, 1000))
    assert found["first_half"] == pytest.approx(half / 500)
    assert found["last_half"] == pytest.approx((whole - half) / 500)
    assert found["buckets"] == [[0, 1000, pytest.approx((half * 499 / 500 + whole - half) / 999)]]


def test_a_compressor_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'rar' is not at hand; there are: zlib, bz2, lzma"):
        compressed_bits("rar", LOG, [10])


def test_bytes_are_read_as_they_are(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    stream = read_stream(tmp_path / "binary", byte_tokenizer(), None)
    assert stream.ids[0].tolist() == list(range(256))
    assert stream.data == bytes(range(256))


# ------------------------------------------------------------------------------------------------ dynamic evaluation


def test_before_its_first_step_dynamic_evaluation_is_the_model_without_memory():
    model, ids = tiny_model("mag", torch.float32), torch.arange(40)[None] % 23
    found = nats_of(dynamic_nats(model, ids, rate=0.1, segment=16))
    with torch.no_grad(), bypass_memory(model):
        plain = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert sorted(found) == list(range(1, 40))
    assert [found[t] for t in range(1, 17)] == pytest.approx(plain[:16].tolist(), rel=1e-5)
    assert found[30] != pytest.approx(plain[29].item(), rel=1e-5)


def test_dynamic_evaluation_learns_and_leaves_the_model_as_it_is():
    model, ids = tiny_model("mac", torch.float32), (torch.arange(400) % 5)[None]
    before = copy.deepcopy(model.state_dict())
    found = nats_of(dynamic_nats(model, ids, rate=0.3, segment=8))
    assert sum(found[t] for t in range(350, 400)) < 0.5 * sum(found[t] for t in range(1, 51))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dynamic_evaluation_refuses_numbers_that_make_no_sense():
    model = tiny_model("mag")
    for options in ({"rate": 0.0}, {"rate": math.nan}, {"rate": 0.1, "segment": 0}):
        with pytest.raises(ValueError, match="a rate above 0 and a segment of at least 1"):
            next(dynamic_nats(model, torch.zeros(1, 9, dtype=torch.long), **options))


# ------------------------------------------------------------------------------------------------ second reading


@torch.no_grad()
def test_both_readings_are_those_of_one_forward_pass():
    model, ids = tiny_model("lmm"), torch.randint(23, (1, 50), generator=torch.Generator().manual_seed(3))
    rows = list(reread(model, ids, lag=8, passage=10, passages=3))
    assert [row["at"] for row in rows] == [0, 16, 32]
    text = torch.cat([ids[:, 16:34], ids[:, 16:26]], 1)
    nats = F.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none")
    assert rows[1]["first"] == pytest.approx(nats[:9].mean().item())
    assert rows[1]["second"] == pytest.approx(nats[-9:].mean().item())


def test_a_text_too_short_for_a_lag_has_no_such_place():
    assert list(reread(tiny_model("lmm"), torch.zeros(1, 50, dtype=torch.long), lag=45, passage=10)) == []


# ------------------------------------------------------------------------------------------------ command


def command(file, folder, out, *more):
    few = ["--modes", "on", "reset", "--rates", "0.1", "--tokens", "150", "--bucket", "32"]
    again = ["--lags", "0", "20", "--passage", "20", "--passages", "2"]
    return main(["evaluate", "adapt", str(file), "--model", str(folder), "--out", str(out), *few, *again, *more])


@pytest.mark.usefixtures("unchecked")
def test_the_command_writes_rows_a_figure_and_goes_on(file, folder, tmp_path, capsys):
    (tmp_path / "[").mkdir()
    out = tmp_path / "[" / "x] adapt.jsonl"  # as rich ends a style
    assert command(file, folder, out) == 0
    head, *rows = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("titans evaluate adapt")
    assert [row.get("predictor", row.get("lag")) for row in rows] == [
        "on", "reset", "dynamic 0.1", *installed(), 0, 20,
    ]  # fmt: skip
    assert out.with_suffix(".png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "second reading / first" in said
    assert "[/x]adapt.jsonl" in "".join(said.split())
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2] + lines[3:]))  # as if it had been interrupted before "reset"
    assert command(file, folder, out) == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert again[1] == rows[0]
    assert {**again[-1], "seconds": 0} == {**rows[1], "seconds": 0}
    assert command(file, of_other_configuration(folder, tmp_path / "other"), out) == 2
    assert "results of other settings (configuration)" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--rates", "-1"], "--rates must be above 0"),
        (["--lags", "-1"], "--lags must be at least 0"),
        (["--passage", "1"], "--passage must be at least 2"),
        (["--out", "nowhere/at/all.jsonl"], "the folder nowhere/at does not exist"),
        (["--out", "figure.png"], "figure.png is the name of the picture"),
        (["--out", "photo.jsonl"], "photo.png is not a picture of this command"),
    ],
)
def test_the_command_names_what_is_wrong(file, folder, tmp_path, tmp_path_factory, monkeypatch, capsys, more, named):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("photo.png").write_bytes(b"of someone")
    assert command(file, folder, tmp_path / "out.jsonl", *more) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert [path.read_bytes() for path in Path().iterdir()] == [b"of someone"]


@pytest.mark.usefixtures("unchecked")
def test_the_command_makes_its_default_folder(file, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--modes", "on", "--rates", "--compressors", "--lags", "--tokens", "50"]
    assert main(["evaluate", "adapt", str(file), "--model", str(folder), *few]) == 0, capsys.readouterr().err
    assert {path.name for path in Path("results").iterdir()} == {"adapt.jsonl", "adapt.png"}


@pytest.mark.usefixtures("unchecked")
def test_a_file_without_text_is_named(folder, tmp_path, capsys):
    (tmp_path / "nothing.log").write_bytes(b"xyz")
    assert command(tmp_path / "nothing.log", folder, tmp_path / "out.jsonl") == 2
    assert "nothing.log has 3 tokens; give a file with at least 4" in capsys.readouterr().err
