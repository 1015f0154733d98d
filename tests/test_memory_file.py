"""Memory files: of constant size, refused if one bit is wrong, and what `titans memory` says of them."""

import os
import random
import resource
import signal
import stat
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import assert_bitwise, tiny_config
from titans_lm import Reader, TitansForCausalLM, TitansState
from titans_lm.cli import main
from titans_lm.models import cache_file
from titans_lm.models.cache_file import Source
from titans_lm.models.hub import load
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.utils.memory_lock import MemoryLock


@pytest.fixture
def file(model, tmp_path) -> Path:
    path = tmp_path / "book.memory"
    Reader(model, byte_tokenizer(), memory=path).read("It was a dark and stormy night. " * 9)
    return path


def said(capsys) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


# ------------------------------------------------------------------------------------------------ files


def test_a_file_has_the_same_size_whatever_was_read(model, tmp_path):
    sizes = set()
    for tokens, texts in ((5, 1), (2000, 1), (40, 70)):
        path = tmp_path / "memory"
        r = Reader(model, memory=path, save_seconds=1e9)
        for _ in range(texts):
            r.read(torch.randint(256, (tokens,)))
        r.state.sources = [
            Source("ä'\"\\\n" * 40, 10**12, "a" * 64, "learning", 10**12, True)
        ] * texts + r.state.sources
        r.save()
        sizes.add(path.stat().st_size)
        path.unlink()
    assert len(sizes) == 1


def test_what_was_read_is_kept_the_newest_first_to_stay(model, tmp_path):
    state = model.initial_state(1)
    state.sources = [
        Source(f"{i} é", i, "a" * 64, "frozen", i, i % 2 == 0, i % 3 == 0, "2026-11-21") for i in range(1000)
    ]
    card = state.save(tmp_path / "memory")
    loaded = TitansState.load(tmp_path / "memory", model)
    assert loaded.sources == card.sources == state.sources[-len(card.sources) :]
    assert 100 < len(card.sources) < 1000


def test_a_file_is_replaced_and_never_written_to(model, file, tmp_path):
    """Who has the old file open goes on reading it: at no moment is there half of the new one."""
    before, other = file.read_bytes(), tmp_path / "other"
    other.hardlink_to(file)
    model.initial_state(1).save(file)
    assert other.read_bytes() == before != file.read_bytes()


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One bit, a byte, a piece cut out, doubled, zeroed or put elsewhere, the end cut off."""
    at, size = draw.randrange(len(content)), draw.choice((1, 2, 8, 100, 5000))
    kind = draw.randrange(6)
    if kind < 2:
        changed = bytearray(content)
        at = draw.randrange(min(3000, len(content))) if kind == 1 else at  # in the header, where it hurts
        changed[at] ^= 1 << draw.randrange(8)
        return bytes(changed)
    piece, rest = content[at : at + size], content[at + size :]
    if kind == 2:
        return content[:at] + rest
    if kind == 3:
        return content[:at] + piece + piece + rest
    if kind == 4:
        return content[:at] + bytes(draw.randrange(256) for _ in piece) + rest
    return content[:at]


def test_six_hundred_mutated_files_are_refused(model, file):
    content, draw = file.read_bytes(), random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(600):
        changed = mutated(content, draw)
        if changed == content:
            continue
        file.write_bytes(changed)
        with pytest.raises((ValueError, OSError), match=r"book\.memory") as error:
            TitansState.load(file, model)
        assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB
    file.write_bytes(content)
    TitansState.load(file, model)


def test_four_hundred_mutated_checkpoints_are_refused(folder, tmp_path):
    copy, draw = tmp_path / "copy", random.Random(1)
    copy.mkdir()
    for name in folder.iterdir():
        (copy / name.name).write_bytes(name.read_bytes())
    load(copy)
    for i in range(400):
        path = copy / ("config.json" if i % 2 else "model.safetensors")
        content = path.read_bytes()
        changed = mutated(content[:3000], draw) + content[3000:] if i % 4 == 0 else mutated(content, draw)
        if changed == content:
            continue
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{copy} is damaged: {path.name}"):
            load(copy)
        path.write_bytes(content)
    load(copy)
    (copy / "digests.json").write_text("[")
    with pytest.raises(ValueError, match=r"digests\.json cannot be read"):
        load(copy)


def test_links_modes_and_long_names_are_kept(model, tmp_path):
    real, link = tmp_path / ("x" * 200 + ".memory"), tmp_path / "link"
    link.symlink_to(real)
    model.initial_state(1).save(link)  # nothing is there yet
    real.chmod(0o600)
    Reader(model, memory=link).read([1, 2, 3])
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert TitansState.load(real, model).position.item() == 3
    for name in ("y" * 247, "ä" * 127, "z" * 255):
        model.initial_state(1).save(tmp_path / name)
        TitansState.load(tmp_path / name, model)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", [b"a text", b"{}", b"\x02" + b"\0" * 7 + b"{}", b"\xff" * 40])
def test_what_is_not_a_memory_file_is_never_overwritten(model, tmp_path, content):
    other = tmp_path / "book.txt"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"book\.txt is not a memory file and is not overwritten"):
        model.initial_state(1).save(other)
    assert other.read_bytes() == content
    for place, words in ((tmp_path, "not a regular file"), (Path("/dev/full"), "not a regular"), (Path("-"), "output")):
        with pytest.raises(ValueError, match=words):
            model.initial_state(1).save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_damaged_memory_file_and_an_empty_one_are_overwritten(model, file):
    for content in (file.read_bytes()[:-9], b""):
        file.write_bytes(content)
        model.initial_state(1).save(file)
        TitansState.load(file, model)


def test_a_lock_says_who_holds_it_and_ends_with_its_process(file):
    child, ready = os.fork(), file.with_name("ready")
    if child == 0:
        with MemoryLock(file):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"is in use by process {child} on "):
        MemoryLock(file).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with MemoryLock(file):
        assert len(list(file.parent.glob(".*.lock"))) == 1
    assert not list(file.parent.glob(".*.lock"))


def test_a_lock_whose_holder_leaves_while_another_looks_at_it_is_waited_for(file, monkeypatch):
    """The holder removes its file after the other has locked it, and before it has compared the two."""
    lock = MemoryLock(file)
    stat, left = Path.stat, []

    def removed(path: Path, **options: object) -> os.stat_result:
        if path == lock.path and not left:
            left.append(path)
            path.unlink()
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", removed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock:
            assert lock.path.exists()
            with pytest.raises(ValueError, match="is in use by"):
                MemoryLock(file).__enter__()
    assert left


@pytest.mark.parametrize(
    ("pending", "columns", "message"),
    [
        (torch.tensor([260]), 0, r"does not fit this model: its pending tokens are \[260\]"),
        (torch.tensor([-2]), 0, r"its pending tokens are \[-2\]"),
        (torch.tensor([3], dtype=torch.int32), 0, r"'pending' is \[1\], torch.int32"),
        (torch.tensor([[3]]), 0, r"'pending' is \[1, 1\], torch.int64"),
        (None, -1, r"description cannot be read \(ValueError\('columns=-1'\)\)"),
    ],
)
def test_a_handmade_file_with_impossible_numbers_is_refused(model, file, pending, columns, message):
    tensors, card = cache_file.load_file(file)
    more = {} if pending is None else {"pending": pending}
    cache_file.save_file(file, {**tensors, **more}, replace(card, columns=columns))
    with pytest.raises(ValueError, match=message):
        TitansState.load(file, model)


# ------------------------------------------------------------------------------------------------ titans memory


def test_show_says_whose_memory_it_is_and_what_it_read(file, capsys):
    assert main(["memory", "show", str(file)]) == 0
    words = said(capsys)
    for word in ("mag, 2 layers", "parameters", "288", "text", "learning"):
        assert word in words


def test_verify_knows_whole_files_their_model_and_numbers_that_are_not(file, folder, tmp_path, capsys):
    assert main(["memory", "verify", str(file)]) == 0
    assert main(["memory", "verify", str(file), "--model", str(folder)]) == 0
    assert "whole and finite, of this model" in said(capsys)
    other = tmp_path / "other"
    torch.manual_seed(1)
    TitansForCausalLM(tiny_config("mag", vocab_size=260, memory_lr=0.1)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    assert main(["memory", "verify", str(file), "--model", str(other)]) == 2
    assert "belongs to another model: its weights" in said(capsys)
    tensors, card = cache_file.load_file(file)
    tensors["layers.1.memory.memory.weights.0"].view(-1)[3] = torch.nan
    cache_file.save_file(file, tensors, card)
    assert main(["memory", "verify", str(file)]) == 2
    assert "layers.1.memory.memory.weights.0 has numbers that are not finite" in said(capsys)


def test_names_in_a_file_are_shown_as_text(file, capsys):
    tensors, card = cache_file.load_file(file)
    hostile = "[/bold] [red]\x1b[31m :smile: \r\u202e"
    sources = [replace(s, name=hostile, mode=hostile, when=hostile) for s in card.sources]
    cache_file.save_file(file, tensors, replace(card, model=hostile, sources=sources))
    assert main(["memory", "show", str(file)]) == 0
    out = capsys.readouterr().out
    assert r"[/bold] [red]\x1b[31m :smile: \r\u202e" in out
    assert not {"\x1b", "\r", "\u202e"} & set(out)
    cache_file.save_file(file, {**tensors, hostile: torch.full((1,), torch.nan)}, card)
    assert main(["memory", "verify", str(file)]) == 2
    assert not {"\x1b", "\r", "\u202e"} & set(capsys.readouterr().err)


def test_a_fork_is_the_same_memory_and_says_where_it_came_from(file, model, tmp_path, capsys):
    fork = tmp_path / "fork.memory"
    assert main(["memory", "fork", str(file), str(fork)]) == 0
    assert_bitwise(TitansState.load(fork, model), TitansState.load(file, model))
    assert cache_file.load_file(fork)[1].parent == cache_file.load_file(file)[1].digest
    before = fork.read_bytes()
    assert main(["memory", "fork", str(file), str(fork)]) == 2
    assert "exists" in said(capsys)
    assert fork.read_bytes() == before
    assert main(["memory", "diff", str(file), str(fork)]) == 0
    assert "the same numbers" in said(capsys)


def test_diff_says_what_was_read_and_what_it_changed(file, model, tmp_path, capsys):
    other = tmp_path / "other.memory"
    TitansState.load(file, model).save(other)
    Reader(model, byte_tokenizer(), memory=other).read("more")
    assert main(["memory", "diff", str(file), str(other)]) == 1
    words = said(capsys)
    assert "+ text (4 tokens" in words
    assert "layers.0.memory.memory.weights.0" in words
    assert main(["memory", "diff", str(file), str(tmp_path / "no")]) == 2
    file.write_text("not a memory")
    assert main(["memory", "show", str(file)]) == 2
    assert "is not a memory file, or is damaged" in said(capsys)
