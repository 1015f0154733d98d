"""Forecasters: forward, window and stream, channels, saving, refusals; and the stream's training and test."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction

from test_forecast import PARTS, series
from titans_lm import TitansForTimeSeriesPrediction, TitansTimeSeriesConfig
from titans_lm.evaluate.forecasting import contenders
from titans_lm.evaluate.forecasting.cells import Cell
from titans_lm.evaluate.forecasting.fit import Recipe
from titans_lm.evaluate.forecasting.series import standardised
from titans_lm.evaluate.forecasting.stream import fit_stream, measure_stream
from titans_lm.evaluate.forecasting.windows import windows_of
from titans_lm.models.cache import TitansState
from titans_lm.models.levels import LevelState, follow_levels

SIZES = {"num_input_channels": 2, "context_length": 24, "prediction_length": 5, "hidden_size": 16, "memory_head_dim": 8,
         "memory_dim": 12, "intermediate_size": 24, "patch_length": 8, "patch_stride": 4, "window_size": 3,
         "segment_size": 3, "memory_chunk_size": 3, "initializer_range": 0.3, "linear_skip": False,
         "memory_lr_start": 0.05}  # fmt: skip
VARIANTS = ("lmm", "mag", "mal", "mac", "attention")
LEVELS = {"level_half_lives": [2, 1.5]}


def forecaster(**fields: Any) -> TitansForTimeSeriesPrediction:
    torch.manual_seed(0)
    model = TitansForTimeSeriesPrediction(TitansTimeSeriesConfig(**{**SIZES, **fields})).eval()
    if model.levels is not None:  # they begin at zero
        torch.nn.init.normal_(model.levels.weight)
    return model


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use", ["window", "stream"])
def test_every_form_forecasts_and_every_weight_learns(use: str, variant: str, mixing: bool):
    model = forecaster(use=use, variant=variant, channel_mixing=mixing, linear_skip=True)
    torch.nn.init.normal_(model.head.weight)
    past = torch.randn(3, 24 if use == "window" else 36, 2)
    out = model.train()(past, torch.randn(3, 5, 2))
    out.loss.backward()
    assert out.prediction_outputs.shape == (3, 5, 2)
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in without if "initial_memory" not in name and "norm_bias" not in name} == set()


@pytest.mark.parametrize(("loss", "expected"), [("mse", lambda e: e.square()), ("mae", lambda e: e.abs())])
def test_losses(loss: str, expected: Any):
    model, future = forecaster(loss=loss), torch.randn(2, 5, 2)
    out = model(torch.randn(2, 24, 2), future)
    assert torch.allclose(out.loss, expected(out.prediction_outputs - future).mean())


def test_a_shifted_and_scaled_window_gives_a_shifted_and_scaled_forecast():
    model, past = forecaster(), torch.randn(2, 24, 2)
    y = model(past).prediction_outputs
    assert torch.allclose(model(past * 3 + 8).prediction_outputs, y * 3 + 8, atol=1e-3)


def test_channels_are_independent_or_mixed():
    past = torch.randn(1, 24, 2)
    changed = torch.cat([past[..., :1], torch.randn(1, 24, 1)], -1)
    for mixing in (False, True):
        model = forecaster(channel_mixing=mixing)
        first, other = (model(x).prediction_outputs[..., 0] for x in (past, changed))
        assert torch.equal(first, other) != mixing


def test_the_last_patch_repeats_the_last_value():
    model = forecaster(context_length=23)
    assert model.config.num_patches == 5
    past = torch.randn(1, 23, 2)
    assert model(past).prediction_outputs.shape == (1, 5, 2)
    ended = past.clone()
    ended[:, -1] += 1
    assert not torch.allclose(model(past).prediction_outputs, model(ended).prediction_outputs)


def test_it_begins_as_a_linear_map_of_the_look_back():
    model, past = forecaster(linear_skip=True), torch.randn(1, 24, 2)
    x, scale = model.rev_in(past)
    expected = model.rev_in.inverse(model.skip(x.transpose(1, 2)).transpose(1, 2), scale)
    assert torch.allclose(model(past).prediction_outputs, expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [*({"variant": name} for name in VARIANTS), LEVELS, {**LEVELS, "channel_mixing": True}]
)
def test_a_stream_may_be_cut_anywhere(fields: dict[str, Any]):
    model, history = forecaster(use="stream", **fields), torch.randn(2, 24 + 4 * 8, 2)
    windows = history.unfold(1, 24, 4).transpose(2, 3)
    whole, _ = model.stream(windows)
    state = model.initial_state(2)
    parts = [model.stream(part, state)[0] for part in windows.split([4, 1, 4], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert torch.allclose(model(history).prediction_outputs, whole[:, -1], atol=1e-5)
    out = model(history[:, :40])
    again = model(history[:, -36:], past_key_values=out.past_key_values)
    assert torch.allclose(again.prediction_outputs, whole[:, -1], atol=1e-4)


def test_a_stream_knows_what_is_older_than_its_look_back_and_nothing_later():
    model, windows = forecaster(use="stream"), torch.randn(1, 9, 24, 2)
    windows.requires_grad_()
    model.stream(windows)[0][:, 5].sum().backward()
    changed = windows.grad.abs().sum((0, 2, 3))
    assert (changed[:6] > 0).all()
    assert (changed[6:] == 0).all()


def test_a_level_that_never_forgets_is_the_mean_of_all_steps():
    history = torch.randn(2, 24 + 4 * 8, 3)
    windows = history.unfold(1, 24, 4).transpose(2, 3)
    found = follow_levels(windows, torch.zeros(2, 3, 1), torch.zeros(2), torch.tensor([1e9]), 4)
    for token in range(9):
        assert torch.allclose(found[:, token, :, 0], history[:, : 24 + 4 * token].mean(1), atol=1e-5)


def test_a_level_of_half_life_one_is_the_exponential_average_of_pandas():
    days = torch.randn(1, 10, 4, 1)
    found = follow_levels(days, torch.zeros(1, 1, 1), torch.zeros(1), torch.tensor([1.0]), 4)
    expected = pd.Series(days.mean(2).flatten().numpy()).ewm(halflife=1, adjust=False).mean()
    assert found.flatten().tolist() == pytest.approx(list(expected), abs=1e-5)


def test_a_shifted_and_scaled_stream_gives_shifted_and_scaled_forecasts():
    model, windows = forecaster(use="stream", **LEVELS), torch.randn(1, 5, 24, 2)
    y, _ = model.stream(windows)
    assert torch.allclose(model.stream(windows * 3 + 8)[0], y * 3 + 8, atol=1e-2)
    torch.nn.init.zeros_(model.levels.weight)
    plain, _ = model.stream(windows)
    assert torch.equal(plain[:, 0], y[:, 0])  # the first look-back is all there is
    assert not torch.allclose(plain[:, 1:], y[:, 1:], atol=1e-2)


@pytest.mark.parametrize("mixing", [False, True])
def test_levels_are_part_of_the_state(mixing: bool, tmp_path: Path):
    model, windows = forecaster(use="stream", channel_mixing=mixing, **LEVELS), torch.randn(2, 4, 24, 2)
    _, state = model.stream(windows)
    rows = len(state.position)
    fork, reset = state.clone(), state.clone()
    reset.reset()
    state.detach().save(tmp_path / "series.memory")
    loaded = TitansState.load(tmp_path / "series.memory", model)
    swapped = state.select([*range(rows // 2, rows), *range(rows // 2)])
    joined = LevelState.concat([state.select([row]) for row in range(rows)])
    later = torch.randn(2, 1, 24, 2)
    y, _ = model.stream(later, state)
    for other in (fork, loaded, joined):
        assert torch.equal(model.stream(later, other)[0], y)
    assert torch.allclose(model.stream(later.flip(0), swapped)[0], y.flip(0), atol=1e-5)
    assert torch.equal(model.stream(later, reset)[0], model.stream(later)[0])
    with pytest.raises(ValueError, match="another level_half_lives"):
        model(later[:, 0], past_key_values=forecaster(use="stream", channel_mixing=mixing).initial_state(2))


def test_saved_forecasters_open_by_their_auto_class(tmp_path: Path):
    model, past = forecaster(variant="mag"), torch.randn(2, 24, 2)
    model.save_pretrained(tmp_path)
    again = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path).eval()
    assert type(again) is TitansForTimeSeriesPrediction
    assert torch.equal(again(past).prediction_outputs, model(past).prediction_outputs)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TitansTimeSeriesConfig
    code = (tmp_path / "modeling_titans.py").read_text()
    assert again.config.auto_map["AutoModelForTimeSeriesPrediction"].split(".")[1] in code


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_length": 25}, "patch_length must be at most context_length=24, got 25"),
        ({"prediction_length": 0}, "prediction_length must be at least 1, got 0"),
        ({"head_dropout": 1}, r"head_dropout must be in \[0, 1\), got 1"),
        (
            {"context_lenght": 3},
            "unknown key 'context_lenght' in TitansTimeSeriesConfig; did you mean 'context_length'",
        ),
        ({"use": "both"}, "use"),
        (LEVELS, 'level_half_lives needs use="stream"'),
        ({"use": "stream", "level_half_lives": [0]}, r"must be numbers above 0, or None, got \[0\]"),
        ({"use": "stream", "level_half_lives": []}, r"must be numbers above 0, or None, got \[\]"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TitansTimeSeriesConfig(**{**SIZES, **fields})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("use", "past", "arguments", "message"),
    [
        ("window", torch.zeros(1, 23, 2), {}, "must have context_length=24 steps, got 23"),
        ("window", torch.zeros(1, 24, 3), {}, "with C = 2 channels, got"),
        ("window", torch.zeros(24, 2), {}, "with C = 2 channels, got"),
        ("stream", torch.zeros(1, 26, 2), {}, "any number of times 4 more, got 26"),
        ("window", torch.full((1, 24, 2), torch.nan), {}, "not finite in row 0, step 0, channel 0"),
        ("window", torch.zeros(1, 24, 2), {"past_observed_mask": torch.zeros(1, 24, 2)}, "marks missing values"),
        ("window", torch.zeros(1, 24, 2), {"future_values": torch.zeros(1, 4, 2)}, r"\[1, 5, 2\], got \[1, 4, 2\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(use: str, past: torch.Tensor, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        forecaster(use=use)(past, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_a_stream_s_look_backs_are_checked_as_forward_s_and_its_state_has_either_name():
    model = forecaster(use="stream")
    for windows, message in (
        (torch.zeros(1, 2, 23, 2), r"windows must be \[B, N, L, C\] with L = context_length = 24, got"),
        (torch.zeros(1, 24, 2), "windows must be"),
        (torch.zeros(1, 0, 24, 2), "windows must be"),
        (torch.zeros(1, 2, 24, 3), "with C = 2 channels, got"),
        (torch.full((1, 2, 24, 2), torch.inf), "not finite in row 0, step 0, channel 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream(windows)
    state, x = model.initial_state(1), torch.randn(1, 2, 24, 2)
    first, after = model.stream(x, cache=state)
    assert after is state
    assert torch.equal(first, model.stream(x, past_key_values=model.initial_state(1))[0])
    with pytest.raises(ValueError, match="two names of one argument"):
        model.stream(x, model.initial_state(1), cache=state)


def test_a_window_model_has_no_stream():
    with pytest.raises(ValueError, match="carries no memory"):
        forecaster().stream(torch.zeros(1, 1, 24, 2))
    model = forecaster()
    with pytest.raises(ValueError, match="past_key_values has no effect"):
        model(torch.zeros(1, 24, 2), past_key_values=model.initial_state(1))


# ------------------------------------------------------------------------------------------------ the study


def test_the_stream_is_measured_on_the_same_windows():
    values = standardised(series(), PARTS)
    data = windows_of(values, PARTS, 24, 5)
    model = forecaster(use="stream", memory_layers=1)
    with torch.no_grad():
        windows = values.unfold(0, 24, 1).transpose(1, 2)
        total = 0.0
        for phase in range(4):
            predicted, _ = model.stream(windows[None, phase::4])
            for token, forecast in enumerate(predicted[0]):
                first = phase + 4 * token + 24
                if PARTS.val <= first <= PARTS.test - 5:
                    total += float((forecast - values[first : first + 5]).double().square().sum())
    found = measure_stream(model, data.test)
    assert found.windows == len(data.test) == 76
    assert found.mse == pytest.approx(total / (76 * 5 * 2), rel=1e-4)
    alone = measure_stream(model, data.test, carried=False)
    assert alone.windows == 76
    assert alone.mse != found.mse


def test_no_row_of_the_test_part_reaches_the_training_of_a_stream():
    values = standardised(series(), PARTS)
    hidden = values.clone()
    hidden[PARTS.val :] = torch.nan
    trained = []
    for given in (values, hidden):
        data = windows_of(given, PARTS, 24, 5)
        fitted = fit_stream(lambda: forecaster(use="stream"), data, Recipe(epochs=1), 0, lambda _: None)
        trained.append(torch.cat([p.detach().flatten() for p in fitted.model.parameters()]))
    assert trained[0].isfinite().all()
    assert torch.equal(*trained)


def test_a_line_of_a_stream_says_what_its_look_back_alone_gives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(contenders.CONTENDERS, "titans_stream", contenders.Contender(
        lambda _: forecaster(use="stream"), Recipe(epochs=1), stream=True))  # fmt: skip
    made = series()
    row = Cell(made, PARTS, contenders.Task(24, 5, 2, 4), "titans_stream", 0).run(lambda _: None)
    assert row["windows"] == 76
    assert row["mse_look_back_alone"] > 0
    assert row["parameters"] == forecaster(use="stream").num_parameters()
