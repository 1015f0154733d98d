"""The package builds from its sdist, and works from its wheel alone."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "src")

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a command prints in `folder`."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel of a copy of the sources: building leaves files beside them. `build` makes the
    wheel from the sdist."""
    sources, target = (tmp_path_factory.mktemp(name) for name in ("sources", "built"))
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, sources / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / part, sources / part)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), "."], sources)
    return target


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), *map(str, built.glob("*.whl"))], built)
    return target


def test_build_makes_an_sdist_with_all_sources_and_a_wheel(built: Path):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    assert sdist.name.removesuffix(".tar.gz") == "-".join(wheel.name.split("-")[:2])
    with tarfile.open(sdist) as archive:
        members = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    source = ROOT / "src" / "titans_lm"
    modules = {path.relative_to(ROOT) for path in source.rglob("*.py")}
    assert {*map(Path, ("pyproject.toml", "README.md", "LICENSE")), *modules} <= members


def test_a_wheel_has_what_is_not_python(installed: Path):
    package = installed / "titans_lm"
    there = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    source = ROOT / "src" / "titans_lm"
    for pattern in ("py.typed", "analyze/assets/*", "ops/cpu/csrc/*", "models/shipped/*/*"):
        expected = {path.relative_to(source) for path in source.glob(pattern) if path.is_file()}
        assert expected, pattern
        assert expected <= there, expected - there


def test_the_demo_runs_from_the_wheel_in_another_folder(installed: Path, tmp_path: Path):
    code = "import sys, titans_lm; print(titans_lm.__file__); from titans_lm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", "--tokens", "2000", "--text-tokens", "0", "--output", "out"]
    told = run(command, tmp_path, PYTHONPATH=str(installed))
    assert Path(told.splitlines()[0]).is_relative_to(installed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.json", "demo.png", "needle.html"}
