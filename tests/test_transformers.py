"""transformers' own model tests, on the four variants (see `transformers_sdist`).

Each test of its mixin is run, or is in `NOT_APPLICABLE` with the reason. A test that would skip itself fails, unless
what it misses is a device: so none is left out unseen when transformers brings new ones.
"""

import re
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.testing_utils import torch_device

import transformers_sdist
from conftest import TITANS, tiny_config
from titans_lm import (
    TitansConfig,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTokenClassification,
    TitansModel,
)

common = transformers_sdist.load("test_modeling_common")
ConfigTester = transformers_sdist.load("test_configuration_common").ConfigTester

NOT_APPLICABLE = {
    "attention_outputs|sliding_window_mask": "attention weights are never made: a window is computed in blocks",
    "eager_matches_sdpa_|can_set_attention_dynamically_|sdpa_can_dispatch_|config_attn_implementation_setter|"
    "attn_implementation_": "they look for attention modules and weights of transformers' own; eager has a test here",
    "flash_attn_|flex_attention_|kernels_": "attention is PyTorch's own, fused or written out",
    "eager_matches_batched_and_grouped_|moe_|output_router_logits_": "there are no experts",
    "get_(text|image|audio|video)_features_|problem_types|encoder_decoder_": "a decoder of text",
    "internal_model_config_": "a configuration has no others in it",
    "model_rope_|vision_axial_rope|resize_position_vector_": "rotary positions have a base, and no other setting",
    "capture_outputs_decorator|can_capture_specific_layers_": "the model gives hidden states itself: with padding it "
    "puts them back to where the caller's tokens stand",
    "keep_in_fp32_modules": "what needs float32, the memory's state, is no module",
    "tp_plan_|tied_head_has_a_tp_plan_": "there is no plan for tensor parallelism",
    "reverse_loading_mapping|can_load_from_already_mapped_keys": "no checkpoint has other names than the model",
    "with_deepspeed(_multi_gpu)?": "sharding is PyTorch's own",
    "torch_compile_for_training|sdpa_can_compile_dynamic": "compilation has tests of its own",
}
"""Beginnings of the tests' names (after `test_`), or words in them, and why they say nothing about these models."""

SEEN_ONCE = ("bc_torch_dtype", "config")
"""What does not depend on the variant, and takes long."""


def reason(test: str) -> str | None:
    """Why a test is left out."""
    return next((why for names, why in NOT_APPLICABLE.items() if re.search(f"^test_({names})|_({names})$", test)), None)


class ModelTester:
    """What transformers' tests ask about a model: a tiny configuration with borders everywhere, and inputs."""

    batch_size, seq_length = 3, 9
    is_training, padded = True, True

    def __init__(self, variant: str):
        self.variant = variant
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads

    def get_config(self) -> TitansConfig:
        return tiny_config(self.variant, pad_token_id=0)

    def prepare_config_and_inputs_for_common(self) -> tuple[TitansConfig, dict[str, Tensor]]:
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        if self.padded:
            mask[0, :4], mask[1, -1] = 0, 0  # on the left, on the right, and not
        return self.get_config(), {"input_ids": ids.to(torch_device), "attention_mask": mask.to(torch_device)}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' tests know what a class is for by lists of names."""
    monkeypatch.setitem(common.MODEL_MAPPING_NAMES, "titans", "TitansModel")
    monkeypatch.setitem(common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "titans", "TitansForCausalLM")
    names = common.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    monkeypatch.setitem(names, "titans", "TitansForSequenceClassification")
    names = common.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    monkeypatch.setitem(names, "titans", "TitansForTokenClassification")


@pytest.mark.usefixtures("listed", "unchecked")
class Laws(common.ModelTesterMixin, transformers_sdist.GenerationTesterMixin):
    variant: str
    all_model_classes = (
        TitansModel,
        TitansForCausalLM,
        TitansForSequenceClassification,
        TitansForTokenClassification,
    )
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.variant)

    def skipTest(self, reason: str) -> None:
        raise AssertionError(f"this test is not run, since {reason}: it belongs into NOT_APPLICABLE")

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """With padding, what is returned is a copy, in the order of the caller's tokens."""
        self.model_tester.padded = False
        super().test_retain_grad_hidden_states_attentions()

    def test_config(self) -> None:
        ConfigTester(self, config_class=TitansConfig, variant=self.variant, hidden_size=32).run_common_tests()


def _laws(variant: str) -> type:
    """The class of a variant's tests; None takes the place of one that is left out."""
    names = [name for name in dir(Laws) if name.startswith("test_") and callable(getattr(Laws, name))]
    once = [f"test_{name}" for name in SEEN_ONCE if variant != TITANS[0]]
    left_out: dict[str, Any] = {name: None for name in names if reason(name) or name in once}
    return type(f"Test{variant.title()}", (Laws, unittest.TestCase), {"variant": variant, **left_out})


TestMac, TestMag, TestMal, TestLmm = map(_laws, TITANS)


def names() -> Iterator[str]:
    return (name for name in dir(common.ModelTesterMixin) if name.startswith("test_"))


def test_each_reason_is_needed():
    for words in NOT_APPLICABLE:
        for word in re.split(r"\|(?![^(]*\))", words):
            assert any(re.search(f"^test_{word}|_{word}$", name) for name in names()), word


def test_most_tests_are_run():
    assert sum(reason(name) is None for name in names()) > 60
