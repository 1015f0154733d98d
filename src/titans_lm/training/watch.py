"""What the memory does while a model trains, by layer, and texts that the model writes, for the trackers.

At logging steps a part of the last batch is read once more, without gradients, beside the training step: no hook is on
the model while it trains, so its outputs keep every bit, and steps between cost nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from titans_lm.layers.gating import ConvexGate, ProductGate, ResidualGate
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models.cache import TitansState
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.matmul import matmul_rate

ROWS, TOKENS = 2, 4096
"""The part of a batch that is read again: its first rows, and their first tokens."""
READ = ("input_ids", "attention_mask", "position_ids", "seq_idx")
"""The arguments, each `[B, T]`, that say what a batch's tokens are."""
OPERATIONS = 6
"""Of each weight for each token: a product and a sum, forward, and twice that backward."""


class Statistics(NamedTuple):
    """Of layers with a memory: means over rows, tokens and heads, and the distribution of the surprise."""

    scalars: dict[str, float]
    """`theta/layer_00` and so on: theta, eta, alpha, the gate that joins attention and memory (mac, mag), the norms of
    memory and momentum after the tokens, the surprise (eq. 12) and its gradient's norm."""
    surprise: dict[str, Tensor]
    """`surprise_of_tokens/layer_00` and so on: `[B * T * H]`."""


@torch.no_grad()
def memory_statistics(model: TitansForCausalLM, batch: dict[str, Any], state: TitansState | None) -> Statistics:
    """Read the first rows and tokens of `batch` after those of `state` (None: new streams), which stays as it is."""
    inputs = {key: batch[key][:ROWS, :TOKENS] for key in READ if batch.get(key) is not None}
    rows = len(inputs["input_ids"])
    before = model.initial_state(rows) if state is None else state.select(list(range(rows)))
    first = model.config.num_persistent_tokens > 0 and bool((before.position == 0).any())
    persistent = first and model.config.variant != "mac"  # whose memory does not write them
    with _gates(model, persistent) as gates, torch.compiler.set_stance("force_eager"):
        out = model(**inputs, past_key_values=before, output_surprise=True)
    scalars: dict[str, float] = {f"{name}/{layer}": mean for (name, layer), mean in gates().items()}
    memories = [found.memory for cache in before.layer_caches if (found := getattr(cache, "memory", None)) is not None]
    layers = [_layer(number) for number, block in enumerate(model.model.blocks()) if _memory(block) is not None]
    surprise = {}
    for layer, memory, found in zip(layers, memories, out.surprise or (), strict=True):
        scalars[f"memory_norm/{layer}"] = _norm(memory.weights)
        scalars[f"momentum_norm/{layer}"] = _norm(memory.momentum)
        scalars[f"surprise/{layer}"] = float(found.loss.mean())
        scalars[f"surprise_gradient/{layer}"] = float(found.gradient_norm.mean())
        surprise[f"surprise_of_tokens/{layer}"] = found.loss.flatten()
    return Statistics(scalars, surprise)


def _layer(number: int) -> str:
    return f"layer_{number:02}"


def _memory(block: nn.Module) -> NeuralMemory | None:
    return next((module for module in block.children() if isinstance(module, NeuralMemory)), None)


def _norm(weights: tuple[Tensor, ...]) -> float:
    """The Frobenius norm of a head's memory, its mean over rows and heads."""
    return float(torch.stack([w.float().square().sum((-2, -1)) for w in weights]).sum(0).sqrt().mean())


@contextmanager
def _gates(model: TitansForCausalLM, persistent: bool) -> Iterator[Callable[[], dict[tuple[str, str], float]]]:
    """A context with hooks on the gates. Yields what returns their means by name and layer.

    With `persistent`, a memory's first call is that of the persistent tokens, which is no token of the text."""
    seen: dict[tuple[str, str], list[Tensor]] = {}
    hooks = []

    def listen(name: str, layer: str, module: nn.Module | None, scale: float = 1.0) -> None:
        def note(_: nn.Module, __: Any, z: Tensor) -> None:
            seen.setdefault((name, layer), []).append(scale * torch.sigmoid(z.float()).flatten())

        if module is not None:
            hooks.append(module.register_forward_hook(note))

    for number, block in enumerate(model.model.blocks()):
        memory, layer, join = _memory(block), _layer(number), getattr(block, "gate", None)
        if memory is not None:
            listen("theta", layer, memory.theta, memory.lr)
            listen("eta", layer, memory.eta)
            listen("alpha", layer, memory.alpha)
        if isinstance(join, ProductGate):
            listen("gate", layer, join.m_norm)
        elif isinstance(join, ConvexGate | ResidualGate):
            listen("gate", layer, join.mix)

    def means() -> dict[tuple[str, str], float]:
        return {key: float(torch.cat(parts[persistent and key[0] != "gate" :]).mean()) for key, parts in seen.items()}

    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------ rates


def operations_per_token(model: nn.Module) -> int:
    """Operations that a token takes in the products with the model's weights, forward and backward.

    What attention and memory compute beside is not counted, so a part of the matmul rate is rather too small."""
    first = {id(p) for module in model.modules() if isinstance(module, NeuralMemory) for p in module.initial_memory}
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in first
    )
    return OPERATIONS * weights


# ------------------------------------------------------------------------------------------------ callback


class Watch(TrainerCallback):
    """Writes the memory's statistics and the part of the matmul rate at each logging step, and samples at theirs."""

    def __init__(self, trainer: Any, trackers: Any):
        self.trainer, self.trackers, self.settings = trainer, trackers, trainer.settings
        self.rate: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not logs or "loss" not in logs or not self.settings.report_to:
            return
        if self.rate is None:
            self.rate = matmul_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        speed = logs.get("tokens_per_second", 0) / max(args.world_size, 1)
        part = speed * operations_per_token(self.trainer.model) / self.rate
        self.trackers.scalars({"train/part_of_matmul_rate": part})
        if isinstance(self.trainer.model, TitansForCausalLM) and self.trainer.last_batch is not None:
            with self.trainer.as_in_training():
                found = memory_statistics(self.trainer.model, self.trainer.last_batch, self.trainer.last_state)
            self.trackers.scalars(found.scalars)
            self.trackers.histograms(found.surprise)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.settings.sample_steps and state.global_step % self.settings.sample_steps == 0:
            self.trackers.texts(self._samples())

    @torch.no_grad()
    def _samples(self) -> dict[str, str]:
        """What the model writes after each prompt, greedily, so that no random number is drawn."""
        model, tokenizer, found = self.trainer.model, self.trainer.processing_class, {}
        training = model.training
        model.eval()
        with self.trainer.as_in_training():
            for number, prompt in enumerate(self.settings.sample_prompts):
                ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
                made = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.settings.sample_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                found[f"samples/{number}"] = prompt + tokenizer.decode(made[0, ids.shape[1] :])
        model.train(training)
        return found
