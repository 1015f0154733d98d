"""Reading and going on, as commands: what is remembered, what is said where something is wrong."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import commands
import titans_lm
from conftest import tiny_config
from titans_lm import TitansForCausalLM, TitansState
from titans_lm.cli import main
from titans_lm.cli.learn import RESET_EVERY, read_three_ways, tenths
from titans_lm.inference.generate import generate_from, prefill
from titans_lm.inference.known_files import KnownFiles
from titans_lm.inference.reader import Reader
from titans_lm.models.hub import load
from titans_lm.models.tokenizer import byte_tokenizer, encode

ROOT = Path(__file__).parents[1]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night. " * 40)
    return path


def said(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err.strip().splitlines()[-1] if captured.err.strip() else ""


def infer(folder, *arguments):
    return main(["infer", "--model", str(folder), *map(str, arguments)])


def test_reading_in_two_calls_through_a_file_is_reading_in_one(folder, text, tmp_path, capsys):
    options = ["--prompt", "The ", "--max-new-tokens", 20]
    assert infer(folder, "--context", text, text, *options) == 0
    whole, _ = said(capsys)
    assert infer(folder, "--context", text, "--save-memory", tmp_path / "memory") == 0
    assert infer(folder, "--load-memory", tmp_path / "memory", "--context", text, *options) == 0
    assert said(capsys)[0] == whole
    assert whole.startswith("The ")
    assert infer(folder, *options) == 0
    assert said(capsys)[0] != whole


def test_a_memory_that_generate_left_with_a_pending_token_reads_on(folder, text, tmp_path, capsys):
    model = TitansForCausalLM.from_pretrained(folder)
    state = model.initial_state(1)
    ids = model.generate(torch.tensor([list(b"It was")]), past_key_values=state, max_new_tokens=3, do_sample=False)
    state.save(tmp_path / "pending")
    model(ids, use_cache=True).past_key_values.save(tmp_path / "read")
    answers = []
    for name in ("pending", "read"):
        assert infer(folder, "--load-memory", tmp_path / name, "--context", text, "--prompt", "The ") == 0
        answers.append(said(capsys)[0])
    assert answers[0] == answers[1]


def test_short_work_of_transformers_shows_no_progress_bar(folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_hook", None)  # as in a process that ran no command yet
    assert infer(folder, "--prompt", "It") == 0
    assert "Loading weights" not in capsys.readouterr().err


@pytest.mark.slow
def test_sampling_follows_the_seed(folder, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert infer(folder, "--prompt", "a", "--max-new-tokens", 30, "--temperature", 1, "--seed", seed) == 0
        texts.append(said(capsys)[0])
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_have_forks_of_one_memory(folder, text, tmp_path, capsys):
    memory = ["--load-memory", tmp_path / "memory", "--max-new-tokens", 9]
    assert infer(folder, "--context", text, "--save-memory", tmp_path / "memory") == 0
    said(capsys)
    assert infer(folder, *memory, "--prompt", "It was", "a") == 0
    together, _ = said(capsys)
    for prompt in ("It was", "a"):
        assert infer(folder, *memory, "--prompt", prompt) == 0
        assert said(capsys)[0].rstrip("\n\ufffd") in together


def test_an_answer_ends_where_it_was_told_to(folder, capsys):
    def printable(prompt: str) -> tuple[str, int]:
        assert infer(folder, "--prompt", prompt, "--max-new-tokens", 30) == 0
        whole = said(capsys)[0]
        return whole, next((i for i, c in enumerate(whole) if i > 8 and c.isascii() and c.isprintable()), 0)

    prompts = ("It was", "It is!", "naive?", "Where?", "a rose")  # an untrained model says what it says
    prompt, (whole, place) = next((p, found) for p in prompts if (found := printable(p))[1])
    assert infer(folder, "--prompt", prompt, "--max-new-tokens", 30, "--stop", "no such text", whole[place]) == 0
    assert said(capsys)[0].rstrip("\n") == whole[: whole.index(whole[place], 6) + 1]


def test_a_conversation_is_one_stream(folder, tmp_path, monkeypatch, capsys):
    def converse(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert infer(folder, "--interactive", "--max-new-tokens", 5) == 0
        return said(capsys)[0]

    once = converse("one")
    assert converse("one", "", "/reset", "one", "/quit", "one") == once + once
    twice = converse("one", "one", f"/save {tmp_path / 'memory'}", "/save")
    assert twice.startswith(once)
    assert twice != once + once
    model, _ = load(folder)
    assert TitansState.load(tmp_path / "memory", model).position.tolist() == [2 * (len("one\n") + 5)]


def test_a_conversation_survives_a_byte_that_is_no_text(folder, monkeypatch, capsys):
    for errors, answers in (("strict", 1), ("replace", 2)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\none\n"), encoding="utf-8"))
        assert infer(folder, "--interactive", "--max-new-tokens", 3, "--errors", errors) == 0
        out, err = capsys.readouterr()
        assert out.count("one\n") == 1
        assert ("caf\ufffd" in out) == (answers == 2)
        assert ("was not read" in " ".join(err.split())) == (answers == 1)


def test_stop_takes_a_newline_as_people_type_it(folder, capsys):
    from titans_lm.cli.infer import _unescaped

    assert _unescaped(r"a\nb\tc\\n\x é") == "a\nb\tc\\n\\x é"
    options = ["--temperature", 3, "--max-new-tokens", 400]
    assert infer(folder, "--prompt", "It was", *options, "--stop", r"\n", r"\t", r"\r") == 0
    answer = said(capsys)[0].removesuffix("\n")
    assert answer[-1] in "\n\t\r"
    assert not set(answer[:-1]) & set("\n\t\r")


def test_a_text_is_not_replaced_by_a_memory(folder, text, monkeypatch, capsys):
    before = text.read_bytes()
    assert infer(folder, "--context", text, "--save-memory", text) == 2
    assert "is not a memory file and is not overwritten" in said(capsys)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/save {text}\n"))
    assert infer(folder, "--interactive") == 0
    assert "not overwritten" in " ".join(said(capsys)[1].split())
    assert text.read_bytes() == before


def test_a_memory_that_was_not_loaded_is_not_overwritten(folder, text, tmp_path, monkeypatch, capsys):
    memory, fork = tmp_path / "memory", tmp_path / "fork"
    model, _ = load(folder)

    def position(path: Path) -> int:
        return int(TitansState.load(path, model).position)

    assert infer(folder, "--context", text, "--save-memory", memory) == 0
    before, read = memory.read_bytes(), position(memory)
    (tmp_path / "link").symlink_to(memory)
    other = [folder, "--context", text, "--save-memory"]
    for path in (memory, tmp_path / "link"):
        assert infer(*other, path) == 2
        assert f"{path} holds a memory that was not loaded here" in said(capsys)[1]
    assert main(["memory", "fork", str(memory), str(fork)]) == 0
    assert infer(*other, memory, "--load-memory", fork) == 2
    assert memory.read_bytes() == before
    assert infer(*other, memory, "--load-memory", tmp_path / "link") == 0
    assert position(memory) == 2 * read

    def converse(*lines: str, load_memory: Path | None) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        loaded = ["--load-memory", load_memory] if load_memory else []
        assert infer(folder, "--interactive", "--max-new-tokens", 1, *loaded) == 0
        return " ".join(capsys.readouterr().err.split())

    before = memory.read_bytes()
    assert "was not loaded here" in converse("one", f"/save {memory}", load_memory=None)
    assert "was not loaded here" in converse("one", f"/save {memory}", load_memory=fork)
    assert memory.read_bytes() == before
    new = tmp_path / "new"
    assert "was not loaded here" not in converse("one", f"/save {new}", "one", f"/save {new}", load_memory=None)
    assert position(new) == 10
    assert "was not loaded here" not in converse("one", f"/save {fork}", load_memory=fork)
    assert position(fork) == read + 5


def test_what_another_process_wrote_meanwhile_is_not_overwritten(folder, tmp_path):
    model, tokenizer = load(folder)
    memory, files = tmp_path / "memory", KnownFiles()
    Reader(model, tokenizer, memory=memory).read("one")
    state = files.load(memory, model)
    files.save(state, memory)
    files.save(state, memory)
    Reader(model, tokenizer, memory=memory).read("two")
    before = memory.read_bytes()
    with pytest.raises(ValueError, match="was not loaded here"):
        files.save(state, memory)
    assert memory.read_bytes() == before


def test_pieces_of_any_size_leave_the_same_memory(folder):
    model, tokenizer = load(folder)
    ids = torch.as_tensor(encode(tokenizer, "some words, " * 30))[None]
    states = []
    for piece in (7, 1000):
        state = model.initial_state(1)
        logits = torch.cat([out.logits for _, out in prefill(model, ids, state, piece)], 1)
        states.append((state, logits))
    assert torch.allclose(states[0][1], states[1][1], atol=1e-3)
    assert states[0][0].position.tolist() == states[1][0].position.tolist() == [ids.shape[1]]


def test_going_on_leaves_the_memory_as_it_was(folder):
    model, tokenizer = load(folder)
    state = model.initial_state(1)
    ids = torch.as_tensor(encode(tokenizer, "some words"))[None]
    list(prefill(model, ids, state))
    first = generate_from(model, tokenizer, state, ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generate_from(model, tokenizer, state, ids, max_new_tokens=8, do_sample=False), first)
    assert state.position.tolist() == [10]


def test_the_three_readings_differ_only_in_what_is_remembered(folder):
    model, _ = load(folder)
    ids = torch.randint(256, (1, 3 * RESET_EVERY + 5), generator=torch.Generator().manual_seed(0))
    readings = read_three_ways(model, ids)
    assert {name: len(r.bits) for name, r in readings.items()} == dict.fromkeys(("learning", "frozen", "reset"), 3)
    learning, frozen, reset = (readings[name].bits for name in ("learning", "frozen", "reset"))
    assert torch.allclose(learning[0], reset[0], rtol=1e-3)  # the first piece: nothing to forget yet
    assert not torch.allclose(learning[1:], reset[1:], rtol=1e-6)
    assert not torch.allclose(learning, frozen, rtol=1e-6)
    assert len(tenths(torch.rand(25))) == 10


def damaged(folder, tmp_path, name, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda b: b[:1000]),
        ("model.safetensors", lambda b: b[: len(b) // 2]),
        ("model.safetensors", lambda _: b""),
        ("model.safetensors", lambda _: b"\x80\x04K\x01."),
        ("config.json", lambda b: b[:20]),
        ("config.json", lambda b: b.replace(b'"hidden_size": 32', b'"hidden_size": 48')),
        ("config.json", lambda b: b.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3')),
        ("config.json", lambda b: b.replace(b'"titans"', b'"llama"')),
        ("config.json", lambda b: b.replace(b'"variant"', b'"varianz"')),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_line(folder, tmp_path, capsys, name, change):
    copy = damaged(folder, tmp_path, name, change)
    assert infer(copy, "--prompt", "a") == 2
    assert said(capsys)[1].startswith(f"titans infer: {copy} ")


def test_what_is_wrong_is_one_line_and_nothing_is_lost(folder, text, tmp_path, capsys):
    memory = tmp_path / "memory"
    assert infer(folder, "--context", text, "--save-memory", memory) == 0
    before, fresh = memory.read_bytes(), tmp_path / "fresh"
    other = tmp_path / "other"
    torch.manual_seed(1)
    TitansForCausalLM(tiny_config("mag", vocab_size=260)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    empty = tmp_path / "empty"
    empty.write_text("")
    cut = tmp_path / "cut"
    cut.write_bytes(before[:-100])
    wrong = [
        ((folder,), "nothing to do"),
        ((folder, "--prompt", ""), "--prompt is empty"),
        ((folder, "--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        ((folder, "--prompt", "a", "--temperature", -1), "--temperature must be finite and not negative"),
        ((tmp_path / "nowhere", "--prompt", "a"), "is not a model"),
        ((folder, "--context", empty, "--save-memory", fresh), "is empty"),
        ((folder, "--context", tmp_path / "no.txt", "--save-memory", fresh), "does not exist"),
        ((folder, "--context", text, "--save-memory", tmp_path / "no" / "memory"), "its folder does not exist"),
        ((other, "--load-memory", memory, "--prompt", "a"), "belongs to another model"),
        ((folder, "--load-memory", cut, "--prompt", "a"), "damaged"),
        ((folder, "--load-memory", text, "--prompt", "a"), "damaged"),
        ((folder, "--load-memory", tmp_path / "no", "--prompt", "a"), "no"),
    ]
    for arguments, words in wrong:
        assert infer(*arguments) == 2, arguments
        line = said(capsys)[1]
        assert line.startswith("titans infer: ")
        assert words in line
    assert memory.read_bytes() == before
    TitansState.load(memory, load(folder)[0])


def test_a_stream_over_the_declared_limit_is_one_line(text, tmp_path, capsys):
    TitansForCausalLM(tiny_config("mag", vocab_size=260, max_position_embeddings=100)).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    assert infer(tmp_path / "m", "--context", text, "--prompt", "a") == 2
    assert "max_position_embeddings=100" in said(capsys)[1]


def test_the_command_names_its_verbs(capsys):
    with pytest.raises(SystemExit) as status:
        main(["reed"])
    assert status.value.code == 2
    assert "reed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        main(["--help"])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("train", "infer", "demo", "learn", "stability"))
    with pytest.raises(SystemExit) as status:
        main(["--version"])
    assert (status.value.code, capsys.readouterr().out) == (0, f"titans-lm {titans_lm.__version__}\n")


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # generate_from gives what generate does
def test_learning_goes_on_where_it_was_interrupted(text, tmp_path, capsys, monkeypatch):
    from titans_lm.cli import learn
    from titans_lm.training.config import parse_settings
    from titans_lm.training.trainer import TitansTrainer

    def settings(output, minutes, _):
        model = {"size": "tiny", "variant": "lmm", "num_hidden_layers": 1, "parameters": 400_000}
        training = {"output_dir": str(output), "max_minutes": minutes, "max_steps": 6, "batch_size": 2,
                    "tbptt_steps": 2, "logging_steps": 1}  # fmt: skip
        data = {"files": [str(text)] * 2, "held_out": 1, "sequence_length": 32}
        return parse_settings({"model": model, "data": data, "training": training})

    def interrupted(trainer, *arguments):
        logged(trainer, *arguments)
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    logged = TitansTrainer.log
    monkeypatch.setattr(learn, "_settings", settings)
    monkeypatch.setattr(learn, "RESET_EVERY", 256)
    command = ["learn", "--minutes", "1000000", "--bytes", "2560", "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(TitansTrainer, "log", interrupted)
        assert main([*command, str(tmp_path / "cut")]) == 130
    assert said(capsys)[1] == f"titans learn: interrupted: saved in {tmp_path}/cut/model; the same command continues"
    assert main([*command, str(tmp_path / "cut")]) == 0
    whole, cut = (json.loads((tmp_path / name / "model/trainer_state.json").read_text()) for name in ("whole", "cut"))
    assert [log["step"] for log in cut["log_history"] if "loss" in log] == [1, 2, 3, 4, 5, 6]
    assert [log.get("loss") for log in cut["log_history"]] == [log.get("loss") for log in whole["log_history"]]


def test_learning_overwrites_only_what_it_wrote(folder, tmp_path, capsys):
    memory = tmp_path / "learn/memory.safetensors"
    memory.parent.mkdir()
    model, tokenizer = load(folder)
    Reader(model, tokenizer, memory=memory).read("hours of text")
    before = memory.read_bytes()
    command = ["learn", "--minutes", "0.001", "--bytes", "50000", "--output"]
    assert main([*command, str(memory.parent)]) == 2
    assert f"{memory} has read more texts since" in said(capsys)[1]
    (memory.parent / "learn.json").write_text("[]")
    assert main([*command, str(memory.parent)]) == 2
    assert "learn.json is not of this command; give --output another folder" in said(capsys)[1]
    assert main([*command, str(memory)]) == 2
    assert "is not a folder" in said(capsys)[1]
    assert memory.read_bytes() == before


def test_stability_writes_what_it_found(tmp_path, capsys):
    from titans_lm.cli.stability import phrases, train_on_phrases

    ids, known = phrases(3, 60, torch.Generator().manual_seed(0))
    for row, mask in zip(ids, known, strict=True):
        period = int((~mask).sum())
        assert 8 <= period <= 24
        assert torch.equal(row[period:], row[:-period])
    result = train_on_phrases({"memory_layers": 1, "memory_dim": 16}, 2, 5000)
    assert result["finite"]
    assert result["finite_after_reading"]
    assert json.dumps(result)
    assert main(["stability", "--steps", "0", "--output", str(tmp_path / "x.json")]) == 2
    assert main(["stability", "--steps", "1", "--output", str(tmp_path / "no" / "x.json")]) == 2
    assert "does not exist" in said(capsys)[1]


@pytest.mark.slow
def test_an_interrupted_stability_goes_on(tmp_path, capsys):
    out = tmp_path / "x.json"
    command = ["stability", "--steps", "20", "--processes", "1", "--output", str(out)]
    process = commands.started(command, tmp_path / "said", commands.few_stability_runs)
    while not out.exists() and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    status, told = commands.ended(process), (tmp_path / "said").read_text()
    assert status == 130, told
    assert told.startswith("titans stability: interrupted: ")
    assert told.endswith(f"of 4 runs are in {out}; the same command continues\n")
    before = json.loads(out.read_text())["runs"]
    assert 0 < len(before) < 4
    assert commands.ended(commands.started(command, tmp_path / "said", commands.few_stability_runs)) == 0
    after = json.loads(out.read_text())
    assert [run["changes"]["memory_chunk_size"] for run in after["runs"]] == list(range(8, 12))
    assert all(run in after["runs"] for run in before)  # to the seconds that they took
    assert after.keys() == json.loads((ROOT / "results/stability_sweep.json").read_text()).keys()
    assert main(["stability", "--steps", "30", "--output", str(out)]) == 2
    assert "has results of other settings" in said(capsys)[1]
    out.write_text("[]")
    assert main(["stability", "--steps", "20", "--output", str(out)]) == 2
    assert "is not a result file of this command" in said(capsys)[1]
    assert out.read_text() == "[]"
