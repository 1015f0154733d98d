"""What the README says, and the map of the code. Its code and commands run in `test_docs.py`."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from titans_lm.cli import main
from titans_lm.training.config import load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCE = ROOT / "src/titans_lm"


def test_it_is_a_screen_and_a_half_and_every_file_that_it_names_is_there():
    assert len(README.splitlines()) <= 110
    for name in re.findall(r"\]\((?!https)([^)#]+)", README):
        assert (ROOT / name).exists(), name


def test_the_settings_of_its_runs_hold():
    runs = re.findall(r"^    titans train (.*)$", README, re.MULTILINE)
    assert runs
    for run in runs:
        config, *arguments = run.split("  #")[0].split()
        load_settings(ROOT / config, [b for a, b in pairwise(arguments) if a == "--set"])


def test_the_map_names_every_module_in_its_storey_and_no_other():
    head, *sections = re.split(r"^## `", (ROOT / "docs/map.md").read_text(), flags=re.MULTILINE)
    named = {section.partition("/`")[0]: set(re.findall(r"`([\w/]+\.py)`", section)) for section in sections}
    storeys = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert named.keys() == storeys
    for storey in storeys:
        modules = {p.relative_to(SOURCE / storey).as_posix() for p in (SOURCE / storey).rglob("*.py")}
        modules = {name for name in modules if not name.startswith("shipped/") and "__" not in name}
        assert named[storey] - {"_moved.py"} == modules, storey
        assert f"`{storey}/`" in head, storey
    for name in re.findall(r"`((?:ops|layers|models|training|tests)/[\w/]+\.\w+)`", head):
        assert (ROOT / name if name.startswith("tests/") else SOURCE / name).is_file(), name


@pytest.mark.usefixtures("unchecked")
def test_a_run_as_it_is_described(tmp_path):
    """Train, read, save, load, answer, small."""
    text = tmp_path / "book.txt"
    text.write_text("The end of it was near. " * 100)
    tree = yaml.safe_load((ROOT / "configs/titans.yaml").read_text())
    tree["data"].update(files=[str(text)], held_out=0, sequence_length=64)
    tree["training"].update(output_dir=str(tmp_path / "out"), max_steps=2, batch_size=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(tmp_path / "run.yaml"), "--set", "model.variant=mac"]) == 0
    model = ["infer", "--model", str(tmp_path / "out")]
    assert main([*model, "--context", str(text), "--save-memory", str(tmp_path / "m")]) == 0
    prompt = ["--prompt", "The end of it was", "--max-new-tokens", "5"]
    assert main([*model, "--load-memory", str(tmp_path / "m"), *prompt]) == 0
