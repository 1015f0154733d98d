"""How tokens are shown: every character as itself, or as a symbol where it has no shape, and never as anything else."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from titans_lm.analyze.display import LINE_END, SYMBOL, display, label, token_bytes
from titans_lm.models.tokenizer import byte_tokenizer, encode


def cells(text):
    """The cells of a text whose tokens are bytes: what is shown, and of how many tokens."""
    shown = display([bytes([byte]) for byte in (text if isinstance(text, bytes) else text.encode())])
    content, found, at = shown.text.encode("utf-16-le"), [], 0
    for units, flags in zip(shown.units.tolist(), shown.flags.tolist(), strict=True):
        if units:
            found.append([content[2 * at : 2 * (at + units)].decode("utf-16-le"), 0, flags])
        found[-1][1] += 1
        at += units
    assert at * 2 == len(content)
    return [(text, tokens) for text, tokens, _ in found], [flags for *_, flags in found]


FAMILY, WALES = "👩‍👩‍👧", "🏴󠁧󠁢󠁷󠁬󠁳󠁿"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>&", [("<", 1), ("b", 1), (">", 1), ("&", 1)]),
        ("é", [("é", 2)]),
        ("e\u0301x", [("e\u0301", 3), ("x", 1)]),
        (FAMILY, [(FAMILY, 18)]),
        (WALES, [(WALES, 28)]),
        ("한你", [("한", 3), ("你", 3)]),
        ("שלום", [(letter, 2) for letter in "שלום"]),
        ("a\u202eb", [("a", 1), ("⟨U+202E⟩", 3), ("b", 1)]),
        ("\u2066\u200f\ufeff", [("⟨U+2066⟩", 3), ("⟨U+200F⟩", 3), ("⟨U+FEFF⟩", 3)]),
        ("\x00\x1b\t\x7f\x85", [("␀", 1), ("␛", 1), ("⇥", 1), ("␡", 1), ("⟨U+0085⟩", 2)]),
        ("\u2028\u2029", [("⟨U+2028⟩", 3), ("⟨U+2029⟩", 3)]),
        ("a\r\nb\n", [("a", 1), ("␍↵", 2), ("b", 1), ("↵", 1)]),
        ("\u0301", [("◌\u0301", 2)]),
        ("\u200d", [("⟨U+200D⟩", 3)]),
        ("\ue000", [("⟨U+E000⟩", 3)]),
        (b"\xff\xe2\x82 \xf0\x9f", [("⟨FF⟩", 1), ("⟨E2⟩", 1), ("⟨82⟩", 1), (" ", 1), ("⟨F0⟩", 1), ("⟨9F⟩", 1)]),
    ],
)  # fmt: skip
def test_each_character_is_whole_and_is_seen(text, expected):
    assert cells(text)[0] == expected


def test_symbols_and_line_ends_are_known_from_text_that_looks_like_them():
    assert cells("↵\n⟨U+202E⟩\u202e")[1] == [0, LINE_END | SYMBOL, *[0] * 8, SYMBOL]
    assert cells("a\r\n")[1][-1] == LINE_END | SYMBOL


def test_a_character_of_very_many_marks_takes_several_cells():
    found, _ = cells("e" + "\u0301" * 1000)
    assert sum(tokens for _, tokens in found) == 2001
    assert max(len(text) for text, _ in found) <= 25


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=12))
def test_nothing_invisible_is_left_however_tokens_cut_characters(parts):
    shown = display(parts)
    assert len(shown.text.encode("utf-16-le")) == 2 * shown.units.sum(dtype=int)
    assert shown.units[0] > 0
    for character in shown.text:
        assert unicodedata.category(character) not in ("Cc", "Zl", "Zp", "Cs", "Co", "Cn"), character
        assert unicodedata.bidirectional(character) not in (
            "RLE",
            "LRE",
            "RLO",
            "LRO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )
    whole = display([b"".join(parts)])
    assert shown.text in (whole.text, "∅" + whole.text)


def test_each_tokenizer_gives_the_bytes_of_its_tokens():
    tokenizer = byte_tokenizer()
    ids = np.array([*encode(tokenizer, "aé\n"), tokenizer.eos_token_id])
    assert token_bytes(tokenizer, ids) == [b"a", b"\xc3", b"\xa9", b"\n", "<eos>"]
    vocabulary = {"▁the": 0, "▁": 1, "é": 2, "<0xE2>": 3, "<unk>": 4}
    pieces = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    found = token_bytes(fast, np.array([0, 1, 2, 3, 4], np.int64))
    assert found == [b" the", b" ", "é".encode(), b"\xe2", "<unk>"]
    assert display(found).text == " the é⟨E2⟩⟨<unk>⟩"
    assert label("<\u202e>") == "⟨<⟨U+202E⟩>⟩"
