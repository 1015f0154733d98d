"""The server, an ASGI application: authentication, limits, and the routes."""

import asyncio
import hmac
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from titans_lm.inference.serve.answer import Answer, Sampling
from titans_lm.inference.serve.limits import Limits, Refused
from titans_lm.inference.serve.protocol import (
    COMPLETION_TOKENS,
    NAME,
    ChatQuestion,
    ChatReply,
    CompletionQuestion,
    CompletionReply,
    Question,
    describe,
    usage,
)
from titans_lm.inference.serve.worker import End, Job, Worker
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode

MESSAGES = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""Chat template for tokenizers that have none."""
SPARE_SECONDS = 5
"""Time after the last request for open connections, such as a client that does not read."""


# ------------------------------------------------------------------------------------------------ service


class Service:
    """A model, the memory that each request forks (None: the model's initial one), and the limits."""

    def __init__(
        self,
        model: TitansForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        memory: TitansState | None = None,
        limits: Limits | None = None,
        api_key: str | None = None,
    ):
        if memory is not None and memory.batch_size != 1:
            raise ValueError(f"the memory must have one row, this one has {memory.batch_size}")
        self.model, self.tokenizer, self.api_key = model, tokenizer, api_key
        self.limits = limits or Limits()
        with torch.no_grad():
            self.memory = model.initial_state(1) if memory is None else model.with_pending_read(memory)
        self.worker = Worker(model, self.limits)
        end = model.generation_config.eos_token_id
        self.ends = frozenset([] if end is None else end if isinstance(end, list) else [end])

    def answer(self, prompt: str | list[int], field: str, sampling: Sampling, any_length: bool = False) -> Answer:
        """Prepare the answer to a prompt with a fork of the memory. Errors name `field`. Raises Refused.

        `any_length`: the answer may be shorter than `sampling` says, where the model takes no more positions."""
        vocabulary, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if not isinstance(prompt, str) and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise Refused(
                400, f"{field}: tokens must be 0 to {vocabulary - 1}, got {min(prompt)} to {max(prompt)}", field
            )
        ids = torch.as_tensor(encode(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
        if not len(ids):
            raise Refused(400, f"{field}: is empty; give at least one character to continue from", field)
        read = int(self.memory.position[0]) + len(ids)
        if limit is not None and any_length:
            sampling = sampling._replace(max_tokens=max(1, min(sampling.max_tokens, limit - read)))
        total = read + sampling.max_tokens
        if limit is not None and total > limit:
            raise Refused(
                400, f"{field}: {total} tokens with memory and answer, this model takes at most {limit}", field
            )
        return Answer(ids, self.memory.shallow_copy(), sampling, self.tokenizer, self.ends)

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation as text, by the tokenizer's template. Raises Refused if the template rejects it."""
        template = self.tokenizer.chat_template or MESSAGES
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise Refused(400, f"messages: {error}", "messages") from error
        assert isinstance(text, str)
        return text

    def check_size(self, content: str | list[int], field: str) -> None:
        size = len(content.encode()) if isinstance(content, str) else len(content)
        if size > self.limits.prompt_bytes:
            raise Refused(413, f"{field}: at most {self.limits.prompt_bytes} bytes, got {size}", field)


def create(service: Service) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.close()
        await run_in_threadpool(service.worker.join, SPARE_SECONDS)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    return app


class Server(uvicorn.Server):
    """Shuts down in bounded time: cancels requests that take longer than the limit."""

    def __init__(self, service: Service):
        self.service = service
        seconds = math.ceil(service.limits.shutdown_seconds) + SPARE_SECONDS
        super().__init__(
            uvicorn.Config(create(service), log_level="warning", server_header=False, timeout_graceful_shutdown=seconds)
        )

    async def shutdown(self, sockets: Any = None) -> None:
        """As uvicorn's, which waits for requests."""
        asyncio.get_running_loop().call_later(self.service.limits.shutdown_seconds, self.service.worker.close)
        await super().shutdown(sockets)


# ---------------------------------------------------------------------------------------- authentication and limits


class Gate:
    """Middleware that checks the key and the size of a request before its body is read, and the time while it
    arrives."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.limits = app, service.limits
        self.expected = None if service.api_key is None else f"Bearer {service.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refusal(scope)
        if refusal is not None:
            return await _error(refusal)(scope, receive, send)
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        if self.expected is not None and scope["path"] != "/health":
            key = headers.get("authorization", "").encode()
            if not hmac.compare_digest(key, self.expected):
                return Refused(401, "the API key is missing or wrong: send Authorization: Bearer KEY")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Refused:
        return Refused(413, f"body: at most {self.limits.body_bytes} bytes", "body")

    def _limited(self, receive: Receive) -> Receive:
        size, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.limits.seconds

        async def limited() -> Message:
            nonlocal size, complete
            try:
                async with asyncio.timeout_at(None if complete else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "body: did not arrive in time") from None
            size += len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
            if size > self.limits.body_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        return limited


def _error(refused: Refused) -> JSONResponse:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {"message": refused.message, "type": kind, "param": refused.field, "code": None}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(refused.status)
    return JSONResponse({"error": error}, refused.status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    field, message = describe(error.errors()[0])
    return _error(Refused(400, message, field))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path}: {error.detail}" if error.status_code in (404, 405) else error.detail
    )
    return _error(Refused(error.status_code, message))


async def _failed(_: Request, error: Exception) -> Response:
    """An internal error; its traceback goes to the log."""
    return _error(Refused(500, f"the server failed: {type(error).__name__}"))


# ------------------------------------------------------------------------------------------------ answers


class JobStream:
    """Passes the texts of a job from the worker's thread to a coroutine. Cancels the job if the client disconnects."""

    def __init__(self, service: Service, request: Request, answer: Answer, stream: bool):
        loop, self.events = asyncio.get_running_loop(), asyncio.Queue[str | End]()

        def deliver(event: str | End) -> None:
            with suppress(RuntimeError):  # the loop has ended, and so has who waited
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.answer, self.request = answer, request
        self.job: Job = service.worker.submit(answer, deliver, stream)
        self.watch = asyncio.create_task(self._cancel_when_left())  # from now on: a stream may never be begun

    async def texts(self) -> AsyncIterator[str]:
        """Yields the texts. Raises Refused if the answer ends early."""
        try:
            while not isinstance(event := await self.events.get(), End):
                yield event
            if event.refused is not None:
                raise event.refused
        finally:
            self.watch.cancel()
            self.job.cancel()

    async def _cancel_when_left(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.job.cancel()

    def usage(self) -> dict[str, int]:
        return usage(len(self.answer.ids), self.answer.count)


async def _reply(stream: JobStream, question: Question, reply: CompletionReply) -> Response:
    if question.stream:
        events = _events(stream, reply, question.wants_usage())
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    text = "".join([text async for text in stream.texts()])
    return JSONResponse(reply.whole(text, stream.answer.finish_reason, stream.usage()))


async def _events(stream: JobStream, reply: CompletionReply, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. An error is an event too, because the status was already sent."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body)}\n\n"

    try:
        for body in reply.first():
            yield event(body)
        async for text in stream.texts():
            yield event(reply.chunk(text))
        yield event(reply.chunk("", stream.answer.finish_reason))
        if with_usage:
            yield event(reply.last(stream.usage()))
    except Refused as error:
        yield f"data: {bytes(_error(error).body).decode()}\n\n"
    finally:
        stream.job.cancel()
    yield "data: [DONE]\n\n"


# ------------------------------------------------------------------------------------------------ routes

router = APIRouter()
MODEL = {"id": NAME, "object": "model", "created": 0, "owned_by": "titans-lm"}


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


Served = Annotated[Service, Depends(_service)]


@router.post("/v1/completions")
async def complete(question: CompletionQuestion, request: Request, service: Served) -> Response:
    sampling = question.sampling(service.limits, COMPLETION_TOKENS)

    def prepare() -> Answer:
        service.check_size(question.prompt, "prompt")
        return service.answer(question.prompt, "prompt", sampling, any_length=question.tokens()[1] is None)

    return await _answer(service, request, question, prepare, CompletionReply())


@router.post("/v1/chat/completions")
async def chat(question: ChatQuestion, request: Request, service: Served) -> Response:
    sampling = question.sampling(service.limits, service.limits.max_tokens)

    def prepare() -> Answer:
        service.check_size("".join(message.content for message in question.messages), "messages")
        text = service.render([message.model_dump() for message in question.messages])
        return service.answer(text, "messages", sampling, any_length=question.tokens()[1] is None)

    return await _answer(service, request, question, prepare, ChatReply())


async def _answer(
    service: Service, request: Request, question: Question, prepare: Callable[[], Answer], reply: CompletionReply
) -> Response:
    service.worker.check_room()  # before the prompt is encoded
    answer = await run_in_threadpool(prepare)
    return await _reply(JobStream(service, request, answer, bool(question.stream)), question, reply)


@router.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"object": "list", "data": [MODEL]}


@router.get("/v1/models/{name}")
async def model(name: str) -> dict[str, Any]:
    if name != NAME:
        raise Refused(404, f"model: there is {NAME!r} alone, not {name!r}", "model")
    return MODEL


@router.get("/health")
async def health(service: Served) -> dict[str, str]:
    if not service.worker.is_alive:
        raise Refused(503, "the server is shutting down")
    return {"status": "ok"}


@router.post("/reset")
async def reset(service: Served) -> dict[str, int]:
    """Cancel all running requests. Needs a server with an API key."""
    if service.api_key is None:
        raise Refused(403, "needs a server that was started with an API key")
    return {"ended": service.worker.cancel_all(Refused(503, "the server was reset"))}
