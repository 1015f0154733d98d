"""Data that is streamed: every token once, in its place, and after a stop the same batches as without one."""

import bz2
import gzip
import itertools
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import parse_settings
from titans_lm.training.data import Blocks
from titans_lm.training.data.build import data_of
from titans_lm.training.data.documents import Documents, TableRows, TextFiles, shard_of, tables, texts_of
from titans_lm.training.data.loader import Loader, Shard
from titans_lm.training.data.packing import PackedRows
from titans_lm.training.data.schedule import Place

TOKENIZER = byte_tokenizer()
TEXTS = [f"text {i}, " + "and so on, " * (i * 7 % 11) + "null" * (i % 2) for i in range(30)]
STREAM = [token for text in TEXTS for token in [*text.encode(), 258]]


def write(folder, kind, texts=TEXTS):
    """The texts as one file of a kind."""
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(texts)).encode()
    table = "text,number\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(texts))
    if kind == "parquet":
        rows = pa.table({"text": texts, "number": list(range(len(texts)))})
        pyarrow.parquet.write_table(rows, path, row_group_size=4)
    elif kind in ("csv", "tsv"):
        path.write_text(table if kind == "csv" else table.replace('",', '"\t').replace("text,n", "text\tn"))
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(kind.split(".")[-1], bytes)
        path.write_bytes(pack(lines))
    return path


def settings(data, **training):
    return parse_settings(
        {
            "model": {"size": "tiny"},
            "data": data if "task" in data else {"sequence_length": 32, **data},
            "training": {"output_dir": "nowhere", "max_steps": 20, "batch_size": 4, **training},
        }
    )


def stream_of(data, **training):
    made = settings(data, **training)
    return data_of(made, TOKENIZER, made.training.batch_size)[0]


def take(loader, count):
    return list(itertools.islice(loader, count))


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_tokens_in_memory_and_streamed(tmp_path, kind):
    path = write(tmp_path, kind)
    assert list(texts_of([path], "text", None)) == TEXTS
    pattern = str(tmp_path / "rows.*")
    in_memory = Blocks(texts_of([path], "text", None), TOKENIZER, 32)
    stream = stream_of({"files": [pattern], "stream": True, "held_out": 0})
    streamed = torch.cat([batch["input_ids"] for batch in take(Loader(stream, Shard(0, 1)), len(in_memory) // 4)])
    assert torch.equal(streamed, in_memory.blocks[: len(streamed)].long())
    assert streamed.flatten().tolist() == STREAM[: streamed.numel()]


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz"])
def test_a_text_file_is_one_document_also_compressed(tmp_path, ending):
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    paths = [tmp_path / f"{name}.txt{ending}" for name in "ab"]
    for path in paths:
        path.write_bytes(pack(f"of {path.name[0]}\nand on".encode()))
    assert list(texts_of(paths, "text", None)) == ["of a\nand on", "of b\nand on"]
    assert list(texts_of(paths, "text", "\n")) == ["of a", "and on", "of b", "and on"]
    paths[0].write_bytes(pack(b"a\0b"))
    with pytest.raises(ValueError, match=r"a.txt.* is not text"):
        list(texts_of(paths, "text", None))
    if ending:
        paths[0].write_bytes(b"no such thing")
        with pytest.raises(ValueError, match=r"a.txt.* cannot be decompressed"):
            list(texts_of(paths, "text", None))


PLACES = {
    "jsonl": {},
    "parquet": {},
    "jsonl.gz": {"separator": ", and", "documents": "reset"},
    "csv": {"curriculum": [{"until": 0.3, "sequence_length": 8}, {"until": 1, "sequence_length": 32}]},
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", PLACES)
def test_from_a_place_on_batches_are_those_of_a_run_that_did_not_stop(tmp_path, kind, steps):
    """Over the end of the data too, which has 2 batches and then begins again."""
    write(tmp_path, kind, TEXTS[:12])
    stream = stream_of(
        {"files": [str(tmp_path / "rows.*")], "stream": True, "held_out": 0, **PLACES[kind]}, tbptt_steps=steps
    )
    whole = take(Loader(stream, Shard(0, 1)), 14)
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in whole}) > 10
    for stop in (0, 1, 5, 6, 11):
        first = Loader(stream, Shard(0, 1))
        take(first, stop)
        first.save(tmp_path) if stop else (tmp_path / "data-00000.json").unlink(missing_ok=True)
        again = Loader(stream, Shard(0, 1))
        if stop:
            again.load(tmp_path, stop)
        assert equal(take(again, 14 - stop), whole[stop:])


def test_nothing_before_a_place_is_read_again(tmp_path):
    paths = [tmp_path / f"{i:02}.txt" for i in range(20)]
    for path, text in zip(paths, TEXTS, strict=False):
        path.write_text(text)
    rows = PackedRows(Documents(TextFiles(paths)), TOKENIZER, borders=True, continued=False)
    for number in range(5):
        rows.rows(Place(number, 2, 16, 0), [0, 1])
    state = json.loads(json.dumps(rows.state_dict()))
    expected = rows.rows(Place(5, 2, 16, 0), [0, 1])
    begun = state["lanes"]["0"]["source"]["before"]["file"]
    assert begun > 0
    for path in paths[:begun]:
        path.unlink()
    again = PackedRows(Documents(TextFiles(paths)), TOKENIZER, borders=True, continued=False)
    again.load_state_dict(state)
    assert equal([again.rows(Place(5, 2, 16, 0), [0, 1])], [expected])


def test_documents_of_rows_that_a_later_stage_lacks_are_read_on(tmp_path):
    paths = [tmp_path / f"{letter}.txt" for letter in "abcdefgh"]
    for path in paths:
        path.write_text(path.stem * 10)
    rows = PackedRows(Documents(TextFiles(paths)), TOKENIZER, borders=True, continued=True)
    read = [rows.rows(Place(0, 4, 4, 0), range(4))] + [rows.rows(Place(n, 2, 8, 1), range(2)) for n in range(1, 5)]
    counts = torch.cat([batch["input_ids"].flatten() for batch in read]).bincount()
    assert [int(counts[ord(letter)]) for letter in "abcdef"] == [10] * 6


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kinds", [["jsonl"], ["parquet"], ["jsonl", "jsonl.gz", "jsonl.xz"]])
def test_shards_have_every_document_once(tmp_path, kinds, count):
    files = [write(tmp_path, kind, TEXTS[i :: len(kinds)]) for i, kind in enumerate(kinds)]
    shards = [list(Documents(TableRows(shard_of(tables(files), i, count), "text")).once()) for i in range(count)]
    assert sorted(text for shard in shards for text in shard) == sorted(TEXTS)
    assert all(shards)
    if len(files) >= count:  # each reads its own files alone
        assert [shard_of(tables(files), i, count).num_shards for i in range(count)] == [[2, 1], [1, 1, 1]][count - 2]


def test_workers_pack_rows_of_their_own_and_go_on_from_their_places(tmp_path):
    write(tmp_path, "jsonl")
    data = {"files": [str(tmp_path / "rows.jsonl")], "stream": True, "held_out": 0}
    stream = stream_of({**data, "workers": 2})
    loader = Loader(stream, Shard(0, 1))
    whole = take(loader, 6)
    alone = [take(Loader(stream_of(data, batch_size=2), Shard(i, 2)), 6) for i in range(2)]
    for batch, *parts in zip(whole, *alone, strict=True):
        for worker, part in enumerate(parts):
            assert torch.equal(batch["input_ids"][worker::2], part["input_ids"])
    first = Loader(stream, Shard(0, 1))
    take(first, 3)
    first.save(tmp_path)
    again = Loader(stream, Shard(0, 1))
    again.load(tmp_path, 3)
    assert equal(take(again, 3), whole[3:])
    with pytest.raises(ValueError, match="process 1 of 1 with 2 workers: resume with as many"):
        Loader(stream_of(data), Shard(0, 1)).load(tmp_path, 3)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"words": "a line"}\n' * 9)
    with pytest.raises(ValueError, match=r"^data.text_column='text' is not in the data set; it has words$"):
        take(Loader(stream_of({**data, "files": [str(broken)], "workers": 1}), Shard(0, 1)), 1)


def test_a_place_that_is_not_one_is_named(tmp_path):
    write(tmp_path, "jsonl")
    stream = stream_of({"files": [str(tmp_path / "rows.jsonl")], "stream": True, "held_out": 0})
    loader = Loader(stream, Shard(0, 1))
    whole = take(loader, 4)
    loader.save(tmp_path)
    with pytest.raises(ValueError, match="damaged: it is the place before batch 4, not 3"):
        Loader(stream, Shard(0, 1)).load(tmp_path, 3)
    with pytest.raises(ValueError, match="process 1 of 1 with 1 workers"):
        Loader(stream, Shard(0, 2)).load(tmp_path, 4)
    (tmp_path / "data-00000.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data-00000\.json is damaged"):
        Loader(stream, Shard(0, 1)).load(tmp_path, 4)
    (tmp_path / "data-00000.json").unlink()
    old = Loader(stream, Shard(0, 1))
    with pytest.warns(UserWarning, match="has no place in the data: it is read again"):
        old.load(tmp_path, 2)
    assert equal(take(old, 2), whole[2:])


def test_sources_come_by_weight_and_in_their_own_order(tmp_path):
    write(tmp_path, "jsonl")
    (tmp_path / "digits.txt").write_text("0123456789" * 20)
    sources = [
        {"files": [str(tmp_path / "rows.jsonl")], "weight": 2},
        {"files": [str(tmp_path / "digits.txt")], "weight": 1},
        {"task": {"name": "streams", "sources": "noise"}, "weight": 1},
    ]
    for documents in ("join", "reset"):
        stream = stream_of({"sources": sources, "documents": documents})
        loader = Loader(stream, Shard(0, 1))
        whole = take(loader, 100)
        rows = torch.cat([batch["input_ids"] for batch in whole])
        digits = ((rows >= 48) & (rows < 58) | (rows == 258)).all(1)
        texts = torch.isin(rows, torch.tensor(list(set(STREAM)))).all(1) & ~digits
        assert 0.17 < digits.float().mean() < 0.33
        assert 0.4 < texts.float().mean() < 0.6
        assert rows[texts].flatten().tolist()[:640] == (STREAM * 9)[:640]
        first = Loader(stream, Shard(0, 1))
        take(first, 30)
        first.save(tmp_path)
        again = Loader(stream, Shard(0, 1))
        again.load(tmp_path, 30)
        assert equal(take(again, 20), whole[30:50])


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ["first line", None, "", "second line", None]))
    stream = stream_of({"files": [str(path)], "stream": True, "held_out": 0, "sequence_length": 8}, batch_size=1)
    loader = stream.begin(0, 1)
    with pytest.warns(UserWarning, match=r"row 1 of the data set has no text \(null\): such rows are left out"):
        ids = torch.cat([batch["input_ids"] for batch in take(loader, 2)]).flatten().tolist()
    assert ids == [*b"first line", 258, *b"second line", 258][:16]
    assert stream.skipped == 2
    loader.save(tmp_path)
    again = stream.begin(0, 1)
    again.load(tmp_path, 2)
    take(again, 1)
    assert stream.skipped == 3  # each row is counted once, and once more in the next pass


def test_data_of_no_text_or_too_little_or_broken_is_named(tmp_path):
    def first(*lines, **data):
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        data = {"files": [str(tmp_path / "rows.jsonl")], "stream": True, "held_out": 0, **data}
        take(Loader(stream_of(data), Shard(0, 1)), 1)

    with pytest.raises(ValueError, match=r"has no text: 2 rows, row 0 of the data set has no text \(int\)"):
        first('{"text": 5}', '{"text": 6}')
    with pytest.raises(ValueError, match=r"has 4 tokens, fewer than one block of sequence_length=32 \(1 rows"):
        first('{"text": "abc"}', '{"text": null}')
    with pytest.raises(ValueError, match=r"JSON|read on"):
        first('{"text": "a line of text"}', '{"text": ')
    with pytest.raises(ValueError, match=r"text_column='words' is not in the data set; it has text"):
        first('{"text": "a line of text"}', text_column="words")
    (tmp_path / "more.csv").write_text("text\nabc\n")
    with pytest.raises(ValueError, match=r"of one format, got csv and json; give them as data\.sources"):
        first("{}", files=[str(tmp_path / "*")])
    with pytest.raises(ValueError, match=r"no file fits .*nothing\*"):
        first("{}", files=[str(tmp_path / "nothing*")])


def test_a_curriculum_keeps_the_tokens_of_a_batch(tmp_path):
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    stages = [
        {"until": 0.25, "sequence_length": 8},
        {"until": 0.5, "sequence_length": 16},
        {"until": 1, "sequence_length": 32},
    ]
    for data in (
        {"files": [str(tmp_path / "text.txt")], "held_out": 0},
        {"files": [str(tmp_path / "text.txt")], "held_out": 0, "stream": True},
        {"task": {"name": "streams", "length": 32, "sources": "markov"}},
        {"task": {"name": "parity", "length": 32}},
    ):
        stream = stream_of({**data, "curriculum": stages}, max_steps=8)
        shapes = [tuple(batch["input_ids"].shape) for batch in take(stream.begin(0, 1), 9)]
        assert shapes == [(16, 8)] * 2 + [(8, 16)] * 2 + [(4, 32)] * 5
        assert all(rows * length == 128 for rows, length in shapes)
    carried = stream_of(
        {**data, "task": {"name": "streams", "length": 32}, "curriculum": stages}, max_steps=8, tbptt_steps=3
    )
    shapes = [tuple(batch["input_ids"].shape) for batch in take(carried.begin(0, 1), 9)]
    assert shapes == [(16, 8)] * 3 + [(8, 16)] * 3 + [(4, 32)] * 3  # no memory goes on in rows of another number


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"workers": 2}, "data.workers=2 has an effect only with data.stream"),
        ({"stream": True, "workers": 5}, "data.workers must be at most training.batch_size=4, got 5"),
        ({"documents": "apart"}, "data.documents must be join or reset, got 'apart'"),
        ({"separator": ""}, "data.separator must be a text"),
        ({"format": "pdf"}, "data.format='pdf' is not one of text, json"),
        ({"curriculum": [{"until": 1}]}, r"data.curriculum\[0\] must have until and sequence_length, got until"),
        ({"curriculum": [{"until": 0.5, "sequence_length": 8}]}, "must end with until: 1.0, got 0.5"),
        ({"curriculum": [{"until": 1, "sequence_length": 7}]}, "=7 does not divide the 128 tokens of a batch"),
        ({"curriculum": [{"until": 1, "sequence_length": 64}]}, "from 2 to data.sequence_length=32, got 64"),
        ({"curriculum": [{"until": 1.5, "sequence_length": 8}]}, "above 0, where it begins, and at most 1, got 1.5"),
        ({"curriculum": 3}, "data.curriculum must be a list of keys and values"),
        ({"files": [], "sources": [{"files": ["a"], "wieght": 2}]}, "did you mean 'weight'"),
        ({"files": [], "sources": [{"files": ["a"]}], "held_out": 2}, "data.held_out=2 has an effect only with"),
        ({"files": [], "sources": [{"dataset": "a", "held_out": 2}]}, r"data.sources\[0\].held_out=2 has an effect"),
        ({"files": [], "sources": [{"weight": 2}]}, r"data.sources\[0\]: give one of"),
        ({"files": [], "sources": [{"files": ["a"], "weight": 0}]}, r"data.sources\[0\].weight must be above 0"),
        ({"files": [], "sources": [{"task": {"name": "mqar"}}]}, r"data.sources\[0\].task: its tokens are numbers"),
        ({"files": [], "task": {"name": "mqar"}, "documents": "reset"}, "each row of a task is read alone already"),
        ({"files": [], "task": {"name": "mqar"}, "separator": "x"}, "data.separator='x' has an effect only with"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(data, words):
    with pytest.raises(ValueError, match=words):
        settings({"files": ["a.txt"], **data})


def test_texts_of_separators_alone_are_counted_and_end_the_first_pass(tmp_path):
    (tmp_path / "a.txt").write_text("----")
    with pytest.raises(ValueError, match=r"no text: 1 rows, .*separators alone"):
        next(Documents(TextFiles([tmp_path / "a.txt"]), "--"))
