"""`titans read --surprising`: the lines that took most bits, of files and streams; with a memory what is new."""

import io
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from titans_lm.cli import main
from titans_lm.inference.reader import Reader
from titans_lm.inference.token_bits import by_bytes
from titans_lm.models.hub import load
from titans_lm.models.tokenizer import byte_tokenizer

TEXT = "".join(f"{n:03d} all is well\n" for n in range(30)) + "Zq#@! what is this\n" + "031 all is well\n"

pytestmark = pytest.mark.usefixtures("unchecked")


@torch.no_grad()
@pytest.mark.parametrize("piece", [7, 100, 4096])
def test_bits_are_those_of_one_forward_pass(model, piece):
    told = []
    Reader(model, byte_tokenizer(), piece=piece, on_tokens=lambda *seen: told.append(seen)).read(TEXT)
    ids = torch.tensor(list(TEXT.encode()))[None]
    nats = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert np.concatenate([seen[1] for seen in told]).tolist() == ids[0].tolist()
    bits = np.concatenate([seen[2] for seen in told])
    assert np.isnan(bits[0])
    np.testing.assert_allclose(bits[1:], nats.numpy() / math.log(2), rtol=2e-4)


def test_watching_does_not_change_what_is_remembered(model):
    watched = Reader(model, byte_tokenizer(), on_tokens=lambda *_: None).read(TEXT).state
    plain = Reader(model, byte_tokenizer()).read(TEXT).state
    for name, value in plain.tensors().items():
        assert torch.equal(value, watched.tensors()[name]), name


def read(capsys, *arguments):
    status = main(["read", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, [line.split("\t") for line in captured.out.splitlines()], captured.err


def test_lines_of_a_file_are_listed_from_the_highest(folder, tmp_path, capsys):
    (tmp_path / "a.log").write_text(TEXT)
    status, lines, _ = read(capsys, tmp_path / "a.log", "--model", folder, "--surprising", 5)
    assert status == 0
    bits, numbers, texts = zip(*lines, strict=True)
    assert len(lines) == 5
    assert sorted(map(float, bits), reverse=True) == [float(b) for b in bits]
    for number, text in zip(numbers, texts, strict=True):
        assert TEXT.splitlines()[int(number) - 1] == text


@torch.no_grad()
def test_a_first_line_is_measured_by_the_bytes_that_something_predicts(folder, tmp_path, capsys):
    (tmp_path / "a.log").write_text("ab\ncd\n")
    (tmp_path / "b.log").write_text("x")
    _, lines, _ = read(capsys, tmp_path / "a.log", "--model", folder, "--surprising", 5)
    text = b"ab\ncd\n"
    bits = -torch.log_softmax(load(folder)[0](torch.tensor(list(text))[None]).logits[0], -1) / math.log(2)
    bits = [float(bits[t - 1, text[t]]) for t in range(1, len(text))]
    expected = {"ab": sum(bits[:2]) / 2, "cd": sum(bits[2:]) / 3}
    assert {text: float(value) for value, _, text in lines} == pytest.approx(expected, abs=0.006)
    assert read(capsys, tmp_path / "b.log", "--model", folder, "--surprising", 5)[:2] == (0, [])


def test_standard_input_and_files_of_one_name(folder, tmp_path, capsys, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.log").write_text("first\nsecond\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"third\n")))
    files = [tmp_path / "one" / "a.log", tmp_path / "two" / "a.log", "-"]
    status, lines, _ = read(capsys, *files, "--model", folder, "--surprising", 9)
    assert status == 0
    assert sorted(place for _, place, _ in lines) == ["a.log:1", "a.log:1", "a.log:2", "a.log:2", "stdin:1"]


def test_with_a_memory_lines_are_new_since_last_time(folder, tmp_path, capsys):
    (tmp_path / "a.log").write_text(TEXT)
    (tmp_path / "b.log").write_text(TEXT)
    options = ["--model", folder, "--memory", tmp_path / "m.memory", "--surprising", 1]
    assert read(capsys, tmp_path / "a.log", *options)[0] == 0
    assert read(capsys, tmp_path / "b.log", *options)[0] == 0
    assert (tmp_path / "m.memory").is_file()


def test_escape_sequences_of_a_text_are_shown_not_sent(folder, tmp_path, capsys):
    (tmp_path / "a.log").write_text("\x1b[31mred\n")
    _, lines, _ = read(capsys, tmp_path / "a.log", "--model", folder, "--surprising", 1)
    assert lines[0][2] == r"\x1b[31mred"


@pytest.mark.parametrize(
    ("options", "named"),
    [((), "give --memory FILE, or --surprising N"), (("--surprising", "0"), "must be at least 1, got 0")],
)
def test_a_reading_that_leaves_nothing_is_refused(folder, tmp_path, capsys, options, named):
    (tmp_path / "a.log").write_text(TEXT)
    status, lines, error = read(capsys, tmp_path / "a.log", "--model", folder, *options)
    assert (status, lines) == (2, [])
    assert named in error


def test_other_tokens_are_their_bytes():
    class Words:
        vocab_size = 3
        is_fast = True

        def convert_tokens_to_ids(self, _):
            return []

        def decode(self, ids):
            return ["ab", "c", "\n"][ids[0]]

    data, bits = by_bytes(Words(), np.array([0, 2, 1]), np.array([4.0, 2.0, 1.0]))
    assert data == b"ab\nc"
    assert bits.tolist() == [4.0, 0.0, 2.0, 1.0]
    _, bits = by_bytes(Words(), np.array([0, 2, 1]), np.array([np.nan, 2.0, 1.0]))
    np.testing.assert_equal(bits, [np.nan, np.nan, 2.0, 1.0])
