"""`titans bench decode`: the time per decoded token after a long context, and its growth.

Reads up to `--read-up-to` tokens. For later positions it sets the counters of the state: its tensors have the same
shapes, and no branch depends on their content. The keys and values of full attention, which grow, are random. Titans
decode as in `generate`, in buffers; making them and leaving them is part of the time.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.bench.race import Entrant, Heat
from titans_lm.layers.key_values import KeyValues
from titans_lm.models.block_cache import AttentionCache
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.presets import SIZES
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red

Decode = Callable[[nn.Module, Tensor, Any], Any]


def decoder(options: dict[str, Any], setting: Setting) -> Contender:
    """A model at a position. The action decodes `tokens` tokens, one per call, from a fork of its state."""
    model = lm.build(options["kind"], options["size"], setting).eval()
    state, read = _state(model, options["position"], options["read_up_to"], setting)
    tokens = lm.ids(options["tokens"], model)
    step: Decode = _step_titans if isinstance(model, TitansForCausalLM) else _step_mamba2

    def run(after: Any) -> None:
        with torch.no_grad(), setting.autocast():
            if isinstance(model, TitansForCausalLM):
                model.begin_decoding(after)
            for i in range(tokens.shape[1]):
                after = step(model, tokens[:, i : i + 1], after)
            if isinstance(model, TitansForCausalLM):
                after.end_decoding()

    def fork() -> Any:
        return state.clone() if isinstance(state, TitansState) else state

    def warm() -> None:
        with torch.no_grad(), setting.autocast():
            step(model, tokens[:, :1], fork())

    about = {"parameters": lm.parameters(model), "read": read, "state_bytes": getattr(state, "nbytes", None)}
    return Contender({"decode": Action(run, fork)}, about, warm)


def _step_titans(model: nn.Module, token: Tensor, state: Any) -> Any:
    return model(token, past_key_values=state).cache


def _step_mamba2(model: nn.Module, token: Tensor, state: Any) -> Any:
    return model(token, use_cache=True, **{lm.MAMBA_CACHE: state})[lm.MAMBA_CACHE]


@torch.no_grad()
def _state(model: nn.Module, position: int, read_up_to: int, setting: Setting) -> tuple[Any, int]:
    """The model's state at `position`, and how many tokens it has read."""
    read = min(position, read_up_to)
    full = isinstance(model, TitansForCausalLM) and model.config.variant == "attention" and not model.config.window_size
    if full:
        read = 0
    state: Any = None
    if isinstance(model, TitansForCausalLM):
        state = model.initial_state(1)
    with setting.autocast():
        for part in lm.ids(read, model).split(PREFILL_TOKENS, 1) if read else ():
            if isinstance(model, TitansForCausalLM):
                model(part, past_key_values=state, logits_to_keep=1)
            else:
                state = model(part, use_cache=True, logits_to_keep=1, **{lm.MAMBA_CACHE: state})[lm.MAMBA_CACHE]
    if isinstance(model, TitansForCausalLM):
        state.position = torch.full_like(state.position, position)
        state.columns = position
        if full:
            state.layer_caches = [AttentionCache(_random(model, position, setting)) for _ in state.layer_caches]
    return state, read


def _random(model: TitansForCausalLM, position: int, setting: Setting) -> KeyValues:
    config = model.config
    assert config.head_dim is not None
    shape = (1, config.num_attention_heads, position, config.head_dim)
    keys, values = (torch.randn(shape, device=setting.device, dtype=setting.torch_dtype()) for _ in "kv")
    return KeyValues((keys,), (values,))


BUILD = {"decoder": decoder}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[1024, 65536, 1048576], help="positions at which to decode"
    )
    parser.add_argument("--variants", nargs="+", choices=lm.TITANS, default=["mag", "mac"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per repetition")
    parser.add_argument(
        "--read-up-to", type=int, default=65536, help="maximum tokens to read; later positions are set without reading"
    )


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "positions", "tokens", "read_up_to")


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    """One heat, in which positions take turns too, because their ratio is the result."""
    names = [*arguments.variants, lm.WINDOW, *((lm.FULL, lm.MAMBA2) if arguments.peers else ())]
    entrants = [_entrant(name, position, arguments) for name in names for position in sorted(arguments.positions)]
    return [Heat("decode", entrants, arguments.runs)]


def _entrant(name: str, position: int, arguments: argparse.Namespace) -> Entrant:
    options = {"kind": name, "size": arguments.size, "position": position, "tokens": arguments.tokens,
               "read_up_to": arguments.read_up_to}  # fmt: skip
    return Entrant(f"{name} at {position:,}", "decode", "decoder", ["decode"], options)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of medians: last position to first, and each model to the sliding window at the same position."""
    complete = [row for row in rows if row["actions"] and not row["error"]]
    seconds = {(row["kind"], row["position"]): row["actions"]["decode"]["seconds"] for row in complete}
    names = {name for name, _ in seconds}
    positions = {name: sorted(p for n, p in seconds if n == name) for name in names}
    return {
        "last_over_first": {n: seconds[n, p[-1]] / seconds[n, p[0]] for n, p in positions.items()},
        "over_sliding_window": {
            f"{n} at {p}": s / seconds[lm.WINDOW, p] for (n, p), s in seconds.items() if (lm.WINDOW, p) in seconds
        },
    }


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("model", "position", "of it read", "ms a token", "least - most", "CPU ms", "over window", "state MiB")
    for row in rows:
        if row["error"]:
            table.add_row(row["kind"], f"{row['position']:,}", red(row["error"]))
            continue
        m = row["actions"]["decode"]
        ms, least, most, cpu = (1e3 * m[key] / row["tokens"] for key in ("seconds", "least", "most", "cpu_seconds"))
        over = results["over_sliding_window"].get(f"{row['kind']} at {row['position']}")
        size = "-" if row["state_bytes"] is None else f"{row['state_bytes'] / 2**20:,.1f}"
        table.add_row(
            row["kind"], f"{row['position']:,}", f"{row['read']:,}", f"{ms:.2f}", f"{least:.2f} - {most:.2f}",
            f"{cpu:.2f}", "-" if over is None else f"{over:.2f}", size,
        )  # fmt: skip
    growth = Table("model", "last position over first")
    for name, ratio in results["last_over_first"].items():
        growth.add_row(name, f"{ratio:.2f}")
    return [table, growth]
