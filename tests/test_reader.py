"""Reading once, keeping what was learned: resumed to the last bit, whatever stopped it; asked without being changed."""

import hashlib
import io
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import VOCABULARY, assert_bitwise, state_tensors, tiny_config
from titans_lm import Reader, TitansForCausalLM, TitansState
from titans_lm.cli import main
from titans_lm.inference.generate import answer
from titans_lm.layers.neural_memory import memories
from titans_lm.models.tokenizer import byte_tokenizer
from tolerance import assert_close, relative_error

BOOK = "It was a dark and stormy night; the rain fell in torrents. " * 12


@pytest.fixture
def books(tmp_path) -> list[Path]:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, text in zip(paths, (BOOK, BOOK.swapcase()), strict=True):
        path.write_text(text)
    return paths


def reader(model, **options) -> Reader:
    return Reader(model, byte_tokenizer(), **{"piece": 50, "save_seconds": 0.0, **options})


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> TitansState:
    """Both books read without an interruption."""
    texts = [BOOK, BOOK.swapcase()]
    folder = tmp_path_factory.mktemp("books")
    for name, text in zip(("one.txt", "two.txt"), texts, strict=True):
        (folder / name).write_text(text)
    return reader(model).read(folder / "one.txt", folder / "two.txt").state


class Stop(Exception):
    pass


def read_some(r: Reader, texts, pieces: int) -> None:
    """Read so many pieces and fail."""
    for i, _ in enumerate(r.reading(*texts)):
        if i + 1 == pieces:
            raise Stop


# ------------------------------------------------------------------------------------------------ reading


def test_reading_is_the_model_over_the_tokens(model, whole):
    ids = torch.tensor([list((BOOK + BOOK.swapcase()).encode())])
    with torch.no_grad():
        expected = model(ids, use_cache=True).past_key_values
    for name, value in state_tensors(whole).items():
        assert_close(value, state_tensors(expected)[name], name)


@pytest.mark.parametrize("pieces", [1, 7, 15, 16, 17, 30])
def test_a_reading_that_failed_anywhere_resumes_to_the_last_bit(model, books, whole, tmp_path, pieces):
    memory = tmp_path / "memory"
    with pytest.raises(Stop):
        read_some(reader(model, memory=memory), books, pieces)
    resumed = reader(model, memory=memory)
    assert resumed.state.position.item() < len(BOOK) * 2
    read = [p.tokens for p in resumed.reading(*books)]
    assert 0 < read[-1] < len(BOOK) * 2
    assert_bitwise(resumed.state, whole)
    assert [(s.name, s.tokens, s.done) for s in resumed.state.sources] == [
        ("one.txt", len(BOOK), True),
        ("two.txt", len(BOOK), True),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_killed_at_fifty_random_moments_no_file_is_ever_broken(model, books, whole, tmp_path):
    begun = time.monotonic()
    reader(model, memory=tmp_path / "memory").read(*books)
    usual = time.monotonic() - begun
    (tmp_path / "memory").unlink()
    memory, draw, positions = tmp_path / "memory", random.Random(0), set()
    for _ in range(50):
        child = os.fork()
        if child == 0:
            reader(model, memory=memory).read(*books)
            os._exit(0)
        time.sleep(draw.uniform(0, 0.4 * usual))  # beginning takes some of it
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if memory.exists():
            positions.add(TitansState.load(memory, model).position.item())
    assert len(positions) > 3  # it was killed within the reading, and went on
    finished = reader(model, memory=memory)
    if not finished.state.sources[-1].done:
        finished.read(*books)
    if len(finished.state.sources) == 2:  # else it was done, and begun once more
        assert_bitwise(finished.state, whole)
    for left in (*tmp_path.glob(".*.part"), *tmp_path.glob(".*.lock")):
        left.unlink()  # what a killed process was writing, and its lock; the file itself was never touched
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory", "one.txt", "two.txt"]


def test_a_killed_reading_resumes_to_the_last_bit(model, books, whole, tmp_path):
    memory = tmp_path / "memory"
    child = os.fork()
    if child == 0:
        for i, _ in enumerate(reader(model, memory=memory).reading(*books)):
            if i == 9:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(child, 0)
    resumed = reader(model, memory=memory)
    assert 0 < resumed.state.position.item() < len(BOOK)
    assert_bitwise(resumed.read(*books).state, whole)


def test_another_text_does_not_go_on_with_an_interrupted_one(model, books, tmp_path):
    memory = tmp_path / "memory"
    with pytest.raises(Stop):
        read_some(reader(model, memory=memory), books, 3)
    position = TitansState.load(memory, model).position
    other = tmp_path / "other.txt"
    other.write_text("another")
    for texts in ([other], books[:1], books[::-1], [*books, other]):
        with pytest.raises(ValueError, match=r"in the middle of one.txt \(150 tokens read"):
            reader(model, memory=memory).read(*texts)
    with pytest.raises(ValueError, match="in the middle"):
        reader(model, memory=memory, mode="frozen").read(*books)
    books[1].write_text("changed since")
    with pytest.raises(ValueError, match="in the middle"):
        reader(model, memory=memory).read(*books)
    assert torch.equal(TitansState.load(memory, model).position, position)
    r = reader(model, memory=memory)
    r.abandon()
    r.read(other)
    assert [(s.name, s.tokens, s.done) for s in r.state.sources] == [("one.txt", 150, False), ("other.txt", 7, True)]
    r.read(*books[:1])  # what was abandoned does not stand in the way
    assert r.state.sources[-1].done


def test_streams_texts_and_tokens_are_read_alike(model, whole, tmp_path):
    words = [BOOK, BOOK.swapcase()]
    ids = [list(w.encode()) for w in words]
    expected = state_tensors(whole)
    for texts in (words, [iter(words)], [(w for w in words)], [torch.tensor(i) for i in ids], ids, [iter(ids)]):
        state = reader(model).read(*texts).state
        assert all(torch.equal(v, expected[k]) for k, v in state_tensors(state).items())
    memory = tmp_path / "memory"
    with pytest.raises(Stop):
        read_some(reader(model, memory=memory), [iter(words)], 20)
    with pytest.raises(ValueError, match="not the stream"):
        reader(model, memory=memory).read(iter(words[::-1]))
    with pytest.raises(ValueError, match="ends before the 958 tokens"):
        reader(model, memory=memory).read(iter(words[:1]))
    assert_bitwise(reader(model, memory=memory).read(iter(words)).state, whole)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_pieces_of_any_size_leave_the_same_memory_after_a_hundred_thousand_tokens(dtype, tolerance):
    torch.manual_seed(0)
    # Larger steps make random text a chaotic system, where a rounding grows to be everything.
    options = {"num_hidden_layers": 1, "memory_chunk_size": 32, "window_size": 32, "memory_lr": 0.02}
    model = TitansForCausalLM(tiny_config("mag", **options)).to(dtype)
    ids = torch.randint(VOCABULARY, (100_000,))
    one, other = (state_tensors(Reader(model, piece=piece).read(ids).state) for piece in (4096, 1999))
    for name, value in one.items():
        if value.is_floating_point():
            assert relative_error(other[name], value) < tolerance, name


def test_frozen_learning_and_reset(model, books):
    learning, frozen, reset = (reader(model, mode=mode).read(*books).state for mode in ("learning", "frozen", "reset"))
    begin = model.initial_state(1)
    begin.frozen = True
    with torch.no_grad():
        model(torch.tensor([[1]]), past_key_values=begin)  # begins with the first memory, and does not write to it
    for layer in range(2):
        first = begin.layer_caches[layer].memory.memory.weights
        assert all(map(torch.equal, frozen.layer_caches[layer].memory.memory.weights, first))
        assert not torch.equal(learning.layer_caches[layer].memory.memory.weights[0], first[0])
    assert not frozen.frozen  # what follows decides for itself
    assert frozen.position.item() == learning.position.item() == 2 * len(BOOK)
    alone = reader(model).read(books[1]).state
    assert reset.position.item() == len(BOOK)
    assert all(torch.equal(v, state_tensors(alone)[k]) for k, v in state_tensors(reset).items())
    assert [s.mode for s in reset.sources] == ["reset", "reset"]


def test_progress_says_how_far_it_is(model, books):
    seen = list(reader(model).reading(*books))
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    assert seen[-1].tokens == 2 * len(BOOK)
    assert seen[-1].left == pytest.approx(0.0)
    assert all(p.rate > 0 and p.left is not None and p.surprise is not None and p.surprise > 0 for p in seen)
    assert [p.source.name for p in seen] == sorted(p.source.name for p in seen)
    stream = list(reader(model).reading(iter([BOOK])))
    assert all(p.left is None for p in stream)
    assert all(p.surprise is None for p in reader(model, mode="frozen").reading(books[0]))


def test_what_is_not_written_costs_a_reader_less():
    def operations(threshold: float | None) -> int:
        torch.manual_seed(0)
        model = TitansForCausalLM(tiny_config("mag", surprise_threshold=threshold)).requires_grad_(False)
        for memory in memories(model):
            memory.backend = "chunked"  # whose operations the counter sees
        with FlopCounterMode(display=False) as counter:
            *_, last = Reader(model).reading(
                torch.randint(VOCABULARY, (100,), generator=torch.Generator().manual_seed(0))
            )
        assert (last.surprise is None) == (threshold is not None)
        return counter.get_total_flops()

    assert operations(1e9) < operations(0.0)
    assert operations(1e9) < operations(None)


@pytest.mark.usefixtures("unchecked")
def test_a_reading_that_failed_keeps_the_memory_from_nothing(model, books, tmp_path):
    memory = tmp_path / "memory"
    r = reader(model, memory=memory)
    with pytest.raises(ValueError, match=r"token 9999 at 2 is not one of this model's, which are 0 to 259"):
        r.read([1, 2, 9999])
    (tmp_path / "bad.txt").write_bytes(BOOK.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"byte {len(BOOK)} is 0xff"):
        r.read(tmp_path / "bad.txt")
    assert not memory.exists()  # nothing was read
    assert r.state.sources == []
    with pytest.raises(ValueError, match="whole numbers"):
        r.read([[1, 2], [3, 4], [5, 6.5]])
    assert [(s.tokens, s.abandoned) for s in r.state.sources] == [(4, True)]
    read = reader(model, memory=memory).read(books[0]).state.sources
    assert [(s.name, s.tokens, s.done) for s in read] == [("stream", 4, False), ("one.txt", len(BOOK), True)]


def test_only_what_was_read_is_recorded(model, tmp_path):
    path, line = tmp_path / "log.txt", BOOK + "\n"  # whose end is a piece's, before the file is read on
    path.write_text(line)
    known = hashlib.sha256(line.encode()).hexdigest()

    def changed_after_a_piece(change) -> Reader:
        r = reader(model)
        for _ in r.reading(path):
            change()
        return r

    (grown,) = changed_after_a_piece(lambda: path.write_text(line + "more")).state.sources
    assert (grown.size, grown.tokens, grown.sha256, grown.done) == (len(line), len(line), known, True)
    path.write_text(line)
    r = reader(model)
    pieces = r.reading(path)
    next(pieces)  # the file's first megabyte is in memory now
    assert list(pieces)[-1].source.done


def test_a_file_that_shrinks_is_not_recorded_as_read(model, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(BOOK)
    r = reader(model)
    other = r.reading(iter(["first"]), path)  # examined when it begins, and opened when its turn comes
    next(other)
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"log\.txt changed while it was read: 100 tokens"):
        list(other)
    stream, record = r.state.sources
    assert stream.done
    assert (record.tokens, record.size, record.done, record.abandoned) == (100, 100, False, True)
    assert record.sha256 == hashlib.sha256(BOOK[:100].encode()).hexdigest()


@pytest.mark.usefixtures("unchecked")
def test_files_pipes_and_numpy_tokens_are_read_as_their_text_is(model, tmp_path, monkeypatch):
    path, both = tmp_path / "one.txt", (BOOK + BOOK.swapcase()).encode()
    path.write_bytes(b"\xef\xbb\xbf" + both)
    expected = reader(model).read(both.decode()).state
    tokens = np.frombuffer(both, np.uint8)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(both)))
    for text in (path, Path("-"), tokens, [np.int64(t) for t in tokens], torch.tensor(list(both))):
        assert_bitwise(reader(model).read(text).state, expected)
    assert reader(model).read(np.array([1, 2])).state.position.item() == 2
    with pytest.raises(ValueError, match="standard input can be read once"):
        reader(model).read(Path("-"), Path("-"))


def test_an_interrupted_pipe_goes_on_where_it_was(model, tmp_path, monkeypatch):
    both, memory = (BOOK + BOOK.swapcase()).encode(), tmp_path / "memory"

    def pipe() -> Path:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(both)))
        return Path("-")

    with pytest.raises(Stop):
        read_some(reader(model, memory=memory), [pipe()], 5)
    resumed = reader(model, memory=memory).read(pipe()).state
    assert_bitwise(resumed, reader(model).read(both.decode()).state)
    (record,) = resumed.sources
    assert (record.name, record.tokens, record.done) == ("stdin", len(both), True)
    assert record.sha256 == hashlib.sha256(both).hexdigest()


def test_one_reader_at_a_time_writes_a_memory_file(model, books, tmp_path):
    memory = tmp_path / "memory"
    first, second = reader(model, memory=memory), reader(model, memory=memory)
    reading = first.reading(*books)
    next(reading)
    for other in (lambda: second.read(books[1]), second.save, lambda: model.initial_state(1).save(memory)):
        with pytest.raises(ValueError, match=rf"memory is in use by process {os.getpid()} on .*, since 20"):
            other()
    list(reading)
    with pytest.raises(ValueError, match="was written by another since this reader loaded it"):
        second.read(books[1])
    assert reader(model, memory=memory).state.position.item() == 2 * len(BOOK)
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------ asking


def test_a_question_leaves_no_trace(model, books):
    r = reader(model).read(books[0])
    before = r.state.clone()
    first = r.ask("It was", max_new_tokens=8)
    assert r.ask("It was", max_new_tokens=8) == first
    news = "Nothing of this was in the book: 1, 2, 3! " * 3
    assert r.ask(news, max_new_tokens=30, frozen=True) != r.ask(news, max_new_tokens=30)
    assert_bitwise(r.state, before)
    r.ask("It was", max_new_tokens=8, remember=True)
    assert r.state.position.item() == before.position.item() + 6 + 8
    assert r.state.sources == before.sources


def test_a_conversation_is_the_talk_read_as_a_whole(model, books):
    r, talk = reader(model).read(books[0]), reader(model).read(books[0])
    for prompt, options in (("It was", {}), ("night", {"num_beams": 3}), ("rain", {"temperature": 1.0, "top_k": 0})):
        ids = torch.tensor([list(prompt.encode())])
        options = {"max_new_tokens": 6, "do_sample": "temperature" in options, "pad_token_id": 256, **options}
        torch.manual_seed(0)
        out = model.generate(ids, past_key_values=talk.state.continuation(), **options)
        talk.read(out[0])  # prompt and answer, to its last token
        torch.manual_seed(0)
        r.ask(prompt, remember=True, **options)
        assert r.state.position.item() == talk.state.position.item()
    for name, tensor in state_tensors(r.state).items():
        assert_close(tensor, state_tensors(talk.state)[name], name)


def test_beams_and_several_answers_are_those_of_generate(model, books):
    r = reader(model).read(books[0])
    answers = r.ask("It was", "a", num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert len(answers) == 4
    assert answers[:2] == r.ask("It was", num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert answers[2:] == r.ask("a", num_beams=3, num_return_sequences=2, max_new_tokens=6)


def test_prompts_of_any_length_have_forks_of_one_memory(model, books):
    r = reader(model).read(books[0])
    prompts = ["It was", "a", "and stormy night; "]
    assert r.ask(*prompts, max_new_tokens=9) == [r.ask(p, max_new_tokens=9)[0] for p in prompts]


def test_an_answer_stops_at_a_text_and_follows_the_seed(model, books):
    r = reader(model).read(books[0])
    (text,) = r.ask("It was", max_new_tokens=40)
    pairs = (text[i : i + 2] for i in range(3, len(text) - 1))
    stop = next(pair for pair in pairs if pair.isascii() and pair.isprintable())  # half a character is no text
    (short,) = r.ask("It was", max_new_tokens=40, stop_strings=[stop])
    assert short == text[: text.index(stop) + len(stop)]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn += r.ask("It was", max_new_tokens=20, do_sample=True)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.usefixtures("unchecked")
def test_what_is_wrong_is_said(model, books, tmp_path):
    with pytest.raises(ValueError, match="tokenizer cannot be passed: prompts, memory and reader determine it"):
        reader(model).read(books[0]).ask("a", stop_strings=["b"], tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="mode='learn' is not one of: learning, frozen, reset"):
        Reader(model, mode="learn")
    with pytest.raises(ValueError, match="piece must be at least 1"):
        Reader(model, piece=0)
    with pytest.raises(ValueError, match="without a tokenizer reads tokens"):
        Reader(model).read("text")
    with pytest.raises(ValueError, match="cannot be asked"):
        Reader(model).ask("text")
    r = reader(model)
    for texts, words in (([""], "empty"), ([torch.zeros(2, 2)], "whole numbers"), ([tmp_path / "no.txt"], "not exist")):
        with pytest.raises(ValueError, match=words):
            r.read(books[0], *texts)
        assert r.state.position.item() == 0
    with pytest.raises(ValueError, match="a prompt is empty"):
        r.ask("a", "")
    for odd, words in ((["a"], "got list"), (b"a", "got bytes"), (None, "got NoneType")):
        with pytest.raises(ValueError, match=rf"a prompt is a str, {words}; several are ask"):
            r.ask("a", odd)
    with pytest.raises(ValueError, match="got bytes: decode them"):
        r.read(b"a")
    with pytest.raises(ValueError, match="no prompt"):
        r.ask()
    with pytest.raises(ValueError, match="one prompt can be remembered"):
        r.ask("a", "b", remember=True)
    with pytest.raises(ValueError, match="one answer can be remembered, and num_return_sequences gave 2"):
        r.ask("a", remember=True, num_beams=2, num_return_sequences=2, max_new_tokens=2)
    for option, words in (
        ({"return_dict_in_generate": True}, "answers are texts"),
        ({"use_cache": False}, "the memory, which is the cache"),
        ({"attention_mask": torch.ones(1, 1)}, "attention_mask cannot be passed"),
    ):
        with pytest.raises(ValueError, match=words):
            r.ask("a", **option)
    for seconds in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="save_seconds at least 0"):
            reader(model, save_seconds=seconds)
    with pytest.raises(ValueError, match="errors='ignore' is not one of: strict, replace"):
        reader(model, errors="ignore")


def test_the_name_of_a_file_is_read_as_a_text_with_a_warning(model, books, recwarn):
    r = reader(model).read("no such file.txt")
    assert not recwarn
    name = str(books[0])
    with pytest.warns(UserWarning, match=r"as a text of \d+ characters, .*pass Path\("):
        r.read(name)
    assert r.state.position.item() == len("no such file.txt") + len(name)


# ------------------------------------------------------------------------------------------------ titans read


def test_the_command_reads_and_goes_on(folder, model, books, whole, tmp_path, capsys):
    memory = tmp_path / "memory"
    r = Reader(model, byte_tokenizer(), memory=memory, piece=100)
    with pytest.raises(Stop):
        read_some(r, books, 3)
    arguments = ["read", "--model", str(folder), "--memory", str(memory), *map(str, books)]
    assert main(arguments) == 0
    assert "1,416 tokens read" in capsys.readouterr().err.replace("\n", " ")
    state = TitansState.load(memory, model)
    for name, value in state_tensors(state).items():
        assert_close(value, state_tensors(whole)[name], name)
    with pytest.raises(Stop):
        read_some(Reader(model, byte_tokenizer(), memory=memory, piece=100), books, 3)
    assert main([*arguments[:-1], str(folder / "config.json")]) == 2
    assert "in the middle of one.txt" in capsys.readouterr().err
    assert main([*arguments, "--abandon"]) == 0
    assert main([*arguments[:4], str(tmp_path / "no" / "memory"), *arguments[5:]]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


def test_a_memory_that_has_not_read_its_last_token_reads_on(tmp_path):
    """As `generate` leaves it."""
    model, state = TitansForCausalLM(tiny_config("mag", vocab_size=260)).eval(), None
    ids = torch.tensor([list(b"It was a dark and stormy night. ")])
    state = model.initial_state(1)
    out = model.generate(
        ids, past_key_values=state, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=256
    )
    assert state.pending is not None
    state.save(tmp_path / "memory")
    reader = Reader(model, byte_tokenizer(), memory=tmp_path / "memory").read("Rain fell.")
    expected = model.initial_state(1)
    with torch.no_grad():
        model(torch.cat([out, torch.tensor([list(b"Rain fell.")])], 1), past_key_values=expected)
    assert reader.state.pending is None
    for name, tensor in state_tensors(expected).items():
        assert_close(state_tensors(reader.state)[name], tensor, name)


def test_an_answer_is_sampled_from_all_tokens():
    torch.manual_seed(0)
    model = TitansForCausalLM(tiny_config("lmm", vocab_size=260, initializer_range=0.02)).eval()
    texts, _ = answer(
        model,
        byte_tokenizer(),
        model.initial_state(1),
        ["a"],
        do_sample=True,
        max_new_tokens=1,
        num_return_sequences=400,
    )
    assert len(set(texts)) > 50
    with pytest.raises(ValueError, match="generation_config cannot be passed"):
        answer(model, byte_tokenizer(), model.initial_state(1), ["a"], generation_config=model.generation_config)
