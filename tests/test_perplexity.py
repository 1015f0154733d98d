"""Bits along a stream: what a plain forward pass gives, on the same tokens in every way to read them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import KINDS, TITANS, each_titan, of_other_configuration, tiny_model, tokens
from titans_lm.cli import main
from titans_lm.evaluate import perplexity as evaluation
from titans_lm.evaluate.perplexity import MODES, Sums, measure, possible_modes, token_sizes, whole
from titans_lm.layers.bypass import bypass_memory
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import byte_tokenizer
from tolerance import assert_close, relative_error

BOOK = "It was a dark and stormy night; the rain fell in torrents. " * 8


@torch.no_grad()
def plain(model: TitansForCausalLM, ids: Tensor) -> Tensor:
    """Nats of each token but the first, by one forward pass; `[T - 1]`"""
    return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")


def check(rows, nats: Tensor, bucket: int) -> None:
    """Rows hold the means of `nats`, token t's at t - 1, by buckets that double."""
    ends = [0, bucket]
    while ends[-1] < len(nats) + 1:
        ends.append(2 * ends[-1])
    assert [row["to"] for row in rows] == [*ends[1:-1], len(nats) + 1]
    for row, first, end in zip(rows, ends, ends[1:], strict=False):
        own = nats[max(first - 1, 0) : end - 1]
        assert row["from"] == max(first, 1)
        assert row["tokens"] == len(own)
        assert row["nats"] == pytest.approx(own.mean().item(), rel=1e-12)
        assert row["perplexity"] == pytest.approx(own.mean().exp().item(), rel=1e-12)
        assert row["complete"]


# ------------------------------------------------------------------------------------------------ modes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
def test_on_is_a_plain_forward_pass(kind):
    model, ids = tiny_model(kind), tokens(1, 60)
    check(measure(model, ids, ["on"], bucket=8, piece=11), plain(model, ids), 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", KINDS)
def test_reset_is_a_forward_pass_of_each_stretch(kind):
    """All stretches, side by side and the short one at the end, predict the token that follows them."""
    model, ids = tiny_model(kind), tokens(1, 120)
    nats = [plain(model, ids[:, first : first + 14]) for first in range(0, 119, 13)]
    check(measure(model, ids, ["reset"], bucket=8, reset_every=13, piece=40), torch.cat(nats), 8)


@pytest.mark.usefixtures("unchecked")
@each_titan
def test_frozen_is_a_memory_that_takes_no_steps(kind):
    model, ids = tiny_model(kind), tokens(1, 40)
    frozen, on = (measure(model, ids, [mode], bucket=8, piece=11) for mode in ("frozen", "on"))
    state = model.initial_state(1)
    state.frozen = True
    with torch.no_grad():
        logits = model(ids, past_key_values=state).logits[0, :-1]
    check(frozen, F.cross_entropy(logits, ids[0, 1:], reduction="none"), 8)
    assert all(abs(a["nats"] - b["nats"]) > 1e-3 for a, b in zip(frozen, on, strict=True))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "gate"), [*((kind, "product") for kind in TITANS), ("mac", "convex"), ("mag", "convex")]
)
def test_off_is_a_model_whose_memories_put_out_zero(kind, gate):
    model, ids = tiny_model(kind, gate=gate), tokens(1, 40)
    on, off = (measure(model, ids, [mode], bucket=8, piece=11) for mode in ("on", "off"))
    assert all(abs(a["nats"] - b["nats"]) > 1e-3 for a, b in zip(off, on, strict=True))
    check(on, plain(model, ids), 8)  # nothing is left of it
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NeuralMemory):
                module.o_proj.weight.zero_()
    check(off, plain(model, ids), 8)


@pytest.mark.usefixtures("unchecked")
def test_off_lmm_knows_the_last_token_alone():
    """Without its memory nothing joins tokens: the same token, the same prediction."""
    model = tiny_model("lmm")
    ids = torch.tensor([[1, 5, 2, 5, 5, 7, 5]])
    with torch.no_grad(), bypass_memory(model):
        logits = model(ids).logits[0]
    for at in (3, 4, 6):
        assert_close(logits[at], logits[1])
    assert relative_error(logits[0], logits[1]) > 0.1


@pytest.mark.usefixtures("unchecked")
def test_memories_speak_again_between_and_after_pieces():
    model, ids = tiny_model("mag"), tokens(1, 30)
    before = plain(model, ids)
    next(evaluation.token_nats(model, ids, "off", 10))  # and no more
    assert torch.equal(plain(model, ids), before)


@pytest.mark.usefixtures("unchecked")
def test_where_there_is_no_memory_some_modes_make_no_sense():
    ids = tokens(1, 20)
    for kind in ("window", "full"):
        model = tiny_model(kind)
        assert possible_modes(model) == ["on", "reset"]
        for mode in ("frozen", "off"):
            with pytest.raises(ValueError, match=f"mode '{mode}' needs a memory, and this model .* has none"):
                measure(model, ids, ["on", mode])
        assert {row["mode"] for row in measure(model, ids, possible_modes(model))} == {"on", "reset"}
    assert all(possible_modes(tiny_model(kind)) == list(MODES) for kind in TITANS)


# ------------------------------------------------------------------------------------------------ buckets


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 300), bucket=st.integers(1, 400), cut=st.integers(1, 300), seed=st.integers(0, 9))
def test_buckets_hold_each_token_but_the_first_once(length, bucket, cut, seed):
    draw = torch.Generator().manual_seed(seed)
    nats = torch.rand(length - 1, generator=draw, dtype=torch.float64)
    sizes = torch.randint(1, 5, (length,), generator=draw)
    sums = Sums(length, bucket, sizes)
    for first in reversed(range(0, length - 1, cut)):
        sums.add(first + 1, nats[first : first + cut])
    rows = sums.rows("on")
    assert [row["from"] for row in rows] == [1, *(row["to"] for row in rows[:-1])]
    assert rows[-1]["to"] == length
    for row in rows:
        own = slice(row["from"], row["to"])
        assert row["tokens"] == own.stop - own.start
        assert row["bytes"] == sizes[own].sum()
        assert row["nats"] == pytest.approx(nats[own.start - 1 : own.stop - 1].mean().item())
        bits = nats[own.start - 1 : own.stop - 1].sum().item() / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits / row["bytes"])
        assert row["complete"]
    (all_,) = whole(rows).values()
    assert all_["tokens"] == length - 1
    assert all_["nats"] == pytest.approx(nats.mean().item())
    assert all_["bits_per_byte"] == pytest.approx(nats.sum().item() / math.log(2) / sizes[1:].sum().item())


def test_what_was_not_read_is_not_counted():
    sums = Sums(100, 10, None)
    sums.add(1, torch.ones(14, dtype=torch.float64))
    assert [(row["from"], row["to"], row["tokens"], row["complete"]) for row in sums.rows("on")] == [
        (1, 10, 9, True), (10, 20, 5, False),
    ]  # fmt: skip
    assert "bits_per_byte" not in sums.rows("on")[0]


# ------------------------------------------------------------------------------------------------ bytes


def tokenizer_of(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Bytes, and a token for each merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_bytes_of_tokens_by_hand():
    """GPT-2's letters for bytes: "ñ" is C3 B1, told as Ã and ±."""
    tokenizer = tokenizer_of(("a", "b"), ("Ã", "±"), ("ab", "Ã±"))
    for text, sizes in (("abcñab", [2, 1, 2, 2]), ("abñ\n", [4, 1]), ("b€ñ", [1, 3, 0, 0, 2]), ("", [])):
        ids, found = token_sizes(tokenizer, text)
        assert found.tolist() == sizes, text
        assert tokenizer.decode(ids) == text
    assert token_sizes(byte_tokenizer(), "ñ!")[1].tolist() == [1, 1, 1]
    words = Tokenizer(models.WordLevel({"ab": 0, "ñ": 1}, "ab"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # space belongs to no token
    _, found = token_sizes(PreTrainedTokenizerFast(tokenizer_object=words), " ab ñ \n")
    assert found.tolist() == [3, 5]


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=40))
def test_bytes_of_tokens_are_those_of_the_text(text):
    for tokenizer in (byte_tokenizer(), tokenizer_of(("a", "b"), ("Ã", "±"), ("Ġ", "Ġ"))):
        ids, sizes = token_sizes(tokenizer, text)
        assert sizes.sum() == len(text.encode())
        assert len(sizes) == len(ids)


@pytest.mark.usefixtures("unchecked")
def test_bits_per_byte_by_hand():
    """A model that finds all 23 tokens as likely, and tokens of one to four bytes."""
    model = tiny_model("mag")
    torch.nn.init.zeros_(model.lm_head.weight)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    sizes = torch.tensor([9, 1, 2, 3, 4])
    rows = measure(model, ids, sizes=sizes, bucket=3, reset_every=2)
    assert [(row["mode"], row["from"], row["to"], row["bytes"]) for row in rows] == [
        (mode, *of) for mode in MODES for of in ((1, 3, 3), (3, 5, 7))
    ]
    assert [row["bits_per_byte"] for row in rows] == pytest.approx([2 * math.log2(23) / 3, 2 * math.log2(23) / 7] * 4)
    assert all(row["perplexity"] == pytest.approx(23) for row in rows)
    for found in whole(rows).values():
        assert found["bits_per_byte"] == pytest.approx(4 * math.log2(23) / 10)


# ------------------------------------------------------------------------------------------------ titans evaluate


@pytest.mark.usefixtures("unchecked")
def test_the_command_writes_figures_and_a_picture(model, folder, tmp_path, capsys):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text(BOOK)
    texts[1].write_text(BOOK.swapcase())
    out = tmp_path / "found.json"
    arguments = ["evaluate", "perplexity", *map(str, texts), "--model", str(folder), "--out", str(out)]
    assert main([*arguments, "--bucket", "64", "--tokens", "700", "--reset-every", "100"]) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    assert found["command"].startswith(f"titans evaluate perplexity {texts[0]} {texts[1]} --model")
    ids = torch.tensor([list((BOOK + BOOK.swapcase()).encode())])[:, :700]
    rows = measure(model, ids, sizes=torch.ones(700), bucket=64, reset_every=100)
    assert len(found["rows"]) == len(rows) == 4 * 5
    for ours, theirs in zip(found["rows"], rows, strict=True):
        assert ours.pop("mode") == theirs.pop("mode")
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found["summary"].keys() == set(MODES)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "512 to 700" in shown
    assert f"{found['summary']['on']['bits_per_byte']:.3f}" in shown


@pytest.mark.usefixtures("unchecked")
def test_what_was_measured_before_an_interruption_is_kept(folder, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second mode; the same command then reads the second mode only."""
    text, out = tmp_path / "long.txt", tmp_path / "found.json"
    text.write_text(BOOK * 30)
    arguments = ["evaluate", "perplexity", str(text), "--model", str(folder), "--out", str(out), "--modes", "off", "on"]

    add = Sums.add

    def interrupted(sums: Sums, first: int, nats: Tensor) -> None:
        if out.exists():  # the first mode is done: Ctrl-C
            raise KeyboardInterrupt
        add(sums, first, nats)

    with monkeypatch.context() as patch:
        patch.setattr(Sums, "add", interrupted)
        assert main(arguments) == 130
    assert f"what was measured before is in {out}" in capsys.readouterr().err.replace("\n", " ")
    found = json.loads(out.read_text())
    assert not found["complete"]
    first = [row for row in found["rows"] if row["mode"] == "off"]
    assert sum(row["tokens"] for row in first) == len(BOOK) * 30 - 1
    assert all(row["complete"] for row in first)
    assert sum(row["tokens"] for row in found["rows"] if row["mode"] == "on") < len(BOOK) * 30 - 1
    for row in first:
        row["nats"] = 1.5  # to be known again
    found["rows"].append({**first[0], "mode": "on", "complete": False})
    out.write_text(json.dumps(found))
    assert main(arguments) == 0
    after = json.loads(out.read_text())
    assert after["complete"]
    assert [row for row in after["rows"] if row["mode"] == "off"] == first
    assert sum(row["tokens"] for row in after["rows"]) == 2 * (len(BOOK) * 30 - 1)
    out.write_text(json.dumps({**after, "complete": False}))
    arguments[4] = str(of_other_configuration(folder, tmp_path / "other"))
    assert main(arguments) == 0  # another model
    assert {row["nats"] for row in json.loads(out.read_text())["rows"]}.isdisjoint({1.5})
    out.write_text(json.dumps(after))
    arguments[4] = str(folder)
    assert main([*arguments, "--tokens", "500"]) == 0  # something else, and that was complete
    assert {row["nats"] for row in json.loads(out.read_text())["rows"]}.isdisjoint({1.5})


def test_what_is_wrong_is_one_line(folder, tmp_path, capsys):
    text, short, other = (tmp_path / name for name in ("text.txt", "short.txt", "other.json"))
    text.write_text(BOOK)
    short.write_text("a")
    other.write_text("[1, 2]\n")
    attention = tmp_path / "attention"
    tiny_model("window", torch.float32, vocab_size=260).save_pretrained(attention)
    byte_tokenizer().save_pretrained(attention)
    options = {"--model": str(folder), "--out": str(tmp_path / "out.json")}
    for path, changed, words in [
        (tmp_path / "no.txt", {}, "does not exist"),
        (short, {}, "has one token"),
        (text, {"--tokens": "1"}, "--tokens must be at least 2, got 1"),
        (text, {"--bucket": "0"}, "--bucket must be at least 1, got 0"),
        (text, {"--reset-every": "0"}, "--reset-every must be at least 1, got 0"),
        (text, {"--out": str(tmp_path / "no" / "out.json")}, "folder"),
        (text, {"--out": str(other)}, "other.json is not a result file of this command"),
        (text, {"--model": str(attention), "--modes": "off"}, "mode 'off' needs a memory"),
    ]:
        given_ = [word for pair in {**options, **changed}.items() for word in pair]
        assert main(["evaluate", "perplexity", str(path), *given_]) == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith("titans evaluate: ")
        assert words in error, error
    assert not (tmp_path / "out.json").exists()
    assert other.read_text() == "[1, 2]\n"


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_said():
    model = tiny_model("mag")
    with pytest.raises(ValueError, match="mode 'half' is not one of: on, frozen, reset, off"):
        measure(model, tokens(1, 20), ["on", "half"])
    with pytest.raises(ValueError, match="give a mode"):
        measure(model, tokens(1, 20), [])
    for ids in (tokens(2, 20), tokens(1, 1), tokens(1, 20)[0]):
        with pytest.raises(ValueError, match="one stream"):
            measure(model, ids)
    with pytest.raises(ValueError, match="reset_every must be a whole number of at least 1"):
        measure(model, tokens(1, 20), reset_every=0)
