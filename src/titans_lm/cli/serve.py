"""`titans serve`: an OpenAI-compatible server; each request forks one memory.

    titans serve --model runs/titans --memory book.memory
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "titans", "prompt": "Who did it?", "max_tokens": 50}'

The server is `titans_lm.inference.serve`.
"""

import argparse
import importlib.util
import ipaddress
import os
import socket
from pathlib import Path

from titans_lm.inference.serve.limits import Limits
from titans_lm.models.model_files import MODEL_HELP
from titans_lm.utils.terminal import PlainConsole

KEY = "TITANS_API_KEY"
"""Environment variable for the key: every user of a machine can see its command lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, help="memory file that each request forks")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: from other machines too; then set a key"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0: any free port")
    parser.add_argument(
        "--api-key", help=f"key that clients must send (default: the environment variable {KEY}, if set)"
    )
    limits = parser.add_argument_group("limits")
    default = Limits()
    limits.add_argument("--max-tokens", type=int, default=default.max_tokens, help="maximum tokens of an answer")
    limits.add_argument("--max-prompt-bytes", type=int, default=default.prompt_bytes, help="maximum bytes of a prompt")
    limits.add_argument("--max-stops", type=int, default=default.stops, help="maximum stop strings of a request")
    limits.add_argument(
        "--max-requests",
        type=int,
        default=default.requests,
        help="maximum concurrent requests, waiting ones included; more are answered with 429",
    )
    limits.add_argument(
        "--max-batch-size",
        type=int,
        default=default.batch_size,
        help="requests that are answered together, each with a memory; others wait for one to end",
    )
    limits.add_argument(
        "--prefill-chunk-size",
        type=int,
        default=default.prefill_chunk_size,
        help="prompt tokens that are read between two tokens of answers",
    )
    limits.add_argument("--request-seconds", type=float, default=default.seconds, help="time limit of a request")
    limits.add_argument(
        "--shutdown-seconds",
        type=float,
        default=default.shutdown_seconds,
        help="time for running requests to finish after SIGTERM",
    )


def run(arguments: argparse.Namespace) -> None:
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn"))):
        raise ValueError("the server's libraries are not installed: pip install 'titans-lm[serve]'")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port must be 0 to 65535, got {arguments.port}")
    limits = Limits(
        max_tokens=arguments.max_tokens, prompt_bytes=arguments.max_prompt_bytes, stops=arguments.max_stops,
        requests=arguments.max_requests, batch_size=arguments.max_batch_size,
        prefill_chunk_size=arguments.prefill_chunk_size, seconds=arguments.request_seconds,
        shutdown_seconds=arguments.shutdown_seconds,
    )  # fmt: skip
    api_key = _api_key(arguments.api_key)
    from titans_lm.models.cache import TitansState
    from titans_lm.models.hub import load

    model, tokenizer = load(arguments.model)
    memory = TitansState.load(arguments.memory, model) if arguments.memory else None
    from titans_lm.inference.serve.app import Server, Service

    listening = listen(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    console = PlainConsole(stderr=True, soft_wrap=True)
    memory_text = f"with {arguments.memory}" if arguments.memory else "with an empty memory"
    console.print(f"{arguments.model} {memory_text} at http://{host}:{port}/v1; Ctrl-C ends it")
    if api_key is None and not ipaddress.ip_address(host.split("%")[0]).is_loopback:
        console.print(f"anyone who reaches {host} may ask: no key is set ({KEY})", style="yellow")
    Server(Service(model, tokenizer, memory, limits, api_key)).run(sockets=[listening])


def _api_key(argument: str | None) -> str | None:
    """The key, if any. Raises ValueError for one that no client could send."""
    name, key = ("--api-key", argument) if argument is not None else (KEY, os.environ.get(KEY))
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{name} must be one word of ASCII characters, and not empty")
    return key


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to the address. Raises OSError if that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error
