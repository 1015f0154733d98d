"""`titans bench serve`: clients of the server, one after another and all at once, over HTTP on this machine.

Prompts have different lengths, from half of `--prompt-tokens` to all of it; answers are greedy and of one length. The
result is the time until the last client has its answer.
"""

import argparse
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from titans_lm.bench import lm
from titans_lm.bench.measure import Action, Contender, Setting
from titans_lm.bench.race import Entrant, Heat
from titans_lm.models.hub import load
from titans_lm.models.model_files import MODEL_HELP, find
from titans_lm.models.presets import SIZES
from titans_lm.models.tokenizer import load_tokenizer
from titans_lm.utils.record import check_least
from titans_lm.utils.terminal import red

Answers = list[tuple[str, int]]
"""Text and number of tokens of each answer."""


def server(options: dict[str, Any], setting: Setting) -> Contender:
    """A server in a thread of this process, and clients that ask it. An action returns their answers."""
    model, address = _serve(options, setting)
    lengths = prompt_lengths(options["clients"], options["prompt_tokens"])
    prompts = [lm.ids(length, model)[0].tolist() for length in lengths]
    alone: Answers = []

    def ask(prompt: list[int]) -> tuple[str, int]:
        return _complete(address, prompt, options["max_tokens"])

    def in_turn(_: Any) -> Answers:
        alone[:] = [ask(prompt) for prompt in prompts]
        return alone

    def at_once(_: Any) -> Answers:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    def report(answers: Answers) -> dict[str, Any]:
        same = sum(text == other for (text, _), (other, _) in zip(answers, alone, strict=True))
        return {"answer_tokens": sum(count for _, count in answers), "same_answers": same}

    actions = {
        name: Action(run, report=report, once=True) for name, run in (("in_turn", in_turn), ("at_once", at_once))
    }
    about = {"parameters": lm.parameters(model), "state_bytes": model.initial_state(1).nbytes}
    return Contender(actions, about, lambda: _warm(address))


def prompt_lengths(clients: int, most: int) -> list[int]:
    """From half of `most` to all of it, at least 1."""
    return [max(1, most * (clients + i + 1) // (2 * clients)) for i in range(clients)]


def _serve(options: dict[str, Any], setting: Setting) -> tuple[Any, str]:
    """Start the server; return its model and address. The process ends with the thread still running."""
    from titans_lm.inference.serve.app import Server, Service  # of the extra "serve"
    from titans_lm.inference.serve.limits import Limits

    model: Any
    if options["model"]:
        model, tokenizer = load(Path(options["model"]))
        model.to(setting.device)
    else:
        model, tokenizer = lm.build(options["kind"], options["size"], setting).eval(), load_tokenizer("bytes")
    rows, piece = options["max_batch_size"], options["prefill_chunk_size"]
    limits = Limits(requests=options["clients"], batch_size=rows, prefill_chunk_size=piece)
    listening = socket.create_server(("127.0.0.1", 0))
    running = Server(Service(model, tokenizer, limits=limits))
    threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True).start()
    while not running.started:
        time.sleep(0.01)
    return model, f"http://127.0.0.1:{listening.getsockname()[1]}"


def _complete(address: str, prompt: list[int], tokens: int) -> tuple[str, int]:
    """One request and its answer."""
    body = {"model": "titans", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def _warm(address: str) -> None:
    """All code once: one row, and two of different length."""
    _complete(address, [97], 2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda length: _complete(address, [97] * length, 2), (1, 3)))


BUILD = {"server": server}

# ------------------------------------------------------------------------------------------------ command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help=f"{MODEL_HELP}; default: random weights of --variants and --size")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--variants", nargs="+", choices=lm.TITANS, default=["mag", "mac"])
    parser.add_argument("--clients", type=int, default=8, help="clients, with a request each")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--max-batch-size", type=int, default=32, help="as of titans serve")
    parser.add_argument("--prefill-chunk-size", type=int, default=512, help="as of titans serve")


def check(arguments: argparse.Namespace) -> None:
    check_least(arguments, 1, "clients", "prompt_tokens", "max_tokens", "max_batch_size", "prefill_chunk_size")
    if arguments.peers:
        raise ValueError("--peers: the server has one kind of model, its own")
    if arguments.model:
        find(arguments.model)


def heats(arguments: argparse.Namespace, setting: Setting) -> list[Heat]:  # noqa: ARG001 - the form of all kinds
    """One heat; in turn and at once are actions of one server, so other load affects both alike."""
    names = [str(arguments.model)] if arguments.model else arguments.variants
    return [Heat("serve", [_entrant(name, arguments) for name in names], arguments.runs)]


def _entrant(name: str, arguments: argparse.Namespace) -> Entrant:
    keys = ("clients", "prompt_tokens", "max_tokens", "max_batch_size", "prefill_chunk_size")
    options = {"kind": name, "model": str(arguments.model or ""), **{key: getattr(arguments, key) for key in keys}}
    size = {} if arguments.model else {"size": arguments.size}
    return Entrant(name, "serve", "server", ["in_turn", "at_once"], {**options, **size})


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The time at once over that in turn, of medians."""
    complete = [row for row in rows if row["actions"].keys() == {"in_turn", "at_once"} and not row["error"]]
    return {
        "at_once_over_in_turn": {
            row["kind"]: row["actions"]["at_once"]["seconds"] / row["actions"]["in_turn"]["seconds"] for row in complete
        }
    }


def table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[Table]:
    table = Table("model", "clients", "prompts", "in turn, s", "at once, s", "ratio", "tokens/s", "same answers")
    for row in rows:
        prompts = f"up to {row['prompt_tokens']}"
        if row["error"]:
            table.add_row(row["kind"], str(row["clients"]), prompts, red(row["error"]))
            continue
        seconds = [row["actions"][name]["seconds"] for name in ("in_turn", "at_once")]
        last = row["repetitions"]["at_once"][-1]
        table.add_row(
            row["kind"], str(row["clients"]), prompts, *(f"{s:.2f}" for s in seconds),
            f"{results['at_once_over_in_turn'][row['kind']]:.3f}",
            " - ".join(f"{last['answer_tokens'] / s:,.0f}" for s in seconds),
            f"{last['same_answers']} of {row['clients']}",
        )  # fmt: skip
    return [table]
