"""Whole models under `torch.compile` and `torch.export` are the eager ones. `test_compile.py` runs this."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import PERSISTENT, SEGMENT, exhaustive, state_tensors, tiny_model, tokens
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.layers.bypass import bypass_memory
from titans_lm.models.export import export_prefill, export_step
from titans_lm.models.tokenizer import byte_tokenizer
from tolerance import assert_close

LENGTHS = (9, 10, 12, 13, 4, 33, 3, 26, 2, 27)
"""Around the window, the segment and the chunk of the tiny models."""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


each_form_of_state = pytest.mark.parametrize("kind", ["mac", *(exhaustive(kind) for kind in ("mal", "mag", "lmm"))])
"""MAC's has most parts. A window's step is exported below, which traces it too."""


def small_model(kind: str, **changes: Any) -> TitansForCausalLM:
    """One layer, in most kinds without the reading of persistent tokens: what is compiled takes seconds as it is."""
    persistent = PERSISTENT if kind == "mag" else 0
    return tiny_model(kind, **{"num_hidden_layers": 1, "num_persistent_tokens": persistent, **changes})


def compiled(model: TitansForCausalLM, backend: Any = "eager") -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend)


def of_any_length(ids: Tensor) -> Tensor:
    """The same tokens, for a graph that does not have their number in it."""
    torch._dynamo.maybe_mark_dynamic(ids, 1)
    return ids


def assert_same_state(actual: TitansState, expected: TitansState) -> None:
    theirs = state_tensors(expected)
    for name, tensor in state_tensors(actual).items():
        assert tensor.dtype == theirs[name].dtype, name
        assert_close(tensor, theirs[name], name)
    assert actual.columns == expected.columns


@torch.no_grad()
def assert_same_prefill(run: Callable[..., Any], model: TitansForCausalLM, ids: Tensor) -> None:
    out, expected = run(ids, use_cache=True), model(ids, use_cache=True)
    assert_close(out.logits, expected.logits)
    assert_same_state(out.past_key_values, expected.past_key_values)


def training_step(run: Callable[..., Any], model: TitansForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """Loss, logits and gradients."""
    model.zero_grad()
    out = run(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"loss": out.loss, "logits": out.logits, **{n: p.grad for n, p in model.named_parameters()}}


def assert_same_step(run: Callable[..., Any], model: TitansForCausalLM, ids: Tensor) -> None:
    found = training_step(run, model, ids)
    for name, expected in training_step(model, model, ids).items():
        assert_close(found[name], expected, name)


@pytest.mark.parametrize(
    ("kind", "training"), [("mac", False), ("lmm", True), exhaustive("mag", True), exhaustive("mal", False)]
)
def test_ten_lengths_are_compiled_at_most_three_times(kind: str, training: bool):
    model, counter = small_model(kind).train(training), CompileCounterWithBackend("eager")
    run = compiled(model, counter)
    for length in LENGTHS:
        if training:
            assert_same_step(run, model, tokens(2, length))
        else:
            assert_same_prefill(run, model, tokens(2, length))
    assert 0 < counter.frame_count <= 3


@pytest.mark.parametrize("kind", ["mac", exhaustive("mal")])
def test_compiled_backward_passes_are_eager_ones(kind: str):
    """Of operators, of those that return what no gradient goes through, and of the loop of MAC."""
    model = small_model(kind, memory_loss_weight=0.5, memory_theta_weight=0.3).train()
    assert_same_step(compiled(model, "aot_eager"), model, of_any_length(tokens(2, 16)))


@each_form_of_state
@torch.no_grad()
def test_a_prompt_and_what_is_decoded_after_it_are_eager_ones(kind: str):
    model, ids, counter = small_model(kind), tokens(2, 30), CompileCounterWithBackend("eager")
    run = compiled(model, counter)
    out, expected = run(ids[:, :16], use_cache=True), model(ids[:, :16], use_cache=True)
    assert_close(out.logits, expected.logits)
    state, eager = out.past_key_values, expected.past_key_values
    assert_same_state(state, eager)
    before = counter.frame_count
    for i in range(16, 30):
        token = ids[:, i : i + 1]
        assert_close(run(token, past_key_values=state).logits, model(token, past_key_values=eager).logits)
        assert_same_state(state, eager)
    assert state.has_begun()
    assert counter.frame_count - before <= 2
    with bypass_memory(model), pytest.raises(Exception, match="call the model itself"):
        run(ids[:, :1], past_key_values=state)


@pytest.mark.parametrize("kind", ["mac", *(exhaustive(kind) for kind in ("mag", "mal", "lmm"))])
@torch.no_grad()
def test_dynamic_compiles_once_for_all_lengths_beyond_a_segment(kind: str):
    """MAC's loop takes no numbers of the modules as inputs: docs/compile.md has the setting."""
    model, counter = small_model(kind), CompileCounterWithBackend("eager")
    run = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch._dynamo.config.patch(specialize_float=True):
        for length in (16, 2 * SEGMENT, SEGMENT + 1, 30):
            ids = tokens(2, length)
            assert_close(run(ids).logits, model(ids).logits)
    assert counter.frame_count == 1


@each_form_of_state
@torch.no_grad()
def test_a_state_that_is_decoding_is_a_value_in_a_graph(kind: str):
    model = small_model(kind)
    run, ids = compiled(model), tokens(2, 13)
    states = [model.initial_state(2) for _ in range(2)]
    for state in states:
        model(ids[:, :9], past_key_values=state)
        model.begin_decoding(state)
        model(ids[:, 9:10], past_key_values=state)
    for i in (10, 11):
        pairs = zip((run, model), states, strict=True)
        ours, expected = (call(ids[:, i : i + 1], past_key_values=state).logits for call, state in pairs)
        assert_close(ours, expected)
    assert_same_state(*(state.clone() for state in states))


@torch.no_grad()
def test_rows_that_continue_with_padding_or_start_anew_are_eager_ones():
    model, ids, mask = small_model("mac"), tokens(3, 20), torch.ones(3, 17, dtype=torch.long)
    mask[0, :5] = mask[1, 9:] = 0
    run, states = compiled(model), [model(ids[:, :3], use_cache=True).past_key_values for _ in range(2)]
    for state in states:
        state.reset([2])
    found, expected = (
        call(ids[:, 3:], attention_mask=mask, past_key_values=state).logits
        for call, state in zip((run, model), states, strict=True)
    )
    assert_close(found * mask[..., None], expected * mask[..., None])
    assert_same_state(*states)
    with pytest.raises(RuntimeError, match="attention_mask must be 0 or 1"):
        run(ids[:, 3:], attention_mask=mask * 2, past_key_values=states[0])


@torch.no_grad()
def test_what_a_trace_cannot_know_is_refused_when_it_runs():
    model = small_model("lmm", max_position_embeddings=6)
    state, run = model(tokens(2, 4), use_cache=True).past_key_values, compiled(model)
    for _ in range(2):
        run(tokens(2, 1), past_key_values=state)
    with pytest.raises(RuntimeError, match="max_position_embeddings=6"):
        run(tokens(2, 1), past_key_values=state)
    state = model(tokens(2, 4), use_cache=True).past_key_values
    state.position.zero_()
    with pytest.raises(RuntimeError, match="set to 0 in place"):
        run(tokens(2, 1), past_key_values=state)
    with pytest.raises(Exception, match="cannot take position_ids"):
        run(tokens(2, 4), position_ids=torch.arange(4).expand(2, -1))


@pytest.mark.slow
@torch.no_grad()
def test_code_that_inductor_makes_is_eager_code():
    model, ids = small_model("lmm", dtype=torch.float32), tokens(2, 16)
    assert_same_prefill(compiled(model, "inductor"), model, of_any_length(ids))


def reloaded(program: torch.export.ExportedProgram) -> Callable[..., Any]:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


SHORTEST: dict[str, Any] = {
    "window_size": 1, "memory_chunk_size": 2, "memory_gates_of": "chunk",
    "surprise_threshold": 0.3, "surprise_threshold_on": "prediction",
}  # fmt: skip
"""Sizes that a call of two tokens, as the trace has it, ends at, and options that compare tokens with those before."""


EXPORTED = [("mac", {}), ("lmm", {}), ("mag", SHORTEST), exhaustive("mag", {}), exhaustive("mal", {})]


@pytest.mark.parametrize(("kind", "changes"), EXPORTED)
@torch.no_grad()
def test_exported_programs_are_the_model_at_any_length_and_number_of_rows(kind: str, changes: dict[str, Any]):
    model = small_model(kind, **changes)
    made = export_prefill(model), export_step(model)
    prefill, step = (reloaded(program) if kind in ("mac", "mag") else program.module() for program in made)
    for rows, length in ((1, 2), (2, 16), (3, 5), (1, 33)):
        ids = tokens(rows, length)
        logits, state = prefill(ids)
        expected = model(ids, use_cache=True)
        assert_close(logits, expected.logits)
        for i in range(8):
            token = tokens(rows, 1, seed=i)
            logits, state = step(token, state)
            assert_close(logits, model(token, past_key_values=expected.past_key_values).logits)
        theirs = expected.past_key_values.tensors()
        assert state.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_close(state[name], tensor, name)
    with pytest.raises(RuntimeError, match="set to 0 in place"):
        step(token, {**state, "position": torch.zeros_like(state["position"])})
    restored = model.initial_state(1)
    restored.set_tensors(state)
    assert_close(model(token, past_key_values=restored).logits, step(token, state)[0])


@torch.no_grad()
def test_a_step_is_exported_where_parts_of_the_state_are_one_tensor():
    """Where a segment begins, what it retrieves from are the memory's weights."""
    model = small_model("mac", segment_size=2)
    step, state = export_step(model).module(), model(tokens(2, 3), use_cache=True).past_key_values
    tensors = state.tensors()
    for i in range(3):
        token = tokens(2, 1, seed=i)
        logits, tensors = step(token, tensors)
        assert_close(logits, model(token, past_key_values=state).logits)


def test_the_code_of_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a model of one layer in place of the shipped one, which takes ten times as long to export."""
    monkeypatch.chdir(tmp_path)
    small_model("lmm", vocab_size=260, dtype=torch.float32).save_pretrained("small")
    byte_tokenizer().save_pretrained("small")
    names: dict[str, Any] = {}
    page = (Path(__file__).parents[1] / "docs/compile.md").read_text(encoding="utf-8")
    assert page.count('load("streams")') == 1
    page = page.replace('load("streams")', 'load("small")')
    for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "compile.md", "exec"), names)  # the project's own documents
    assert names["logits"].shape == (1, 1, names["model"].config.vocab_size)


def test_a_state_that_grows_is_not_exported():
    with pytest.raises(ValueError, match="constant size"):
        export_step(small_model("full"))
