"""Text to tokens: nothing lost, nothing invented, and what is not text is named."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from titans_lm.models.tokenizer import byte_tokenizer, encode, is_bytes
from titans_lm.training.data import Blocks, TBPTTSampler
from titans_lm.utils.corpora import split_held_out, stdlib_files, text_files
from titans_lm.utils.text_file import read_text, text_pieces

TOKENIZER = byte_tokenizer()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(text=st.text())
def test_any_text_is_its_bytes_and_comes_back(text):
    ids = encode(TOKENIZER, text)
    assert ids.tolist() == list(text.encode()) == TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


def test_the_byte_tokenizer_is_saved_and_loaded_without_a_download(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert is_bytes(loaded)
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (256, 257, 258)
    assert len(loaded) == 259
    assert loaded.padding_side == "left"


def test_blocks_are_the_texts_in_order_each_closed_by_the_end_token():
    texts = ["first", "second text", "third"]
    blocks = Blocks(texts, TOKENIZER, 5)
    stream = [t for text in texts for t in [*text.encode(), 258]]
    assert torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist() == stream[: len(blocks) * 5]
    assert len(blocks) == len(stream) // 5
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])


def test_a_text_shorter_than_a_block_is_named():
    with pytest.raises(ValueError, match="fewer than one block of sequence_length=50"):
        Blocks(["short"], TOKENIZER, 50)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(batch=st.integers(1, 4), carried=st.integers(1, 5), extra=st.integers(0, 30), seed=st.integers(0, 9))
def test_rows_go_on_from_batch_to_batch_and_no_block_comes_twice(batch, carried, extra, seed):
    count = batch * carried + extra
    order = np.array(list(TBPTTSampler(count, batch, carried, seed)))
    assert len(order) == len(TBPTTSampler(count, batch, carried, seed))
    assert len(set(order)) == len(order)
    assert order.max() < count
    rounds = order.reshape(-1, carried, batch)
    assert (np.diff(rounds, axis=1) == 1).all()


def test_the_order_is_the_seed_s_and_the_epoch_s():
    order = TBPTTSampler(40, 2, 4, seed=1)
    first = list(order)
    assert list(order) == first == list(TBPTTSampler(40, 2, 4, seed=1))
    order.set_epoch(1)
    assert list(order) != first
    assert list(TBPTTSampler(40, 2, 4, seed=2)) != first
    with pytest.raises(ValueError, match="too few"):
        TBPTTSampler(7, 2, 4, seed=1)


def test_what_is_not_text_is_named(tmp_path):
    bad = {
        "missing": (None, "does not exist"),
        "empty": (b" \n", "is empty"),
        "latin": (b"caf\xe9", "not UTF-8"),
        "binary": (b"ab\0cd", "NUL"),
    }
    for name, (content, words) in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            read_text(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")), size=st.integers(1, 9))
def test_pieces_of_a_file_are_its_text_and_end_where_lines_end(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("pieces") / "text"
    path.write_bytes(text.encode())
    if not text.strip():
        with pytest.raises(ValueError, match="is empty"):
            list(text_pieces(path, size))
        return
    pieces = list(text_pieces(path, size))
    assert "".join(pieces) == text.removeprefix("\ufeff")
    for piece, following in pairwise(pieces):
        whole = len((piece + following).encode())  # a line is cut if it is longer than a piece
        assert piece.endswith("\n") or whole >= size
    assert all(len(piece.encode()) < 2 * size + 4 for piece in pieces)


def test_folders_give_their_files_in_order_and_others_are_named(tmp_path):
    for name in ("b.txt", "a.txt", "inner/c.txt", "d.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    names = [p.relative_to(tmp_path).as_posix() for p in text_files([str(tmp_path)], [".txt"])]
    assert names == ["a.txt", "b.txt", "inner/c.txt"]
    assert text_files([str(tmp_path / "d.md")], [".txt"]) == [tmp_path / "d.md"]
    with pytest.raises(ValueError, match=r"no file that ends in \.rst"):
        text_files([str(tmp_path)], [".rst"])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        text_files([str(tmp_path / "nowhere")], [".txt"])


def test_empty_files_of_a_folder_are_left_out_and_counted(tmp_path, caplog):
    for name, text in {"__init__.py": "", "a.py": "x = 1\n", "blank.py": " \n\t\n"}.items():
        (tmp_path / name).write_text(text)
    assert text_files([str(tmp_path)], [".py"]) == [tmp_path / "a.py"]
    assert "2 empty files are left out" in caplog.text
    with pytest.raises(ValueError, match="is empty"):  # one that is named is not left out
        read_text(text_files([str(tmp_path / "__init__.py")], [".py"])[0])
    (tmp_path / "a.py").write_text("")
    with pytest.raises(ValueError, match="has only empty files"):
        text_files([str(tmp_path)], [".py"])


def test_the_standard_library_is_megabytes_of_text_and_not_its_tests():
    files = stdlib_files()
    assert sum(p.stat().st_size for p in files) > 4_000_000
    assert not [p for p in files if {"test", "site-packages"} & set(p.parts[-4:])]
    assert text_files(["python-stdlib"], [".txt"]) == files


def test_files_are_held_out_whole_and_something_is_left(tmp_path):
    files = [tmp_path / name for name in "abcd"]
    assert split_held_out(files, 1) == (files[:3], files[3:])
    assert split_held_out(files, 0) == (files, [])
    with pytest.raises(ValueError, match="leaves nothing"):
        split_held_out(files, 4)
