"""Documents packed into rows: what the model learns from them is what it would learn from each alone."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from titans_lm import TitansConfig, TitansForCausalLM
from titans_lm.models.graft_files import graft
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import parse_settings
from titans_lm.training.data import Blocks
from titans_lm.training.data.blocks import ShuffledRows, Tokens
from titans_lm.training.data.build import data_of
from titans_lm.training.data.continued import continue_documents
from titans_lm.training.data.documents import Documents, TextFiles
from titans_lm.training.data.packing import PackedRows
from titans_lm.training.data.schedule import Place
from titans_lm.training.train import train

TOKENIZER = byte_tokenizer()
TEXTS = ["first", "a second text, which is longer than a row of it", "x", "the third one", "4th", "and a last text"]
DOCUMENTS = [torch.tensor([*text.encode(), 258]) for text in TEXTS]
MODEL = {
    "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "segment_size": 4,
    "intermediate_size": 16, "window_size": 4, "num_persistent_tokens": 2, "memory_head_dim": 8, "memory_dim": 8,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    set_seed(0)
    folder = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).save_pretrained(folder)
    return folder


def model_of(variant, llama=None):
    set_seed(0)
    if variant == "graft":
        model = graft(str(llama), memory_head_dim=8, memory_dim=8, memory_lr_start=0.5)
        for name, parameter in model.named_parameters():
            if "gate" in name or ".memory." in name:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
        return model.train()
    return TitansForCausalLM(TitansConfig(variant=variant, **MODEL)).train()


def alone(model, pieces):
    """The sum of the losses of pieces of documents that are read by themselves, and the number of labels."""
    losses = [torch.nn.functional.cross_entropy(model(p[None]).logits[0, :-1], p[1:], reduction="sum") for p in pieces]
    return sum(losses), sum(len(piece) - 1 for piece in pieces)


def pieces_of(ids, position):
    """The documents of a row, which may begin within one."""
    cuts = [0, *[int(i) for i in (position == 0).nonzero() if i], len(ids)]
    return [ids[a:b] for a, b in pairwise(cuts)]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "graft"])
def test_the_loss_and_its_gradients_are_those_of_separate_documents(files, llama, variant):
    model = model_of(variant, llama)
    learns = [p for p in model.parameters() if p.requires_grad]
    batch = PackedRows(Documents(TextFiles(files)), TOKENIZER, True, False).rows(Place(0, 3, 32, 0), range(3))
    assert batch["input_ids"].flatten().tolist() == torch.cat([*DOCUMENTS, *DOCUMENTS])[:96].tolist()
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, learns, allow_unused=True)
    pieces = [p for row in range(3) for p in pieces_of(batch["input_ids"][row], batch["position_ids"][row])]
    total, count = alone(model, [piece for piece in pieces if len(piece) > 1])
    assert torch.allclose(loss, total / count, rtol=1e-5)
    expected = torch.autograd.grad(total / count, learns, allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    joined = PackedRows(Documents(TextFiles(files)), TOKENIZER, False, False).rows(Place(0, 3, 32, 0), range(3))
    assert not torch.allclose(model(**joined).loss, loss, rtol=1e-3)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_a_document_goes_on_over_batches_and_a_new_one_resets(files, variant):
    """Rows of 8 tokens, so that documents begin within rows, with rows, and go on over several of them."""
    model, rows = model_of(variant), PackedRows(Documents(TextFiles(files)), TOKENIZER, True, True)
    state, total, count, read = None, 0.0, 0, [[], []]
    for number in range(10):
        batch = rows.rows(Place(number, 2, 8, 0), range(2))
        for row in range(2):
            read[row].append((batch["input_ids"][row], batch["position_ids"][row]))
        out = model(**continue_documents(batch, state), past_key_values=state, use_cache=True)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(out.loss.detach()) * labels, count + labels
        state = out.past_key_values.detach()
    losses = []
    for row in read:
        ids, position = (torch.cat(part) for part in zip(*row, strict=True))
        at = 0
        for piece in pieces_of(ids, position):
            logits = model(piece[None]).logits[0]
            for i in range(1, len(piece)):
                if (at + i) % 8:  # the first label of a row is of the batch before, which did not have it
                    losses.append(torch.nn.functional.cross_entropy(logits[i - 1], piece[i]).item())
            at += len(piece)
    assert len(losses) == count
    assert total / count == pytest.approx(sum(losses) / count, rel=1e-4)


def test_rows_of_every_source_have_borders_at_the_same_tokens(files):
    texts = [path.read_text() for path in files]
    blocks = Blocks(texts, TOKENIZER, 16, borders=True)
    packed = PackedRows(Documents(TextFiles(files)), TOKENIZER, True, False)
    tokens = Tokens(texts, TOKENIZER, borders=True)
    rows = packed.rows(Place(0, len(blocks), 16, 0), range(len(blocks)))
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.stack([blocks[i][key] for i in range(len(blocks))]), rows[key])
    shuffled = ShuffledRows(tokens, 1, 0, False).rows(Place(0, len(blocks), 16, 0), range(len(blocks)))
    assert sorted(shuffled["labels"].tolist()) == sorted(rows["labels"].tolist())
    first = rows["position_ids"] == 0
    assert bool(first[:, 0].all())  # a row begins at 0, also within a document, unless it continues
    starts = torch.tensor([i for document in DOCUMENTS for i in range(len(document))])[: rows["labels"].numel()] == 0
    assert torch.equal((rows["labels"] == -100).flatten(), starts)


def run(output, data, **training):
    return parse_settings(
        {
            "model": {"variant": "mag", **MODEL, "initializer_range": 0.02},
            "data": data if "task" in data else {"sequence_length": 16, **data},
            "training": {"output_dir": str(output), "max_steps": 6, "batch_size": 2, "logging_steps": 1,
                         "save_steps": 3, **training},
        }
    )  # fmt: skip


def losses(output):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


STAGES = [{"until": 0.4, "sequence_length": 8}, {"until": 1, "sequence_length": 16}]


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ({"documents": "reset", "stream": True, "held_out": 1, "separator": " "}, {"tbptt_steps": [2, 4]}),
        ({"documents": "reset", "curriculum": STAGES}, {"tbptt_steps": 2, "accumulation": 2}),
        ({"files": [], "task": {"name": "parity", "length": 16}, "curriculum": STAGES}, {}),
    ],
    ids=["stream", "memory", "task"],
)
def test_a_run_goes_on_from_its_place_to_the_same_bits(files, tmp_path, data, training):
    data = {"files": [str(files[0].parent / "*.txt")], "held_out": 0, **data}
    settings = run(tmp_path / "out", data, **training)
    whole = train(settings).state_dict()
    before = losses(tmp_path / "out")
    assert len(before) == 6
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    settings.training.resume = True
    again = train(settings).state_dict()
    assert losses(tmp_path / "out") == before
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    if data.get("curriculum"):
        settings.training.max_steps = 8
        with pytest.raises(ValueError, match=r"training.max_steps=8 \(was 6\) cannot change on resume"):
            train(settings)


def test_a_run_reads_documents_apart(files, tmp_path):
    """The weights after a step are those of a step on separate documents: no memory of one is in another."""
    settings = run(tmp_path / "out", {"files": [str(f) for f in files], "documents": "reset", "stream": True,
                                      "held_out": 0}, max_steps=1, max_grad_norm=1e9, weight_decay=0.0)  # fmt: skip
    batch = next(iter(data_of(settings, TOKENIZER, 2)[0]))
    train(settings)
    from titans_lm.training.train import model_for

    model = model_for(settings)
    pieces = [p for row in range(2) for p in pieces_of(batch["input_ids"][row], batch["position_ids"][row])]
    total, count = alone(model, [piece for piece in pieces if len(piece) > 1])
    assert losses(tmp_path / "out") == [pytest.approx(float(total.detach() / count), rel=1e-4)]
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_a_model_that_cannot_reset_is_refused():
    with pytest.raises(
        ValueError, match=r"data.documents=reset needs a Titans model: mamba2 cannot reset within a row"
    ):
        parse_settings(
            {
                "model": {"size": "tiny", "baseline": "mamba2"},
                "data": {"files": ["a.txt"], "documents": "reset"},
                "training": {"output_dir": "out"},
            }
        )
