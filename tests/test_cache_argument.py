"""A cache is given and returned as `past_key_values` or `cache`, whichever the installed transformers calls it."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers.utils import logging

from conftest import each_kind, tiny_config, tiny_model, tokens
from titans_lm import TitansForSequenceClassification, TitansForTokenClassification
from titans_lm.models.cache_argument import NAMES, OF_TRANSFORMERS
from titans_lm.models.outputs import TitansCausalLMOutput
from titans_lm.models.time_series import TitansForTimeSeriesPrediction
from titans_lm.models.time_series_configuration import TitansTimeSeriesConfig

pytestmark = pytest.mark.usefixtures("unchecked")
each_name = pytest.mark.parametrize("name", NAMES)
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def labelled(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config("mag", pad_token_id=0, num_labels=3)).eval()


@each_kind
@each_name
def test_a_state_goes_on_by_either_name(kind, name):
    model, ids = tiny_model(kind), tokens(2, 17)
    state = model.initial_state(2)
    parts = []
    for part in ids.split([9, 1, 7], 1):
        out = model(part, **{name: state})
        assert out.cache is out.past_key_values is out["cache"] is out["past_key_values"] is state
        assert all(key in out and out.get(key) is state for key in NAMES)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits)
    assert state.positions() == [17, 17]
    inner = model.model(ids, **{name: model.initial_state(2)})
    assert inner.cache.positions() == [17, 17]


@each_kind
@each_name
@pytest.mark.parametrize("choice", [{}, {"num_beams": 2}, {"prefill_chunk_size": 3}])
def test_generate_goes_on_by_either_name_and_says_nothing(kind, name, choice, monkeypatch):
    model, ids = tiny_model(kind), tokens(2, 12)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **OPTIONS, **choice)
    state = model(ids[:, :5], use_cache=True).cache
    logger, said = logging.get_logger("transformers.utils.generic"), []
    logger.warning_once.cache_clear()  # what was said before is said again
    monkeypatch.setattr(logger, "warning", said.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **OPTIONS, **choice, **{name: state}
        )
    assert not said
    assert torch.equal(out.sequences, expected)
    assert getattr(out, OF_TRANSFORMERS) is state
    assert state.columns == 15  # all but the last token


@each_name
def test_a_model_whose_forward_is_wrapped_generates_by_either_name(name):
    """By a function that does not show its arguments, as tools that watch a model make it."""
    model, ids = tiny_model("mag"), tokens(1, 9)
    expected = model.generate(ids, **{name: model.initial_state(1)}, **OPTIONS)
    forward = model.forward
    model.forward = lambda *arguments, **options: forward(*arguments, **options)
    assert torch.equal(model.generate(ids, **{name: model.initial_state(1)}, **OPTIONS), expected)


def test_two_caches_are_refused_and_none_is_none():
    model, ids = tiny_model("mag"), tokens(1, 5)
    first, second = model.initial_state(1), model.initial_state(1)
    both = {"past_key_values": first, "cache": second}
    for call in (
        model,
        model.model,
        lambda ids, **o: model(ids, None, None, first, cache=o["cache"]),
        lambda ids, **options: model.generate(ids, **OPTIONS, **options),
    ):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            call(ids, **both)
    assert first.columns == second.columns == 0
    assert model(ids, past_key_values=first, cache=None).cache is first
    assert model(ids, past_key_values=None, cache=second).cache is second


@each_name
def test_heads_and_forecasters_take_either_name(name):
    ids = tokens(2, 9).clamp(min=1)  # 0 is padding
    for kind in (TitansForSequenceClassification, TitansForTokenClassification):
        model = labelled(kind)
        state = model.initial_state(2)
        model(ids[:, :4], **{name: state})
        last = model(ids[:, 4:], **{name: state}).logits
        whole = model(ids).logits
        torch.testing.assert_close(last, whole if whole.dim() == 2 else whole[:, 4:])
    sizes = {"num_input_channels": 2, "context_length": 12, "prediction_length": 3, "hidden_size": 16,
             "memory_head_dim": 8, "memory_dim": 12, "patch_length": 4, "patch_stride": 4}  # fmt: skip
    forecaster = TitansForTimeSeriesPrediction(TitansTimeSeriesConfig(use="stream", **sizes)).eval()
    state = forecaster.initial_state(1)
    out = forecaster(torch.randn(1, 20, 2), **{name: state})
    assert out.cache is out.past_key_values
    assert out.cache.positions() == [3, 3]


def test_signatures_name_both():
    for model in (tiny_model("mag"), tiny_model("mag").model, labelled(TitansForTokenClassification)):
        parameters = inspect.signature(model.forward).parameters
        assert set(NAMES) <= parameters.keys()
        assert list(parameters)[:5] == [
            "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds",
        ]  # fmt: skip
    assert "generation_config" in inspect.signature(tiny_model("mag").generate).parameters


def test_what_is_set_under_the_old_name_is_the_field():
    out = TitansCausalLMOutput(logits=torch.zeros(1), cache=1)
    out.past_key_values = 2
    assert (out.cache, out["cache"]) == (2, 2)
    out["past_key_values"] = 3
    assert (out.cache, out["cache"], list(out)) == (3, 3, ["logits", "cache"])
