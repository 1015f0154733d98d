"""Requests and replies of OpenAI's completions and chat completions, validated field by field.

A field is obeyed or refused. Unsupported fields that clients send anyway are accepted with their neutral value only.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from titans_lm.inference.serve.answer import Sampling
from titans_lm.inference.serve.limits import Limits, Refused

NAME = "titans"
"""Model name in requests and replies."""
COMPLETION_TOKENS = 16
"""Default `max_tokens` of a completion, as OpenAI's. A chat's default is the server's limit."""
STOP_LENGTH = 256


def _is_unicode(text: str) -> str:
    """Raises UnicodeEncodeError for a lone surrogate, which JSON can encode."""
    text.encode()
    return text


def _strings(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # several clients send a list always
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt)):
        return prompt
    raise ValueError("must be one text, or the tokens of one")


def _content(content: Any) -> Any:
    """Join the text parts of a message."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError('must be a text, or a list of {"type": "text", "text": "..."}')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a part must be a string")
    return "".join(part["text"] for part in content)


Text = Annotated[str, AfterValidator(_is_unicode)]
Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[list[Any], Field(max_length=0)]
EmptyMap = Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """Strict types, and no unknown fields, unless their value is None: clients send such fields, also those of a reply
    that is sent back as a message."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if value is not None or key in cls.model_fields}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_content)]


class Question(Strict):
    """Fields of both kinds of request. None is the same as a missing field: some clients send it."""

    model: Literal["titans"]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[list[Annotated[Text, Field(min_length=1, max_length=STOP_LENGTH)]], BeforeValidator(_strings)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # identifies the user; has no effect, as the two that took its place in OpenAI's protocol
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: EmptyMap | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: EmptyMap | None = None

    def tokens(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the answer's tokens."""
        return "max_tokens", self.max_tokens

    def sampling(self, limits: Limits, tokens: int) -> Sampling:
        """Sampling parameters; `tokens` is the default limit. Raises Refused for values over the limits."""
        field, max_tokens = self.tokens()
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise Refused(400, f"{field}: must be at most {limits.max_tokens}, got {max_tokens}", field)
        if self.stop is not None and len(self.stop) > limits.stops:
            raise Refused(400, f"stop: at most {limits.stops} strings, got {len(self.stop)}", "stop")
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "stream_options: only with stream", "stream_options")
        return Sampling(
            max_tokens or min(tokens, limits.max_tokens),
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
            tuple(self.stop or ()),
        )

    def wants_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionQuestion(Question):
    prompt: Annotated[Text | list[int], BeforeValidator(_prompt)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatQuestion(Question):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None  # of tools, of which there are none
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def tokens(self) -> tuple[str, int | None]:
        """`max_completion_tokens`, the newer name, takes precedence."""
        if self.max_completion_tokens is None:
            return super().tokens()
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise Refused(
                400, "max_completion_tokens and max_tokens are the same, and differ here", "max_completion_tokens"
            )
        return "max_completion_tokens", self.max_completion_tokens


def describe(error: dict[str, Any]) -> tuple[str, str]:
    """Convert an error of pydantic to the field and a message that names field and value."""
    places = [str(part)[:80] for part in error["loc"] if part != "body" and "[" not in str(part)]
    field = ".".join(places).encode("ascii", "backslashreplace").decode() or "body"  # a client's own words
    if error["type"] == "extra_forbidden":
        return field, f"{field}: this server has no such field"
    if error["type"] == "json_invalid":
        return "body", f"body: not JSON: {error['ctx']['error']} at character {field}"
    if isinstance(error["input"], bytes):
        return "body", "body: not read as JSON: send it with the header Content-Type: application/json"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return field, f"{field}: {message}"
    value = repr(error["input"])
    return field, f"{field}: {message}, got {value if len(value) <= 80 else value[:80] + '...'}"


# ------------------------------------------------------------------------------------------------ answers


def usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class CompletionReply:
    """The response bodies of one request."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]], used: dict[str, int] | None) -> dict[str, Any]:
        body = {"id": self.id, "object": kind, "created": self.created, "model": NAME, "choices": choices}
        return body if used is None else {**body, "usage": used}

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def whole(self, text: str, reason: str | None, used: dict[str, int]) -> dict[str, Any]:
        return self._body(self.whole_object, [self._choice(text, reason)], used)

    def first(self) -> list[dict[str, Any]]:
        """First chunks of a stream."""
        return []

    def chunk(self, text: str, reason: str | None = None) -> dict[str, Any]:
        return self._body(self.chunk_object, [self._choice(text, reason)], None)

    def last(self, used: dict[str, int]) -> dict[str, Any]:
        """Last chunk of a stream, with the usage."""
        return self._body(self.chunk_object, [], used)


class ChatReply(CompletionReply):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def chunk(self, text: str, reason: str | None = None) -> dict[str, Any]:
        return self._chunk({"content": text} if text else {}, reason)

    def _chunk(self, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        return self._body(self.chunk_object, [{"index": 0, "delta": delta, "finish_reason": reason}], None)
