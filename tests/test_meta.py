"""The meta device: tensors of shapes without values, for estimates of memory and operations before there is a model."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import each_kind, each_titan, tiny_config, tokens
from test_time_series import SIZES, VARIANTS
from titans_lm import (
    NeuralMemory,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTimeSeriesPrediction,
    TitansForTokenClassification,
    TitansState,
    TitansTimeSeriesConfig,
)

META = torch.device("meta")


def on(device, kind, cls=TitansForCausalLM, **changes):
    with torch.device(device):
        return cls(tiny_config(kind, **changes)).eval()


def shapes(state: TitansState) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in state.tensors().items()}


def read(model: TitansForCausalLM, ids: Tensor, cuts: list[int], **options) -> tuple[list[torch.Size], TitansState]:
    """Shapes of the logits of each call, and the state after them."""
    state, found = None, []
    with torch.no_grad():
        for part in ids.split(cuts, 1):
            out = model(part, past_key_values=state, use_cache=True, **options)
            state = out.past_key_values
            found.append(out.logits.shape)
    return found, state


@each_kind
@pytest.mark.parametrize("cuts", [[29], [9, 19, 1], [1, 1, 27]])
def test_logits_and_state_have_the_shapes_of_a_real_call(kind, cuts):
    ids = tokens(2, 29)
    found, state = read(on("meta", kind), ids.to("meta"), cuts)
    expected, real = read(on("cpu", kind), ids, cuts)
    assert found == expected
    assert all(t.is_meta for t in state.tensors().values())
    assert shapes(state) == shapes(real)
    assert state.nbytes == real.nbytes
    assert repr(state) == repr(real)  # positions are known without a look at tensors


@each_kind
def test_padding_and_a_state_that_was_asked_for(kind):
    model, ids = on("meta", kind), tokens(2, 29).to("meta")
    state = model.initial_state(2)
    with torch.no_grad():
        for part in (ids, ids[:, :5], ids[:, :1]):
            out = model(part, attention_mask=torch.ones_like(part), past_key_values=state, output_surprise=True)
            assert out.logits.shape[:2] == part.shape
    assert "position=unknown" in repr(state)
    assert all(surprise.loss.shape[:2] == (2, 1) for surprise in out.surprise)
    state.reset([0])
    assert state.select([1, 0, 0]).batch_size == 3


@each_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(kind, checkpointing):
    model, ids = on("meta", kind).train(), tokens(2, 29).to("meta")
    if checkpointing:
        model.activation_checkpointing_enable()
    out = model(ids, labels=ids, use_cache=True)
    again = model(ids, labels=ids, past_key_values=out.past_key_values)  # truncated BPTT over two calls
    (out.loss + again.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


@each_titan
def test_matrix_products_are_those_of_a_real_call(kind):
    """But for attention, which the counter does not know on CPUs, and convolutions, which are one operator there."""
    counts = []
    for device in ("cpu", "meta"):
        model, ids = on(device, kind), tokens(2, 64).to(device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids)
        found = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
        counts.append({name: found[name] for name in ("aten.mm", "aten.addmm", "titans_lm.scan")})
    assert counts[0] == counts[1]


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_the_layer_alone(backend):
    with META:
        memory = NeuralMemory(12, 2, chunk_size=4, backend=backend)
        x, mask = torch.randn(2, 9, 12), torch.ones(2, 9, dtype=torch.bool)
    y, state = memory(x)
    y, state = memory(x, state, mask)
    y.sum().backward()
    assert memory.q_proj.weight.grad.shape == (12, 12)
    assert memory.retrieve(x, state).shape == x.shape


@each_kind
@pytest.mark.parametrize("cls", [TitansForSequenceClassification, TitansForTokenClassification])
def test_it_classifies(kind, cls):
    ids = tokens(2, 9).to("meta")
    model = on("meta", kind, cls)
    for mask in (None, torch.ones_like(ids)):
        assert model(ids, attention_mask=mask).logits.shape == (
            (2, 2) if cls is not TitansForTokenClassification else (2, 9, 2)
        )


@pytest.mark.parametrize("use", ["window", "stream"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_forecasts(use, variant):
    with META:
        model = TitansForTimeSeriesPrediction(TitansTimeSeriesConfig(**SIZES, use=use, variant=variant)).eval()
        values = torch.randn(2, 24, 2)
    assert model(past_values=values).prediction_outputs.shape == (2, 5, 2)


def test_documents_of_a_row_cannot_be_told():
    model, ids = on("meta", "mag"), tokens(2, 9).to("meta")
    with pytest.raises(ValueError, match="on the meta device cannot take position_ids"):
        model(ids, position_ids=torch.arange(9, device="meta").expand(2, -1))
