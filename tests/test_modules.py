"""Weights are used in their modules' calls: adapters, hooks, offloading, quantization and sharding act on all."""

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from conftest import KINDS, SEGMENT, each_kind, each_titan, tiny_config, tiny_model, tokens
from titans_lm import (
    NeuralMemory,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTokenClassification,
    TitansModel,
)
from titans_lm.layers.module_call import is_plain_linear
from tolerance import assert_close

PREDICTED = {"surprise_threshold": 0.1, "surprise_threshold_on": "prediction"}


def memory_layer(dtype: torch.dtype = torch.float64) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(12, 2, head_dim=8, chunk_size=4, lr=0.5).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)


def adapted(model: nn.Module) -> nn.Module:
    """With adapters that do something on every linear map (but not on the logits')."""
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))


def in_two_calls(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, from a state that the user asked for."""
    state = model.initial_state(len(ids))
    cut = SEGMENT - 1
    return torch.cat([model(part, past_key_values=state).logits for part in (ids[:, :cut], ids[:, cut:])], 1)


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in KINDS), ("mag", PREDICTED)])
def test_every_adapter_learns_and_merging_them_changes_nothing(kind, changes):
    ids = tokens(2, 17)
    model = adapted(tiny_model(kind, **changes))
    model(ids, labels=ids).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    if kind in ("mac", "mag", "mal", "lmm"):
        assert {"theta", "eta", "alpha", "q_proj", "o_proj"} <= {
            name.split(".lora_")[0].split(".")[-1] for name in adapters
        }
    assert [name for name, gradient in adapters.items() if gradient is None or not gradient.any()] == []
    with torch.no_grad():
        expected = model(ids).logits
        assert_close(model.merge_and_unload()(ids).logits, expected)


def test_a_layer_in_somebodys_network_takes_adapters():
    model, x = nn.ModuleDict({"memory": memory_layer()}), inputs()
    without = model["memory"](x)[0]
    names = ["theta", "eta", "alpha"]
    adapters = LoraConfig(target_modules=names, r=2, init_lora_weights=False)
    memory = get_peft_model(model, adapters).base_model.model["memory"]
    y = memory(x)[0]
    y.square().sum().backward()
    assert not torch.allclose(y, without)
    assert all(p.grad is not None and p.grad.any() for name in names for p in getattr(memory, name).lora_B.parameters())


@pytest.mark.parametrize("name", ["theta", "eta", "alpha", "q_proj", "k_proj", "v_proj", "output_gate", "o_proj"])
def test_hooks_and_parametrizations_act_on_every_projection(name):
    memory, x = memory_layer(), inputs()
    plain = memory(x)[0]
    doubled = copy.deepcopy(memory)
    getattr(doubled, name).register_forward_hook(lambda *call: 2 * call[-1])
    scaled = copy.deepcopy(memory)
    part = getattr(scaled, name)
    nn.utils.parametrize.register_parametrization(part, "weight", Twice())
    if part.bias is not None:
        nn.utils.parametrize.register_parametrization(part, "bias", Twice())
    assert not torch.allclose(doubled(x)[0], plain)
    assert_close(scaled(x)[0], doubled(x)[0])


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("name", ["convs.0", "convs.2", "initial_memory"])
def test_convolutions_and_the_first_memory_are_called(name):
    memory, x, calls = memory_layer(), inputs(), []
    memory.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    memory(x)
    assert calls == [name]


@each_kind
def test_blocks_are_kept_whole_by_name(kind):
    """By device maps, and by FSDP's policies, which refuse the names of classes that are not there."""
    model = tiny_model(kind)
    assert model._no_split_modules == {type(model.model.layers[0]).__name__}


def test_plain_gates_are_one_product():
    memory = memory_layer()
    assert is_plain_linear(memory.theta)
    memory.theta.register_forward_pre_hook(lambda *_: None)
    assert not is_plain_linear(memory.theta)
    assert not is_plain_linear(adapted(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).base_model.model[0])


# ------------------------------------------------------------------------------------------------ offloaded, quantized


@each_kind
@pytest.mark.usefixtures("unchecked")  # accelerate makes a model's output of a dict, as transformers allows
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_reads_the_same(kind, where, tmp_path):
    model, ids = tiny_model(kind), tokens(2, 17)
    with torch.no_grad():
        expected = model(ids).logits
        if where == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, tmp_path, torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        assert_close(in_two_calls(model, ids), expected)
        assert model.generate(ids[:, :5], max_new_tokens=2, do_sample=False).shape == (2, 7)


@each_kind
@pytest.mark.usefixtures("unchecked")
def test_a_device_map_puts_parts_on_disk(kind, tmp_path):
    model, ids = tiny_model(kind, torch.float32), tokens(2, 17)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    loaded = TitansForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "lm_head": "disk"}, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("places", ["auto", "sequential"])
@pytest.mark.parametrize(
    "kind", [TitansModel, TitansForCausalLM, TitansForSequenceClassification, TitansForTokenClassification]
)
def test_a_device_map_is_made_for_every_model(kind, places, tmp_path):
    config = tiny_config("mac")
    model, ids = kind(config).eval(), tokens(2, 17)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = kind.from_pretrained(tmp_path, device_map=places)
        assert_close(found(ids.to(found.device))[0].cpu(), model(ids)[0])


@each_kind
def test_a_quantized_model_reads(kind):
    """By a class of torch's whose `weight` is a method."""
    model, ids = tiny_model(kind, torch.float32, memory_lr=0.05), tokens(2, 17)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, y = model(ids).logits, quantized(ids).logits
        assert in_two_calls(quantized, ids).isfinite().all()
    assert 0 < (y - expected).norm() / expected.norm() < 0.5


class Int8(Tensor):
    """A weight as torchao's: 8 bits and a scale, known to `F.linear` and to nothing else."""

    @staticmethod
    def __new__(cls, bits: Tensor, scale: Tensor) -> "Int8":
        return torch.Tensor._make_wrapper_subclass(cls, bits.shape, dtype=scale.dtype)

    def __init__(self, bits: Tensor, scale: Tensor):
        self.bits, self.scale = bits, scale

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.bits.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].bits, args[0].scale)
        raise NotImplementedError(f"{function} of a quantized weight")


@each_kind
def test_weights_may_be_tensors_of_another_kind(kind):
    model, ids = tiny_model(kind, torch.float32, memory_lr=0.05), tokens(2, 17)
    with torch.no_grad():
        expected = model(ids).logits
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(Int8.of(module.weight), requires_grad=False)
        y = model(ids).logits
        assert_close(in_two_calls(model, ids), y)
    assert 0 < (y - expected).norm() / expected.norm() < 0.5


# ------------------------------------------------------------------------------------------------ sharded


def sharded(rank: int, kinds: list[str], folder: Path) -> None:
    """One of two processes: a step of each kind, sharded by layer; then a bare memory."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    ids, found = tokens(2, 17), {}
    for kind in kinds:
        model = tiny_model(kind, torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        state = model.initial_state(1)
        row = ids[rank : rank + 1]
        model(row[:, :6], past_key_values=state)
        found[kind] = [model(row[:, 6:], past_key_values=state).logits.detach()]
        out = model(row, labels=row)
        out.loss.backward()
        found[kind] += [out.logits.detach(), *(p.grad.full_tensor() for p in model.parameters())]
    memory, x = memory_layer(torch.float32), inputs(torch.float32)[rank : rank + 1]
    fully_shard(memory, mesh=mesh)
    y, state = memory(x)
    (y + memory.retrieve(x, state)).square().mean().backward()
    found["layer"] = [y.detach(), *(p.grad.full_tensor() for p in memory.parameters())]
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_by_layer_all_is_as_on_one_device(tmp_path):
    kinds = list(KINDS)
    torch.multiprocessing.spawn(sharded, (kinds, tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    ids = tokens(2, 17)
    for kind in kinds:
        model = tiny_model(kind, torch.float32)
        out = model(ids, labels=ids)
        out.loss.backward()
        for rank in range(2):
            continued, logits, *gradients = found[rank][kind]
            assert_close(logits, out.logits[rank : rank + 1], kind)
            assert_close(continued, out.logits[rank : rank + 1, 6:], kind)
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                assert_close(gradient, parameter.grad, f"{kind} {name}")
    memory, x = memory_layer(torch.float32), inputs(torch.float32)
    y, state = memory(x)
    (y + memory.retrieve(x, state)).square().mean().backward()
    for rank in range(2):
        sharded_y, *gradients = found[rank]["layer"]
        assert_close(sharded_y, y[rank : rank + 1])
        for (name, parameter), gradient in zip(memory.named_parameters(), gradients, strict=True):
            assert_close(gradient, parameter.grad, name)


# ------------------------------------------------------------------------------------------------ accumulated


@each_titan
def test_gradients_of_a_batch_are_those_of_its_rows_accumulated(kind):
    model, ids = tiny_model(kind, memory_loss_weight=1.0, memory_theta_weight=0.5).train(), tokens(2, 20)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :18] = -100
    mask[1, 14:] = 0
    labels[1, 14:] = -100
    items = int((labels[:, 1:] != -100).sum())
    whole = model(ids, attention_mask=mask, labels=labels)
    whole.loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for together in (True, False):
        model.zero_grad()
        for rows in [slice(0, 2)] if together else [slice(0, 1), slice(1, 2)]:
            part = {"attention_mask": mask[rows], "labels": labels[rows]}
            model(ids[rows], **part, num_items_in_batch=items).loss.backward()
        for name, p in model.named_parameters():
            assert_close(p.grad, expected[name], name)
