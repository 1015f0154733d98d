"""Laws of the whole model, in every architecture: it is the paper, causal, the same in any cut, and trainable."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import titans_lm.layers.neural_memory
import titans_lm.models.blocks
from conftest import (
    SEGMENT,
    VOCABULARY,
    each_kind,
    each_titan,
    exhaustive,
    read_in_calls,
    state_tensors,
    tiny_config,
    tiny_model,
    tokens,
)
from definition import logits as logits_by_definition
from titans_lm import TitansForCausalLM, TitansModel
from titans_lm.layers.neural_memory import memories
from tolerance import assert_close, relative_error

SETTINGS: dict[str, dict[str, Any]] = {
    "convex gate": {"gate": "convex"},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "chunk 1": {"memory_chunk_size": 1},
    "plain matrix": {"memory_layers": 1, "memory_form": "plain", "memory_clip": None},
    "plain, depth 3": {"memory_layers": 3, "memory_form": "plain"},
    "first memory 0": {"memory_init": "zero"},
    "no momentum": {"memory_momentum": False},
    "no forgetting": {"memory_forgetting": False},
    "gates of a chunk": {"memory_gates_of": "chunk"},
    "no convolution": {"memory_conv_size": 1},
    "segments and windows of 1": {"segment_size": 1, "window_size": 1},
    "wide heads, untied": {"head_dim": 6, "num_memory_heads": 3, "tie_word_embeddings": False},
}
each_setting = pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)


# ------------------------------------------------------------------------------------------------ the paper


def assert_is_the_paper(model: TitansForCausalLM, length: int) -> None:
    ids = tokens(2, length)
    weight = torch.randn(2, length, VOCABULARY, dtype=torch.float64)
    actual, parameters = model(ids).logits, dict(model.named_parameters())
    expected = torch.stack([logits_by_definition(model, row) for row in ids])
    assert_close(actual, expected)
    ours = torch.autograd.grad((actual * weight).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        assert_close(a, b, name)
        assert b.abs().sum() > 0, name


@each_kind
def test_logits_and_gradients_are_the_paper_s_equations(kind):
    assert_is_the_paper(tiny_model(kind), 2 * SEGMENT + 2)


@each_titan
@each_setting
def test_every_setting_is_the_paper_s_equations_and_all_of_it_learns(kind, changes):
    assert_is_the_paper(tiny_model(kind, num_hidden_layers=1, **changes), SEGMENT + 2)


# ------------------------------------------------------------------------------------------------ causality


@each_kind
def test_no_logit_moves_with_a_later_token(kind):
    model, length = tiny_model(kind), 4 * SEGMENT + 2
    ids = tokens(1, length)
    changed = ids.repeat(length, 1)
    changed.diagonal().copy_((ids[0] + 1) % VOCABULARY)  # row t differs at token t
    with torch.no_grad():
        moved = (model(changed).logits - model(ids).logits).abs().amax(-1)
    assert moved.tril(-1).max() <= 1e-12
    assert moved.diagonal().min() > 1e-6


@each_kind
def test_no_gradient_comes_from_a_later_token(kind):
    model, length = tiny_model(kind), 2 * SEGMENT + 2
    embeddings = model.get_input_embeddings()(tokens(1, length)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    for t in range(length):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert gradient[0, t].abs().sum() > 0


@pytest.mark.usefixtures("unchecked")
@each_kind
def test_random_tokens_are_not_learned(kind):
    """ln V is what a model pays that does not see the next token; one that sees it is below 1 within 60 steps."""
    changes = {"vocab_size": 8, "num_hidden_layers": 1, "initializer_range": 0.1, "segment_size": 6}
    model = tiny_model(kind, torch.float32, **changes, memory_chunk_size=8).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(80):
        ids = torch.randint(8, (16, 12), generator=draw)
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-40:]).mean() > math.log(8) - 0.02


# ------------------------------------------------------------------------------------------------ cuts and padding


def assert_reads_as_alone(model: TitansForCausalLM, ids: Tensor, calls: list[Tensor]) -> None:
    """Each row of `ids`, read in `calls` with the others, as in one call of its own: logits and state."""
    with torch.no_grad():
        logits, state = read_in_calls(model, ids, calls)
        for row, length in enumerate(state.position.tolist()):
            out = model(ids[row : row + 1, :length], use_cache=True)
            assert_close(logits[row], out.logits[0])
            ours, alone = state_tensors(state), state_tensors(out.past_key_values)
            assert ours.keys() == alone.keys()
            for name, tensor in ours.items():
                mine, its = tensor[row], alone[name][0]
                if mine.shape != its.shape:  # attention over everything keeps empty slots on the left
                    assert (mine[:, : -length or None] == 0).all(), name
                    mine = mine[:, mine.shape[1] - length :]
                assert mine.dtype == its.dtype, name
                assert_close(mine, its, name)


each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@each_kind
@each_dtype
@settings(deadline=None, derandomize=True, max_examples=6)
@given(cuts=st.lists(st.integers(0, 22), max_size=6))
def test_any_cut_into_calls_is_one_call(kind, dtype, cuts):
    calls = [torch.ones(2, b - a, dtype=torch.bool) for a, b in itertools.pairwise([0, *sorted(cuts), 22])]
    assert_reads_as_alone(tiny_model(kind, dtype), tokens(2, 22), calls)


@each_kind
@each_dtype
def test_token_by_token_is_one_call(kind, dtype):
    assert_reads_as_alone(tiny_model(kind, dtype), tokens(2, 22), [torch.ones(2, 1, dtype=torch.bool)] * 22)


PLACES = {"left": lambda call: call.sort(1)[0], "right": lambda call: call.sort(1, descending=True)[0], "any": None}
"""Where the padding is: in the test's name."""


@each_kind
@settings(deadline=None, derandomize=True, max_examples=10)
@given(
    calls=st.lists(
        st.integers(1, 9).flatmap(lambda size: st.lists(st.tuples(*[st.booleans()] * 3), min_size=size, max_size=size)),
        min_size=1,
        max_size=4,
    ),
    place=st.sampled_from(sorted(PLACES)),
)
def test_padding_is_invisible_and_rows_are_apart(kind, calls, place):
    masks = [torch.tensor(call).T for call in calls]
    if place != "any":
        masks = [PLACES[place](mask.int()).bool() for mask in masks]
    assert_reads_as_alone(tiny_model(kind), tokens(3, 36), masks)


RAGGED = [torch.arange(9, -1, -1) < torch.tensor([[9], [2], [6]]), torch.arange(8) < torch.tensor([[1], [8], [5]])]


@each_titan
@each_setting
def test_every_setting_reads_ragged_rows_as_alone(kind, changes):
    assert_reads_as_alone(tiny_model(kind, num_hidden_layers=1, **changes), tokens(3, 18), RAGGED)


@each_kind
def test_padding_may_be_nan(kind):
    model, mask = tiny_model(kind), RAGGED[0]
    x = model.get_input_embeddings()(tokens(3, mask.shape[1])).detach()

    def read(junk: float) -> list[Tensor]:
        embeds = x.masked_fill(~mask[..., None], junk).requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=True)
        found = torch.autograd.grad(out.logits.square().sum(), [embeds, *model.parameters()], materialize_grads=True)
        return [out.logits, *state_tensors(out.past_key_values).values(), *found]

    for actual, expected in zip(read(math.nan), read(0.5), strict=True):
        assert_close(actual, expected)


@each_kind
def test_a_row_does_not_depend_on_its_neighbours(kind):
    model, ids = tiny_model(kind), tokens(3, 3 * SEGMENT)
    others = ids.clone()
    others[1] = tokens(1, 3 * SEGMENT, seed=1)
    with torch.no_grad():
        before, after = model(ids).logits, model(others).logits
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert relative_error(after[1], before[1]) > 0.1


@each_kind
def test_no_token_at_all_changes_nothing(kind):
    model, ids = tiny_model(kind), tokens(2, 9)
    with torch.no_grad():
        assert model(ids[:, :0]).logits.shape == (2, 0, VOCABULARY)
        state = model(ids).past_key_values
        before = {name: t.clone() for name, t in state_tensors(state).items()}
        model(ids[:, :0], past_key_values=state)
        model(ids, attention_mask=torch.zeros(2, 9), past_key_values=state)
    for name, tensor in state_tensors(state).items():
        filled = tensor[..., tensor.shape[2] - before[name].shape[2] :, :] if ".attention" in name else tensor
        assert torch.equal(filled, before[name]), name


@each_kind
@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
def test_a_long_text_is_read_in_pieces_to_the_same_numbers(kind, ragged, monkeypatch):
    """Without gradients a block reads PREFILL_TOKENS tokens at a time, but for attention over everything."""
    model, ids = tiny_model(kind), tokens(3, 23)
    options = {"use_cache": True, "output_surprise": True}
    if ragged:
        options["attention_mask"] = (torch.arange(23) < torch.tensor([[23], [9], [0]])).long()
    whole = model(ids, **options)
    monkeypatch.setattr(titans_lm.models.blocks, "PREFILL_TOKENS", 5)
    read, branch = [], type(model.model.layers[0]).branch
    monkeypatch.setattr(
        type(model.model.layers[0]),
        "branch",
        lambda self, x, *rest: [read.append(x.shape[1]), branch(self, x, *rest)][1],
    )
    with torch.no_grad():
        pieces = model(ids, **options)
    assert read == ([23] if kind == "full" else [5, 5, 5, 5, 3]) * 2
    assert_close(pieces.logits, whole.logits)
    for name, tensor in state_tensors(pieces.past_key_values).items():
        assert_close(tensor, state_tensors(whole.past_key_values)[name], name)
    for ours, theirs in zip(pieces.surprise, whole.surprise, strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            assert_close(part, expected)


@each_titan
def test_surprise_is_computed_only_where_it_is_asked_for(kind, monkeypatch):
    asked, scan = [], titans_lm.layers.neural_memory.memory_scan
    monkeypatch.setattr(
        titans_lm.layers.neural_memory, "memory_scan", lambda *a, **k: [asked.append(k["surprise"]), scan(*a, **k)][1]
    )
    model, ids = tiny_model(kind, num_persistent_tokens=0), tokens(1, SEGMENT)
    with torch.no_grad():
        model(ids)
        model(ids[:, :1])
        assert not any(asked)
        asked.clear()
        model(ids, output_surprise=True)
        model.config.memory_theta_weight = 0.5
        model(ids, labels=ids)
    # the first memory of a stream reads its persistent tokens, whose surprise nobody sees
    assert asked.count(True) == 2 * model.config.num_hidden_layers


# ------------------------------------------------------------------------------------------------ training


@each_kind
@pytest.mark.parametrize("fresh", [False, True], ids=["moved", "as built"])
def test_every_parameter_learns(kind, fresh):
    model, ids = tiny_model(kind), tokens(2, 3 * SEGMENT)
    if fresh:
        model = TitansForCausalLM(model.config).double()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@each_kind
def test_the_loss_is_the_next_token_s_cross_entropy(kind):
    model, ids = tiny_model(kind), tokens(2, 11)
    labels = ids.clone()
    labels[0, 3:6] = labels[1, 9] = -100
    out = model(ids, labels=labels)
    log_p = out.logits.double().log_softmax(-1)
    wanted = [-log_p[r, t - 1, labels[r, t]] for r in range(2) for t in range(1, 11) if labels[r, t] != -100]
    assert_close(out.loss, torch.stack(wanted).mean().to(out.loss.dtype))


@each_titan
@pytest.mark.parametrize("term", ["theta", "both"])
def test_the_memory_s_terms_are_added_by_their_weights(kind, term):
    """The reconstruction loss and the step."""
    model, ids = tiny_model(kind).train(), tokens(2, 11)
    plain, expected = model(ids, labels=ids).loss, {}
    for name, weight in (("loss", 0.5), ("theta", 0.3)):
        if term in (name, "both"):
            setattr(model.config, f"memory_{name}_weight", weight)
            expected[name] = weight
    out = model(ids, labels=ids, output_surprise=True)
    added = torch.zeros_like(plain)
    for name in ("loss", "theta"):
        mean = torch.stack([getattr(s, name).mean() for s in out.surprise]).mean()
        added = added + expected.get(name, 0.0) * mean
        if name in expected:
            assert_close(out[f"memory_{name}"], mean)
        else:
            assert getattr(out, f"memory_{name}") is None
    assert added > 0
    assert_close(out.loss, plain + added)
    evaluated = model.eval()(ids, labels=ids)
    assert_close(evaluated.loss, plain)
    assert_close(evaluated.memory_theta, out.memory_theta)
    assert model(ids).memory_loss is model(ids).memory_theta is None


@each_titan
def test_a_price_on_the_step_lowers_it(kind):
    """By the gradient of its gate."""
    model, ids = tiny_model(kind, memory_theta_weight=1.0), tokens(2, 11)
    out = model(ids, labels=ids)
    gates = [memory.theta.bias for memory in memories(model)]
    for gradient in torch.autograd.grad(out.memory_theta, gates):
        assert (gradient > 0).all()


@each_titan
def test_the_memory_s_terms_do_not_count_padding(kind):
    model, ids = tiny_model(kind, memory_loss_weight=0.5, memory_theta_weight=0.3), tokens(2, 11)
    padded, mask, labels = F.pad(ids, (4, 0)), F.pad(torch.ones_like(ids), (4, 0)), F.pad(ids, (4, 0), value=-100)
    out = model(padded, attention_mask=mask, labels=labels)
    alone = model(ids, labels=ids)
    assert_close(out.memory_loss, alone.memory_loss)
    assert_close(out.memory_theta, alone.memory_theta)


@each_kind
def test_gradients_pass_through_a_carried_state_and_detach_cuts_them(kind):
    model, ids = tiny_model(kind), tokens(2, 2 * SEGMENT + 3)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    cut = SEGMENT + 1
    (whole,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits[:, cut:].square().sum(), embeddings)

    def carried(detach: bool) -> Tensor:
        state = model(inputs_embeds=embeddings[:, :cut], use_cache=True).past_key_values
        state = state.detach() if detach else state
        logits = model(inputs_embeds=embeddings[:, cut:], past_key_values=state).logits
        return torch.autograd.grad(logits.square().sum(), embeddings)[0]

    assert_close(carried(False), whole)
    detached = carried(True)
    assert (detached[:, :cut] == 0).all()
    assert detached[:, cut:].abs().sum() > 0


@each_kind
def test_activation_checkpointing_gives_the_same_gradients(kind):
    model, ids = tiny_model(kind).train(), tokens(2, 2 * SEGMENT + 3)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    for name, gradient in gradients().items():
        assert_close(gradient, plain[name], name)


def assert_finite(model: TitansForCausalLM) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("depth", "half"), [(2, True), (4, False), exhaustive(2, False), exhaustive(4, True)])
def test_training_on_a_repeated_pattern_stays_finite(depth, half):
    """A key that comes again in every chunk multiplies its error; unbounded, this diverges within some steps."""
    torch.manual_seed(0)
    one = {"num_hidden_layers": 1, "num_memory_heads": 1, "num_persistent_tokens": 0}
    model = TitansForCausalLM(tiny_config("lmm", memory_layers=depth, memory_chunk_size=16, **one)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    ids = tokens(1, 16).repeat(2, 2)
    losses = []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < 0.5 * losses[0]
    assert_finite(model)


@pytest.mark.parametrize("kind", ["mag", "lmm"])
def test_one_token_a_hundred_thousand_times_stays_finite(kind):
    model = tiny_model(
        kind, torch.float32, hidden_size=16, num_hidden_layers=1, memory_chunk_size=64, window_size=64,
        num_attention_heads=1, intermediate_size=16,
    )  # fmt: skip
    state = model.initial_state(1)
    with torch.no_grad():
        for _ in range(10):
            out = model(torch.full((1, 10_000), 5), past_key_values=state, logits_to_keep=10)
            assert out.logits.isfinite().all()
    for name, tensor in state_tensors(state).items():
        assert tensor.isfinite().all(), name
    assert state.position.tolist() == [100_000]


# ------------------------------------------------------------------------------------------------ half precision


@each_kind
def test_a_bfloat16_model_keeps_its_memory_in_float32(kind):
    model, ids = tiny_model(kind, torch.float32).to(torch.bfloat16), tokens(2, 2 * SEGMENT + 3)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        again = model(ids, past_key_values=out.past_key_values)
    assert out.logits.dtype == torch.bfloat16
    assert again.logits.isfinite().all()
    for name, tensor in state_tensors(out.past_key_values).items():
        if ".memory.memory." in name and "position" not in name:
            assert tensor.dtype == torch.float32, name


@each_kind
def test_autocast_to_bfloat16_is_near_and_keeps_the_memory_in_float32(kind):
    model, ids = tiny_model(kind, torch.float32, initializer_range=0.1), tokens(2, 2 * SEGMENT + 3)
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert relative_error(out.logits, exact) < 0.1
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name, tensor in state_tensors(out.past_key_values).items():
        if ".memory.memory." in name and "position" not in name:
            assert tensor.dtype == torch.float32, name


# ------------------------------------------------------------------------------------------------ in transformers


@each_kind
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_and_loaded_models_are_bit_equal(kind, tied, dtype, tmp_path):
    model, ids = tiny_model(kind, dtype, tie_word_embeddings=tied), tokens(2, 9)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is TitansForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).own_fields() == model.config.own_fields()
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        base = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert type(base) is TitansModel
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("init", ["learned", "zero"])
@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_begin_where_they_should_and_loaded_ones_stay(depth, form, init, tmp_path):
    """transformers initialises models module by module, and passes over those without parameters of their own."""
    config = tiny_config(
        "lmm", memory_layers=depth, memory_form=form, memory_init=init, memory_alpha_bias=-7.0, memory_lr_start=0.03
    )
    model = TitansForCausalLM(config)
    starts = {
        "theta": 0.03 / config.memory_lr,
        "eta": 1 - 1 / config.memory_chunk_size,
        "alpha": 1 / (1 + math.exp(7)),
    }
    for layer in model.model.layers:
        for name, start in starts.items():
            bias = layer.memory.get_submodule(name).bias
            assert torch.sigmoid(bias).tolist() == pytest.approx([start] * len(bias)), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_truncated_checkpoint_is_refused(tmp_path):
    tiny_model("mag", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|deserializ|corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    tiny_model("mag", torch.float32).save_pretrained(tmp_path)
    tiny_model("mag", torch.float32, hidden_size=48).config.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 32, "n_layer": 2}')
    with pytest.raises(ValueError, match="of type 'gpt2', not 'titans'"):
        TitansForCausalLM.from_pretrained(tmp_path)


@each_kind
def test_embeddings_in_and_hidden_states_out(kind):
    model, ids = tiny_model(kind), tokens(2, 9)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, out.logits)
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert model(ids, return_dict=False)[0].shape == (2, 9, VOCABULARY)


@each_titan
def test_surprise_is_reported_per_layer_token_and_head_and_not_at_padding(kind):
    model, ids = tiny_model(kind), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, [0, 4, 8]] = 0
    with torch.no_grad():
        surprise = model(ids, attention_mask=mask, output_surprise=True).surprise
        alone = model(ids[1:, mask[1] == 1], output_surprise=True).surprise
    assert len(surprise) == model.config.num_hidden_layers
    for layer, own in zip(surprise, alone, strict=True):
        for part, expected in zip(layer, own, strict=True):
            assert part.shape == (2, 9, model.config.num_memory_heads)
            assert (part[mask == 0] == 0).all()
            assert_close(part[1, mask[1] == 1], expected[0])
            assert (expected > 0).all()


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_logits_to_keep_gives_the_last_logits(keep):
    model, ids = tiny_model("mag"), tokens(2, 9)
    assert_close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, -keep:])
    assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, model(ids).logits[:, [1, 4]])


@pytest.mark.usefixtures("unchecked")
def test_inputs_that_do_not_fit_are_refused():
    model, ids = tiny_model("mag"), tokens(2, 9)
    state = model(ids).past_key_values
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="not both"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="2 rows, the input has 1"):
        model(ids[:1], past_key_values=state)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="max_position_embeddings=12"):
        tiny_model("mag", max_position_embeddings=12)(tokens(2, 13))


def test_a_refused_call_leaves_the_state_as_it_was():
    model = tiny_model("mag", max_position_embeddings=12)
    state = model(tokens(2, 9)).past_key_values
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(tokens(2, 4), past_key_values=state)
    assert state.position.tolist() == [9, 9]
    assert state.columns == 9
