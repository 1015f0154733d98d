"""Forecast your own table: train a forecaster in a stream, save it, and forecast what comes after the last row.

    python examples/forecast.py sales.csv --horizon 24 --look-back 96 --output runs/forecaster

The table has a date in its first column and numbers in the others. The memory reads all of it before the forecast.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from titans_lm import TitansForTimeSeriesPrediction, TitansTimeSeriesConfig
from titans_lm.evaluate.forecasting.fit import Recipe
from titans_lm.evaluate.forecasting.series import Parts, load_series, standardised
from titans_lm.evaluate.forecasting.stream import fit_stream
from titans_lm.evaluate.forecasting.windows import windows_of


def train(
    values: Tensor, parts: Parts, look_back: int, horizon: int, season: int, epochs: int
) -> tuple[float, TitansForTimeSeriesPrediction]:
    """A forecaster of standardised values `[T, C]`, and its error on the validation part."""
    config = TitansTimeSeriesConfig(
        use="stream", num_input_channels=values.shape[1], context_length=look_back, prediction_length=horizon,
        patch_length=min(season, look_back), patch_stride=season, head_dropout=0.3,
    )  # fmt: skip
    data, recipe = windows_of(values, parts, look_back, horizon), Recipe(epochs=epochs, patience=2)
    fitted = fit_stream(lambda: TitansForTimeSeriesPrediction(config), data, recipe, 0, print)
    assert isinstance(fitted.model, TitansForTimeSeriesPrediction)
    return fitted.val.mse, fitted.model.eval()


@torch.no_grad()
def forecast(model: TitansForTimeSeriesPrediction, values: Tensor) -> Tensor:
    """The steps after the last row, `[H, C]`, from all of `values` `[T, C]`."""
    config = model.config
    whole = (len(values) - config.context_length) // config.patch_stride * config.patch_stride + config.context_length
    out: Tensor = model(past_values=values[None, -whole:]).prediction_outputs[0]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--look-back", type=int, default=96)
    parser.add_argument("--season", type=int, default=24, help="rows from token to token, such as the hours of a day")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/forecaster"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} is there already; give another folder")
    series = load_series(arguments.table)
    rows = len(series.values)
    parts = Parts(int(0.8 * rows), rows - arguments.horizon, rows)  # the last fifth chooses the epoch
    values = standardised(series, parts)
    error, model = train(values, parts, arguments.look_back, arguments.horizon, arguments.season, arguments.epochs)
    model.save_pretrained(arguments.output)
    print(f"mean squared error on the last fifth: {error:.3f} of the training variance; {arguments.output}")
    past = series.values[: parts.train]
    std, mean = past.std(0, correction=0), past.mean(0)
    print("step", *series.columns, sep="\t")
    for step, row in enumerate((forecast(model, values) * std + mean).tolist(), 1):
        print(step, *(f"{value:.3f}" for value in row), sep="\t")


if __name__ == "__main__":
    main()
