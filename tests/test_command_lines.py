"""Every command with every hostile input: it works, or it ends in one line, status 2, and nothing is lost.

`INPUTS` are files as people have them, `COMMANDS` where a command takes one. A new command is one line in `COMMANDS`; a
new input is one in `INPUTS`, tried with all commands. Commands run in this process, since starting one costs seconds.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from titans_lm import Reader, TitansForCausalLM, TitansState
from titans_lm.cli import main
from titans_lm.models.hub import load
from titans_lm.models.tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")  # as for a user: no type is checked for the package
TEXT = "It was a dark and stormy night; the rain fell in torrents.\n" * 4
LIMIT = 20_000
"""Tokens that the model reads at most, so that a huge file is refused soon after its beginning."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model's, small enough to be asked often."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = tiny_config("mag", vocab_size=260, num_hidden_layers=1, max_position_embeddings=LIMIT)
    TitansForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


# ------------------------------------------------------------------------------------------------ inputs


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return make


def a_folder(place: Path) -> Path:
    (place / "texts").mkdir()
    return place / "texts"


def growing(place: Path) -> Path:
    """Another process, as it were, appends to it as long as the test runs."""
    path = written("log.txt", TEXT.encode())(place)

    def append() -> None:
        while path.exists():
            with path.open("a") as file:
                file.write("more\n")
            time.sleep(0.02)

    threading.Thread(target=append, daemon=True).start()
    return path


def fifo(place: Path) -> Path:
    """Something waits to write to it, once."""
    path = place / "fifo"
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(OSError), path.open("w") as file:
            file.write(TEXT)

    threading.Thread(target=write, daemon=True).start()
    return path


def standard_input(place: Path) -> Path:  # noqa: ARG001 - what `stdin` gives
    return Path("-")


TEXTS = {"growing", "fifo", "standard input", "spaces", "non-ASCII", "markup", "byte order mark", "one byte"}
"""Inputs that can be read as texts, to their end; the others are refused."""
INPUTS: dict[str, Callable[[Path], Path]] = {
    "missing": lambda place: place / "nowhere.txt",
    "empty": written("empty.txt", b""),
    "blank": written("blank.txt", b" \n\n\t"),
    "binary": written("binary.txt", bytes(range(256)) * 9),
    "invalid late": written("late.txt", TEXT.encode() * 5000 + b"caf\xe9"),
    "huge line": written("line.txt", b"word " * 300_000),
    "growing": growing,
    "unreadable": lambda _: Path("/proc/self/mem"),  # to anyone: nothing is mapped at its beginning
    "folder": a_folder,
    "fifo": fifo,
    "standard input": standard_input,
    "full device": lambda _: Path("/dev/full"),
    "spaces": written("a long  name.txt", TEXT.encode()),
    "non-ASCII": written("kötü ad 名.txt", TEXT.encode()),
    "markup": written("[bold] \x1b[31m [/x] :smile:.txt", TEXT.encode()),
    "byte order mark": written("bom.txt", b"\xef\xbb\xbf" + TEXT.encode()),
    "one byte": written("one.txt", b"a"),
}


# ------------------------------------------------------------------------------------------------ commands

Command = Callable[[Path, Path, Path], list[object]]
COMMANDS: dict[str, tuple[set[str], Command]] = {
    "read": (TEXTS, lambda model, place, file: ["read", "--model", model, "--memory", place / "m", file]),
    "read into": ({"missing"}, lambda model, place, file: ["read", "--model", model, "--memory", file, place / "book"]),
    "infer context": (
        TEXTS,
        lambda model, place, file: ["infer", "--model", model, "--context", file, "--save-memory", place / "m"],
    ),
    "infer load": (
        set(),
        lambda model, _, file: ["infer", "--model", model, "--load-memory", file, "--prompt", "a"],
    ),
    "infer save": (
        {"missing", "empty"},
        lambda model, place, file: [
            "infer", "--model", model, "--context", place / "book", "--save-memory", file,
        ],
    ),
    "memory show": (set(), lambda _, __, file: ["memory", "show", file]),
    "memory verify": (set(), lambda _, __, file: ["memory", "verify", file]),
    "memory fork": (set(), lambda _, place, file: ["memory", "fork", file, place / "m"]),
    "memory diff": (set(), lambda _, place, file: ["memory", "diff", file, place / "book"]),
    "demo model": (set(), lambda _, place, file: ["demo", "--model", file, "--output", place / "out"]),
}  # fmt: skip
"""By name: inputs with which it succeeds, and its arguments for (folder of a model, empty folder, input)."""


@pytest.fixture
def stdin(monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))


def contents(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != "log.txt"}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("stdin")
def test_it_works_or_ends_in_one_line_and_nothing_is_lost(command, kind, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works, arguments = COMMANDS[command]
    (tmp_path / "book").write_text(TEXT)
    file = INPUTS[kind](tmp_path)
    before = contents(tmp_path)
    try:
        status = main(list(map(str, arguments(folder, tmp_path, file))))
    finally:
        (tmp_path / "log.txt").unlink(missing_ok=True)  # ends what appends to it
    out, err = capsys.readouterr()
    assert status == (0 if kind in works else 2), err
    if kind not in works:
        verb = str(arguments(folder, tmp_path, file)[0])
        last = err.splitlines()[-1]
        assert last.startswith(f"titans {verb}: ")
        assert "\x1b" not in last
        assert "Traceback" not in out + err
    after = contents(tmp_path)
    assert all(after[path] == content for path, content in before.items() if path != file or kind not in works)


# ------------------------------------------------------------------------------------------------ signals, outputs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["read", "infer"])
def test_a_signal_to_end_saves_what_was_read(verb, number, folder, tmp_path, capsys):
    book, memory = written("book.txt", TEXT.encode())(tmp_path), tmp_path / "m"
    os.mkfifo(tmp_path / "silent")  # nothing is ever written: the command waits here

    writers: list[int] = []

    def end() -> None:
        while not writers:
            with contextlib.suppress(OSError):  # until the command has it open: it has read the book then
                writers.append(os.open(tmp_path / "silent", os.O_WRONLY | os.O_NONBLOCK))
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, number)

    threading.Thread(target=end, daemon=True).start()
    texts = [str(book), str(tmp_path / "silent")]
    options = ["--memory", str(memory), "--save-seconds", "0", *texts]
    if verb == "infer":
        options = ["--save-memory", str(memory), "--context", *texts]
    assert main([verb, "--model", str(folder), *options]) == 128 + number
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]
    os.close(writers[0])
    assert TitansState.load(memory, load(folder)[0]).position.item() == len(TEXT)
    assert not list(tmp_path.glob(".*"))


def closed_pipe(mode: str) -> io.TextIOWrapper:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, mode)


@pytest.mark.parametrize(("output", "status"), [(Path("/dev/full").open, 2), (closed_pipe, 141)])
@pytest.mark.parametrize("verb", ["memory", "infer"])
def test_an_output_that_takes_nothing_is_one_line(verb, output, status, folder, tmp_path, capsys, monkeypatch):
    model, tokenizer = load(folder)
    Reader(model, tokenizer, memory=tmp_path / "m").read(TEXT)
    before = contents(tmp_path)
    command = ["memory", "show", str(tmp_path / "m")]
    if verb == "infer":
        command = ["infer", "--model", str(folder), "--load-memory", str(tmp_path / "m"), "--prompt", "a"]
    with monkeypatch.context() as patch, output("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(command) == status
    assert ("No space left" in capsys.readouterr().err) == (status == 2)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_it_reads_without_a_home_a_terminal_and_a_compiler(folder, tmp_path):
    """In a process of its own, as `env -i` starts it."""
    memory = tmp_path / "çok uzun ad.memory"
    command = [sys.executable, "-c", "import sys; from titans_lm.cli import main; sys.exit(main())"]
    command += ["read", "--model", str(folder), "--memory", str(memory), "-"]
    few = {"PATH": "/nowhere", "TERM": "dumb", "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=few, input=TEXT.encode(), capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert f"{len(TEXT)} tokens read" in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert memory.is_file()
