"""Files as they are: cut in bounded pieces, what is not text named by its place, streams read once."""

import io
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from titans_lm.cli import main
from titans_lm.utils.corpora import text_files
from titans_lm.utils.text_file import PIECE_BYTES, decoded, examine, read_text


def file(place: Path, content: bytes) -> Path:
    path = place / "text.txt"
    path.write_bytes(content)
    return path


def test_one_line_of_64_mib_takes_the_memory_of_a_piece(tmp_path):
    path = tmp_path / "line.txt"
    with path.open("wb") as out:
        for _ in range(64):
            out.write(b"words and " * (PIECE_BYTES // 10) + b"      ")
    tracemalloc.start()
    sizes = [len(raw) for raw, _ in decoded(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == path.stat().st_size == 64 * PIECE_BYTES
    assert max(sizes) <= 2 * PIECE_BYTES
    assert peak < 12 * PIECE_BYTES


@pytest.mark.parametrize("at", [0, 10, PIECE_BYTES + 12345])
def test_what_is_not_utf_8_is_named_by_its_place_before_anything_is_used(tmp_path, at):
    path = file(tmp_path, (b"twelve chars" * (at // 12 + 1))[:at] + b"\xe9\nrest")
    with pytest.raises(ValueError, match=rf"not UTF-8 \(byte {at:,} is 0xe9"):
        examine(path)
    assert examine(path, "replace").size == path.stat().st_size
    assert read_text(path, errors="replace")[at:] == "\ufffd\nrest"
    path.write_bytes(path.read_bytes().replace(b"\xe9", b"\0"))
    with pytest.raises(ValueError, match=rf"NUL bytes \(the first is byte {at:,}"):
        examine(path)
    assert read_text(path, errors="replace")[at:] == "\ufffd\nrest"


@pytest.mark.parametrize("content", [b"caf\xe9 and more", b"caf\0 and more"])
@pytest.mark.parametrize(
    ("command", "takes"),
    [
        (["read", "--surprising", "1", "FILE", "--model"], True),
        (["infer", "--prompt", "a", "--context", "FILE", "--model"], True),
        (["analyze", "--text", "FILE", "--out", "out", "--model"], True),
        (["evaluate", "perplexity", "FILE", "--model"], False),
        (["train", "RUN", "--set", "data.held_out=0", "--set"], False),
    ],
)
def test_an_error_names_only_options_that_its_command_has(
    command, takes, content, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = file(tmp_path, content)
    places = {"FILE": str(path), "RUN": str(Path(__file__).parents[1] / "configs/tiny.yaml")}
    last = f"data.files=[{path}]" if command[0] == "train" else str(folder)
    assert main([*(places.get(word, word) for word in command), last]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} is not text" in said
    assert ("errors=replace reads it with U+FFFD there" in said) == takes
    assert ("errors" in said) == takes


def test_a_byte_order_mark_is_no_text_and_is_hashed(tmp_path):
    path = file(tmp_path, b"\xef\xbb\xbfone \xef\xbb\xbftwo")
    assert read_text(path) == "one \ufefftwo"  # within a text it is a character
    assert b"".join(raw for raw, _ in decoded(path)) == path.read_bytes()
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="byte 3 is 0xe9"):
        read_text(path)


def test_a_file_that_grows_ends_where_it_ended(tmp_path):
    path = file(tmp_path, b"before\n")
    found = examine(path)
    with path.open("ab") as out:
        out.write(b"after\n")
    assert b"".join(raw for raw, _ in decoded(path, limit=found.size)) == b"before\n"


def test_streams_are_opened_once_and_not_before_they_are_read(tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert examine(fifo).size == -1  # nobody writes yet, and nobody waits
    writer = threading.Thread(target=fifo.write_bytes, args=(b"from a pipe",))
    writer.start()
    assert read_text(fifo) == "from a pipe"
    writer.join()
    for name in ("-", "/dev/stdin"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("typéd".encode())))
        assert examine(Path(name)).size == -1
        assert read_text(name) == "typéd"
        with pytest.raises(ValueError, match="is empty"):
            read_text(name)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_text("-")
    assert read_text("/proc/self/comm").endswith("\n")  # a file without a size


def test_empty_files_of_a_folder_are_left_out(tmp_path):
    (tmp_path / "__init__.py").touch()
    with pytest.raises(ValueError, match=r"\.py"):
        text_files([str(tmp_path)], [".py"])
    (tmp_path / "module.py").write_text("x = 1\n")
    (tmp_path / "blank.py").write_text(" \n")
    assert text_files([str(tmp_path)], [".py"]) == [tmp_path / "module.py"]
