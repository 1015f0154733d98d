"""Text from regular files, pipes, FIFOs and standard input, in pieces of bounded size.

Files are cut as bytes, at line ends, and each piece is decoded separately. So the cuts depend on the content alone,
errors name the position of an invalid byte, and the bytes can be hashed independently of their decoding.
"""

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, NamedTuple

STANDARD_INPUT = Path("-")
"""Path that stands for standard input."""
PIECE_BYTES = 1 << 20
Errors = Literal["strict", "replace"]
"""Handling of invalid UTF-8 and of NUL: a ValueError with the position, or U+FFFD. As an argument here, None is
"strict" of a caller whose users cannot choose: the error does not tell them to."""
_BOM = b"\xef\xbb\xbf"


class Content(NamedTuple):
    """Size and digest of a file, determined before its text is used."""

    size: int
    """In bytes; -1 for a stream (pipe, FIFO, terminal), which can be read only once."""
    sha256: str
    """SHA-256 of the bytes; empty for a stream."""


def is_standard_input(path: Path) -> bool:
    """Whether `path` is `-` or a system path of this process's standard input."""
    return path == STANDARD_INPUT or str(path) in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


def name_of(path: Path) -> str:
    """Name for records: the file's name, or "stdin"."""
    return "stdin" if is_standard_input(path) else path.name


def examine(path: Path, errors: Errors | None = None) -> Content:
    """Read a regular file to its end, to check that all of it can be read. Does not touch a stream.

    Raises ValueError for a missing file, a folder, an empty file and invalid text; OSError for an unreadable file.
    """
    if is_standard_input(path):
        return Content(-1, "")
    status = _stat(path)
    if not stat.S_ISREG(status.st_mode):
        return Content(-1, "")
    digest, size = hashlib.sha256(), 0
    for raw, _ in decoded(path, errors=errors, limit=status.st_size or None):
        digest.update(raw)
        size += len(raw)
    return Content(size, digest.hexdigest()) if status.st_size else Content(-1, "")  # /proc has files of no size


def decoded(
    path: Path, size: int = PIECE_BYTES, errors: Errors | None = None, limit: int | None = None
) -> Iterator[tuple[bytes, str]]:
    """Yields the bytes of a text file in pieces, each with its text. Opens the file once.

    A piece ends at a line end and has about `size` bytes, at most twice as many. A longer line is cut before a space,
    or else between characters. A byte order mark has bytes but no text. `limit`: maximum bytes to read, so that a
    growing file ends where it ended when it was examined. Raises as `examine` does."""
    offset, blank = 0, True
    try:
        with _opened(path) as file:
            for raw in _cut(_blocks(file.read, size, limit), size):
                text = _decode(raw, offset, path, errors)
                offset += len(raw)
                blank = blank and not text.strip()
                yield raw, text
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    if blank:
        raise ValueError(f"{path} is empty; give a file with text in it")


def text_pieces(path: str | Path, size: int = PIECE_BYTES, errors: Errors | None = None) -> Iterator[str]:
    """Yields the text of a file in pieces (see `decoded`)."""
    return (text for _, text in decoded(Path(path), size, errors))


def read_text(path: str | Path, errors: Errors | None = None) -> str:
    """The whole text of a file. Raises as `examine` does."""
    return "".join(text_pieces(path, errors=errors))


def is_blank(path: Path) -> bool:
    """Whether a file has only white space."""
    with path.open("rb") as file:
        return all(block.isspace() for block in iter(lambda: file.read(1 << 16), b""))


def decode_text(content: bytes, path: Path) -> str:
    """The text of a file whose `content` has been read by other means. Raises ValueError as `examine` does."""
    text = _decode(content, 0, path, None)
    if not text.strip():
        raise ValueError(f"{path} is empty; give a file with text in it")
    return text


# ------------------------------------------------------------------------------------------------ parts


def _stat(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give the path of a text file") from None
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        raise OSError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is a folder; give a text file")
    return status


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file. Standard input stays open afterwards."""
    if not is_standard_input(path):
        _stat(path)
        with path.open("rb") as file:
            yield file
    elif sys.stdin is None:
        raise ValueError("standard input is closed; give a file, or pass text to it")
    else:
        yield sys.stdin.buffer


def _blocks(read: Callable[[int], bytes], size: int, limit: int | None) -> Iterator[bytes]:
    """Yields blocks of `size` bytes, the last one shorter, however a pipe delivers them."""
    left = sys.maxsize if limit is None else limit
    while left and (data := read(min(size, left))):
        left -= len(data)
        yield data


def _cut(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Recut blocks at line ends, or within a line longer than `size`."""
    rest = b""
    for data in blocks:
        rest += data
        end = rest.rfind(b"\n") + 1 or (_within_a_line(rest) if len(rest) >= size else 0)
        if end and not (rest.isspace() and len(rest) < size):  # white space joins the text after it
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _within_a_line(line: bytes) -> int:
    """Where to cut a long line: before its last space, else before an incomplete character at its end. 0: nowhere
    yet."""
    space = line.rfind(b" ")
    if space > 0:
        return space
    for back in range(1, min(4, len(line)) + 1):
        byte = line[-back]
        if byte & 0xC0 != 0x80:  # not the continuation of a character
            wanted = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(line) if wanted <= back else len(line) - back
    return len(line)


def _decode(raw: bytes, offset: int, path: Path, errors: Errors | None) -> str:
    """Decode a piece. Raises ValueError with the position of an invalid byte."""
    if offset == 0:
        start = len(_BOM) if raw.startswith(_BOM) else 0
        raw, offset = raw[start:], start
    try:
        text = raw.decode("utf-8", errors or "strict")
    except UnicodeDecodeError as error:
        place = f"byte {offset + error.start:,} is 0x{raw[error.start]:02x}"
        advice = "convert it" if errors is None else "errors=replace reads it with U+FFFD there"
        raise ValueError(f"{path} is not text: it is not UTF-8 ({place}); {advice}") from None
    if "\0" in text and errors != "replace":
        place = f"the first is byte {offset + raw.index(0):,}"
        advice = "" if errors is None else "; errors=replace reads it with U+FFFD there"
        raise ValueError(f"{path} is not text: it contains NUL bytes ({place}){advice}")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text
