"""`titans graft`: a folder with a new graft, a pretrained model with memories that do nothing yet."""

import argparse
from pathlib import Path
from typing import Any

import transformers

from titans_lm.models.graft import GraftForCausalLM
from titans_lm.models.graft_config import KEYS, graft_config
from titans_lm.models.graft_files import load_graft, make_graft, save_graft
from titans_lm.utils.yaml_values import parse_yaml


def run(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is not empty; give another folder")
    transformers.set_seed(arguments.seed)
    model = make_graft(graft_config({"graft": arguments.base, **_fields(arguments)}))
    save_graft(model, output)
    print(_summary(load_graft(output)[0], output))


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys that were given. Raises ValueError for a --set that is not KEY=VALUE."""
    named = {"layers": arguments.layers, "window_size": arguments.window_size, "lora_rank": arguments.lora_rank}
    fields = {key: value for key, value in named.items() if value is not None}
    for change in arguments.changes:
        key, equals, value = change.partition("=")
        if not equals or key not in KEYS or key == "graft":
            raise ValueError(
                f"--set {change!r} must be KEY=VALUE, such as memory_dim=256; keys are: {', '.join(KEYS[1:])}"
            )
        fields[key] = parse_yaml(value)
    return fields


def _summary(model: GraftForCausalLM, output: Path) -> str:
    """What the graft is, and what trains it."""
    config = model.config
    own = sum(weight.numel() for weight in model.own_state_dict().values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    seen = "attention as the base has it" if config.window_size is None else f"attention to {config.window_size} tokens"
    most = (
        "no limit of length"
        if config.max_position_embeddings is None
        else f"{config.max_position_embeddings:,} tokens at most"
    )
    return (
        f"{output}: {config.base} with a memory in layers {', '.join(map(str, config.grafted))}; {seen}; {most}.\n"
        f"{whole:,} parameters; {own:,} of them are the graft's and are trained. It computes what its base does\n"
        f"until `titans train` with `model: {{pretrained: {output}}}` has opened its gates."
    )
