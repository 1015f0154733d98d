"""`titans bench op`: the memory operation, its rate relative to a large matmul, and its peers.

Operations are those of `ops/README.md`, section Cost; the backward pass counts as twice the forward pass, without
recomputation.
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from titans_lm.bench import peers
from titans_lm.bench.measure import Action, Contender, Setting, matmul, matmul_operations
from titans_lm.bench.operation import HEADS, Inputs, Shape, both_ways, form, inputs, reader
from titans_lm.bench.race import Entrant, Heat
from titans_lm.ops import ScanInputs, Tokens, choice, initial_state, memory_scan, resolve_backend
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red


def profiled(training: Action) -> Action:
    """Forward and backward under the profiler: the largest shares of time by PyTorch operation."""

    def run(leaves: Any) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            training.run(leaves)
        return profile.key_averages()

    def report(events: Any) -> dict[str, Any]:
        spent = {event.key: event.self_cpu_time_total for event in events}
        largest = sorted(spent, key=lambda key: -spent[key])[:10]
        return {"shares": {key: round(spent[key] / sum(spent.values()), 3) for key in largest}}

    return Action(run, training.prepare, report, once=True)


def ours(options: dict[str, Any], setting: Setting, scan: Callable[..., Any] = memory_scan) -> Contender:
    shape = Shape(**options)
    x = inputs(shape, setting.torch_dtype(), setting.device)
    small = inputs(shape._replace(tokens=2 * shape.chunk), setting.torch_dtype(), setting.device)
    actions = both_ways(reader(shape, setting, scan), x)

    def warm() -> None:
        for action in both_ways(reader(shape, setting, scan), small).values():
            action.run(action.prepare())

    profile = {"profile": profiled(actions["training"])}
    about: dict[str, Any] = {"operations": shape.operations(), "backend": backend(shape, setting, x)}
    if setting.backend == "auto" and (decision := choice.decided(_call(shape, setting, x), gradients=True)):
        about["decision"] = str(decision)  # on a GPU: what was compared, and how fast each was
    large, facts = matmul(setting)
    return Contender({"matmul": large, **actions, **profile}, {**about, **facts}, warm)


def backend(shape: Shape, setting: Setting, x: Inputs) -> str:
    """The backend that the setting resolves to."""
    return resolve_backend(setting.backend, _call(shape, setting, x))  # type: ignore[arg-type]


def _call(shape: Shape, setting: Setting, x: Inputs) -> ScanInputs:
    state, memory = initial_state(x.first, shape.rows), form(shape, setting.device)
    return ScanInputs(Tokens(*x[:6]), state, shape.chunk, memory, None, False, 0)


def compiled(options: dict[str, Any], setting: Setting) -> Contender:
    """The operation under torch.compile. Not measured on a GPU."""
    return ours(options, setting, torch.compile(memory_scan))


BUILD = {
    "ours": ours,
    "compiled": compiled,
    **{peer.__name__: peer for peer in (peers.titans_pytorch, peers.gated_delta_rule, peers.attention)},
}

# ------------------------------------------------------------------------------------------------ command

ACTIONS = ["matmul", "forward", "training"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256], help="hidden widths of the memory")
    parser.add_argument("--chunk", type=int, nargs="+", default=[64, 16], help="chunk sizes")
    parser.add_argument("--depth", type=int, nargs="+", default=[2], help="layers of the memory")
    parser.add_argument("--forms", nargs="+", choices=["plain", "residual"], default=["plain", "residual"])
    parser.add_argument(
        "--rows", type=int, help=f"batch rows of {HEADS} heads (default: as many as threads; 8 on a GPU)"
    )
    parser.add_argument("--profile", action="store_true", help="profile PyTorch operations")
    parser.add_argument(
        "--peer-tokens", type=int, default=256, help="tokens for titans-pytorch, which stores weights per token"
    )


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:
    rows = arguments.rows or (8 if setting.device == "cuda" else setting.threads)
    heats = []
    for hidden, chunk in itertools.product(arguments.hidden, arguments.chunk):
        kinds = itertools.product(arguments.forms, arguments.depth)
        shapes = [Shape(rows, arguments.tokens, hidden, chunk, f, depth) for f, depth in kinds]
        names = [s.form if len(arguments.depth) == 1 else f"{s.form}, depth {s.depth}" for s in shapes]
        entrants = [_entrant(name, "ours", shape) for name, shape in zip(names, shapes, strict=True)]
        if arguments.profile:
            entrants = [dataclasses.replace(e, actions=[*ACTIONS, "profile"]) for e in entrants]
        if setting.device == "cuda":
            entrants += [_entrant(f"{n}, compiled", "compiled", shape) for n, shape in zip(names, shapes, strict=True)]
        name = f"hidden {hidden}, chunk {chunk}"
        heats.append(Heat(name, entrants, arguments.runs))
        if arguments.peers:
            shape = Shape(rows, arguments.peer_tokens, hidden, chunk)
            heats.append(Heat(f"{name}, {shape.tokens} tokens", _peers(shape, setting), arguments.runs))
    return heats


def _entrant(name: str, contender: str, shape: Shape, **more: Any) -> Entrant:
    return Entrant(name, "op", contender, ACTIONS, {**shape._asdict(), **more})


OURS, SAME = "ours", "titans-pytorch, same function"


def _peers(shape: Shape, setting: Setting) -> list[Entrant]:
    """titans-pytorch (C: our chunk) with chunk_size 1 and batch_size C, which is our recurrence; with chunk_size C,
    where a chunk's tokens share gates and memory; and without batch_size, where all gradients are taken at M_0."""
    entrants = [
        _entrant(OURS, "ours", shape),
        _entrant(SAME, "titans_pytorch", shape, store_chunk=1, batch=shape.chunk),
        _entrant("titans-pytorch, approximate", "titans_pytorch", shape, store_chunk=shape.chunk, batch=shape.chunk),
        _entrant("titans-pytorch, first weights", "titans_pytorch", shape, store_chunk=shape.chunk, batch=None),
    ]
    if setting.device == "cuda":
        entrants += [
            _entrant("flash-linear-attention, gated delta rule", "gated_delta_rule", shape),
            _entrant("attention", "attention", shape),
        ]
    return entrants


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "tokens", "peer_tokens", "hidden", "chunk", "depth", "rows")
    if arguments.peers:
        if arguments.depth != [2]:
            raise ValueError(f"--peers are measured at --depth 2, got {' '.join(map(str, arguments.depth))}")
        peers.require("titans_pytorch")
        for chunk in arguments.chunk:
            if arguments.peer_tokens % chunk:
                raise ValueError(f"--peer-tokens {arguments.peer_tokens} must be a multiple of --chunk {chunk}")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add to each row its rate, absolute and relative to the matmul. Returns ratios of each peer's time and memory to
    ours."""
    ratios_of_peers = []
    ours: dict[str, Any] = {}
    for row in rows:
        if "operations" in row:
            _rates(row)
        ours = row["actions"] if row["name"] == OURS else ours
        if row["name"].startswith("titans-pytorch") and ours and not row["error"]:
            ratios = {f"{a}_{what}": _ratio(row["actions"], ours, a, what) for a in ACTIONS[1:] for what in MEASURES}
            ratios_of_peers.append({"heat": row["heat"], "peer": row["name"], **ratios})
    return {"peers_over_ours": ratios_of_peers}


MEASURES = ("seconds", "cpu_seconds", "peak_bytes")


def _ratio(theirs: dict[str, Any], ours: dict[str, Any], action: str, what: str) -> float | None:
    pair = [part.get(action, {}).get(what) for part in (theirs, ours)]
    return pair[0] / pair[1] if all(pair) else None


def _rates(row: dict[str, Any]) -> None:
    """Rates relative to the matmul of the same repetition, which cancels other load."""
    repetitions = row["repetitions"]
    large, large_work = repetitions.get("matmul", []), matmul_operations(row)
    for action, passes in (("forward", 1), ("training", 3)):
        work = passes * row["operations"]
        pairs = list(zip(repetitions.get(action, []), large, strict=False))
        for key, spent in (("part_of_matmul_rate", "seconds"), ("part_of_matmul_rate_cpu", "cpu_seconds")):
            parts = [(work / r[spent]) / (large_work / m[spent]) for r, m in pairs]
            if parts:
                row["actions"][action][key] = statistics.median(parts[1:] or parts)
        if pairs:
            row["actions"][action]["operations_per_second"] = work / row["actions"][action]["seconds"]


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    timings = Table("shape", "contender", "", "ms", "least - most", "CPU ms", "Gop/s", "of matmul", "peak MiB")
    for row in rows:
        for action in ACTIONS[1:]:
            if action in row["actions"]:
                timings.add_row(*_cells(row, action))
        if row["error"]:
            timings.add_row(row["heat"], row["name"], red(row["error"]))
    profiles = Table("shape", "contender", "share of the time of forward and backward")
    for row in rows:
        for shares in [r["shares"] for r in row["repetitions"].get("profile", [])[-1:]]:
            profiles.add_row(row["heat"], row["name"], ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items()))
    tables = [timings, profiles] if profiles.rows else [timings]
    if not results["peers_over_ours"]:
        return tables
    names = {"seconds": "time", "cpu_seconds": "CPU time", "peak_bytes": "memory"}
    keys = [f"{action}_{what}" for what in MEASURES for action in ACTIONS[1:]]
    ratios = Table("shape", "over ours", *(f"{action} {names[what]}" for what in MEASURES for action in ACTIONS[1:]))
    for r in results["peers_over_ours"]:
        ratios.add_row(r["heat"], r["peer"], *("-" if r[key] is None else f"{r[key]:.1f}" for key in keys))
    return [*tables, ratios]


def _cells(row: dict[str, Any], action: str) -> list[str]:
    m = row["actions"][action]
    rate, part = m.get("operations_per_second"), m.get("part_of_matmul_rate")
    peak = "-" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 2**20:,.0f}"
    return [
        row["heat"], row["name"], action, f"{1e3 * m['seconds']:,.1f}",
        f"{1e3 * m['least']:,.1f} - {1e3 * m['most']:,.1f}", f"{1e3 * m['cpu_seconds']:,.1f}",
        "-" if rate is None else f"{rate / 1e9:,.1f}", "-" if part is None else f"{part:.2f}", peak,
    ]  # fmt: skip
