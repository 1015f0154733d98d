"""Trainers and adapters of others: transformers' `Trainer`, TRL's, PEFT's adapters. Each learns what it should, or is
refused in words."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from conftest import each_titan, tiny_model, tokens
from titans_lm import TitansForCausalLM
from titans_lm.models.hub import load, save
from titans_lm.models.tokenizer import byte_tokenizer
from tolerance import assert_close

pytestmark = pytest.mark.usefixtures("unchecked")

BYTES = byte_tokenizer()
BYTES.padding_side = "right"  # on the left, as for generating, transformers' losses count a row's first token too
DOCUMENTS = [tokens(1, length, seed=length)[0].tolist() for length in (5, 15, 2, 9, 12)]
ROWS = Dataset.from_list([{"input_ids": document} for document in DOCUMENTS])
LORA = {"target_modules": "all-linear", "r": 2, "task_type": TaskType.CAUSAL_LM}


def bytes_model(kind: str = "mag", dtype: torch.dtype = torch.float32, **changes: Any) -> TitansForCausalLM:
    ids = {key: getattr(BYTES, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tiny_model(kind, dtype, **{"vocab_size": 260, "num_hidden_layers": 1, **ids, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save(bytes_model(), BYTES, path)
    return path


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 5, **fixed, **changes}


def sft(model: Any, folder: Path, peft_config: Any = None, rows: Dataset = ROWS, **changes: Any) -> SFTTrainer:
    arguments = SFTConfig(**options(folder, **{"learning_rate": 0.1, "max_length": 16, **changes}))
    return SFTTrainer(model, arguments, train_dataset=rows, processing_class=BYTES, peft_config=peft_config)


def mean_loss(model: Any, documents: list[list[int]] = DOCUMENTS) -> Tensor:
    """The loss of documents that are read one by one, of all their tokens but the first."""
    losses = [model(torch.tensor([d]), labels=torch.tensor([d])).loss * (len(d) - 1) for d in documents if len(d) > 1]
    return torch.stack(losses).sum() / sum(len(d) - 1 for d in documents)


def changed(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ transformers


@each_titan
@pytest.mark.parametrize("packed", [False, True])
def test_trainer_reads_documents_of_a_data_set_as_if_each_were_alone(kind, packed, tmp_path):
    model = bytes_model(kind)
    before, expected = copied(model), mean_loss(model).item()
    collator = DataCollatorWithFlattening() if packed else DataCollatorForLanguageModeling(BYTES, mlm=False)
    arguments = TrainingArguments(**options(tmp_path, logging_steps=1, learning_rate=0.1))
    trainer = Trainer(model, arguments, train_dataset=ROWS, data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert changed(model, before) >= before.keys() - {name for name in before if "norm" in name}


# ------------------------------------------------------------------------------------------------ TRL's SFTTrainer


def test_sft_trains_on_documents_padded_to_a_batch(tmp_path):
    model = bytes_model()
    before, expected = copied(model), mean_loss(model).item()
    trainer = sft(model, tmp_path, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert {name for name in before if "memory" in name and "norm" not in name} <= changed(model, before)


@each_titan
@pytest.mark.parametrize(
    "way", [{"packing": True}, {"padding_free": True, "max_length": None}, {"packing": True, "pad_to_multiple_of": 32}]
)
def test_documents_that_trl_packs_are_read_as_if_each_were_alone(kind, way, tmp_path):
    model = bytes_model(kind).train()
    trainer = sft(model, tmp_path, **{"activation_checkpointing": False, **way})
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["input_ids"]) == 1  # all documents are in one row
    parameters = list(model.parameters())
    loss, alone = trainer.compute_loss(model, dict(batch)), mean_loss(model)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    ours, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(alone, parameters)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    joined = model(batch["input_ids"], labels=batch["labels"]).loss.item()
    assert abs(joined - alone.item()) > 1e-3  # read as one document, the row has another loss


def test_a_memory_loss_that_a_trainer_leaves_out_is_named(tmp_path):
    model = bytes_model(memory_loss_weight=0.5, memory_theta_weight=0.3)
    words = r"no effect of memory_loss_weight=0\.5 and memory_theta_weight=0\.3 .*labels.*0\.3 \* surprise\.theta"
    with pytest.warns(UserWarning, match=words):
        sft(model, tmp_path).train()
    model, ids = bytes_model(memory_loss_weight=0.5).train(), tokens(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids)
        model(ids, output_surprise=True)
        model.eval()(ids)
        with torch.no_grad():
            model.train()(ids)


# ------------------------------------------------------------------------------------------------ TRL's DPOTrainer


PAIRS = Dataset.from_list(
    [{"prompt": "ab", "chosen": "cd", "rejected": "xyz"}, {"prompt": "", "chosen": "e", "rejected": "fgh"}]
)


@pytest.mark.parametrize("map_of_classes", ["saved", "none"])
def test_dpo_loads_its_reference_from_a_folder_and_runs_no_code_of_it(map_of_classes, saved, tmp_path):
    folder = tmp_path / "model"
    save(TitansForCausalLM.from_pretrained(saved), BYTES, folder)
    (folder / "modeling_titans.py").write_text("raise SystemExit('code of the folder was run')")
    if map_of_classes == "none":  # as models of earlier versions
        config = json.loads((folder / "config.json").read_text())
        del config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = copied(model)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path / "run", max_steps=2, logging_steps=1, learning_rate=0.01)),
        train_dataset=PAIRS,
        processing_class=BYTES,
    )
    assert isinstance(trainer.ref_model, TitansForCausalLM)
    trainer.train()
    first, second = (log["loss"] for log in trainer.state.log_history[:2])
    assert first == pytest.approx(math.log(2), rel=1e-5)  # the reference is the model that training began with
    assert second < first
    assert not changed(trainer.ref_model, before)
    assert changed(model, before)


def test_dpo_of_an_adapter_has_the_model_without_it_as_its_reference(tmp_path):
    model = bytes_model()
    before = copied(model)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options(tmp_path, max_steps=2, logging_steps=1, learning_rate=0.1)),
        train_dataset=PAIRS,
        processing_class=BYTES,
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    first, second = (log["loss"] for log in trainer.state.log_history[:2])
    assert first == pytest.approx(math.log(2), rel=1e-5)
    assert second < first
    unloaded = trainer.model.unload()
    assert not changed(unloaded, before)


# ------------------------------------------------------------------------------------------------ PEFT


@each_titan
def test_lora_on_all_linear_maps_trains_the_gates_too_and_merges(kind, tmp_path):
    base = bytes_model(kind)
    before, ids = copied(base), tokens(1, 20)
    trainer = sft(base, tmp_path, LoraConfig(**LORA), packing=True)
    trainer.train()
    model = trainer.model.eval()
    learned = {
        name.split(".lora_B")[0].split(".")[-1]
        for name, weight in model.named_parameters()
        if "lora_B" in name and weight.any()  # zero before training
    }
    linear = {name.split(".")[-1] for name, m in bytes_model(kind).named_modules() if isinstance(m, torch.nn.Linear)}
    assert learned == linear - {"lm_head"}
    assert {"theta", "eta", "alpha"} <= learned
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(ids).logits
        again = PeftModel.from_pretrained(bytes_model(kind), tmp_path / "adapter")
        assert torch.equal(again(ids).logits, expected)
        merged = model.merge_and_unload()
        assert isinstance(merged, TitansForCausalLM)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert changed(merged, before)
        save(merged, BYTES, tmp_path / "merged")
        assert torch.equal(load(tmp_path / "merged")[0](ids).logits, merged(ids).logits)


def test_an_adapter_of_transformers_is_trained_by_trl_and_saved_alone(saved, tmp_path):
    model = TitansForCausalLM.from_pretrained(saved)
    ids = tokens(1, 20)
    model.add_adapter(LoraConfig(**LORA))
    sft(model, tmp_path / "run").train()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = TitansForCausalLM.from_pretrained(saved)
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        model.disable_adapters()
        without = TitansForCausalLM.from_pretrained(saved)(ids).logits
        torch.testing.assert_close(model(ids).logits, without, rtol=1e-3, atol=1e-5)
        assert (without - expected).abs().max() > 0.1


@pytest.mark.parametrize("way", [PromptTuningConfig, PromptEncoderConfig])
@each_titan
def test_a_learned_prompt_is_read_before_the_text(kind, way):
    base = bytes_model(kind, torch.float64)
    ids, labels = tokens(2, 9), tokens(2, 9)
    labels[0, :4] = -100
    model = get_peft_model(base, way(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).double().eval()
    prompt = model.get_prompt(batch_size=2)
    embedded = torch.cat([prompt, base.get_input_embeddings()(ids)], 1)
    shifted = torch.cat([torch.full((2, 3), -100), labels], 1)
    out = model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    alone = base(inputs_embeds=embedded, labels=shifted)
    assert_close(out.logits, alone.logits)
    assert_close(out.loss.double(), alone.loss.double())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        for _ in range(4):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_a_learned_prompt_is_trained_by_trl(tmp_path):
    trainer = sft(bytes_model(), tmp_path, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    before = trainer.model.get_prompt(1).clone()
    trainer.train()
    assert not torch.equal(trainer.model.get_prompt(1), before)


def test_a_prefix_of_keys_and_values_is_refused_in_words(tmp_path):
    config, ids = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3), tokens(1, 5)
    words = r"prefix tuning.*use PEFT's prompt tuning.*or LoRA"
    with pytest.raises(ValueError, match=words):
        get_peft_model(bytes_model(), config)(ids)
    with pytest.raises(ValueError, match=words):
        get_peft_model(bytes_model(), config).generate(input_ids=ids, max_new_tokens=2)
    with pytest.raises(ValueError, match=words):
        sft(bytes_model(), tmp_path, config).train()
