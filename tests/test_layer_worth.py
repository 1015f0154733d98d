"""What each layer's memory is worth: unwritten memories stay as they are, keys are compared, the command tells both."""

import json

import pytest
import torch
import torch.nn.functional as F

from conftest import each_titan, of_other_configuration, tiny_model, tokens
from titans_lm.cli import main
from titans_lm.evaluate.adapt import Stream
from titans_lm.evaluate.layers import bits_per_byte, key_spread, named_memories, unwritten
from titans_lm.evaluate.perplexity import measure, whole
from titans_lm.models.tokenizer import byte_tokenizer

LAYERS = ["model.layers.0.memory", "model.layers.1.memory"]


def stream(ids):
    return Stream("text", ids, torch.ones(ids.shape[1], dtype=torch.float64), b"")


@each_titan
def test_all_and_none_are_the_modes_on_and_frozen(kind):
    model, ids = tiny_model(kind), tokens(1, 60)
    expected = {row: found["bits_per_byte"] for row, found in whole(
        measure(model, ids, ["on", "frozen"], sizes=torch.ones(60))).items()}  # fmt: skip
    assert bits_per_byte(model, stream(ids), "all") == pytest.approx(expected["on"], rel=1e-12)
    assert bits_per_byte(model, stream(ids), "none") == pytest.approx(expected["frozen"], rel=1e-9)


@each_titan
def test_one_memory_stays_as_it_was_and_the_other_is_written(kind):
    model, ids = tiny_model(kind), tokens(1, 40)
    named, before = named_memories(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert list(named) == LAYERS
    with unwritten([named[LAYERS[1]]]), torch.no_grad():
        early, late = (model(ids[:, :n], use_cache=True).past_key_values.layer_caches for n in (5, 40))
    first, second = (
        [torch.equal(w, begun) for w, begun in zip(new.memory.memory.weights, old.memory.memory.weights, strict=True)]
        for old, new in zip(early, late, strict=True)
    )
    assert not any(first)
    assert all(second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = {writes: bits_per_byte(model, stream(ids), writes) for writes in (
        "all", "none", *(f"all but {name}" for name in LAYERS))}  # fmt: skip
    assert len({round(bits, 6) for bits in found.values()}) == 4


def test_an_error_leaves_the_model_as_it_was():
    model, ids = tiny_model("mag", memory_forgetting=False), tokens(1, 40)
    expected = model(ids).logits
    within = unwritten(named_memories(model).values())
    within.__enter__()
    assert not torch.equal(model(ids).logits, expected)
    assert not within.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert torch.equal(model(ids).logits, expected)


@each_titan
def test_cosine_and_rank_are_those_of_all_pairs_of_the_text(kind):
    model, ids = tiny_model(kind, memory_conv_size=1), tokens(1, 33)
    read = {name: [] for name in LAYERS}
    hooks = [memory.k_proj.register_forward_hook(lambda _, __, out, name=name: read[name].append(out))
             for name, memory in named_memories(model).items()]  # fmt: skip
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    found = key_spread(model, ids)
    for name in LAYERS:
        first = len(read[name]) > 1 and kind != "mac"  # the call of the persistent tokens
        k = F.normalize(F.silu(torch.cat(read[name][first:], 1)[0].unflatten(-1, (2, 16))), dim=-1)
        assert len(k) == 33
        pairs = torch.einsum("ihd,jhd->hij", k, k)
        cosine = (pairs.sum((1, 2)) - 33) / (33 * 32)
        values = torch.linalg.eigvalsh(torch.einsum("ihc,ihd->hcd", k, k))
        rank = values.sum(1) ** 2 / values.square().sum(1)
        assert found[name] == pytest.approx(
            {"cosine": float(cosine.mean()), "rank": float(rank.mean())}, rel=1e-5
        )  # keys are float32
        assert 1 < found[name]["rank"] < 16


@torch.no_grad()
def test_keys_are_those_of_the_convolution():
    model, ids = tiny_model("mag", num_persistent_tokens=0), tokens(1, 300)
    block, memory = model.model.layers[0], model.model.layers[0].memory
    x = block.norm(model.model.embed_tokens(ids))
    k = memory._features(x, memory.initial_state(1).conv_state, None)[0][1][0]
    cosine = (k.sum(0).square().sum(-1) - 300) / (300 * 299)
    assert key_spread(model, ids)[LAYERS[0]]["cosine"] == pytest.approx(float(cosine.mean()), rel=1e-6)


def test_other_words_than_these_are_refused():
    with pytest.raises(
        ValueError, match=r"writes must be one of all, none, all but model\.layers\.0\.memory, .*got 'off'"
    ):
        bits_per_byte(tiny_model("mag"), stream(tokens(1, 9)), "off")


@pytest.mark.slow
def test_files_of_one_name_and_models_of_one_layer(tmp_path, capsys):
    texts = [tmp_path / name / "a.txt" for name in ("one", "two")]
    for number, path in enumerate(texts):
        path.parent.mkdir()
        path.write_text("a line of text, and another\n" * (9 + number))
    model = tiny_model("mag", vocab_size=260, num_hidden_layers=1).float()
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    out = tmp_path / "layers.jsonl"
    command = ["evaluate", "layers", *map(str, texts), str(texts[0]), "--model", str(tmp_path / "m"), "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    expected = [
        (name, writes) for name in ("one/a.txt", "two/a.txt") for writes in ("all", f"all but {LAYERS[0]}", "keys")
    ]
    assert [(row["stream"], row.get("writes", row.get("of"))) for row in rows] == expected
    assert "layer 0" in capsys.readouterr().out
    command[command.index("--model") + 1] = str(of_other_configuration(tmp_path / "m", tmp_path / "other"))
    assert main(command) == 2
    assert "has results of other settings (configuration)" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_lines_and_goes_on(folder, tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.log"]
    for number, path in enumerate(texts):
        path.write_text("a line of text, and another\n" * (20 + number))
    out = tmp_path / "layers.jsonl"
    command = ["evaluate", "layers", *map(str, texts), "--model", str(folder), "--tokens", "300", "--out", str(out)]
    assert main(command) == 0
    head, *rows = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("titans evaluate layers")
    assert [row.get("writes", row.get("of")) for row in rows] == 2 * [
        "all",
        "none",
        *(f"all but {n}" for n in LAYERS),
        "keys",
    ]
    assert "layer 1" in capsys.readouterr().out
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:4]))  # what an interrupted run left
    assert main(command) == 0
    again = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert again == rows


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--out", "/nowhere/l.jsonl"], "the folder /nowhere does not"),
    ],
)
def test_what_is_wrong_is_one_line(more, words, folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    assert main(["evaluate", "layers", str(tmp_path / "a.txt"), "--model", str(folder), *more]) == 2
    assert words in capsys.readouterr().err


def test_a_model_without_memory_is_named(tmp_path, capsys):
    tiny_model("window", vocab_size=260).float().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "a.txt").write_text("some text")
    assert main(["evaluate", "layers", str(tmp_path / "a.txt"), "--model", str(tmp_path / "m")]) == 2
    assert "it has no memory to measure" in capsys.readouterr().err
