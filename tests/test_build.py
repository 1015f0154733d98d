"""The cache of the compiled library: built once, rebuilt if damaged, refused in folders that others may write to."""

import ctypes
import hashlib
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from test_ops import Case, make_call
from titans_lm.ops import resolve_backend
from titans_lm.ops.cpu import build, compiled

ANSWER = 4711
SOURCE = 'extern "C" {\n' + "".join(f"long {name}(const void*) {{ return {ANSWER}; }}\n" for name in compiled.FUNCTIONS)


def clear_caches() -> None:
    for cached in (compiled.library, compiled._build_failure):
        cached.cache_clear()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sources in place of the real ones, which compile in a moment."""
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "memory.cpp").write_text(SOURCE + "}\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clear_caches()
    yield tmp_path / "cache/titans_lm"
    clear_caches()


@pytest.fixture
def copied(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that is built but not loaded. Its path is new to this process, which keeps loaded libraries."""
    build.build(build.find_compiler(), "float")
    shutil.copytree(folder, tmp_path / "other/titans_lm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    return build.library_path(build.find_compiler(), "float")


def answer() -> int:
    """Load the library as `memory_scan` does, and call it."""
    clear_caches()
    return compiled.library(torch.float32).titans_forward(ctypes.c_void_p())


WITHOUT = {
    "could not build or load compiled code: .*no-such-compiler": {"CXX": "no-such-compiler"},
    "could not build or load compiled code: No closing quotation": {"CXX": 'g++ "'},
    "could not be compiled by false: no message": {"CXX": "false"},
    r"needs a C\+\+ compiler: c\+\+, g\+\+ or clang\+\+": {"CXX": "", "PATH": ""},
}


@pytest.mark.parametrize("reason", WITHOUT)
def test_without_a_compiler_auto_takes_chunked_and_native_says_why(reason: str, folder: Path, monkeypatch):
    for name, value in WITHOUT[reason].items():
        monkeypatch.setenv(name, value)
    call = make_call(Case(tokens=5))
    assert resolve_backend("auto", call) == "chunked"
    with pytest.raises(ValueError, match=f'^backend="native" {reason}.*; use "chunked"$'):
        resolve_backend("native", call)
    assert {file.name for file in folder.glob("*")} <= {"lock"}


def test_it_is_compiled_once_and_kept_with_its_digest(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert answer() == ANSWER
    (library,), (digest,) = folder.glob("*.so"), folder.glob("*.sha256")
    assert digest.read_text().strip() == hashlib.sha256(library.read_bytes()).hexdigest()
    assert {file.name for file in folder.iterdir()} - {"lock"} == {library.name, digest.name}
    assert folder.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(build.subprocess, "run", None)  # no compiler is asked
    assert answer() == ANSWER


def cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])


def no_digest(library: Path) -> None:
    build._digest_path(library).unlink()


def other_digest(library: Path) -> None:
    build._digest_path(library).write_text("0" * 64)


def another_machine_s(library: Path) -> None:
    library.write_bytes(b"no library of this machine")
    build._digest_path(library).write_text(build._digest(library))


def writable_by_others(library: Path) -> None:
    library.write_bytes(library.read_bytes() + b"of another user")  # which still loads
    build._digest_path(library).write_text(build._digest(library))
    library.chmod(0o777)


@pytest.mark.parametrize("damage", [cut, no_digest, other_digest, another_machine_s, writable_by_others])
def test_what_is_not_as_it_was_built_is_built_again(damage, copied: Path):
    whole = copied.read_bytes()
    damage(copied)
    assert answer() == ANSWER
    assert copied.read_bytes() == whole
    assert build._is_intact(copied)


def test_no_flipped_bit_is_loaded(copied: Path):
    whole, draw = copied.read_bytes(), random.Random(0)
    assert build._is_intact(copied)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        copied.write_bytes(damaged)
        assert not build._is_intact(copied)
    assert answer() == ANSWER  # the last damaged file, by the public path
    assert copied.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, copied: Path, caplog: pytest.LogCaptureFixture):
    copied.parent.chmod(mode)
    with pytest.raises(compiled.NativeBuildError, match="another user owns it or may write to it"):
        answer()
    assert str(copied.parent) in caplog.text  # logged, because "auto" goes on without it
    assert resolve_backend("auto", make_call(Case(tokens=5))) == "chunked"


@pytest.mark.usefixtures("copied")
def test_a_folder_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(compiled.NativeBuildError, match="another user owns it"):
        answer()


def test_a_folder_that_anyone_could_exchange_is_refused(copied: Path):
    copied.parents[1].chmod(0o1777)  # as /tmp: only its owner renames a folder in it
    assert answer() == ANSWER
    copied.parents[1].chmod(0o777)
    with pytest.raises(compiled.NativeBuildError, match=f"anyone may write to {copied.parents[1]}"):
        answer()


def test_what_a_killed_build_left_is_removed_by_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as killing:
        killing.setenv("CXX", "sh -c 'kill -9 $PPID'")
        child = os.fork()
        if child == 0:
            compiled.library(torch.float32)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert list(folder.glob("tmp*"))
    assert answer() == ANSWER
    assert not list(folder.glob("tmp*"))


@pytest.mark.usefixtures("folder")
def test_no_place_for_it_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(compiled.NativeBuildError, match=f"could not build or load compiled code: .*{file}"):
        answer()
