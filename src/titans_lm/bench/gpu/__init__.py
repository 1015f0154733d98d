"""`titans bench gpu`: what is to be known about a GPU, in one command of at most twelve minutes.

Sections, the most valuable first: are the kernels right; do they compile; how fast is the operation, a model, a decoded
token; does a model learn. Each result is written as it comes. Each section has a part of the time, and gives what it
does not need to the next. Called again with the same `--out`, it skips what is there.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from titans_lm.bench.gpu.cells import SECTIONS, all_sections
from titans_lm.bench.gpu.report import verdict_table, verdicts
from titans_lm.bench.gpu.sections import run_section
from titans_lm.utils.record import Lines, command_line, write_json
from titans_lm.utils.terminal import PlainConsole

OUT, TOY_OUT = Path("results/gpu"), Path("runs/gpu_toy")
VERDICTS = "verdicts.json"
AT_THE_END = 5.0
"""Seconds that are left for the verdicts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--toy",
        action="store_true",
        help="tiny sizes, to try the script; with --device cpu the kernels are interpreted",
    )
    parser.add_argument("--minutes", type=float, default=12.0, help="time in all; call again for what is left")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, help=f"folder to write, or to continue (default: {OUT}; with --toy {TOY_OUT})"
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not fit this machine or each other."""
    import torch

    if not arguments.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {arguments.minutes}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this machine has no GPU that PyTorch can use; try the script with --device cpu --toy"
        )
    if arguments.device == "cpu" and not arguments.toy:
        raise ValueError("--device cpu interprets the kernels, which takes days at full size: add --toy")
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is not a folder")


def run(arguments: argparse.Namespace) -> None:
    """Run the sections until the time is over, then print the verdicts on all results in the folder."""
    check(arguments)
    ends = time.monotonic() + 60 * arguments.minutes - AT_THE_END
    out = arguments.out or (TOY_OUT if arguments.toy else OUT)
    out.mkdir(parents=True, exist_ok=True)
    command, settings = command_line("bench gpu", arguments), _settings(arguments)
    every = all_sections(arguments.device, toy=arguments.toy)
    files = {section.name: Lines(out / f"{section.name}.jsonl", settings, command) for section in every}
    chosen = [section for section in every if section.name in arguments.sections]
    console = PlainConsole(width=None if sys.stdout.isatty() else 150)
    for i, section in enumerate(chosen):
        left = ends - time.monotonic()
        own = section.share / sum(other.share for other in chosen[i:])  # of what is left: an early end helps the next
        with files[section.name] as lines:
            run_section(section, lines, min(ends, time.monotonic() + own * left), arguments.device, console)
    found = verdicts({name: lines.rows for name, lines in files.items()})
    write_json(out / VERDICTS, {"command": command, "settings": settings, "verdicts": found})
    console.print(verdict_table(found))


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same for results to stand in one file."""
    from importlib.metadata import version

    import torch

    on_gpu = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu, kernels interpreted",
        "toy": arguments.toy,
        "torch": torch.__version__,
        "triton": version("triton"),
    }
