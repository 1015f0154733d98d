"""The server, asked by a real client over loopback: it knows its memory, and no client knows another."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from transformers import pipeline

from titans_lm import Reader
from titans_lm.cli import main
from titans_lm.data import byte_tokenizer
from titans_lm.serve import _listen, app

SECRETS = [f"my number is {n}{n}{n}; " * 6 for n in range(8)]


@pytest.fixture(scope="module")
def reader(model) -> Reader:
    return Reader(model, byte_tokenizer()).read("It was a dark and stormy night. " * 9)


@pytest.fixture
def preloaded(model, reader):
    model.begin_with(reader.state)
    yield model
    model.begin_with(None)


@pytest.fixture
def client(preloaded):
    listening = _listen("localhost", 0)
    host, port = listening.getsockname()[:2]
    server = uvicorn.Server(uvicorn.Config(app(preloaded, byte_tokenizer()), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none")
    server.should_exit = True
    thread.join()


def complete(client, prompt: str) -> str:
    answer = client.completions.create(model="titans", prompt=prompt, max_tokens=12, temperature=0)
    return answer.choices[0].text


def test_a_client_is_answered_from_the_memory(client, model, reader):
    (expected,) = reader.ask("It was", max_new_tokens=12)
    assert complete(client, "It was") == expected
    model.begin_with(None)
    assert complete(client, "It was") != expected


def test_many_clients_at_once_have_memories_of_their_own(client, reader):
    """None of them sees what another said, before or at the same time; the memory stays as it was."""
    alone = {prompt: reader.ask(prompt, max_new_tokens=12)[0] for prompt in SECRETS}
    prompts = SECRETS * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert answers == [alone[prompt] for prompt in prompts]


def test_chat_and_streaming(client, reader):
    messages = [{"role": "user", "content": "It was"}]
    options = {"model": "titans", "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**options, stream=True)]
    assert len(pieces) > 1
    assert whole == reader.ask("It was\n", max_new_tokens=12)[0]
    assert "".join(pieces).rstrip("\ufffd") == whole.rstrip("\ufffd")  # half a character is never streamed


def test_there_is_one_model(client):
    assert [model.id for model in client.models.list()] == ["titans"]
    with pytest.raises(openai.BadRequestError, match="400"):
        client.completions.create(model="another", prompt="a")


def test_pipelines_begin_with_the_memory(preloaded, reader):
    generate = pipeline("text-generation", model=preloaded, tokenizer=byte_tokenizer())
    (expected,) = reader.ask("It was", max_new_tokens=12)
    for _ in range(2):
        answer = generate("It was", max_new_tokens=12, do_sample=False, return_full_text=False)
        assert answer[0]["generated_text"] == expected


def test_streams_begin_with_a_fork_in_every_row(preloaded, reader):
    state = preloaded.initial_state(3)
    assert state.position.tolist() == [reader.state.position.item()] * 3
    assert state.columns == 0
    with pytest.raises(ValueError, match="this one has 3"):
        preloaded.begin_with(state)


def test_what_is_wrong_is_one_line(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    taken = _listen("localhost", 0)
    taken.listen()
    serve = ["serve", "--model", str(tmp_path / "model")]
    for arguments, words in (
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--port", str(taken.getsockname()[1])], "cannot listen at localhost"),
        (["--memory", str(tmp_path / "no")], "no"),
    ):
        assert main([*serve, *arguments]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    taken.close()
