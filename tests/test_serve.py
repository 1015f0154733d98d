"""The server, asked by a real client over loopback: it knows its memory, no client knows another, none holds it up."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import jaxtyping
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from conftest import Made, assert_bitwise, tiny_config
from titans_lm import Reader, TitansForCausalLM
from titans_lm.cli import main
from titans_lm.cli.serve import KEY, listen
from titans_lm.inference.serve.answer import Answer, Decoder, Sampling, Stops
from titans_lm.inference.serve.app import Server, Service
from titans_lm.inference.serve.engine import Engine
from titans_lm.inference.serve.limits import Limits
from titans_lm.inference.serve.worker import Worker
from titans_lm.models.tokenizer import byte_tokenizer

SECRETS = [f"my number is {n}{n}{n}; " * 6 for n in range(8)]
ENDLESS = 10**6
"""Tokens that no answer here comes to: what asks for them ends for another reason."""
LIMITS = Limits(max_tokens=ENDLESS, prompt_bytes=300_000, stops=3, requests=8, seconds=300.0, shutdown_seconds=0.0)
LONG = "a" * LIMITS.prompt_bytes


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Shapes unchecked, which takes most of a token's time here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    """Its memory ends within a segment."""
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config("mac", vocab_size=260)).eval()


@pytest.fixture(scope="module")
def reader(model) -> Reader:
    return Reader(model, byte_tokenizer()).read("It was a dark and stormy night. " * 9)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """-> its address"""
    listening = listen("127.0.0.1", 0)
    host, port = listening.getsockname()[:2]
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(300)
    assert not thread.is_alive()


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def service(model, reader) -> Iterator[Service]:
    before = reader.state.clone()
    yield (service := Service(model, byte_tokenizer(), reader.state, LIMITS))
    assert_bitwise(service.memory, before)  # whatever all the tests asked


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with serving(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> str:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model="titans", prompt=prompt, **options).choices[0].text


def pieces(client: openai.OpenAI, prompt: str, **options: Any) -> list[str]:
    options = {"max_tokens": 12, "temperature": 0, **options}
    stream = client.completions.create(model="titans", prompt=prompt, stream=True, **options)
    return [chunk.choices[0].text for chunk in stream]


# ------------------------------------------------------------------------------------------------ the memory


def test_a_client_is_answered_from_the_memory(client, model, reader):
    (expected,) = reader.ask("It was", max_new_tokens=12)
    assert complete(client, "It was") == expected
    assert expected != Reader(model, byte_tokenizer()).ask("It was", max_new_tokens=12)[0]


def test_without_a_memory_streams_begin_anew(model):
    with serving(Service(model, byte_tokenizer(), limits=LIMITS)) as url:
        (expected,) = Reader(model, byte_tokenizer()).ask("It was", max_new_tokens=12)
        assert complete(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), "It was") == expected


def test_many_clients_at_once_have_memories_of_their_own(client, reader):
    """None of them sees what another said, before or at the same time; the memory stays as it was."""
    alone = {prompt: reader.ask(prompt, max_new_tokens=12)[0] for prompt in SECRETS}
    prompts = SECRETS * 2
    with ThreadPoolExecutor(LIMITS.requests) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert answers == [alone[prompt] for prompt in prompts]


def test_pipelines_begin_with_the_memory(model, reader):
    model.begin_with(reader.state)
    generate = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    (expected,) = reader.ask("It was", max_new_tokens=12)
    for _ in range(2):
        answer = generate("It was", max_new_tokens=12, do_sample=False, return_full_text=False)
        assert answer[0]["generated_text"] == expected
    model.begin_with(None)


def test_streams_begin_with_a_fork_in_every_row(model, reader):
    model.begin_with(reader.state)
    state = model.initial_state(3)
    model.begin_with(None)
    assert state.position.tolist() == [reader.state.position.item()] * 3
    assert state.columns == 0
    with pytest.raises(ValueError, match="this one has 3"):
        model.begin_with(state)
    with pytest.raises(ValueError, match="this one has 3"):
        Service(model, byte_tokenizer(), state)


# ------------------------------------------------------------------------------------------------ the protocol


def test_chat_and_streaming(client, reader):
    messages = [{"role": "user", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "was"}]}]
    options = {"model": "titans", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    ChatCompletion.model_validate(whole.model_dump())
    text = whole.choices[0].message.content
    assert text == reader.ask("It was\n", max_new_tokens=12)[0]
    chunks = list(client.chat.completions.create(**options, stream=True))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump())
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(parts) > 3
    assert "".join(parts) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_usage_is_counted(client):
    whole = client.completions.create(model="titans", prompt="It was", max_tokens=12)
    Completion.model_validate(whole.model_dump())
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (6, 12, 18)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.completions.create(model="titans", prompt=[73, 116], max_tokens=5, **options)
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 2, 5)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_is_closed(path: str, http):
    body = {"model": "titans", "max_tokens": 3, "stream": True}
    asked = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = http.post(f"/v1/{path}", json={**body, **asked})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_what_asks_for_nothing_may_be_sent(client):
    nothing = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "seed": None}
    nothing |= {"best_of": 1, "echo": False, "logprobs": None, "suffix": None, "stop": None, "stream": False}
    more = {"store": False, "metadata": {}, "service_tier": "auto", "safety_identifier": "me", "prompt_cache_key": "me"}
    more |= {"top_k": None, "of_a_later_version": None}
    whole = complete(client, "It was")
    assert complete(client, "It was", **nothing, extra_body=more) == whole
    assert (
        client.completions.create(model="titans", prompt=["It was"], max_tokens=12, temperature=0).choices[0].text
        == whole
    )
    assert complete(client, [list(b"It was")]) == whole


def test_a_reply_may_be_sent_back_as_the_client_prints_it(client):
    ask = {"model": "titans", "max_tokens": 4, "temperature": 0}
    nothing = {"response_format": {"type": "text"}, "parallel_tool_calls": True, "modalities": ["text"], "tools": []}
    question = {"role": "user", "content": "Who?"}
    reply = client.chat.completions.create(messages=[question], **ask, **nothing).choices[0].message
    talk = [question, reply.model_dump(), question]
    assert any(value is None for value in talk[1].values())
    plain = [question, {"role": "assistant", "content": reply.content}, question]
    second, expected = (client.chat.completions.create(messages=messages, **ask) for messages in (talk, plain))
    assert second.choices[0].message.content == expected.choices[0].message.content


def test_json_without_its_header_is_named(http):
    body = json.dumps({"model": "titans", "prompt": "It was"})
    error = refusal(http.post("/v1/completions", content=body), 400)
    assert error["message"] == "body: not read as JSON: send it with the header Content-Type: application/json"
    assert error["param"] == "body"


def test_defaults_are_those_of_the_protocol(client):
    answer = client.completions.create(model="titans", prompt="a", seed=1)
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text == complete(client, "a", max_tokens=16, temperature=1, top_p=1, seed=1)


def test_there_is_one_model(client, http):
    assert [model.id for model in client.models.list()] == ["titans"]
    assert client.models.retrieve("titans").id == "titans"
    with pytest.raises(openai.NotFoundError, match="'another'"):
        client.models.retrieve("another")
    with pytest.raises(openai.BadRequestError, match=r"model: .*'titans', got 'another'"):
        client.completions.create(model="another", prompt="a")
    assert http.get("/health").json() == {"status": "ok"}


# ------------------------------------------------------------------------------------------------ sampling


def test_seeds_and_temperature(client):
    hot = {"temperature": 1.5, "max_tokens": 20}
    texts = [complete(client, "It was", seed=seed, **hot) for seed in range(5)]
    assert len(set(texts)) == 5
    assert texts == [complete(client, "It was", seed=seed, **hot) for seed in range(5)]
    assert len({complete(client, "It was", **hot) for _ in range(3)}) == 3  # no seed is another each time
    assert complete(client, "It was", seed=0, temperature=0.5, max_tokens=20) != texts[0]


def test_top_p_keeps_the_likeliest(client):
    greedy = complete(client, "It was")
    assert complete(client, "It was", temperature=1.5, top_p=0, seed=3) == greedy
    assert complete(client, "It was", temperature=1.5, seed=3) != greedy
    assert complete(client, "It was", temperature=1e-30, seed=3) == greedy


def test_others_do_not_change_a_seeded_answer(client):
    def seeded(seed: int) -> str:
        return complete(client, "It was", seed=seed, temperature=1.5, max_tokens=20)

    alone = [seeded(seed) for seed in range(LIMITS.requests)]
    with ThreadPoolExecutor(LIMITS.requests) as pool:
        assert list(pool.map(seeded, range(LIMITS.requests))) == alone


def test_stop_strings_end_an_answer_and_are_not_in_it(client):
    options = {"seed": 1, "temperature": 1, "max_tokens": 200}
    whole = complete(client, "It was", **options)
    stop = whole[60:63]
    end = whole.index(stop)
    answer = client.completions.create(model="titans", prompt="It was", **options, stop=["nowhere in it", stop])
    assert answer.choices[0].text == whole[:end]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 200
    assert "".join(pieces(client, "It was", **options, stop=stop)) == whole[:end]


def test_the_end_token_ends_an_answer(client, service, monkeypatch):
    monkeypatch.setattr(service, "ends", frozenset(range(260)) - {256})
    answer = client.completions.create(model="titans", prompt="It was", temperature=0, max_tokens=9)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a token that begins a text is written without its space; bytes where no token is."""
    words = ["▁the", "▁end", "▁was", "é", "▁", "e", "nd"]
    vocabulary = {**{f"<0x{b:02X}>": b for b in range(256)}, **{word: 256 + i for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


BYTES, OTHER = byte_tokenizer(), other_tokenizer()
TEXTS = st.text(st.sampled_from("aé€😀 "), max_size=40).map(str.encode)


@settings(deadline=None, max_examples=50)
@given(st.one_of(TEXTS, st.binary(max_size=80), st.tuples(TEXTS, st.binary(max_size=3), TEXTS).map(b"".join)))
def test_tokens_become_text_as_soon_as_they_are_characters(data: bytes):
    decoder = Decoder(BYTES)
    parts = [decoder.push(token) for token in data]
    assert "".join(parts) + decoder.flush() == BYTES.decode(list(data))
    with_text = data.decode(errors="ignore").encode()
    decoder = Decoder(BYTES)
    parts = [decoder.push(token) for token in with_text]
    assert "\ufffd" not in "".join(parts)  # no half characters
    assert "".join(parts) == with_text.decode()  # and nothing is held longer than its character needs


WORDS = st.integers(256, 262).map(lambda word: [word])
CHARACTERS = st.sampled_from("é€😀").map(lambda character: list(character.encode()))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(WORDS, CHARACTERS), max_size=60))
def test_words_keep_their_spaces(parts: list[list[int]]):
    decoder, ids = Decoder(OTHER), [id for part in parts for id in part]
    given_out = "".join(map(decoder.push, ids))
    assert given_out == OTHER.decode(ids)
    assert len(decoder.window) < 2 * Decoder.WINDOW


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_wherever_texts_are_cut(parts: list[str], strings: list[str]):
    stops, whole = Stops(strings), "".join(parts)
    given_out = ""
    for part in parts:
        given_out += stops.push(part)
        if stops.found:
            break
    ends = [whole.index(s) for s in strings if s in whole]
    assert stops.found == bool(ends)
    if not ends:
        assert given_out + stops.flush() == whole
    else:
        assert whole.startswith(given_out)
        assert not any(s in given_out for s in strings)


# ------------------------------------------------------------------------------------------------ what is refused

NO = object()
COMPLETIONS: list[tuple[str, Any]] = [
    *[("prompt", value) for value in ("", [], None, 5, {"text": "a"}, ["a", "b"], [1, "a"], [260], [-1], [True], NO)],
    *[("prompt", value) for value in ([1.5], [2**70], "\ud800")],
    *[("max_tokens", value) for value in (0, -1, 10**12, "12", 1.5, True)],
    *[("temperature", value) for value in (-0.1, 2.5, "hot", float("nan"), float("inf"))],
    *[("top_p", value) for value in (1.5, -1, "1", float("nan"))],
    *[("seed", value) for value in (1.5, 2**63, "a", 10**400)],
    *[("stop", value) for value in ("", ["a", ""], [1], 5, list("abcd"), "a" * 257, "\ud800")],
    *[("model", value) for value in ("another", None, NO)],
    *[("stream", value) for value in ("yes", 1)],
    *[("stream_options", value) for value in ({"include_usage": True}, {"other": 1}, "a")],
    ("n", 2), ("best_of", 2), ("echo", True), ("logprobs", 5), ("suffix", "a"), ("presence_penalty", 1),
    ("frequency_penalty", 0.5), ("logit_bias", {"5": 1}), ("store", True), ("metadata", {"a": "b"}), ("top_k", 5),
    ("prompt", [[]]), ("prompt", [["a"]]), ("prompt", [[1], [2]]), ("service_tier", "priority"),
    ("generation_config", {}), ("user", 5),
]  # fmt: skip
CHATS: list[tuple[str, Any]] = [
    *[("messages", value) for value in ([], NO, None, "hi", {}, [5], [{}], [{"role": "user"}])],
    *[("messages", [{"role": role, "content": "a"}]) for role in ("robot", "tool", None)],
    *[("messages", [{"role": "user", "content": value}]) for value in (None, 5, {}, [5], [{"type": "image_url"}])],
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    ("messages", [{"role": "user", "content": "a", "tool_calls": []}]),
    ("messages", [{"role": "user", "content": ""}, {"role": "user", "content": "\udfff"}]),
    ("chat_template", "{% for a in range(10**9) %}{% endfor %}"),
    ("chat_template_kwargs", {"chat_template": "{% for a in range(10**9) %}{% endfor %}"}),
    ("tools", [{"type": "function"}]), ("tool_choice", "auto"), ("functions", []), ("response_format", {}),
    ("response_format", {"type": "json_object"}), ("modalities", ["text", "audio"]),
    ("max_completion_tokens", 0), ("max_completion_tokens", 10**12), ("max_tokens", 0), ("logprobs", True),
]  # fmt: skip


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_bad_values_are_named(http):
    """Every one of them is the client's mistake."""
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, good, changes in (("completions", {"prompt": "a"}, COMPLETIONS), ("chat/completions", chat, CHATS)):
        for field, value in changes:
            body = {"model": "titans", "max_tokens": 2, **good, field: value}
            body = {key: value for key, value in body.items() if value is not NO}
            sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
            error = refusal(http.post(f"/v1/{path}", **sent), 400)
            assert error["param"].split(".")[0] == field, error
            assert error["message"].startswith(field), error
            assert error["type"] == "invalid_request_error"


def test_one_number_of_tokens_by_two_names(http):
    body = {"model": "titans", "messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2}
    assert "differ" in refusal(http.post("/v1/chat/completions", json={**body, "max_tokens": 3}), 400)["message"]
    assert http.post("/v1/chat/completions", json={**body, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"1", b'"a"', b'{"\\ud800": 5}', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 9999]
)
def test_what_is_no_request(body: bytes, http):
    for path in ("completions", "chat/completions"):
        error = refusal(http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"}), 400)
        assert error["message"]


def test_paths_and_methods_that_are_not_there(http):
    assert "/v1/embeddings" in refusal(http.post("/v1/embeddings", json={}), 404)["message"]
    assert "/v1/completions" in refusal(http.get("/v1/completions"), 405)["message"]
    assert refusal(http.post("/v1/completions", content=b"model=titans"), 400)["message"]
    assert refusal(http.post("/load_model", json={"model": "/etc"}), 404)["message"]


def test_a_template_that_takes_no_such_conversation(http, service, monkeypatch):
    monkeypatch.setattr(service.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    body = {"model": "titans", "messages": [{"role": "user", "content": "a"}]}
    assert "messages: roles must alternate" in refusal(http.post("/v1/chat/completions", json=body), 400)["message"]


def test_the_room_of_a_model_is_not_exceeded(http, service, monkeypatch):
    room = int(service.memory.position[0]) + 10
    monkeypatch.setattr(service.model.config, "max_position_embeddings", room)
    body = {"model": "titans", "prompt": "abcd", "max_tokens": 6}
    assert http.post("/v1/completions", json=body).status_code == 200
    error = refusal(http.post("/v1/completions", json={**body, "max_tokens": 7}), 400)
    assert error["message"].startswith(f"prompt: {room + 1} tokens")
    answered = http.post("/v1/completions", json={"model": "titans", "prompt": "abcd"}).json()
    assert answered["usage"]["completion_tokens"] <= 6
    assert refusal(http.post("/v1/completions", json={"model": "titans", "prompt": "a" * 10}), 400)


def test_an_engine_that_fails_to_remove_a_row_fails_its_jobs_alone(http, service, monkeypatch):
    discard, failures = Engine.discard, [MemoryError("no memory for a copy")]

    def failing(engine, answers):
        if answers and failures:
            raise failures.pop()
        discard(engine, answers)

    monkeypatch.setattr(Engine, "discard", failing)
    body = {"model": "titans", "prompt": "a", "max_tokens": 2}
    failed = refusal(http.post("/v1/completions", json=body), 500)  # its last text was lost with the step
    assert "no memory for a copy" in failed["message"]
    assert not failures
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2
    assert service.worker.is_alive


# ------------------------------------------------------------------------------------------------ limits


def test_large_requests(http):
    body = {"model": "titans", "max_tokens": 1}
    error = refusal(http.post("/v1/completions", json={**body, "prompt": LONG + "a"}), 413)
    assert error["message"] == "prompt: at most 300000 bytes, got 300001"
    messages = [{"role": "user", "content": "é" * 75_000}] * 2
    assert http.post("/v1/chat/completions", json={**body, "messages": [*messages, messages[0]]}).status_code == 413
    huge = b" " * 2**16  # with and without being announced

    def unannounced() -> Iterator[bytes]:
        for _ in range(LIMITS.body_bytes // len(huge) + 1):
            yield huge

    sent = {"headers": {"content-type": "application/json"}}
    assert refusal(http.post("/v1/completions", content=unannounced(), **sent), 413)["param"] in ("body", None)
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        length = LIMITS.body_bytes + 1
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode())
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413")


def ask_without_end(url: str, prompt: str, stream: bool) -> tuple[httpx.Client, threading.Thread]:
    """A client that waits, until it is closed."""
    client = httpx.Client(base_url=url, timeout=None)

    def ask() -> None:
        body = {"model": "titans", "prompt": prompt, "max_tokens": ENDLESS, "stream": stream}
        try:
            with client.stream("POST", "/v1/completions", json=body) as response:
                for _ in response.iter_raw():
                    pass
        except httpx.TransportError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return client, thread


def leave(client: httpx.Client) -> None:
    """Closed as by a process that ends: from another thread than the one that reads."""
    pool = client._transport._pool
    for connection in pool.connections:
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a", LONG])
def test_who_left_is_not_served(stream: bool, prompt: str, url, service):
    client, thread = ask_without_end(url, prompt, stream)
    wait_for(lambda: service.worker.jobs and service.worker.jobs[0].answer.read)
    leave(client)
    wait_for(lambda: not service.worker.jobs)
    thread.join(300)


def test_a_long_prompt_does_not_hold_the_others(url, client, service):
    long, thread = ask_without_end(url, LONG, True)
    wait_for(lambda: service.worker.jobs and service.worker.jobs[0].answer.read)
    reading = service.worker.jobs[0].answer
    alone = complete(client, "It was")
    assert reading.is_reading
    leave(long)
    thread.join(300)
    wait_for(lambda: not service.worker.jobs)
    assert complete(client, "It was") == alone


def test_one_request_too_many(url, http, service):
    waiting = [ask_without_end(url, "a", True) for _ in range(LIMITS.requests)]
    wait_for(lambda: len(service.worker.jobs) == LIMITS.requests)
    response = http.post("/v1/completions", json={"model": "titans", "prompt": "a"})
    assert "8 requests are being answered" in refusal(response, 429)["message"]
    assert response.headers["retry-after"]
    for client, thread in waiting:
        leave(client)
        thread.join(300)
    wait_for(lambda: not service.worker.jobs)
    assert http.post("/v1/completions", json={"model": "titans", "prompt": "a"}).status_code == 200


def test_a_prompt_is_read_in_the_same_space_at_any_length(model):
    """Pieces: no tensor is larger for a longer prompt."""

    def largest(tokens: int) -> int:
        sizes = [0]
        answer = Answer(torch.full((tokens,), 97), model.initial_state(1), Sampling(1), byte_tokenizer())
        worker = Worker(model, replace(LIMITS, prefill_chunk_size=16))
        job = worker.submit(answer, lambda _: None)
        with torch.no_grad(), Made(lambda made: sizes.append(made.nbytes)):
            while job.over() is None:
                worker.turn()
        return max(sizes)

    assert largest(6 * 16 + 1) == largest(2 * 16 + 1)


def test_a_request_that_waits_for_a_row_is_answered(model, reader):
    """More requests than rows, also with nobody left to wait for the first of them."""
    limits = replace(LIMITS, batch_size=2)
    with serving(service := Service(model, byte_tokenizer(), reader.state, limits)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        holding = [ask_without_end(url, "a", True) for _ in range(2)]
        wait_for(lambda: len(service.worker.engine.decoding.answers) == 2)
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(complete, client, prompt) for prompt in SECRETS[:4]]
            wait_for(lambda: len(service.worker.engine.waiting) == 4)
            for held, thread in holding:
                leave(held)
                thread.join(300)
            expected = [reader.ask(prompt, max_new_tokens=12)[0] for prompt in SECRETS[:4]]
            assert [answer.result(300) for answer in answers] == expected


def test_a_memory_whose_last_token_is_unread_is_read_to_its_end(model, reader):
    """As `generate` leaves one."""
    state = reader.state.continuation()
    model.generate(torch.tensor([[73]]), past_key_values=state, max_new_tokens=3, do_sample=False)
    assert state.pending is not None
    service = Service(model, byte_tokenizer(), state, LIMITS)
    assert (service.memory.pending, int(service.memory.position)) == (None, int(state.position) + 1)
    assert state.pending is not None


def test_a_deadline_and_a_failure_end_one_request_alone(model, reader):
    with serving(
        Service(model, byte_tokenizer(), reader.state, Limits(ENDLESS, seconds=1.0, shutdown_seconds=0.0))
    ) as url:
        body = {"model": "titans", "prompt": "a", "max_tokens": ENDLESS}
        assert (
            "longer than 1 seconds"
            in refusal(httpx.post(f"{url}/v1/completions", json=body, timeout=300), 504)["message"]
        )
        streamed = httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, timeout=300).text.split("\n\n")
        assert "longer than 1 seconds" in json.loads(streamed[-3].removeprefix("data: "))["error"]["message"]
        assert streamed[-2:] == ["data: [DONE]", ""]
    broken = reader.state.clone()
    broken.layer_caches = [cache._replace(memory=cache.memory._replace(conv_state=())) for cache in broken.layer_caches]
    with serving(Service(model, byte_tokenizer(), broken, LIMITS)) as url:
        for _ in range(2):
            body = {"model": "titans", "prompt": "a"}
            error = refusal(httpx.post(f"{url}/v1/completions", json=body, timeout=300), 500)
            assert error["message"].startswith("the model failed")
            assert error["type"] == "server_error"


def test_a_key(model, reader):
    with serving(Service(model, byte_tokenizer(), reader.state, LIMITS, api_key="open-sesame")) as url:
        for key in ("none", "open-sesam", "open-sesame2"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                openai.OpenAI(base_url=f"{url}/v1", api_key=key).models.list()
        for path in ("/v1/models", "/v1/completions", "/reset", "/other"):
            assert httpx.post(url + path, json={}).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        header = {"authorization": "Bearer open-sesame"}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="open-sesame")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(pieces, client, "a", max_tokens=ENDLESS)
            wait_for(lambda: httpx.post(f"{url}/reset", headers=header).json()["ended"] == 1)
            with pytest.raises(openai.APIError, match="the server was reset"):
                answer.result(300)
        assert len(complete(client, "a")) > 0


def test_without_a_key_nothing_can_be_reset(http):
    assert "API key" in refusal(http.post("/reset"), 403)["message"]


# ------------------------------------------------------------------------------------------------ the command


def test_sigterm_ends_it_whatever_is_asked(folder, reader, tmp_path):
    memory = tmp_path / "a.memory"
    reader.state.save(memory)
    command = [sys.executable, "-m", "titans_lm.cli", "serve", "--model", str(folder), "--memory", str(memory)]
    command[1:3] = ["-c", "import sys; from titans_lm.cli import main; sys.exit(main())"]
    environment = {**os.environ, KEY: "open-sesame"}
    options = ["--port", "0", "--shutdown-seconds", "0.5", "--max-tokens", str(ENDLESS)]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = next(word for line in process.stderr for word in line.split() if word.startswith("http://"))
        assert url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=url.rstrip(";"), api_key="open-sesame", max_retries=0)
        assert complete(client, "It was") == reader.ask("It was", max_new_tokens=12)[0]
        stream = client.completions.create(model="titans", prompt="a", max_tokens=ENDLESS, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert process.wait(300) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


def test_what_is_wrong_is_one_line(folder, capsys, monkeypatch):
    taken = listen("127.0.0.1", 0)
    taken.listen()
    serve = ["serve", "--model", str(folder)]
    for arguments, words in (
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--port", str(taken.getsockname()[1])], "cannot listen at 127.0.0.1"),
        (["--memory", str(folder / "no")], "no"),
        (["--api-key", ""], "--api-key must be one word"),
        (["--api-key", "two words"], "--api-key must be one word"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1, got 0"),
        (["--max-prompt-bytes", "-1"], "--max-prompt-bytes must be at least 1, got -1"),
        (["--max-requests", "0"], "--max-requests must be at least 1, got 0"),
        (["--max-batch-size", "0"], "--max-batch-size must be at least 1, got 0"),
        (["--prefill-chunk-size", "0"], "--prefill-chunk-size must be at least 1, got 0"),
        (["--max-stops", "-1"], "--max-stops must not be negative, got -1"),
        (["--request-seconds", "nan"], "--request-seconds must be a number above 0, got nan"),
        (["--shutdown-seconds", "inf"], "--shutdown-seconds must be a number, not negative, got inf"),
    ):
        assert main([*serve, *arguments]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    taken.close()
    monkeypatch.setenv(KEY, "")
    assert main(serve) == 2
    assert f"{KEY} must be one word" in capsys.readouterr().err
