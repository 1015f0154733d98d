"""A memory for a pretrained causal language model of transformers: beside the attention of chosen layers (MAG).

The gate between them begins closed, so a new graft computes what its base computes, to the bit. The base's weights are
frozen. A graft is a `TitansForCausalLM`: its state is a `TitansState`, so whatever reads, generates, serves or trains
takes it.
"""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from titans_lm.layers.attention import RotaryEmbedding
from titans_lm.layers.bypass import bypass_memory, is_bypassed
from titans_lm.layers.gating import ResidualGate
from titans_lm.layers.memory_state import LayerSurprise, NeuralMemoryState
from titans_lm.models import model_files
from titans_lm.models.block_cache import AttentionCache, BlockCache, LMMCache, MAGCache, as_value, restart_rows
from titans_lm.models.block_layers import make_memory
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import OF_TRANSFORMERS
from titans_lm.models.distillation import as_published, distilled, published_hidden_states, teacher_logits
from titans_lm.models.forward_context import ForwardContext
from titans_lm.models.graft_base import check_options, load_base, load_weights, one_device, one_dtype
from titans_lm.models.graft_cache import BaseShape, GraftCall
from titans_lm.models.graft_config import GraftConfig, windows
from titans_lm.models.model_identity import weights_digest
from titans_lm.models.modeling import TitansCausalLMOutput, TitansForCausalLM, TitansModel
from titans_lm.models.replay import LayersCall, LayersOutput
from titans_lm.models.segments import concat_surprises

WINDOW_TOKENS = 1024
"""Without gradients a base with a window reads this many tokens at a time: its masks are dense."""
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""What decoder layers of transformers call their attention."""


class GraftedAttention(nn.Module):
    """A layer's attention with a memory beside it, in its place. Called without a `GraftCall` it is the attention."""

    def __init__(self, attention: nn.Module, layer: int, config: GraftConfig):
        super().__init__()
        self.attention, self.layer = attention, layer
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.memory = make_memory(config)
        self.gate = ResidualGate(config.hidden_size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.attention(*args, **kwargs)
        call = next((value for value in (*kwargs.values(), *args) if isinstance(value, GraftCall)), None)
        if call is None:
            return out
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(out, tuple):
            return (self._join(x, out[0], call), *out[1:])
        return self._join(x, out, call)

    def _join(self, x: Tensor, y: Tensor, call: GraftCall) -> Tensor:
        """x, the attention's input, and y, its output, `[B, T, D]` -> y and what the gate adds of the memory."""
        c, bypass = call.context, is_bypassed(self.memory)
        x = self.norm(x.to(self.norm.weight.dtype))
        state = self._begin(call.memories[self.layer], x, c)
        out = self.memory.forward_aligned(x, state, c.valid, update=c.update, surprise=c.surprise, bypass=bypass)
        call.memories[self.layer] = out.state
        if out.surprise is not None:
            call.surprises.append(out.surprise)
        return y if bypass else self.gate(y, out.y)

    def _begin(self, state: NeuralMemoryState | None, x: Tensor, context: ForwardContext) -> NeuralMemoryState:
        """The state, with the first memory in rows at their first token."""
        if state is not None and context.new_rows is None:
            return state
        first = self.memory.initial_state_like(len(x), x)
        if state is None or context.new_rows is None:
            return first
        return restart_rows(context.new_rows, LMMCache(first), as_value(LMMCache(state), context.position)).memory


class GraftedLayer(nn.Module):
    """A layer as its surroundings see a block: its cache, and its memory and gate, if it has them. It is not called."""

    def __init__(self, shape: BaseShape, layer: int, grafted: GraftedAttention | None):
        super().__init__()
        self.shape, self.layer = shape, layer
        self.cache_type = AttentionCache if grafted is None else MAGCache
        if grafted is not None:
            self.memory, self.gate, self.norm = grafted.memory, grafted.gate, grafted.norm

    def may_replay(self, _position: int) -> bool:
        """False: the base's own operations cannot be replayed."""
        return False

    def empty_cache(self, batch: int, like: Tensor) -> BlockCache:
        attention = self.shape.empty(self.layer, batch, like)
        if self.cache_type is AttentionCache:
            return AttentionCache(attention)
        return MAGCache(attention, self.memory.empty_state(batch, like.to(self.norm.weight.dtype)))


class GraftModel(TitansModel):
    """The base's decoder with memories in its layers. Everything around the layers is `TitansModel`'s."""

    config: GraftConfig

    def __init__(self, config: GraftConfig, base: PreTrainedModel):
        super(TitansModel, self).__init__(config)  # not the blocks of TitansModel
        self.base = base
        self.shape = BaseShape.of(base.config, windows(base.config, config.window_size))
        self.gradient_checkpointing = False
        self._beginning: TitansState | None = None
        decoder_layers = _decoder_layers(base)
        for layer in config.grafted:
            name = _attention_name(decoder_layers[layer], base)
            grafted = GraftedAttention(getattr(decoder_layers[layer], name), layer, config)
            grafted.memory.reset_parameters()
            setattr(decoder_layers[layer], name, grafted.to(_device(base)))
        with no_init_weights():
            self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:  # type: ignore[override]
        """The base's embedding."""
        return cast(nn.Module, self.base.get_input_embeddings())

    def grafts(self) -> list[GraftedAttention]:
        """The attentions with a memory, in the order of layers."""
        return [module for module in self.base.modules() if isinstance(module, GraftedAttention)]

    def blocks(self) -> list[Any]:
        own = {grafted.layer: grafted for grafted in self.grafts()}
        return [GraftedLayer(self.shape, layer, own.get(layer)) for layer in range(self.config.num_hidden_layers)]

    def _rope(self, position: Tensor, dtype: torch.dtype) -> RotaryEmbedding:
        """None: the base has its own positions."""
        empty = torch.empty(*position.shape, 0, dtype=dtype, device=position.device)
        return RotaryEmbedding(empty, empty)

    def _run_layers(self, call: LayersCall) -> LayersOutput:
        x, before, context, _ = call
        most = PREFILL_TOKENS if None in self.shape.windows else max(WINDOW_TOKENS, *map(int, self.shape.windows))  # type: ignore[arg-type]
        if x.shape[1] <= most or torch.is_grad_enabled():
            return self._run_base(call)
        outputs: list[LayersOutput] = []
        for start in range(0, x.shape[1], most):
            part = x[:, start : start + most]
            here = context.part(start, start + most)
            outputs.append(self._run_base(LayersCall(part, before, here, call.options)))
            before = outputs[-1][1]
            moved = here.advanced(part.shape[1])
            context = context._replace(position=moved.position, uniform_position=moved.uniform_position, new_rows=None)
        xs, caches, hidden, surprises = zip(*outputs, strict=True)
        layers = [torch.cat(layer, 1) for layer in zip(*hidden, strict=True)]
        found = [cast(LayerSurprise, concat_surprises(parts)) for parts in zip(*surprises, strict=True)]
        return torch.cat(xs, 1), caches[-1], layers, found

    def _run_base(self, call: LayersCall) -> LayersOutput:
        x, before, context, options = call
        if not x.shape[1]:
            caches = self.initial_state(len(x)).layer_caches if None in before else before
            return x, cast(list[BlockCache], caches), [x] * self.config.num_hidden_layers * options.hidden, []
        call = GraftCall(self.shape, before, context)
        position = context.position[:, None] + torch.arange(x.shape[1], device=x.device)
        limit = self.config.max_position_embeddings
        out = self.base(
            inputs_embeds=x,
            attention_mask=call.masks(x),
            position_ids=position if limit is None else position.clamp(max=limit - 1),  # of padding
            use_cache=True,
            output_hidden_states=options.hidden,
            **{OF_TRANSFORMERS: call},
        )
        hidden = list(out.hidden_states[:-1]) if options.hidden else []
        return out.last_hidden_state, call.after(x.shape[1]), hidden, call.surprises


class GraftHead(nn.Module):
    """The base's logits: its last linear map, and what its configuration says is done to them."""

    def __init__(self, linear: nn.Module, config: Any):
        super().__init__()
        self.linear = linear
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None)
        self.divisor = getattr(config, "logits_scaling", None)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        logits = logits if self.scale is None else logits * self.scale
        logits = logits if self.divisor is None else logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class GraftForCausalLM(TitansForCausalLM):
    """A pretrained language model with a memory.

    Takes `base`, a causal language model of transformers, over: its attention modules are replaced in place. Raises
    ValueError for one without a list of decoder layers with attention, and for LoRA without PEFT installed.
    """

    config: GraftConfig
    _tied_weights_keys = None  # type: ignore[assignment]
    supports_gradient_checkpointing = False

    def __init__(self, config: GraftConfig, base: PreTrainedModel):
        super(TitansForCausalLM, self).__init__(config)  # not its TitansModel
        base.requires_grad_(False)
        frozen = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
        if config.lora_rank:
            _add_lora(base, config)
        self.model = GraftModel(config, _decoder(base))
        self.vocab_size = config.vocab_size
        self.lm_head = GraftHead(base.get_output_embeddings(), base.config)  # type: ignore[assignment]
        self.generation_config = copy.deepcopy(base.generation_config)
        self.generation_config.cache_implementation = None  # its cache is a TitansState
        with no_init_weights():
            self.post_init()
        named = self.state_dict(keep_vars=True)
        self._keys_to_ignore_on_save = {name for name, tensor in named.items() if id(tensor) in frozen}

    def own_state_dict(self) -> dict[str, Tensor]:
        """The weights that are not the base's: those of memories, gates and LoRA."""
        return {name: t for name, t in self.state_dict().items() if name not in self._keys_to_ignore_on_save}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        distillation: Tensor | None = None,
        cache: TitansState | None = None,
        **options: Any,
    ) -> TitansCausalLMOutput:
        """As `TitansForCausalLM.forward`. In training `labels` give the loss that the configuration's `distillation`
        names, or for each row the argument's, `[B]`. Raises ValueError for the argument without labels."""
        if distillation is not None and labels is None:
            raise ValueError("distillation needs labels: it replaces their loss, row by row")
        out: TitansCausalLMOutput = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, cache=cache, **options
        )
        if not self.training or labels is None or (distillation is None and not self.config.distillation):
            return out  # before any value of a tensor is looked at
        weight = labels.new_full(labels.shape[:1], self.config.distillation, dtype=torch.float32)
        weight = weight if distillation is None else distillation
        rows = weight > 0
        if rows.any():
            x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            teacher = teacher_logits(
                lambda x, mask: self.base_logits(None, mask, x), x, attention_mask, rows,
                {"position_ids": position_ids, **options},
            )  # fmt: skip
            assert out.loss is not None and out.logits is not None
            more = distilled(teacher, out.logits[rows], labels[rows]) * weight[rows]
            items = options.get("num_items_in_batch")
            out.loss = out.loss + more.sum() / ((labels[:, 1:] != -100).sum().clamp(min=1) if items is None else items)
        return out

    @torch.no_grad()
    def base_logits(
        self, input_ids: Tensor | None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The logits of the base as it was published, for rows `[B, T]` from their first token on. Rows of more tokens
        than it has positions are read in the graft's window.

        Raises ValueError for such rows where no window lifts the limit."""
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        limit = getattr(self.model.base.config, "max_position_embeddings", None)
        if limit is not None and x.shape[1] > limit:
            with as_published(self.model.base), bypass_memory(self.model):
                logits: Tensor = super().forward(attention_mask=attention_mask, inputs_embeds=x, use_cache=False).logits
            return logits
        return self.lm_head(published_hidden_states(self.model.base, x, attention_mask))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        config: GraftConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> Any:
        """The graft in a folder that `save_pretrained` wrote, on its base, in evaluation mode; `AutoModelForCausalLM`
        calls this. `dtype` is of all weights (None, "auto": as they were saved), `device_map` names one device; "auto"
        is the accelerator with most free memory, if the graft fits, else the CPU.

        The base is looked for under the name in config.json, in the folder and from the working directory. Raises
        ValueError for damaged files, for a base that is not found or has other weights, for weights that are not this
        graft's, and for other options."""
        folder = Path(pretrained_model_name_or_path)
        dtype = one_dtype(options.pop("torch_dtype", None) if dtype is None else dtype)  # as transformers does
        check_options(options)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not the folder of a graft: it has no config.json")
        model_files.check_digests(folder)
        config = GraftConfig.from_pretrained(folder, local_files_only=True) if config is None else config
        beside = folder / config.base
        base = load_base(str(beside) if (beside / "config.json").is_file() else config.base)
        if weights_digest(base) != config.base_weights:
            raise ValueError(f"{folder} was trained on other weights than those of its base {config.base} now")
        if config._attn_implementation is not None:
            base.set_attn_implementation(config._attn_implementation)
        model = cls(config, base)
        model.load_state_dict(load_weights(folder, model.own_state_dict()), strict=False)
        model = model.to(dtype=dtype).eval()
        model = model.to(one_device(device_map, model.get_memory_footprint()))
        found: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, {**found, "error_msgs": []}) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **options: Any) -> None:
        """Save memories, gates and LoRA as an adapter: config.json, which names the base, and model.safetensors. No
        weight of the base is written."""
        PreTrainedModel.save_pretrained(self, save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            model_files.add_companions(save_directory, adapter=False, code=False)


# ------------------------------------------------------------------------------------------------ the base's parts


def _decoder(base: PreTrainedModel) -> PreTrainedModel:
    decoder = base.base_model
    if decoder is base or base.get_output_embeddings() is None:
        raise ValueError(f"graft: {type(base).__name__} is not a decoder with a head for its vocabulary")
    return cast(PreTrainedModel, decoder)


def _decoder_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers. Raises ValueError for a model that has none."""
    count = decoder.config.num_hidden_layers
    for part in decoder.children():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise ValueError(f"graft: {type(decoder).__name__} has no list of {count} decoder layers that a memory could go to")


def _attention_name(layer: nn.Module, decoder: PreTrainedModel) -> str:
    """The attribute with a layer's attention. Raises ValueError for a layer without one."""
    for name in _ATTENTION:
        if isinstance(getattr(layer, name, None), nn.Module):
            return name
    raise ValueError(f"graft: {type(layer).__name__} of {type(decoder).__name__} has none of: {', '.join(_ATTENTION)}")


def _device(base: PreTrainedModel) -> torch.device:
    return next(base.parameters()).device


def _add_lora(base: PreTrainedModel, config: GraftConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora_rank needs the package peft: pip install peft") from None
    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    targets: Any = "all-linear" if config.lora_targets is None else config.lora_targets
    try:
        inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets), base)  # type: ignore[arg-type]
    except ValueError as error:  # no module has such a name
        raise ValueError(f"lora_targets={targets}: {' '.join(str(error).split())}") from error


AutoModelForCausalLM.register(GraftConfig, GraftForCausalLM, exist_ok=True)
