"""Logits of the last tokens alone, where only these have labels: the same loss and gradients as with all logits."""

import pytest
import torch

from titans_lm.models.configuration import TitansConfig
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.tasks import IGNORED
from titans_lm.training.needed_logits import only_needed_logits


def make_model(**options) -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, memory_head_dim=16,
                          vocab_size=50, **options)  # fmt: skip
    return TitansForCausalLM(config).double()


def make_inputs(*labelled: int, tokens: int = 20) -> dict[str, torch.Tensor]:
    """Two rows, of which the second has only the last of the labels."""
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 50
    labels = torch.full_like(ids, IGNORED)
    labels[0, list(labelled)] = 7
    labels[1, list(labelled[-1:])] = 9
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("variant", ["lmm", "mac", "mag", "mal", "attention"])
@pytest.mark.parametrize("labelled", [(19,), (12, 19), (11,), ()])
@pytest.mark.parametrize("items", [None, 5])
def test_the_loss_and_its_gradients_are_those_of_all_logits(variant: str, labelled: tuple[int, ...], items: int | None):
    model, inputs = make_model(variant=variant), make_inputs(*labelled)
    given = only_needed_logits(model, inputs)
    assert given["logits_to_keep"] == (20 - labelled[0] + 1 if labelled else 2)
    found = []
    for arguments in (inputs, given):
        model.zero_grad()
        out = model(**arguments, **({} if items is None else {"num_items_in_batch": items}))
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert given["logits_to_keep"] == model(**given).logits.shape[1]
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=not labelled)


@pytest.mark.parametrize(
    "change",
    ["many", "first", "no labels", "elsewhere", "memory loss", "memory theta", "kept", "shifted", "another model"],
)
def test_other_calls_are_left_as_they_are(change: str):
    inputs = make_inputs(*{"many": (10, 19), "first": (0, 19)}.get(change, (19,)))
    if change == "no labels":
        del inputs["labels"]
    if change == "elsewhere":
        inputs["labels"] = inputs["labels"].to("meta")  # as on a GPU: its values are not at hand
    if change == "kept":
        inputs["logits_to_keep"] = 20
    if change == "shifted":
        inputs["shift_labels"] = inputs["labels"]
    model = make_model(
        variant="mag",
        **{"memory loss": {"memory_loss_weight": 1.0}, "memory theta": {"memory_theta_weight": 1.0}}.get(change, {}),
    )
    given = only_needed_logits(torch.nn.Linear(1, 1) if change == "another model" else model, inputs)
    assert given is inputs
