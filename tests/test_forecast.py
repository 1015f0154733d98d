"""Forecasting: the protocol, what reaches training, the rivals' equations, errors of files, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error
from torch import Tensor

from titans_lm import cli
from titans_lm.evaluate.forecasting.candidates import load_candidates
from titans_lm.evaluate.forecasting.cells import Cell
from titans_lm.evaluate.forecasting.contenders import CONTENDERS, Task, build
from titans_lm.evaluate.forecasting.fit import EVAL_BATCH, Recipe, fit, measure
from titans_lm.evaluate.forecasting.report import choice, errors, older
from titans_lm.evaluate.forecasting.rivals import DLinear, NLinear, RLinear, SeasonalNaive
from titans_lm.evaluate.forecasting.series import Parts, Series, load_series, split_of, standardised
from titans_lm.evaluate.forecasting.windows import Windows, check_no_leak, windows_of
from titans_lm.models.rev_in import RevIN

PARTS = Parts(240, 320, 400)


def series(rows: int = 400, columns: int = 2, name: str = "made") -> Series:
    """Waves of 24 and 17 steps with noise."""
    t = torch.arange(rows, dtype=torch.float64)[:, None]
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).double()
    values = 5 + torch.sin(t * 2 * torch.pi / 24) + 2 * torch.cos(t * 2 * torch.pi / 17) + 0.1 * noise
    return Series(name, [f"c{i}" for i in range(columns)], values, "digest")


def write_csv(path: Path, rows: list[str] | None = None, columns: str = "date,a,b") -> Path:
    found = series().values
    hours = np.datetime64("2020-01-01T00") + np.arange(len(found))
    lines = [f"{str(hour).replace('T', ' ')}:00:00,{a:.4f},{b:.4f}" for hour, (a, b) in zip(hours, found, strict=True)]
    path.write_text("\n".join([columns, *(lines if rows is None else rows)]) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ the protocol


def test_ett_is_cut_as_published():
    hours, minutes = series(17420, 1, "ETTh1"), series(69680, 1, "ETTm1")
    assert split_of(hours, "auto") == (8640, 8640 + 2880, 8640 + 2 * 2880)
    assert split_of(minutes, "auto") == (34560, 34560 + 11520, 34560 + 2 * 11520)
    assert split_of(series(1000, 1, "weather"), "auto") == (700, 800, 1000)
    assert split_of(series(1000, 1), "60/20/20") == (600, 800, 1000)
    data = windows_of(standardised(hours, split_of(hours, "auto")), split_of(hours, "auto"), 96, 720)
    assert [len(part) for part in data] == [8640 - 96 - 720 + 1, 2880 - 720 + 1, 2880 - 720 + 1]


def test_windows_hold_successive_rows_and_look_back_reaches_into_the_part_before():
    values = torch.arange(400.0)[:, None]
    data = windows_of(values, PARTS, 30, 7)
    for part, first, last in ((data.train, 30, 239), (data.val, 240, 319), (data.test, 320, 399)):
        past, future = part.batch(torch.tensor([0, len(part) - 1]))
        assert future[0].flatten().tolist() == list(range(first, first + 7))
        assert past[0].flatten().tolist() == list(range(first - 30, first))
        assert int(future[1, -1]) == last


def test_only_the_training_part_standardises():
    made = series()
    changed = made._replace(values=torch.cat([made.values[:240], made.values[240:] * 100 + 3]))
    a, b = standardised(made, PARTS), standardised(changed, PARTS)
    assert torch.equal(a[:240], b[:240])
    assert not torch.allclose(a[240:], b[240:])
    assert a[:240].mean(0).abs().max() < 1e-6
    assert np.allclose(a[:240].std(0, correction=0), 1)


def test_a_constant_column_stays_finite():
    made = series()
    made.values[:, 1] = 4.0
    assert standardised(made, PARTS).isfinite().all()


def test_errors_are_those_of_scikit_learn_over_all_windows():
    values = standardised(series(1200), Parts(700, 800, 1200))
    test = windows_of(values, Parts(700, 800, 1200), 24, 10).test
    assert len(test) % EVAL_BATCH
    assert len(test) > EVAL_BATCH
    model = DLinear(24, 10)
    found = measure(model, test)
    past, future = test.batch(torch.arange(len(test)))
    true, predicted = (x.detach().double().flatten().numpy() for x in (future, model(past)))
    assert found.mse == pytest.approx(mean_squared_error(true, predicted), rel=1e-6)
    assert found.mae == pytest.approx(mean_absolute_error(true, predicted), rel=1e-6)
    assert found.windows == len(test)


# ------------------------------------------------------------------------------------------------ leaks


def weights_after_training(values: Tensor, parts: Parts = PARTS) -> Tensor:
    data = windows_of(values, parts, 24, 12)
    fitted = fit(lambda: build("dlinear", Task(24, 12, 2, 24), 0), data, Recipe(epochs=2), 0, lambda _: None)
    return torch.cat([p.detach().flatten() for p in fitted.model.parameters()])


def test_no_row_of_the_test_part_reaches_training():
    values = standardised(series(), PARTS)
    hidden = values.clone()
    hidden[PARTS.val :] = torch.nan
    assert torch.equal(weights_after_training(values), weights_after_training(hidden))


def test_a_planted_leak_is_caught():
    values, leaking = standardised(series(), PARTS), PARTS._replace(train=PARTS.train + 30)
    data = windows_of(values, leaking, 24, 12)
    with pytest.raises(ValueError, match="leak: training windows reach row 269, and the part ends before row 240"):
        check_no_leak(data, PARTS)
    data = windows_of(values, PARTS, 24, 12)
    with pytest.raises(ValueError, match="leak: validation windows reach row 320"):
        check_no_leak(data._replace(val=dataclasses.replace(data.val, end=321)), PARTS)
    check_no_leak(data, PARTS)
    hidden = values.clone()
    hidden[PARTS.val :] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        weights_after_training(hidden, PARTS._replace(train=325, val=350))


def test_training_stops_by_the_validation_part_and_returns_its_best():
    values = standardised(series(), PARTS)
    data = windows_of(values, PARTS, 24, 12)
    told: list[str] = []
    recipe = Recipe(rates=(0.3, 1e-3), epochs=6, patience=1, decay=1.0)
    fitted = fit(lambda: RLinear(24, 12, 2), data, recipe, 0, told.append)
    errors = {line.split(",")[0]: [] for line in told}
    for line in told:
        errors[line.split(",")[0]].append(float(line.rsplit(" ", 1)[1]))
    assert fitted.val.mse == pytest.approx(min(min(e) for e in errors.values()), abs=1e-4)
    assert measure(fitted.model, data.val) == fitted.val
    assert fitted.epochs == np.argmin(errors[f"rate {fitted.rate:g}"]) + 1


# ------------------------------------------------------------------------------------------------ rivals


def test_a_season_is_repeated():
    past = torch.arange(10.0).view(1, 10, 1)
    assert SeasonalNaive(7, 3)(past).flatten().tolist() == [7, 8, 9, 7, 8, 9, 7]


def test_dlinear_s_moving_average_is_pandas_s():
    import pandas as pd

    past = torch.randn(1, 40, 1)
    padded = [past[0, 0, 0]] * 12 + list(past.flatten()) + [past[0, -1, 0]] * 12
    expected = pd.Series([float(x) for x in padded]).rolling(25).mean().dropna().to_numpy()
    assert np.allclose(DLinear(40, 3).moving_average(past).flatten(), expected, atol=1e-5)


def test_dlinear_is_two_linear_maps_of_trend_and_rest():
    model, past = DLinear(40, 3), torch.randn(2, 40, 5)
    torch.nn.init.normal_(model.trend.weight)
    trend = model.moving_average(past)
    expected = torch.einsum("hl,blc->bhc", model.trend.weight, trend) + model.trend.bias[:, None]
    expected = expected + torch.einsum("hl,blc->bhc", model.season.weight, past - trend) + model.season.bias[:, None]
    assert torch.allclose(model(past), expected, atol=1e-5)


@pytest.mark.parametrize("model", [NLinear(20, 4), RLinear(20, 4, 3)])
def test_a_shifted_window_gives_a_shifted_forecast(model: torch.nn.Module):
    past = torch.randn(2, 20, 3)
    assert torch.allclose(model(past + 50), model(past) + 50, atol=1e-3)


def test_a_scaled_window_gives_a_scaled_forecast_of_rlinear():
    model, past = RLinear(20, 4, 3), torch.randn(2, 20, 3)
    assert torch.allclose(model(past * 7), model(past) * 7, atol=1e-2)
    assert not torch.allclose(NLinear(20, 4)(past * 7), NLinear(20, 4)(past) * 7, atol=1e-2)


def test_revin_undoes_itself():
    norm, x = RevIN(3), torch.randn(2, 50, 3) * 4 + 9
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    torch.nn.init.normal_(norm.bias)
    y, scale = norm(x)
    assert torch.allclose(norm.inverse(y, scale), x, atol=1e-4)
    plain = (y - norm.bias) / norm.weight
    assert torch.allclose(plain.mean(1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(plain.std(1, correction=0), torch.ones(2, 3), atol=1e-4)


@pytest.mark.parametrize("name", [name for name, contender in CONTENDERS.items() if not contender.stream])
def test_every_model_forecasts_and_can_be_built_again(name: str):
    task, past = Task(48, 5, 3, 24), torch.randn(2, 48, 3)
    a, b = (build(name, task, 3).eval() for _ in range(2))
    assert a(past).shape == (2, 5, 3)
    assert torch.equal(a(past), b(past))


# ------------------------------------------------------------------------------------------------ files


def bad(tmp_path: Path, change: Any) -> Path:
    lines = write_csv(tmp_path / "bad.csv").read_text().splitlines()
    change(lines)
    (tmp_path / "bad.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "bad.csv"


def swap(lines: list[str]) -> None:
    lines[4], lines[5] = lines[5], lines[4]


def set_line(number: int, text: str) -> Any:
    def change(lines: list[str]) -> None:
        lines[number] = text

    return change


FILES = {
    "missing": (set_line(7, "2020-01-01 06:00:00,,1"), r"row 7 \(line 8\), column 'a': the value is missing"),
    "nan": (set_line(7, "2020-01-01 06:00:00,1,NaN"), r"row 7 \(line 8\), column 'b': the value is missing"),
    "text": (set_line(3, "2020-01-01 02:00:00,1,high"), r"row 3 \(line 4\), column 'b': 'high' is not a finite number"),
    "infinite": (set_line(3, "2020-01-01 02:00:00,inf,1"), r"row 3 \(line 4\), column 'a': 'inf' is not a finite"),
    "short": (set_line(9, "2020-01-01 08:00:00,1"), r"row 9 \(line 10\), column 'b': the row has 2 values, .* 3 col"),
    "long": (set_line(9, "2020-01-01 08:00:00,1,2,3"), r"row 9 \(line 10\), column 'b': the row has 4 values"),
    "blank": (set_line(9, ""), r"row 9 \(line 10\), column 'date': the row has 0 values"),
    "order": (swap, r"row 5 \(line 6\), column 'date': '2020-01-01 03:00:00' is not after '2020-01-01 04:00:00'"),
    "twice": (set_line(2, "2020-01-01 00:00:00,1,1"), r"row 2 \(line 3\), column 'date': .* is not after"),
    "no date": (set_line(2, "yesterday,1,1"), r"row 2 \(line 3\), column 'date': 'yesterday' is not a date"),
    "two of a name": (set_line(0, "date,a,a"), r"line 1, has two columns of the name 'a'"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_refused_by_row_and_column(case: str, tmp_path: Path):
    change, message = FILES[case]
    with pytest.raises(ValueError, match=message):
        load_series(bad(tmp_path, change))


def test_a_file_without_numbers_or_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="1 columns and 400 rows"):
        load_series(write_csv(tmp_path / "a.csv", [f"2020-01-01 00:00:{i}" for i in range(400)], "date"))
    with pytest.raises(ValueError, match="3 columns and 0 rows"):
        load_series(write_csv(tmp_path / "a.csv", []))
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_series(tmp_path / "a.csv")


def test_a_good_file_is_read_as_it_is(tmp_path: Path):
    found = load_series(write_csv(tmp_path / "good.csv"))
    assert found.columns == ["a", "b"]
    assert torch.allclose(found.values, series().values, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the command


def run(*arguments: str | Path) -> int:
    return cli.main(["evaluate", "forecast", *map(str, arguments)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--horizons", "96"), "the validation part ends before row 320 and holds no window of look-back 24"),
        (("--horizons", "0"), "--horizons must be at least 1"),
        (("--look-back", "0"), "--look-back must be at least 1"),
        (("--look-back", "279"), "the training part ends before row 280"),
        (("--look-back", "500"), "give a shorter --look-back"),
        (("--season", "25"), "seasonal_naive repeats the last --season 25 steps, and sees --look-back 24"),
        (("--split", "ett-hour"), "has 400 rows, the split 'ett-hour' needs 14400"),
        (("--seeds", "-1"), "--seeds must be at least 0"),
    ],
)
def test_impossible_flags_are_refused_before_training(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, out = write_csv(tmp_path / "x.csv"), tmp_path / "out.jsonl"
    assert run("--data", data, "--look-back", 24, "--horizons", 8, "--out", out, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_command_writes_a_line_for_each_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = write_csv(tmp_path / "x.csv"), tmp_path / "out.jsonl"
    flags = ("--data", data, "--look-back", 24, "--horizons", 8, "--epochs", 1, "--out", out)
    assert run(*flags, "--models", "seasonal_naive", "rlinear") == 0
    assert "2 of 2 lines are new" in capsys.readouterr().out
    head, *rows = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("titans evaluate forecast")
    assert [row["model"] for row in rows] == ["seasonal_naive", "rlinear"]
    assert rows[1]["parameters"] == 24 * 8 + 8 + 4
    assert rows[0]["windows"] == 80 - 8 + 1
    assert "| rlinear | 204 |" in out.with_suffix(".md").read_text()
    assert run(*flags, "--models", "rlinear", "nlinear", "--seeds", 0) == 0
    assert "1 of 2 lines are new" in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text().splitlines()][:3] == [head, *rows]
    out.with_suffix(".md").write_text("notes\n")
    assert run(*flags, "--models", "rlinear") == 2
    assert "out.md is not a page of this command" in capsys.readouterr().err
    out.with_suffix(".md").unlink()
    assert run(*flags[:-4], "--epochs", 2, "--out", out, "--models", "rlinear") == 2
    assert "another recipe" in capsys.readouterr().err
    write_csv(data, data.read_text().splitlines()[1:-1])
    assert run(*flags, "--models", "rlinear") == 2
    assert "another digest and parts" in capsys.readouterr().err


def test_windows_are_named_by_their_first_target():
    with pytest.raises(ValueError, match="training part"):
        windows_of(torch.zeros(400, 1), Parts(20, 320, 400), 24, 8)
    assert len(Windows(torch.zeros(400, 1), 24, 240, 24, 8)) == 240 - 24 - 8 + 1


# ------------------------------------------------------------------------------------------------ candidates

SMALL = {"hidden_size": 8, "memory_head_dim": 4, "memory_dim": 4, "intermediate_size": 8, "memory_layers": 1}
FILE: dict[str, Any] = {
    "shared": {"model": SMALL, "recipe": {"epochs": 1, "rates": [0.01]}},
    "candidates": {
        "window": {"model": {"patch_length": 8}, "recipe": {"windows": 64}},
        "stream": {"model": {"use": "stream", "level_half_lives": [3]}},
    },
}


def candidates_file(tmp_path: Path, tree: Any = FILE) -> Path:
    (tmp_path / "c.yaml").write_text(json.dumps(tree))  # which is YAML
    return tmp_path / "c.yaml"


def test_candidates_are_measured_without_the_test_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    candidates = load_candidates(candidates_file(tmp_path))
    made = series()
    hidden = made._replace(values=made.values.clone())
    hidden.values[PARTS.val :] = torch.nan
    cell = Cell(made, PARTS, Task(24, 5, 2, 24), "rlinear", 0)
    assert len(cell.values()) == PARTS.test
    for name, candidate in candidates.items():
        assert len(dataclasses.replace(cell, candidate=candidate).values()) == PARTS.val
        found, blind = (
            Cell(given, PARTS, Task(24, 5, 2, 24), name, 0, candidate=candidate).run(lambda _: None)
            for given in (made, hidden)
        )
        assert found["val_mse"] == blind["val_mse"] > 0
        assert found["settings"]["model"].items() >= SMALL.items()
        assert not {"mse", "mae", "mse_look_back_alone"} & found.keys()
    data, out = write_csv(tmp_path / "x.csv"), tmp_path / "out.jsonl"
    flags = ("--data", data, "--look-back", 24, "--horizons", 8, "--out", out)
    assert run(*flags, "--candidates", tmp_path / "c.yaml") == 0
    assert "geometric mean" in capsys.readouterr().out
    head, *rows = map(json.loads, out.read_text().splitlines())
    assert [row["model"] for row in rows] == ["window", "stream"]
    assert "cut off" in head["settings"]["test"]
    assert run(*flags, "--models", "rlinear") == 2  # not into the file of a search


def test_the_lowest_validation_error_is_first():
    rows = [
        {"model": name, "data": data, "horizon": 8, "val_mse": error}
        for name, errors in {"a": (1.0, 4.0), "b": (3.0, 1.0), "unfinished": (0.1,)}.items()
        for data, error in zip("xy", errors, strict=False)
    ]
    assert [row[0] for row in choice(rows).rows] == ["b", "a", "unfinished"]
    assert choice(rows).rows[1] == ["a", "1.0000", "4.0000", "2.0000"]


def test_tables_are_means_over_seeds_and_then_over_horizons():
    line = {"data": "x", "look_back": 9, "parameters": 5, "model": "a"}
    alone = {"mse_look_back_alone": 4.0, "mae_look_back_alone": 1.0}
    rows = [
        {**line, **alone, "horizon": horizon, "seed": seed, "mse": mse, "mae": mse / 2}
        for horizon, seed, mse in ((2, 0, 1.0), (2, 1, 3.0), (4, 0, 4.0))
    ]
    assert errors(rows)[0].rows == [["a", "5", "2.000 / 1.000", "4.000 / 2.000", "3.000 / 1.500", "2"]]
    assert older(rows)[0].rows[0][3:] == ["2", "2.000 / 1.000", "4.000 / 1.000", "-50.0 % / +0.0 %"]
    rows[0].pop("mse_look_back_alone")
    assert errors([{**row, "model": "b"} for row in rows[:2]] + rows[2:])[0].rows[0][3] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {}}, "must have the key candidates"),
        ({"others": 1}, "unknown key 'others'"),
        ({"candidates": {"a": {"modle": {}}}}, "a must have the keys model and recipe alone"),
        ({"candidates": {"a": {"recipe": {"rate": 1}}}}, "a: unknown key 'rate' in recipe"),
        ({"candidates": {"a": {"recipe": {"loss": "l1"}}}}, "a: loss must be one of mse, mae, huber, got 'l1'"),
        ({"candidates": {"a": {"model": {"hiden_size": 8}}}}, "a: unknown key 'hiden_size'"),
    ],
)
def test_a_wrong_file_of_candidates_is_refused(change: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_candidates(candidates_file(tmp_path, FILE | change))


def test_the_project_s_own_candidates_load():
    assert "stream" in load_candidates(Path(__file__).parents[1] / "studies/forecast.yaml")
