"""`titans bench model`: a training step and a prefill at several lengths, with one sequence per batch.

The memory's share of a step is measured by a step of the same model that bypasses each memory, with its projections,
convolutions and gates; both steps take turns. With `--compile` each variant is measured under `torch.compile` too.
"""

import argparse
from typing import Any

import torch
from rich.table import Table
from torch import nn

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.bench.race import Entrant, Heat
from titans_lm.layers.bypass import bypass_memory
from titans_lm.models.presets import SIZES
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red


def trained_options(
    kind: str, size: str, tokens: int, checkpointing: bool = False, backend: str | None = None
) -> dict[str, Any]:
    """The options of `trained`. `backend` is that of `torch.compile`; None: not compiled."""
    return {"kind": kind, "size": size, "tokens": tokens, "checkpointing": checkpointing, "compile": backend}


def trained(options: dict[str, Any], setting: Setting) -> Contender:
    """A model that trains on and prefills `tokens` tokens."""
    model = lm.build(options["kind"], options["size"], setting)
    if options["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    compiled = options["compile"] is not None
    if compiled:
        model.compile(fullgraph=True, backend=options["compile"])
    actions = _actions(model, options["tokens"], setting, compiled)
    small = _actions(model, min(64, options["tokens"]), setting, compiled)

    def warm() -> None:
        for action in small.values():
            action.run(action.prepare())
        model.zero_grad(set_to_none=True)

    return Contender(actions, {"parameters": lm.parameters(model)}, warm)


def _actions(model: nn.Module, length: int, setting: Setting, compiled: bool) -> dict[str, Action]:
    """A compiled model has no step without its memory: its graph would raise."""
    tokens = lm.ids(length, model)

    def prefill(_: Any) -> None:
        model.eval()
        with torch.no_grad(), setting.autocast():
            model(tokens, use_cache=True, logits_to_keep=1)

    def step(_: Any) -> None:
        model.train()
        with setting.autocast():
            loss = lm.loss(model, tokens)
        loss.backward()

    def without(_: Any) -> None:
        with bypass_memory(model):
            step(None)

    def zero_grad() -> None:
        model.zero_grad(set_to_none=True)

    actions = {"prefill": Action(prefill), "step": Action(step, zero_grad)}
    return actions if compiled else {**actions, WITHOUT: Action(without, zero_grad)}


WITHOUT = "step without memory"
BUILD = {"trained": trained}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384, 65536], help="tokens of a sequence")
    parser.add_argument("--variants", nargs="+", choices=lm.TITANS, default=list(lm.TITANS))
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in training")
    parser.add_argument(
        "--compile",
        choices=["inductor", "aot_eager", "eager"],
        help="measure each variant also under torch.compile with this backend; compiling is in the warm-up",
    )
    parser.add_argument(
        "--prefill-only", action="store_true", help="skip training steps, for lengths at which they take too long"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=300.0,
        help="maximum seconds of a warm-up; a slower one is the only measurement",
    )


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 2, "lengths")
    if not arguments.patience >= 0:
        raise ValueError(f"--patience must be a number of seconds, got {arguments.patience}")


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    eager = [(kind, None) for kind in (*arguments.variants, *(lm.BASELINES if arguments.peers else ()))]
    compiled = [(kind, arguments.compile) for kind in arguments.variants if arguments.compile]
    models = [*eager, *compiled]
    entrants = [_entrant(*model, tokens, arguments) for tokens in sorted(arguments.lengths) for model in models]
    return [Heat("model", entrants, arguments.runs, patience=arguments.patience)]


def _entrant(kind: str, backend: str | None, tokens: int, arguments: argparse.Namespace) -> Entrant:
    without = [WITHOUT] if kind in lm.TITANS and backend is None else []
    actions = ["prefill", *([] if arguments.prefill_only else ["step", *without])]
    options = trained_options(kind, arguments.size, tokens, arguments.checkpointing, backend)
    return Entrant(f"{_name(kind, backend)}, {tokens:,} tokens", "model", "trained", actions, options)


def _name(kind: str, backend: str | None) -> str:
    return kind if backend is None else f"{kind}, compiled"


Measured = dict[tuple[str, int], dict[str, Any]]
SPENT = {"seconds": "", "cpu_seconds": ", CPU"}
"""Ratios are reported for both: on a shared machine CPU seconds are the better measure of one thread's cost."""


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of medians per action, as far as measured."""
    measured = {(_name(row["kind"], row["compile"]), row["tokens"]): row["actions"] for row in rows if row["actions"]}
    return {
        "time_per_token_longest_over_shortest": _growth(measured),
        "mac_over_mag": _over(measured, "mac", "mag"),
        "compiled_over_eager": {
            f"{name} {tokens}": ratios
            for name in lm.TITANS
            for tokens, ratios in _over(measured, _name(name, "any"), name).items()
        },
        "full_attention_over_mag": _over(measured, lm.FULL, "mag"),
        "mag_over_sliding_window": _over(measured, "mag", lm.WINDOW),
        "memory_part_of_step": {f"{name} {tokens}": _share(actions) for (name, tokens), actions in measured.items()
                                if WITHOUT in actions},
        "mag_peak_over_sliding_window": _peaks(measured, "mag", lm.WINDOW),
        "full_attention_peak_over_mag": _peaks(measured, lm.FULL, "mag"),
    }  # fmt: skip


def _growth(measured: Measured) -> dict[str, dict[str, Any]]:
    """Time per token at the longest measured length relative to the shortest, by model."""
    growth = {}
    for name in sorted({n for n, _ in measured}):
        lengths = sorted(tokens for n, tokens in measured if n == name)
        first, last = lengths[0], lengths[-1]
        if first < last:
            ratios = {
                key: ratio * first / last for key, ratio in _ratio(measured[name, last], measured[name, first]).items()
            }
            growth[name] = {"from": first, "to": last, **ratios}
    return growth


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Ratios of seconds and CPU seconds, by action."""
    both = [action for action in ("prefill", "step") if action in one and action in other]
    return {f"{a}{label}": one[a][key] / other[a][key] for key, label in SPENT.items() for a in both}


def _over(measured: Measured, one: str, other: str) -> dict[str, dict[str, float]]:
    """The time of `one` relative to `other`, by length."""
    return {
        str(tokens): _ratio(measured[one, tokens], actions)
        for (name, tokens), actions in measured.items()
        if name == other and (one, tokens) in measured
    }


def _peaks(measured: Measured, one: str, other: str) -> dict[str, dict[str, float]]:
    return {
        str(tokens): {
            action: measured[one, tokens][action]["peak_bytes"] / m["peak_bytes"]
            for action, m in actions.items()
            if m["peak_bytes"] and action in measured[one, tokens]
        }
        for (name, tokens), actions in measured.items()
        if name == other and (one, tokens) in measured
    }


def _share(actions: dict[str, Any]) -> dict[str, float]:
    return {f"step{label}": 1 - actions[WITHOUT][key] / actions["step"][key] for key, label in SPENT.items()}


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("model", "parameters", "", "us a token", "least - most", "CPU us", "peak MiB", "runs")
    for row in rows:
        for action, m in row["actions"].items():
            us, least, most, cpu = (1e6 * m[key] / row["tokens"] for key in ("seconds", "least", "most", "cpu_seconds"))
            peak = "-" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f}"
            table.add_row(
                row["name"], f"{row['parameters'] / 1e6:.2f}M", action, f"{us:,.1f}", f"{least:,.1f} - {most:,.1f}",
                f"{cpu:,.1f}", peak, str(m["runs"]),
            )  # fmt: skip
        if row["error"]:
            table.add_row(row["name"], "", red(row["error"]))
    return [table, _ratios(results)]


def _ratios(results: dict[str, Any]) -> Table:
    columns = ["prefill", "step", "prefill, CPU", "step, CPU"]
    table = Table("ratio", "of", *columns)

    def add(ratio: str, of: str, values: dict[str, Any]) -> None:
        table.add_row(ratio, of, *(f"{values[key]:.2f}" if key in values else "-" for key in columns))

    for name, growth in results["time_per_token_longest_over_shortest"].items():
        add(f"time a token, {growth['to']:,} over {growth['from']:,} tokens", name, growth)
    for key in [key for key in results if "_over_" in key and key.startswith(("ma", "full"))]:
        for tokens, ratios in results[key].items():
            add(key.replace("_", " "), f"{int(tokens):,} tokens", ratios)
    for name, ratios in results["compiled_over_eager"].items():
        add("compiled over eager", name, ratios)
    for name, part in results["memory_part_of_step"].items():
        add("memory's part of a step", name, part)
    return table
