"""`titans train`: a language model from a YAML file."""

import argparse

from titans_lm.training.combinations import check_run
from titans_lm.training.config import load_settings
from titans_lm.training.processes import Processes
from titans_lm.training.train import train


def run(arguments: argparse.Namespace) -> None:
    settings = load_settings(arguments.config, arguments.changes)
    check_run(settings.model, settings.config(), settings.data, settings.training)
    model = train(settings)
    size = sum(p.numel() for p in model.parameters())
    if Processes().is_first:
        print(f"{settings.training.output_dir}: a model of {size:,} parameters; titans infer --model reads with it")
