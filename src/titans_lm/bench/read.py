"""`titans bench read`: read a text of any length through the carried state, in bounded memory, and measure each
stretch.

The text is the source of the Python standard library, repeated; the weights are random, or those of `--model`.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting, resident
from titans_lm.bench.operation import HEADS, WIDTH, Shape, form, inputs
from titans_lm.bench.race import Entrant, Heat
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.presets import SIZES
from titans_lm.models.tokenizer import encode, load_tokenizer
from titans_lm.ops import initial_state, memory_scan
from titans_lm.utils.corpora import stdlib_files
from titans_lm.utils.figures import figure_file
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red
from titans_lm.utils.text_file import read_text


class Reader:
    """A model that reads the text."""

    def __init__(self, options: dict[str, Any], setting: Setting):
        self.setting, self.piece = setting, options["piece"]
        self.model: nn.Module
        if options["model"]:
            self.model, tokenizer = load(Path(options["model"]))
            self.model.to(setting.device)
        else:
            self.model, tokenizer = lm.build(options["kind"], options["size"], setting).eval(), load_tokenizer("bytes")
        self.text = _text(tokenizer)
        self.state: Any = self.model.initial_state(1) if isinstance(self.model, TitansForCausalLM) else None
        self.finite = True

    @torch.no_grad()
    def read(self, tokens: int) -> None:
        """Read the next `tokens` tokens."""
        for size in [self.piece] * (tokens // self.piece) + [tokens % self.piece] * (tokens % self.piece > 0):
            ids = torch.tensor([list(itertools.islice(self.text, size))], device=self.setting.device)
            with self.setting.autocast():
                logits = self._logits(ids)
            self.finite = self.finite and lm.is_finite([logits])

    def _logits(self, ids: Tensor) -> Tensor:
        out: Any
        if isinstance(self.state, TitansState):
            out = self.model(ids, past_key_values=self.state, logits_to_keep=1)
        else:
            out = self.model(ids, use_cache=True, logits_to_keep=1, **{lm.MAMBA_CACHE: self.state})
            self.state = out[lm.MAMBA_CACHE]
        logits: Tensor = out.logits
        return logits

    def report(self) -> dict[str, Any]:
        """Size and norms of the state, and whether it is finite."""
        report: dict[str, Any] = {"resident_bytes": resident(), "finite": self.finite}
        if isinstance(self.state, TitansState):
            report |= {"state_bytes": self.state.nbytes, **_norms(self.state)}
            report["finite"] = self.finite and all(report[key] < float("inf") for key in NORMS if key in report)
        return report


NORMS = ("weights_norm", "momentum_norm")


def _norms(state: TitansState) -> dict[str, float]:
    """Largest Frobenius norms of a head's weights and momentum over layers."""
    memories = state.memory_states()
    if not memories:
        return {}
    parts = ([w for m in memories for w in m.weights], [s for m in memories for s in m.momentum])
    return {name: max(float(w.norm(dim=(-2, -1)).max()) for w in part) for name, part in zip(NORMS, parts, strict=True)}


def _text(tokenizer: Any) -> Iterator[int]:
    """Yields tokens of the text, endlessly."""
    for file in itertools.cycle(stdlib_files()):
        yield from encode(tokenizer, read_text(file)).tolist()


class Operation:
    """The memory operation alone: random keys, whose values are a fixed nonlinear function of them. Forgetting is slow,
    because weights that have decayed to 0 learn no more."""

    def __init__(self, options: dict[str, Any], setting: Setting):
        self.setting, self.piece, self.finite = setting, options["piece"], True
        self.shape = Shape(1, options["piece"], 64, 16, "residual")
        self.form = form(self.shape, setting.device)
        self.state = initial_state(inputs(self.shape, torch.float32, setting.device).first, 1)
        self.values = torch.randn(HEADS, WIDTH, WIDTH, device=setting.device)

    @torch.no_grad()
    def read(self, tokens: int) -> None:
        """Read the next `tokens` tokens."""
        for first in range(0, tokens, self.piece):
            shape = self.shape._replace(tokens=min(self.piece, tokens - first))
            x = inputs(shape, self.setting.torch_dtype(), self.setting.device)
            v = torch.einsum("bthk,hkv->bthv", x.k.float(), self.values).abs().to(x.v.dtype)
            options: dict[str, Any] = {"form": self.form, "backend": self.setting.backend}
            y, self.state, *_ = memory_scan(
                *x._replace(v=v, alpha=0.01 * x.alpha)[:6], self.state, chunk_size=shape.chunk, **options
            )
            self.finite = self.finite and lm.is_finite([y])

    def report(self) -> dict[str, Any]:
        parts = zip(NORMS, (self.state.weights, self.state.momentum), strict=True)
        norms = {name: max(float(w.norm(dim=(-2, -1)).max()) for w in part) for name, part in parts}
        size = sum(w.nbytes for part in self.state[:3] for w in part)
        finite = self.finite and all(norm < float("inf") for norm in norms.values())
        return {"resident_bytes": resident(), "state_bytes": size, **norms, "finite": finite}


def operation(options: dict[str, Any], setting: Setting) -> Contender:
    """The action reads the next stretch."""
    one = Operation(options, setting)
    action = Action(lambda _: one.read(options["stretch"]), report=lambda _: one.report(), once=True)
    return Contender({"stretch": action}, {}, lambda: Operation(options, setting).read(options["piece"]))


def reader(options: dict[str, Any], setting: Setting) -> Contender:
    """The action reads the next stretch."""
    one = Reader(options, setting)

    def warm() -> None:
        Reader(options, setting).read(min(options["piece"], options["stretch"]))

    action = Action(lambda _: one.read(options["stretch"]), report=lambda _: one.report(), once=True)
    return Contender({"stretch": action}, {"parameters": lm.parameters(one.model)}, warm)


BUILD = {"reader": reader, "operation": operation}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--model", type=Path, help=f"{MODEL_HELP}; instead of random weights")
    parser.add_argument("--variants", nargs="+", choices=lm.TITANS, default=["mag"])
    parser.add_argument("--operation", action="store_true", help="measure the memory operation alone, on random tokens")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens in total")
    parser.add_argument("--stretches", type=int, default=20, help="stretches of the text that are measured")
    parser.add_argument("--piece", type=int, default=PREFILL_TOKENS, help="tokens per forward call")


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "piece", "stretches")
    check_least(arguments, arguments.stretches, "tokens")
    if arguments.operation and arguments.model is not None:
        raise ValueError("--operation reads random tokens without a model; leave out --model")
    if arguments.model is not None and arguments.variants != ["mag"]:
        raise ValueError("--variants are models with random weights; leave them out with --model")
    if arguments.model is not None:
        find(arguments.model)


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    names = [str(arguments.model)] if arguments.model else arguments.variants
    names = [*names, *((lm.WINDOW, lm.MAMBA2) if arguments.peers else ())]
    stretch = arguments.tokens // arguments.stretches
    if arguments.operation:
        options = {"stretch": stretch, "piece": arguments.piece}
        alone = [Entrant("operation", "read", "operation", ["stretch"], options)]
        return [Heat("read", alone, arguments.stretches, warm_up=False)]
    return [Heat("read", [_entrant(n, stretch, arguments) for n in names], arguments.stretches, warm_up=False)]


def _entrant(name: str, stretch: int, arguments: argparse.Namespace) -> Entrant:
    model = name if arguments.model and name == str(arguments.model) else None
    options = {"kind": name, "size": arguments.size, "model": model, "stretch": stretch, "piece": arguments.piece}
    return Entrant(name, "read", "reader", ["stretch"], options)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By model: rate in total and last rate relative to first; growth of memory after the first stretch; norms."""
    return {row["name"]: _summary(row) for row in rows if row["repetitions"]}


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    stretches = row["repetitions"]["stretch"]
    rates = [row["stretch"] / s["seconds"] for s in stretches]
    sizes = [s["resident_bytes"] for s in stretches]
    return {
        "tokens": row["stretch"] * len(stretches), "finite": all(s["finite"] for s in stretches),
        "tokens_per_second": len(rates) / sum(1 / r for r in rates), "last_rate_over_first": rates[-1] / rates[0],
        "resident_growth_bytes": None if None in sizes else sizes[-1] - sizes[0],
        **{name: [s[name] for s in (stretches[0], stretches[-1])] for name in NORMS if name in stretches[0]},
    }  # fmt: skip


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("model", "tokens", "tokens/s", "last/first rate", "resident grew, MiB", "largest |W|, |S|", "finite")
    for row in rows:
        if row["error"]:
            table.add_row(row["name"], red(row["error"]))
        if row["name"] in results:
            result = results[row["name"]]
            grew = result["resident_growth_bytes"]
            norms = ", ".join(f"{result[name][1]:.2f}" for name in NORMS if name in result)
            table.add_row(
                row["name"], f"{result['tokens']:,}", f"{result['tokens_per_second']:,.0f}",
                f"{result['last_rate_over_first']:.2f}", "-" if grew is None else f"{grew / 2**20:,.1f}", norms or "-",
                "yes" if result["finite"] else red("NO"),
            )  # fmt: skip
    return [table]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Rate, memory and norms along the text."""
    with figure_file(path, 3, 1, figsize=(8, 8), sharex=True, dpi=120) as axes:
        for row in rows:
            stretches = row["repetitions"].get("stretch", [])
            at = [row["stretch"] * (i + 1) for i in range(len(stretches))]
            axes[0].plot(at, [row["stretch"] / s["seconds"] for s in stretches], label=row["name"])
            axes[1].plot(at, [(s["resident_bytes"] or 0) / 2**20 for s in stretches], label=row["name"])
            for name, line in zip(NORMS, ("-", ":"), strict=True):
                norms = [s[name] for s in stretches if name in s]
                if norms:
                    axes[2].plot(at, norms, line, label=f"{row['name']}, {name.replace('_norm', '')}")
        for axis, label in zip(
            axes, ("tokens a second", "resident memory, MiB", "largest norm of a head"), strict=True
        ):
            axis.set_ylabel(label)
            axis.set_ylim(0, 1.15 * max((max(line.get_ydata()) for line in axis.lines), default=1) or 1)
            if axis.lines:
                axis.legend(frameon=False)
        axes[2].set_xlabel("tokens read")
