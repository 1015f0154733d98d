"""The documentation: the site builds and fetches nothing, every example runs, every command is one that exists."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

import titans_lm
from titans_lm import cli
from titans_lm.models.model_files import SHIPPED
from titans_lm.training.config import parse_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
COMPILED = "docs/compile.md"
"""Its code is run by compiled_models.py: models under the checks of shapes cannot be compiled."""
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for kind, body in FENCED.findall(TEXTS[page]) if kind == language]


def commands(page: str) -> list[str]:
    """Lines of fenced shell blocks, and indented ones that begin as a command does; continued lines are joined."""
    fenced = "\n".join(blocks(page, "sh"))
    indented = "\n".join(re.findall(r"^    (.*(?:\\\n    .*)*)$", FENCED.sub("", TEXTS[page]), re.MULTILINE))
    return re.sub(r"\\\n\s*", " ", f"{fenced}\n{indented}").splitlines()


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {Path(name).stem for name in PAGES} - {"README"}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", html):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: titans_lm\.([\w.]+)$", TEXTS["docs/api.md"], re.MULTILINE)
    assert set(titans_lm.__all__) <= set(named)
    assert len(named) == len(set(named))


def test_diagrams_are_what_their_script_draws():
    script = module(ROOT / "docs/diagrams/draw.py")
    files = {path.stem: path.read_bytes() for path in (ROOT / "docs/diagrams").glob("*.svg")}
    assert files == {name: draw().svg().encode() for name, draw in script.DIAGRAMS.items()}
    assert all(f"diagrams/{name}.svg" in TEXTS["docs/concepts.md"] for name in files)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != COMPILED])
@pytest.mark.usefixtures("unchecked")
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """In an empty folder, but for two texts and a trained model, of which a page may say that a reader has them."""
    monkeypatch.chdir(tmp_path)
    for name in ("one.txt", "two.txt"):
        Path(name).write_text("It was the end. " * 20)
    shutil.copytree(SHIPPED / "streams", "runs/titans")
    names: dict[str, object] = {"__name__": "page"}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)  # the project's own documents


@pytest.mark.parametrize("page", [page for page in PAGES if any(line.startswith("titans ") for line in commands(page))])
def test_the_commands_of_a_page_exist_with_their_options(page):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["titans"]:
            assert words[1] in cli.VERBS, line
            cli._parsed(words[1], words[2:])  # exits where argparse refuses them


@pytest.mark.parametrize("page", PAGES)
def test_the_scripts_and_targets_of_a_page_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = shlex.split(line, comments=True) if re.match(r"(make|python) ", line) else [""]
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_the_settings_of_a_page_are_ones_that_training_takes(page, tmp_path, monkeypatch):
    """Each block by itself; a section that it leaves out is a small one. A page may name a pretrained model."""
    monkeypatch.chdir(tmp_path)
    LlamaConfig(num_hidden_layers=5).save_pretrained("runs/graft_base")
    for block in blocks(page, "yaml"):
        small = {"model": {"size": "tiny"}, "data": {"files": ["python-stdlib"]}, "training": {"output_dir": "runs/x"}}
        given = yaml.safe_load(block)
        tree = {**small, **given}
        tree["training"] = {**small["training"], **tree["training"]}
        parse_settings(tree)
