"""Imports by the names of earlier versions: they give what the new names give, and say which these are."""

import importlib
import pickle
import subprocess
import sys
from types import FunctionType

import pytest

import titans_lm
from titans_lm._moved import MOVED

KNOWN = {
    "answer": "answer go_on read PIECE",
    "attention": "SegmentAttention WindowAttention",
    "baselines": "BASELINES build",
    "block": "BLOCKS TitansBlock",
    "checkpoint": "load save ship find RUN SHIPPED NAMES MODEL_HELP",
    "config": "TitansConfig SIZES VARIANTS preset fitted count_parameters DEFAULT_CONFIG VARIANT_CONFIGS",
    "data": "byte_tokenizer load_tokenizer encode is_bytes text_files read_text stdlib_files Blocks STDLIB streamed",
    "features": "ShortConvolution features",
    "flags": "READ_MODES",
    "infer": "run",
    "memory": "NeuralMemory NeuralMemoryState memories memory_off",
    "memory_file": "Card Source read write",
    "memory_lock": "MemoryLock",
    "model": "TitansForCausalLM TitansModel",
    "model_files": "find check_digests",
    "ops.build": "SOURCES build",
    "ops.naive": "naive",
    "ops.native": "native",
    "ops.step": "step",
    "packing": "documents",
    "prediction": "Predictor",
    "reader": "Reader Progress PIECE go_on read",
    "reading": "LayerState",
    "record": "Lines write_json",
    "serve": "KEY listen run",
    "serve.app": "Server Service",
    "settings": "Settings load_settings parse_settings",
    "state": "TitansState identity",
    "surprising": "SurprisingLines",
    "text_file": "examine read_text text_pieces",
    "token_bits": "TokenBits by_bytes",
    "train": "train model_for trainer_for run",
    "trainer": "TitansTrainer",
}
"""What could be imported before the package had storeys."""


@pytest.mark.parametrize("old", KNOWN)
def test_a_name_imports_from_its_old_module_with_a_warning(old: str):
    for name in KNOWN[old].split():
        module = importlib.import_module(f"titans_lm.{old}")
        with pytest.warns(
            DeprecationWarning, match=rf"titans_lm\.{old}\.{name} has moved: use titans_lm\."
        ) as all_told:
            value = getattr(module, name)
        told = next(one for one in all_told if "has moved" in str(one.message))
        assert told.filename == __file__
        place, _, new = str(told.message).rpartition(" ")[2].rpartition(".")
        assert getattr(importlib.import_module(place), new) is value
        assert not isinstance(value, type | FunctionType) or value.__module__ == place


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_imports_and_its_places_exist(old: str):
    assert f"titans_lm.{MOVED[old][0]}" in importlib.import_module(f"titans_lm.{old}").__doc__
    for place in MOVED[old]:
        importlib.import_module(f"titans_lm.{place}")


def test_what_never_was_is_no_module_and_no_name():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("titans_lm.readers")
    with pytest.raises(AttributeError, match=r"Raeder.*titans_lm\.inference\.reader"):
        importlib.import_module("titans_lm.reader").Raeder  # noqa: B018


def test_statements_as_users_have_them():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import titans_lm, titans_lm.reader, titans_lm.serve.app\n"
        "import titans_lm.memory as memory\n"
        "warnings.simplefilter('ignore')\n"
        "from titans_lm.evaluate.perplexity import perplexity\n"
        "from titans_lm.data import byte_tokenizer\n"
        "from titans_lm import settings\n"
        "assert settings.Settings.__module__ == 'titans_lm.training.config'\n"
        "assert titans_lm.reader.Reader is titans_lm.Reader and memory.NeuralMemory is titans_lm.NeuralMemory\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_pickled_before_is_found():
    assert pickle.loads(b"ctitans_lm.config\nTitansConfig\n.") is titans_lm.TitansConfig
