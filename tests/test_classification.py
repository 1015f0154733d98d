"""Heads for labels: transformers' meaning of last token, labels and problems; packing; saving; the Auto classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from conftest import tiny_config
from titans_lm import TitansForSequenceClassification, TitansForTokenClassification

PAD = 0


def classifier(labels: int = 3, **fields: Any) -> TitansForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config("mag", pad_token_id=PAD, num_labels=labels, **fields)
    return TitansForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def model() -> TitansForSequenceClassification:
    return classifier()


TEXTS = [torch.tensor(row) for row in ([5, 6, 7, 8, 9, 3], [4, 4, 9], [11])]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(TEXTS, batch_first=True, padding_value=PAD, padding_side=side)
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_last_token_that_is_there_is_classified(side: str, masked: bool, model: TitansForSequenceClassification):
    ids, mask = padded(side)
    logits = model(ids, attention_mask=mask if masked else None).logits
    alone = torch.cat([model(text[None]).logits for text in TEXTS])
    assert torch.allclose(logits, alone, atol=1e-5)
    hidden = [model.model(text[None]).last_hidden_state[0, -1] for text in TEXTS]
    assert torch.allclose(alone, model.score(torch.stack(hidden)), atol=1e-6)


def test_embeddings_with_a_mask_are_classified_as_tokens(model: TitansForSequenceClassification):
    ids, mask = padded("right")
    embeds = model.model.embed_tokens(ids)
    assert torch.allclose(model(inputs_embeds=embeds, attention_mask=mask).logits, model(ids).logits, atol=1e-5)


def test_a_text_in_parts_is_classified_as_a_whole(model: TitansForSequenceClassification):
    ids = torch.randint(1, 20, (2, 9))
    state = model.initial_state(2)
    model(ids[:, :5], past_key_values=state)
    assert torch.allclose(model(ids[:, 5:], past_key_values=state).logits, model(ids).logits, atol=1e-4)


def test_problem_types_have_their_losses():
    ids = torch.randint(1, 20, (4, 5))
    single = classifier(3)
    out = single(ids, labels=torch.tensor([0, 2, 1, 1]))
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 2, 1, 1])))
    multi, several = classifier(3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]])
    out = multi(ids, labels=several)
    assert torch.allclose(out.loss, torch.nn.functional.binary_cross_entropy_with_logits(out.logits, several))
    assert multi.config.problem_type == "multi_label_classification"
    one = classifier(1)
    out = one(ids[:1], labels=torch.tensor([2.5]))
    assert torch.allclose(out.loss, (out.logits[0, 0] - 2.5) ** 2)
    numbers = classifier(2, problem_type="regression")
    out = numbers(ids, labels=torch.ones(4, 2))
    assert torch.allclose(out.loss, (out.logits - 1).square().mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([0, 1])}, r"labels must be \[3\]"),
        ({"labels": torch.zeros(3, 2)}, r"labels must be \[3, 3\]"),
        ({"seq_idx": torch.zeros(3, 6, dtype=torch.long)}, "seq_idx describes several documents"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)}, "starts a second document in row 0, column 3"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 6, [1] * 6])}, "row 1 holds padding alone"),
        (
            {
                "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1]] * 3),
                "position_ids": torch.tensor([[0, 1, 0, 0, 0, 1]] * 3),
            },
            "starts a second document in row 0, column 4",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(
    arguments: dict[str, Any], message: str, model: TitansForSequenceClassification
):
    ids = torch.randint(1, 20, (3, 6))
    with pytest.raises(ValueError, match=message):
        model(ids, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_one_row_of_ids_is_refused_by_its_shape(model: TitansForSequenceClassification):
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \[5\]"):
        model(torch.randint(1, 20, (5,)))


def test_positions_of_a_padded_row_that_goes_on_are_those_of_one_document(model: TitansForSequenceClassification):
    ids = torch.randint(1, 20, (1, 6))
    state = model(ids[:, :3], use_cache=True).past_key_values
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]])
    out = model(ids[:, 3:], attention_mask=mask, position_ids=torch.tensor([[0, 3, 4]]), past_key_values=state)
    assert torch.allclose(out.logits, model(ids[:, [0, 1, 2, 4, 5]]).logits, atol=1e-5)


def test_a_row_of_padding_ids_is_refused(model: TitansForSequenceClassification):
    with pytest.raises(ValueError, match="row 1 holds padding alone"):
        model(torch.tensor([[4, 5], [PAD, PAD]]))


def test_saved_classifiers_open_by_their_auto_classes(tmp_path: Path, model: TitansForSequenceClassification):
    ids = torch.randint(1, 20, (2, 6))
    model.save_pretrained(tmp_path / "s")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "s")
    assert type(again) is TitansForSequenceClassification
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    tokens = TitansForTokenClassification(tiny_config("lmm", num_labels=4)).eval()
    tokens.save_pretrained(tmp_path / "t")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "t").eval()
    assert torch.equal(again(ids).logits, tokens(ids).logits)
    assert json.loads((tmp_path / "t" / "config.json").read_text())["architectures"] == ["TitansForTokenClassification"]


def test_each_token_gets_a_label_and_padding_none():
    torch.manual_seed(0)
    model = TitansForTokenClassification(tiny_config("mac", pad_token_id=PAD, num_labels=4)).eval()
    ids, mask = padded("left")
    labels = torch.randint(0, 4, ids.shape).masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    alone = [model(text[None]).logits[0] for text in TEXTS]
    assert torch.allclose(out.logits[mask.bool()], torch.cat(alone), atol=1e-5)
    given = labels[mask.bool()]
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(torch.cat(alone), given), atol=1e-5)
    with pytest.raises(ValueError, match=r"labels must be \[B, T\]"):
        model(ids, labels=labels[:, 1:])


def test_a_stream_of_labels_is_carried_on_by_the_cache_it_returns():
    torch.manual_seed(0)
    model = TitansForTokenClassification(tiny_config("mag", num_labels=4)).eval()
    ids = torch.randint(1, 20, (2, 12))
    first = model(ids[:, :7], use_cache=True)
    assert first.past_key_values is first.cache
    second = model(ids[:, 7:], cache=first.cache)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), model(ids).logits, atol=1e-5)
    assert model(ids, use_cache=False).cache is None


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_training_drops_the_share_of_the_configuration(share: float):
    torch.manual_seed(0)
    model = TitansForTokenClassification(tiny_config("lmm", num_labels=4, classifier_dropout=share)).train()
    seen = []
    model.score.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0] == 0).float().mean().item()))
    model(torch.randint(1, 20, (4, 200)))
    assert abs(seen[0] - share) < 0.05
    with pytest.raises(ValueError, match=r"classifier_dropout must be in \[0, 1\)"):
        tiny_config("lmm", classifier_dropout=1.0)


def test_packed_documents_get_their_own_labels():
    torch.manual_seed(0)
    model = TitansForTokenClassification(tiny_config("mag", num_labels=4)).eval()
    packed = torch.cat(TEXTS)[None]
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])[None]
    alone = torch.cat([model(text[None]).logits[0] for text in TEXTS])
    assert torch.allclose(model(packed, position_ids=positions).logits[0], alone, atol=1e-5)
    assert not torch.allclose(model(packed).logits[0], alone, atol=1e-3)


def test_accumulated_gradients_weigh_each_label_once(model: TitansForSequenceClassification):
    ids, labels = torch.randint(1, 20, (3, 5)), torch.tensor([0, 2, 1])
    parts = [model(ids[a:b], labels=labels[a:b], num_items_in_batch=3).loss for a, b in ((0, 1), (1, 3))]
    assert torch.allclose(sum(parts), model(ids, labels=labels).loss, atol=1e-6)
