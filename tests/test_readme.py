"""What the README shows, runs."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from conftest import tiny_config
from titans_lm import TitansForCausalLM
from titans_lm.cli import VERBS, main
from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.training.config import load_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("unchecked")
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TitansForCausalLM(tiny_config("mag", vocab_size=260)).save_pretrained("runs/titans")
    byte_tokenizer().save_pretrained("runs/titans")
    for name in ("one.txt", "two.txt"):
        Path(name).write_text("It was the end. " * 20)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)  # the project's own README
    assert names["y"].shape == (2, 24, 384)
    assert (tmp_path / "book.memory").is_file()
    assert (tmp_path / "library.memory").is_file()


def test_the_commands_are_there_and_their_settings_hold():
    for command in re.findall(r"^    titans (.*)$", README, re.MULTILINE):
        verb, *arguments = command.split("  #")[0].split()
        assert verb in VERBS
        changes = [b for a, b in pairwise(arguments) if a == "--set"]
        if verb == "train":
            load_settings(ROOT / arguments[0], changes)


def test_every_file_that_it_names_is_there_and_every_module_is_named():
    for name in re.findall(r"\]\((?!https)([^)]+)\)", README):
        assert (ROOT / name).exists(), name
    source = ROOT / "src/titans_lm"
    storeys = {p.parent for p in source.glob("*/__init__.py")}
    assert not {f"{s.name}/" for s in storeys if f"`{s.name}/`" not in README}
    for storey in ("ops", "layers", "models", "training", "inference"):
        files = {p.name for p in (source / storey).glob("*.py")} - {"__init__.py"}
        folders = {f"{p.name}/" for p in (source / storey).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert not {name for name in files | folders if f"`{name}`" not in README}, storey


def test_a_run_as_it_is_described(tmp_path):
    """Train, read, save, load, answer: the README's four commands, small."""
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
