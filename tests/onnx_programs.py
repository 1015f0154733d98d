"""Programs as ONNX compute what the model computes, in a runtime without PyTorch and this package.
`test_compile.py` runs this."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from conftest import exhaustive, tiny_model
from titans_lm import export_prefill, export_step, to_onnx
from titans_lm.models.onnx import NEW
from tolerance import assert_close

FORMS = [
    ("mag", {"memory_form": "plain", "memory_clip": None, "memory_activation": "gelu", "num_persistent_tokens": 0}),
    exhaustive("mac", {"num_persistent_tokens": 0}),
    exhaustive("mag", {}),
    exhaustive("mac", {}),
    exhaustive("mal", {}),
]


class Program:
    """A program in a session of its own: inputs and outputs by name."""

    def __init__(self, exported: torch.export.ExportedProgram, path: Path):
        to_onnx(exported).save(path)
        self.session = onnxruntime.InferenceSession(path)

    def __call__(self, ids: Tensor, state: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        names = {value.name for value in self.session.get_inputs()}
        given = {"input_ids": ids.numpy(), **(state or {})}
        logits, *values = self.session.run(None, {name: x for name, x in given.items() if name in names})
        outputs = [value.name for value in self.session.get_outputs()]
        assert outputs[0] == "logits"
        assert all(name.startswith(NEW) for name in outputs[1:])
        return logits, {name.removeprefix(NEW): x for name, x in zip(outputs[1:], values, strict=True)}


def assert_equal(found: np.ndarray, expected: Tensor) -> None:
    assert_close(torch.from_numpy(found), expected)


@pytest.mark.parametrize(("kind", "form"), FORMS)
@torch.no_grad()
def test_a_prompt_and_the_tokens_after_it_are_the_model_s(kind: str, form: dict[str, Any], tmp_path: Path):
    model = tiny_model(kind, torch.float32, num_hidden_layers=1, **form)
    prefill = Program(export_prefill(model), tmp_path / "prefill.onnx")
    step = Program(export_step(model), tmp_path / "step.onnx")
    for rows, length in ((1, 2), (3, 5), (2, 33)):
        ids = torch.randint(model.config.vocab_size, (rows, length))
        logits, state = prefill(ids)
        expected = model(ids, use_cache=True)
        assert_equal(logits, expected.logits)
        for _ in range(9):
            token = torch.randint(model.config.vocab_size, (rows, 1))
            logits, state = step(token, state)
            assert_equal(logits, model(token, past_key_values=expected.past_key_values).logits)
        theirs = expected.past_key_values.tensors()
        assert state.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_equal(state[name], tensor)


def test_a_program_without_onnxscript_is_one_clear_line(monkeypatch):
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"^to_onnx needs onnxscript: pip install 'titans-lm\[onnx\]'$"):
        to_onnx(program)
