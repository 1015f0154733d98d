"""Streams: each source is what it says, by measures that are not its own; every stream is made from its seed alone."""

import dataclasses
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from titans_lm.tasks import StreamRows, make_task
from titans_lm.tasks.streams import SOURCES, Streams
from titans_lm.training.config import parse_settings
from titans_lm.training.train import train
from titans_lm.utils.corpora import stdlib_files, stdlib_held_out

TEXT = "the quick brown fox jumps over a lazy dog while Seven Wizards QUIETLY box 40 jugs of 1918 liquor; (no: 'ten')"
WORDS = re.split(" ", TEXT)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(3):
        lines = (" ".join(WORDS[j] for j in rng.integers(len(WORDS), size=12)) for _ in range(300))
        (folder / f"{i}.txt").write_text(f"file {i}\n" + "\n".join(lines) + "\n")
    return folder


def task(texts, **options) -> Streams:
    made = make_task({"name": "streams", "files": str(texts), **options})
    assert isinstance(made, Streams)
    return made


def stream(texts, source, seed=0, length=1 << 14, **options):
    return task(texts, sources=source, **options).stream(np.random.default_rng(seed), length)


@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_is_made_from_its_seed_alone_and_no_other_is_alike(texts, source):
    one, again, other = (stream(texts, source, seed, 3000) for seed in (1, 1, 2))
    assert one.shape == (3000,)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_batch_asks_for_every_token(texts):
    made = task(texts, length=64)
    ids, labels = made.batch(np.random.default_rng(0), 3)
    assert ids.shape == (3, 64)
    assert ids.dtype == np.int64
    assert np.array_equal(ids, labels)
    assert made.vocab_size == 259


@pytest.mark.parametrize("spans", [[1, 2, 6], [2, 5]])
def test_carried_rows_are_parts_of_streams_that_begin_where_memories_do(texts, spans):
    made, longest = task(texts, length=32), max(spans)
    rows = iter(StreamRows(made, spans, len(spans), seed=3))
    batches = [[next(rows)["input_ids"].numpy() for _ in spans] for _ in range(2 * longest)]
    seen = Counter()
    for row, span in enumerate(spans):
        which = 0
        for begin in range(0, 2 * longest, longest):
            for first in range(begin, begin + longest, span):  # the trainer's resets
                whole = made.stream(np.random.default_rng((3, row, which)), 32 * span).reshape(span, 32)
                here = range(first, min(first + span, begin + longest))
                for part, number in enumerate(here):
                    assert np.array_equal(batches[number][row], whole[part])
                seen[bytes(whole)] += 1
                which += 1
    assert max(seen.values()) == 1


def losses(output):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["bits_per_byte"]) for entry in history if "loss" in entry]


def run(texts, output, **training):
    return parse_settings({
        "model": {"variant": "lmm", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "intermediate_size": 32, "num_persistent_tokens": 2, "memory_dim": 16},
        "data": {"task": {"name": "streams", "files": str(texts), "length": 32, "switch": 50}},
        "training": {"output_dir": str(output), "max_steps": 8, "batch_size": 3, "logging_steps": 1, "save_steps": 4,
                     "tbptt_steps": [1, 2, 5], **training},
    })  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_of_carried_streams_goes_on_to_the_same_losses(texts, tmp_path, accumulation):
    settings = run(texts, tmp_path / "out", accumulation=accumulation)
    train(settings)
    whole = losses(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-8")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    settings.training.resume = True
    train(settings)
    assert losses(tmp_path / "out") == whole
    assert len(whole) == 8
    assert whole[0][1] == pytest.approx(whole[0][0] / np.log(2), abs=1e-4)


def test_what_cannot_be_carried_is_told(texts, tmp_path):
    settings = run(texts, tmp_path / "out")
    tree = dataclasses.asdict(settings)
    with pytest.raises(ValueError, match=r"tbptt_steps above 1 does not go with data\.shortest"):
        parse_settings({**tree, "data": {**tree["data"], "shortest": 8}})
    with pytest.raises(ValueError, match=r"needs data\.files, data\.dataset, or a data\.task whose rows continue"):
        parse_settings({**tree, "data": {"task": {"name": "parity", "length": 8}}})


# ------------------------------------------------------------------------------------------------ files


def test_held_out_files_are_never_read(texts, tmp_path):
    archive = tmp_path / "some.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(texts.iterdir(), reverse=True):
            file.add(path, path.name)
    for where in (texts, archive):
        read = bytes(stream(where, "text", length=1 << 17, held_out=1))
        assert b"file 0" in read
        assert b"file 1" in read
        assert b"file 2" not in read
        assert b"file 2" in bytes(stream(where, "text", length=1 << 17))


def test_a_tenth_of_the_standard_library_is_held_out():
    held_out, files = stdlib_held_out(), stdlib_files()
    assert set(held_out) < set(files)
    assert 0.05 < len(held_out) / len(files) < 0.15
    assert stdlib_held_out() == held_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": "log"}, "sources: 'log' is not one of: text, cipher"),
        ({"sources": {"logs": -1}}, "sources: the weight of logs must be a number of at least 0, got -1"),
        ({"sources": {"logs": 0}}, "sources must be a name, a list of names, or names with weights above 0"),
        ({"sources": 3}, "sources must be a name"),
        ({"files": []}, "files must be a name"),
        ({"files": "nowhere"}, "nowhere does not exist"),
        ({"held_out": 3}, "held_out=3 leaves nothing"),
        ({"switch": -1}, "switch must be a whole number of at least 0, got -1"),
        ({"suffixes": [1]}, "suffixes must be texts"),
        ({"suffixes": ".rst"}, "has no file that ends in .rst"),
        ({"length": 0}, "length must be a whole number of at least 1"),
    ],
)
def test_a_wrong_option_is_told(texts, options, message):
    with pytest.raises(ValueError, match=message):
        task(texts, **options)


def test_what_is_no_archive_of_texts_is_told(tmp_path):
    broken = tmp_path / "broken.tar.xz"
    broken.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as an archive"):
        task(broken)
    with tarfile.open(tmp_path / "bytes.tar", "w") as file:
        member = tarfile.TarInfo("a.txt")
        member.size = 4
        file.addfile(member, io.BytesIO(b"\xff\xfe\xff\xfe"))
    with pytest.raises(ValueError, match=r"bytes\.tar: a\.txt is not text"):
        task(tmp_path / "bytes.tar")
