"""How tokens are shown: characters as readers see them, and visible symbols for what has no shape or reorders text.

A token may be a part of a character, and a character, such as an emoji, may be several code points. Each character is
shown whole, at the token that has its first byte; the tokens of its other bytes join that cell.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from titans_lm.models.tokenizer import byte_characters, is_bytes

SYMBOL, LINE_END = 1, 2
"""Flags of a cell: it is a symbol for something invisible; the line ends after it."""
MAX_CODE_POINTS = 24
"""Code points of one cell. A character with more combining marks continues in the next."""
NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
JOINERS = "\u200c\u200d"
"""What joins or separates letters and emoji: kept within a character."""
FLAG, TAGS = "\U0001f3f4", range(0xE0020, 0xE0080)
"""The emoji of a flag and the invisible letters that say whose."""


class Display(NamedTuple):
    """The cells of T tokens."""

    text: str
    """What is shown, of all tokens. It has no control character and none that reorders text."""
    units: NDArray[np.uint16]
    """UTF-16 code units of `text` that each token shows, `[T]`. 0: the token is a later part of the cell before it."""
    width: NDArray[np.uint16]
    """Columns that each token takes, `[T]`, in a font of fixed width."""
    flags: NDArray[np.uint8]
    """`SYMBOL`, `LINE_END`, `[T]`."""


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: NDArray[np.int64]) -> list[bytes | str]:
    """The bytes of each token; of a special token its name, as a str."""
    special = set(tokenizer.all_special_ids)
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    byte_level = is_bytes(tokenizer) or "ByteLevel" in str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
    found: dict[int, bytes | str] = {}
    for token in np.unique(ids).tolist():
        name = tokenizer.convert_ids_to_tokens(token)
        if name is None or token in special:
            found[token] = str(name if name is not None else token)
        elif byte_level and all(character in byte_of for character in name):
            found[token] = bytes(byte_of[character] for character in name)
        elif (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)) is not None:
            found[token] = bytes.fromhex(byte[1])
        else:
            found[token] = name.replace("▁", " ").encode(errors="replace")
    return [found[token] for token in ids.tolist()]


def display(parts: list[bytes | str]) -> Display:
    """How tokens are shown, each given by its bytes, or by its name if it is special."""
    shown: list[list[str]] = [[] for _ in parts]
    flags, first = np.zeros(len(parts), np.uint8), 0
    while first < len(parts):
        end = first
        if isinstance(parts[first], str):
            shown[first].append(f"⟨{''.join(map(_visible, str(parts[first])))}⟩")
            flags[first] = SYMBOL
            end += 1
        else:
            while end < len(parts) and isinstance(parts[end], bytes):
                end += 1
            _show_bytes([part for part in parts[first:end] if isinstance(part, bytes)], shown, flags, first)
        first = end
    joined = ["".join(cells) for cells in shown]
    if joined and not joined[0]:
        joined[0], flags[0] = "∅", flags[0] | SYMBOL
    units = np.array([len(cell.encode("utf-16-le")) // 2 for cell in joined], np.uint16)
    width = np.array([sum(map(_columns, cells)) for cells in shown], np.uint16)
    return Display("".join(joined), units, width, flags)


def label(part: bytes | str) -> str:
    """One token by itself, as a list shows it: part of a character is shown as its bytes."""
    return display([part]).text


def _show_bytes(parts: list[bytes], shown: list[list[str]], flags: NDArray[np.uint8], first: int) -> None:
    """Give each character of some tokens to the token that has its first byte."""
    text = b"".join(parts).decode("utf-8", "surrogateescape")
    owner = np.repeat(np.arange(first, first + len(parts)), [len(part) for part in parts])
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (code >= 0x80).astype(int) + (code >= 0x800) + (code >= 0x10000)
    size[(code >= 0xDC80) & (code <= 0xDCFF)] = 1
    token = owner[np.concatenate([[0], np.cumsum(size)[:-1]])] if len(code) else owner
    for start, character in _characters(text):
        cell, symbol = _shown(character)
        at = int(token[start])
        shown[at].append(cell)
        flags[at] |= SYMBOL * symbol | LINE_END * ("\n" in character)


def _characters(text: str) -> Iterator[tuple[int, str]]:
    """Each character as readers see it, with the index of its first code point."""
    for match in regex.finditer(r"\X", text):
        character = match[0]
        for part in range(0, len(character), MAX_CODE_POINTS):
            yield match.start() + part, character[part : part + MAX_CODE_POINTS]


@lru_cache(4096)
def _shown(character: str) -> tuple[str, bool]:
    """What stands for a character, and whether that is a symbol."""
    if len(character) == 1:
        cell = _based(character)
        return cell, cell != character
    if character == "\r\n":
        return "␍↵", True
    flag = character[0] == FLAG
    inside = [c if c in JOINERS or (flag and ord(c) in TAGS) else _visible(c) for c in character[1:]]
    return _based(character[0]) + "".join(inside), False


def _based(c: str) -> str:
    """`_visible`, and a mark without a letter on a dotted circle, so that it does not change the cell before it."""
    return f"◌{c}" if unicodedata.category(c) in ("Mn", "Me", "Mc") else _visible(c)


@lru_cache(4096)
def _columns(cell: str) -> int:
    """Columns of one character, about: what it begins with, and the symbols in it."""
    first = 0 if not cell else 2 if unicodedata.east_asian_width(cell[0]) in "WF" else 1
    return max(first, len(cell) if "⟨" in cell or cell == "␍↵" else 0)


def _visible(c: str) -> str:
    """A code point, or a symbol for one that has no shape or reorders text."""
    code, category = ord(c), unicodedata.category(c)
    if c in NAMED:
        return NAMED[c]
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"⟨{code - 0xDC00:02X}⟩"
    if category in ("Cc", "Cf", "Zl", "Zp", "Co", "Cn", "Cs"):
        return f"⟨U+{code:04X}⟩"
    return c
