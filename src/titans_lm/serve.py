"""`titans serve`: transformers' OpenAI-compatible server, each request a fork of one memory.

    titans serve --model runs/titans --memory book.memory
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "titans", "prompt": "Who did it?", "max_tokens": 50}'

What a request says is forgotten with it: no client sees another's text, and the memory stays as it was loaded.
"""

import argparse
import socket
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from titans_lm.checkpoint import MODEL_HELP, load
from titans_lm.model import TitansForCausalLM
from titans_lm.state import TitansState

NAME = "titans"
"""What clients call the model."""
MESSAGES = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""How a conversation becomes a text, for a tokenizer that has no chat template."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help=MODEL_HELP)
    parser.add_argument("--memory", type=Path, help="what every client's stream begins with")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")


def run(arguments: argparse.Namespace) -> None:
    if not is_serve_available():
        raise ValueError("the server's libraries are not installed: pip install 'titans-lm[serve]'")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port must be 0 to 65535, got {arguments.port}")
    model, tokenizer = load(arguments.model)
    if arguments.memory:
        model.begin_with(TitansState.load(arguments.memory, model))
    console = Console(stderr=True)
    listening = _listen(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app(model, tokenizer), log_level="warning"))
    known = f"with {arguments.memory}" if arguments.memory else "with an empty memory"
    console.print(
        f"{arguments.model} {known} at http://{host}:{port}/v1; Ctrl-C ends it", markup=False, highlight=False
    )
    server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """Raises OSError for an address that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        return listening
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error


def app(model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The server, an ASGI application, of this model alone, by the name "titans"."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState

    class OneModel(ModelManager):
        """It would look for the model's class in transformers, where it is not, and for models on this machine."""

        def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            return tokenizer

        def _load_model(self, *_: Any, **__: Any) -> TitansForCausalLM:
            return model

        @staticmethod
        def get_gen_models(_: str | None = None) -> list[dict[str, Any]]:
            return [{"id": NAME, "object": "model", "owned_by": "titans-lm", "created": 0}]

    if tokenizer.chat_template is None:
        tokenizer.chat_template = MESSAGES
    models, state = OneModel(device="cpu", force_model=NAME), GenerationState(continuous_batching=False)
    return build_server(
        models,
        ChatCompletionHandler(models, state),
        CompletionHandler(models, state),
        ResponseHandler(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )
