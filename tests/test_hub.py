"""Model folders as transformers, its neighbours and strangers make them: opened anywhere, and never run."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import titans_lm
from conftest import tiny_config, tiny_model, tokens
from titans_lm import TitansConfig, TitansForCausalLM
from titans_lm.models.configuration import AUTO_MAP
from titans_lm.models.hub import load, save
from titans_lm.models.model_files import DIGESTS, SHIPPED, check_digests, find
from titans_lm.models.tokenizer import byte_tokenizer, load_tokenizer


def digests(folder: Path) -> set[str]:
    return set(json.loads((folder / DIGESTS).read_text()))


# ------------------------------------------------------------------------------------------------ by name and path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_shipped_model_goes_by_its_name(kind, monkeypatch, tmp_path):
    model, tokenizer = titans_lm.load(kind("books"))
    assert type(model) is TitansForCausalLM
    assert not model.training
    assert len(tokenizer) <= model.config.vocab_size
    same = TitansForCausalLM.from_pretrained(kind("books"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    monkeypatch.chdir(tmp_path)
    tiny_model("mal", torch.float32).save_pretrained("books")  # a folder of that name is what is meant
    assert TitansForCausalLM.from_pretrained(kind("books")).config.variant == "mal"
    assert find(kind("books")) == Path("books")


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"bookz is not a model.*shipped is: books"):
        titans_lm.load("bookz")
    with pytest.raises(ValueError, match="is not a model"):
        titans_lm.load(str(tmp_path))


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    model = tiny_model("mag", torch.float32, vocab_size=260)
    with torch.no_grad():
        model.model.layers[1].memory.theta.bias[0] = torch.inf
    save(model, byte_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.memory\.theta\.bias' has numbers that are not finite"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ elsewhere


def test_a_process_that_has_not_imported_the_package_opens_a_saved_model(folder, tmp_path):
    """With nobody who answers: without trust it says where the code is."""
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "try:\n"
        "    AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    assert f'{sys.argv[1]} contains custom code' in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
        "assert 'titans_lm' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "import titans_lm\n"
        "assert type(model) is titans_lm.TitansForCausalLM\n"
        "assert tokenizer('ab')['input_ids'] == [97, 98]\n"
        "model.save_pretrained(sys.argv[2])  # transformers registered the classes for saving their code\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "again")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    assert {path.name for path in again.glob("*.py")} == {"modeling_titans.py"}
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    check_digests(again)
    assert "titans_lm.load" in (again / "modeling_titans.py").read_text()


def test_where_the_package_is_imported_no_code_of_a_folder_is_run(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modeling_titans.py").write_text("raise RuntimeError('run')")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is TitansForCausalLM
    with pytest.raises(ValueError, match=r"modeling_titans\.py is not as it was saved"):
        load(tmp_path)


def test_every_configuration_says_which_auto_class_opens_it(tmp_path):
    """What trainers of others look at; models of earlier versions were saved without it."""
    tiny_config("mag").save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())  # no code beside it
    assert "AutoModelForCausalLM" in AutoConfig.from_pretrained(tmp_path).auto_map


def test_a_class_of_one_s_own_is_registered_as_in_transformers(tmp_path):
    class Mine(TitansForCausalLM):
        pass

    Mine.register_for_auto_class("AutoModelForCausalLM")
    TitansForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    TitansConfig.register_for_auto_class()
    Mine(tiny_config("mag")).save_pretrained(tmp_path / "mine")
    TitansForCausalLM(tiny_config("mag")).save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"] == "test_hub.Mine"
    assert TitansConfig.auto_map == AUTO_MAP
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not (tmp_path / "ours" / "model.py").exists()


# ------------------------------------------------------------------------------------------------ code of strangers


def with_code(folder: Path, into: Path, tokenizer_class: str) -> Path:
    """A model's folder whose tokenizer brings code, which leaves a file behind where it is run."""
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    config = json.loads((into / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "strange.Strange"]}, "tokenizer_class": tokenizer_class}
    (into / "tokenizer_config.json").write_text(json.dumps(config))
    (into / "strange.py").write_text(f"open({str(into / 'marker')!r}, 'w')\nclass Strange: pass\n")
    return into


@pytest.mark.parametrize("tokenizer_class", ["Strange", "PreTrainedTokenizerFast"])
def test_a_tokenizer_s_code_is_never_asked_about_and_never_run(tokenizer_class, folder, tmp_path, monkeypatch):
    place = with_code(folder, tmp_path / "model", tokenizer_class)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for act in (lambda: load(place), lambda: load_tokenizer(str(place))):
        refusal = (
            pytest.raises(ValueError, match="Python code of its own, which is never run")
            if tokenizer_class == "Strange"
            else contextlib.nullcontext()
        )
        with refusal, contextlib.redirect_stdout(io.StringIO()) as shown:
            act()
        assert "Do you wish" not in shown.getvalue()
    assert not (place / "marker").exists()


def test_a_tokenizer_s_files_are_under_the_digests(tmp_path):
    model = tiny_model("mag", torch.float32, vocab_size=260)
    save(model, byte_tokenizer(), tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"} <= digests(tmp_path)
    load(tmp_path)
    for name in digests(tmp_path):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content.replace(b"e", b"f", 1))
        with pytest.raises(ValueError, match=f"{name} is not as it was saved"):
            load(tmp_path)
        (tmp_path / name).write_bytes(content)
    model.save_pretrained(tmp_path)  # and then perhaps another tokenizer
    assert "tokenizer.json" not in digests(tmp_path)
    other = byte_tokenizer()
    other.add_special_tokens({"unk_token": "<unk>"})
    other.save_pretrained(tmp_path)
    assert load(tmp_path)[1].unk_token == "<unk>"


def test_shipped_models_have_their_tokenizers_under_the_digests():
    for folder in SHIPPED.iterdir():
        assert "tokenizer.json" in digests(folder)
        check_digests(folder)


# ------------------------------------------------------------------------------------------------ adapters


def adapted() -> TitansForCausalLM:
    model = tiny_model("mag", torch.float32)
    model.add_adapter(LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    return model


def test_an_adapter_is_saved_alone_and_loaded_onto_its_model(tmp_path):
    model, ids = adapted(), tokens(1, 9)
    base = tiny_model("mag", torch.float32)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert digests(tmp_path / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "adapter" / "config.json").exists()
    check_digests(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds an adapter and no model.*load_adapter"):
        load(tmp_path / "adapter")
    again = TitansForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    wrapped = PeftModel.from_pretrained(TitansForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, model(ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(wrapped(ids).logits, model(ids).logits)


def test_an_adapter_beside_its_model_leaves_the_model_s_digests(tmp_path):
    base = tiny_model("mag", torch.float32)
    base.save_pretrained(tmp_path)
    before = json.loads((tmp_path / DIGESTS).read_text())
    adapted().save_pretrained(tmp_path)
    after = json.loads((tmp_path / DIGESTS).read_text())
    assert after.keys() - before.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert {name: after[name] for name in before} == before
    check_digests(tmp_path)


def test_a_trainer_s_checkpoint_of_an_adapter_is_whole(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True
    )
    Trainer(adapted(), arguments, train_dataset=rows).train()
    (checkpoint,) = tmp_path.glob("checkpoint-1")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert (checkpoint / "trainer_state.json").is_file()
    check_digests(checkpoint)


# ------------------------------------------------------------------------------------------------ uploads


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_what_is_uploaded_has_its_digests_and_its_code(way, tmp_path, monkeypatch):
    uploaded: dict[str, bytes] = {}

    def commit(_, operations, **__):
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/model"))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: _Card())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: _Card())
    model = tiny_model("mag", torch.float32)
    if way == "push_to_hub":
        model.push_to_hub("me/model")
    else:
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert {"config.json", "model.safetensors", "modeling_titans.py", DIGESTS} <= uploaded.keys()
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    check_digests(tmp_path)
    assert digests(tmp_path) == {"config.json", "model.safetensors", "modeling_titans.py"}


class _Card:
    """The model card, for which transformers asks the Hub."""

    def save(self, path: str | Path) -> None:
        Path(path).write_text("")
