"""Tokens -> embedding -> blocks -> logits and loss, as transformers models; registered with its Auto classes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults

from titans_lm.layers.attention import Attention, Rotation, rotation
from titans_lm.layers.called import at_home
from titans_lm.layers.features import ShortConvolution
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.models import model_files
from titans_lm.models.arguments import check_arguments, check_finite, check_state, embedded, hidden_states, token_mask
from titans_lm.models.blocks import BLOCKS, TitansBlock
from titans_lm.models.cache import Identity, TitansState, identity
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.generation import TitansGeneration
from titans_lm.models.packing import Asked, Read, document_starts, documents, read_documents
from titans_lm.models.reading import LayerState, Reading, start_rows
from titans_lm.ops import Surprise, gather_tokens, left_align, masked_zero, undo_left_align

OF_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Arguments of transformers' loss functions; `Trainer` passes the first without labels too, where it smooths them."""


@dataclass
class TitansModelOutput(ModelOutput):
    """`surprise`, if asked for: for each layer with a memory, `loss` and `gradient_norm`, each `[B, T, H]`."""

    last_hidden_state: Tensor | None = None
    past_key_values: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[Surprise, ...] | None = None


@dataclass
class TitansCausalLMOutput(ModelOutput):
    """`loss` includes `memory_loss_weight * memory_loss`, the mean reconstruction loss before each write: of each row,
    and then of rows weighed by their labels, as the other part of the loss weighs them."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: TitansState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    surprise: tuple[Surprise, ...] | None = None
    memory_loss: Tensor | None = None


class TitansPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers may do with these models."""

    config: TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # no assisted decoding: what was read cannot be unread

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NeuralMemory | ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, TitansBlock) and module.persistent is not None:
            init.normal_(module.persistent, std=1.0)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """transformers passes over a module of ours without parameters of its own, as a plain memory is, whose gates
        would then begin at 0. What a file gave is not touched: `torch.nn.init` knows it while this runs."""
        own = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and own)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers has it, and by the name of a shipped model, such as "books"."""
        if pretrained_model_name_or_path is not None:  # None: `state_dict` has the weights
            pretrained_model_name_or_path = model_files.shipped(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """As transformers has it, and beside it code that finds this package, and the digests of what was written, by
        which `titans` knows a damaged folder."""
        ours = model_files.is_ours(type(self))  # else a class that was registered adds itself to the map
        saved_map = dict(model_files.AUTO_MAP) if ours else {"AutoConfig": model_files.AUTO_MAP["AutoConfig"]}
        self.config.auto_map = saved_map  # type: ignore[misc]  # of this configuration alone
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            model_files.complete(save_directory, adapter=self._has_adapter)

    def _upload_modified_files(self, working_dir: str | Path, *arguments: Any, **options: Any) -> Any:
        """What `save_pretrained` writes beside the model is uploaded with it."""
        model_files.complete(working_dir, adapter=self._has_adapter)
        return super()._upload_modified_files(working_dir, *arguments, **options)

    @property
    def _has_adapter(self) -> bool:
        """`add_adapter` was called: the adapter is what transformers saves then, without the model."""
        return bool(getattr(self, "_hf_peft_config_loaded", False))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """As transformers has it, for a class of your own. Those of this package need none of it: what they save says
        which of them opens it, and has no copy of their code."""
        if not model_files.is_ours(cls):
            super().register_for_auto_class(auto_class)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own TitansState


class TitansModel(TitansPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BLOCKS[config.variant](config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._no_split_modules = [
            BLOCKS[config.variant].__name__
        ]  # by name, and the names of other variants are refused
        self._beginning: TitansState | None = None
        self.post_init()

    def begin_with(self, memory: TitansState | None) -> None:
        """Streams begin with a fork of `memory` (of one row): `generate`, pipelines and servers then know what it
        knows. None: they begin with the learned first memory again, as in training."""
        if memory is not None and memory.batch_size != 1:
            raise ValueError(f"streams can begin with a memory of one row, this one has {memory.batch_size}")
        beginning = None if memory is None else memory.detach()
        if beginning is not None and beginning.pending is not None:
            ids, there = beginning.take_pending()
            with torch.no_grad():
                self(ids, attention_mask=there, past_key_values=beginning)
        if beginning is not None:
            beginning.identity = Identity(dict)  # streams get the model's; a copy of the model must not have this one's
        self._beginning = beginning

    def initial_state(self, batch: int) -> TitansState:
        """The memory of `batch` streams before their first token. It is 0: a row at position 0 begins with the learned
        first memory in the first call that reads it, and gradients flow there."""
        if self._beginning is not None:
            state = self._beginning.to(at_home(self).device).select([0] * batch)
            state.columns, state.identity = 0, Identity(partial(identity, self))
            return state
        like = at_home(self)
        return self._state([block.empty_state(batch, like) for block in self.blocks()], batch, like.device)

    def _state(self, layers: list[LayerState], batch: int, device: torch.device) -> TitansState:
        position = torch.zeros(batch, dtype=torch.long, device=device)
        return TitansState(layers, position, Identity(partial(identity, self)))

    def blocks(self) -> list[TitansBlock]:
        """The layers, as what they are."""
        return [block for block in self.layers if isinstance(block, TitansBlock)]

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_surprise: bool = False,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput:
        """Read tokens `[B, T]` (or embeddings `[B, T, D]`) on from `past_key_values`, which is updated.

        `attention_mask` `[B, T]`, or longer where it covers earlier tokens too: 0 is padding, at any place, invisible.
        A row may be of several documents, of which none sees another: where `position_ids` `[B, T]` start again at 0,
        or `seq_idx` `[B, T]` changes, or as `cu_seq_lens_q` says, all as transformers' collators make them. Then the
        row's state afterwards is that of its last document. Otherwise a model counts its tokens itself.
        Raises ValueError for inputs that do not fit, embeddings that are not finite, an argument that would have no
        effect, or a stream over `max_position_embeddings`.
        """
        x = embedded(self.embed_tokens, input_ids, inputs_embeds)
        state = self._new_state(x) if past_key_values is None else check_state(past_key_values)
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        check_arguments(kwargs, state.columns, x.shape[1])
        mask = token_mask(attention_mask, x, state.batch_size)
        if inputs_embeds is not None or not self.training:  # in training the loss says so
            check_finite(x, mask)
        expected = self._expected(state) if position_ids is not None and state.memories else [[]] * len(x)
        starts = document_starts(mask, (len(x), x.shape[1]), position_ids, expected, kwargs)
        if state.pending is not None:
            state = self._with_pending(state, x, mask)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        asked = Asked(output_surprise, bool(hidden))
        if starts is None:
            read = self._read(x, mask, state, asked)
        else:
            read = read_documents(
                documents(starts.to(x.device), mask),
                x,
                state if state.memories else self.initial_state(len(x)),
                self.initial_state,
                lambda x, present, state: self._read(x, present, state, asked),
            )
        if past_key_values is not None:
            past_key_values.become(read.state)
            past_key_values.identity = Identity(partial(identity, self))  # an unpickled one knows its former model
        elif use_cache:
            past_key_values = read.state
        return TitansModelOutput(
            last_hidden_state=read.x,
            past_key_values=past_key_values,
            hidden_states=hidden_states(hidden, [*read.hidden, read.x]),
            surprise=tuple(read.surprise) if output_surprise else None,
        )

    def _read(self, x: Tensor, mask: Tensor | None, state: TitansState, asked: Asked) -> Read:
        """Embeddings `[B, T, D]`, from `state`, which is left as it is; without layers, no row has read anything."""
        layers, position = self._begin_rows(state)
        places = set(position.tolist()) if layers else {0}  # no need to ask a GPU
        fresh = position == 0 if 0 in places and len(places) > 1 else None
        begun: list[LayerState] | list[None] = [None] * len(self.layers) if places == {0} else layers
        length = torch.full_like(position, x.shape[1])
        present, tokens = None, x.shape[1]
        if mask is not None:
            order, length = left_align(mask)
            x = gather_tokens(masked_zero(x, mask), order)
            present = torch.arange(tokens, device=x.device) < length[:, None]
        self._check_length(position + length)
        time = position[:, None] + torch.arange(tokens, device=x.device)
        assert self.config.head_dim is not None
        turn = Rotation(*(part.to(x.dtype) for part in rotation(time, self.config.head_dim, self.config.rope_theta)))
        at = places.pop() if present is None and len(places) == 1 else None
        reading = Reading(position, at, turn, present, state.frozen, asked.surprise, fresh)
        for module in self.blocks():
            if isinstance(attention := getattr(module, "attention", None), Attention):
                attention.eager = self.config._attn_implementation == "eager"
        after: list[LayerState] = []
        hidden: list[Tensor] = []
        seen: list[Surprise] = []
        for layer, before in zip(self.layers, begun, strict=True):
            if asked.hidden:
                hidden.append(x)
            x, memory, surprise = layer(x, before, reading)
            after.append(memory)
            if surprise is not None:
                seen.append(surprise)
        x = self.norm(x)
        if mask is not None:
            x, *hidden = (undo_left_align(h, mask) for h in (x, *hidden))
            seen = [Surprise(*(undo_left_align(part, mask) for part in s)) for s in seen]
        return Read(x, state.moved(after, position + length, tokens), hidden, seen)

    def _expected(self, state: TitansState) -> list[list[int]]:
        """Positions at which rows may go on: as many as their tokens, without those they began with, or columns."""
        begun = 0 if self._beginning is None else int(self._beginning.position)
        return [[p, state.columns, p - begun] if p else [] for p in state.position.tolist()]

    def _with_pending(self, state: TitansState, x: Tensor, mask: Tensor | None) -> TitansState:
        """A continuation once it has read its pending tokens; any other state, if these tokens begin with them."""
        if state.columns:
            return state.begun_by(x, mask, self.embed_tokens)
        state = state.shared()
        ids, there = state.take_pending()
        self.forward(ids, attention_mask=there, past_key_values=state)
        state.columns = 0
        return state

    def _new_state(self, x: Tensor) -> TitansState:
        """Of as many streams as x has rows; without layers, which the blocks make, if they begin with nothing."""
        if self._beginning is not None:
            return self.initial_state(len(x))
        return self._state([], len(x), x.device)

    def _begin_rows(self, state: TitansState) -> tuple[list[LayerState], Tensor]:
        """The state's layers and positions, where rows at position 0 begin as `begin_with` said."""
        if self._beginning is None or not bool((fresh := state.position == 0).any()):
            return state.memories, state.position
        begin = self.initial_state(state.batch_size)
        layers = [start_rows(fresh, b, old) for b, old in zip(begin.memories, state.memories, strict=True)]
        return layers, torch.where(fresh, begin.position, state.position)

    def _check_length(self, total: Tensor) -> None:
        limit = self.config.max_position_embeddings
        if limit is not None and int(total.max()) > limit:
            raise ValueError(f"{int(total.max())} tokens are over this model's max_position_embeddings={limit}")


class TitansForCausalLM(TitansPreTrainedModel, TitansGeneration, GenerationMixin):
    """A Titans language model: `generate`, `labels`, `past_key_values` as everywhere in transformers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def initial_state(self, batch: int) -> TitansState:
        """The memory of `batch` streams before their first token."""
        return self.model.initial_state(batch)

    def begin_with(self, memory: TitansState | None) -> None:
        """See `TitansModel.begin_with`."""
        self.model.begin_with(memory)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_surprise: bool = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TitansCausalLMOutput:
        """As `TitansModel.forward`; `labels` `[B, T]` (-100: not counted) give the loss of the next token.
        `logits_to_keep=n` computes logits of the last n positions only."""
        of_loss = {key: kwargs.pop(key) for key in OF_LOSS if key in kwargs}
        if labels is None and (of_loss.keys() - {"num_items_in_batch"}):
            raise ValueError(f"{', '.join(of_loss)} without labels would have no effect")
        weight = self.config.memory_loss_weight if labels is not None else 0.0
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_surprise=output_surprise or weight > 0,
            position_ids=position_ids,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss: Tensor | None = None
        memory_loss: Tensor | None = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **of_loss)
        if loss is not None and labels is not None and weight > 0 and out.surprise:
            rows, counted = _memory_losses(out.surprise, attention_mask), _counted(labels, **of_loss)
            total, own = (rows * counted).sum(), counted.sum().clamp(min=1)
            items = of_loss.get("num_items_in_batch")
            memory_loss = total / own
            loss = loss + weight * total / (own if items is None else items)
        return TitansCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            surprise=out.surprise if output_surprise else None,
            memory_loss=memory_loss,
        )


def _memory_losses(surprise: tuple[Surprise, ...], attention_mask: Tensor | None) -> Tensor:
    """Of each row, `[B]`: the mean over layers, heads and tokens that are there."""
    each = torch.stack([s.loss.mean(-1) for s in surprise]).mean(0)  # [B, T], 0 where masked
    if attention_mask is None:
        return each.mean(1)
    return each.sum(1) / attention_mask[:, -each.shape[1] :].sum(1).clamp(min=1)


def _counted(labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any) -> Tensor:
    """Labels of each row `[B]` that the loss counts: what rows weigh, however an update's rows are put into batches."""
    return ((labels[:, 1:] if shift_labels is None else shift_labels) != ignore_index).sum(1)


AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)
