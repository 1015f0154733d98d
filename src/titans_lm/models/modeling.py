"""The models for transformers: embedding, blocks, logits and loss. They are registered with its Auto classes."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from titans_lm.layers.attention import RotaryEmbedding, rotary_embedding
from titans_lm.layers.few_rows import linears, rms_norm
from titans_lm.layers.memory_state import LayerSurprise
from titans_lm.layers.module_call import empty_like_weights
from titans_lm.layers.neural_memory import NeuralMemory
from titans_lm.layers.short_conv import ShortConvolution
from titans_lm.models import model_files
from titans_lm.models.arguments import (
    check_arguments,
    check_caches,
    check_finite,
    check_state,
    embedded,
    select_hidden_states,
    token_mask,
    warn_of_memory_loss,
)
from titans_lm.models.block_cache import BlockCache
from titans_lm.models.blocks import BLOCKS, TitansBlock
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import NAMES, given_state
from titans_lm.models.configuration import TitansConfig
from titans_lm.models.decoding import begin_decoding
from titans_lm.models.forward_context import ForwardContext
from titans_lm.models.generation import TitansGeneration
from titans_lm.models.loss import LOSS_ARGUMENTS, MemoryTerms, memory_terms, memory_weights
from titans_lm.models.model_identity import Identity, identity
from titans_lm.models.outputs import TitansCausalLMOutput, TitansModelOutput
from titans_lm.models.packing import OutputOptions, StackOutput, document_starts, read_documents
from titans_lm.models.replay import LayersCall, LayersOutput, run_or_replay
from titans_lm.models.row_starts import RowStarts, check_length
from titans_lm.ops import gather_tokens, is_traced, left_align, masked_zero, undo_left_align


class TitansPreTrainedModel(PreTrainedModel):
    """Initialisation, saving and loading, and the features of transformers that these models support."""

    config: TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(NAMES)  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # no assisted decoding: a memory cannot unread tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NeuralMemory | ShortConvolution):
            module.reset_parameters()
        elif isinstance(module, TitansBlock) and module.persistent is not None:
            init.normal_(module.persistent, std=1.0)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """For remote code, transformers skips modules without parameters of their own, such as a plain memory, whose
        gates would then start at 0. Weights from a file stay: `torch.nn.init` knows them while this runs."""
        own = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and own)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers has it. It also takes the name of a shipped model, such as "books"."""
        if pretrained_model_name_or_path is not None:  # None: `state_dict` holds the weights
            pretrained_model_name_or_path = model_files.shipped_folder(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """As transformers has it. It also writes code that finds this package, and digests of the written files, by
        which `titans` detects a damaged folder."""
        ours = model_files.is_ours(type(self))  # a registered class of someone else adds itself to the map
        known = type(self.config).auto_map  # of the class, whatever a loaded configuration has
        saved_map = dict(known) if ours else {"AutoConfig": known["AutoConfig"]}
        self.config.auto_map = saved_map  # type: ignore[misc]  # of this configuration alone
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            model_files.add_companions(save_directory, adapter=self._has_adapter)

    def _upload_modified_files(self, working_dir: str | Path, *arguments: Any, **options: Any) -> Any:
        """Upload the files that `save_pretrained` writes beside the model too."""
        model_files.add_companions(working_dir, adapter=self._has_adapter)
        return super()._upload_modified_files(working_dir, *arguments, **options)

    @property
    def _has_adapter(self) -> bool:
        """Whether `add_adapter` was called. transformers then saves the adapter without the model."""
        return bool(getattr(self, "_hf_peft_config_loaded", False))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """As transformers has it, for a class of your own. This package's classes do not need it: what they save names
        the class that opens it, and holds no copy of their code."""
        if not model_files.is_ours(cls):
            super().register_for_auto_class(auto_class)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes a TitansState itself


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
        """Begin new streams with a fork of `memory`, also in `generate`, pipelines and servers.

        None: begin with the learned first memory, as in training. Raises ValueError unless `memory` has one row."""
        if memory is not None and memory.batch_size != 1:
            raise ValueError(f"streams can begin with a memory of one row, this one has {memory.batch_size}")
        beginning = None if memory is None else memory.detach()
        if beginning is not None and beginning.pending is not None:
            ids, mask = beginning.take_pending()
            with torch.no_grad():
                self(ids, attention_mask=mask, past_key_values=beginning)
        if beginning is not None:
            beginning.positions()  # read once, here
            beginning.identity = Identity(dict)  # a copy of the model must not refer to this one; streams get their own
        self._beginning = beginning

    def initial_state(self, batch: int) -> TitansState:
        """The state of `batch` streams before their first token. Its memory is 0: the first call that reads a row puts
        the learned first memory there, and gradients flow back to it."""
        if self._beginning is not None:
            beginning = self._beginning.to(empty_like_weights(self).device)
            state = beginning.select(torch.zeros(batch, dtype=torch.long))
            state.columns, state.identity = 0, Identity(partial(identity, self))
            return state
        like = empty_like_weights(self)
        return self._state([block.empty_cache(batch, like) for block in self.blocks()], batch, like.device)

    def begin_decoding(self, state: TitansState) -> None:
        """Let calls of one token write buffers of `state` in place, on a CPU, until `state.end_decoding()`.

        A token is faster then. The buffers are copies, and forks and files have none of them, so nobody sees a
        difference; begin where several tokens follow. Other calls, and devices, work as without. The keys and values of
        persistent tokens are computed here, so new weights or adapters act on them only after `end_decoding`."""
        begin_decoding(self.blocks(), state)

    def _state(self, caches: list[BlockCache], batch: int, device: torch.device) -> TitansState:
        position = torch.zeros(batch, dtype=torch.long, device=device)
        state = TitansState(caches, position, Identity(partial(identity, self)))
        if not is_traced(position):
            state.note_positions([0] * batch)
        return state

    def blocks(self) -> list[TitansBlock[Any]]:
        """The layers, with their type."""
        return [block for block in self.layers if isinstance(block, TitansBlock)]

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_surprise: bool = False,
        output_hidden_states: bool | int | list[int] | None = None,
        cache: TitansState | None = None,
        **kwargs: Any,
    ) -> TitansModelOutput:
        """Read tokens `[B, T]` (or embeddings `[B, T, D]`) after those of `past_key_values`, and update it. `cache` is
        another name of it.

        `attention_mask` is `[B, T]`, or longer if it covers earlier tokens too. 0 is padding, at any place; it has no
        effect on the tokens. A row may hold several documents that do not see each other, as transformers' collators
        pack them: `position_ids` `[B, T]` restarts at 0, `seq_idx` `[B, T]` changes, or `cu_seq_lens_q` has their
        lengths. The row's state afterwards is that of its last document. Without packing, a state counts its tokens
        itself.

        Raises ValueError for inputs or a state that do not fit, embeddings that are not finite, an argument that would
        have no effect, and a stream longer than `max_position_embeddings`.
        """
        past_key_values = given_state(past_key_values, cache)
        x = embedded(self.embed_tokens, input_ids, inputs_embeds)
        state = self._new_state(x) if past_key_values is None else check_state(past_key_values)
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        check_caches(state.layer_caches, [block.cache_type for block in self.blocks()])
        warn_of_memory_loss(memory_weights(self.config), self.training and not output_surprise)
        check_arguments(kwargs, state.columns, x.shape[1])
        mask = token_mask(attention_mask, x, state.batch_size)
        if inputs_embeds is not None or not (self.training or x.is_cuda):  # in training, the loss shows it
            check_finite(x, mask)  # of the model's own embeddings a GPU would have to be waited for
        if state.pending is not None:
            state = self._with_pending(state, x, mask)
        starts = document_starts(mask, (x.shape[0], x.shape[1]), position_ids, partial(self._expected, state), kwargs)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options = OutputOptions(output_surprise, hidden is not None and hidden is not False)
        out = read_documents(starts, mask, x, state, self.initial_state, partial(self._run_blocks, options=options))
        if past_key_values is not None:
            past_key_values.assign(out.state)
            past_key_values.identity = Identity(partial(identity, self))  # an unpickled state has that of its old model
        elif use_cache:
            past_key_values = out.state
        return TitansModelOutput(
            last_hidden_state=out.x,
            cache=past_key_values,
            hidden_states=select_hidden_states(hidden, [*out.hidden, out.x]),
            surprise=tuple(out.surprise) if output_surprise else None,
        )

    def _run_blocks(self, x: Tensor, mask: Tensor | None, state: TitansState, options: OutputOptions) -> StackOutput:
        """Embeddings `[B, T, D]` -> the final norm's output. `state` stays as it is; without caches, all rows are at
        their first token."""
        starts = self._begin_rows(state, traced=is_traced(x))
        position, tokens = starts.position, x.shape[1]
        before = [None] * self.config.num_hidden_layers if starts.all_new() else starts.caches
        length, valid = torch.full_like(position, tokens), None
        if mask is not None:
            order, length = left_align(mask)
            x = gather_tokens(masked_zero(x, mask), order)
            valid = torch.arange(tokens, device=x.device) < length[:, None]
        check_length(self.config.max_position_embeddings, starts, length if mask is not None else tokens)
        context = ForwardContext(
            position,
            uniform_position=starts.uniform_position() if valid is None else None,
            rope=self._rope(position[:, None] + torch.arange(tokens, device=x.device), x.dtype),
            valid=valid,
            update=not state.frozen,
            surprise=options.surprise and not state.frozen,
            eager=self.config._attn_implementation == "eager",
            new_rows=starts.new_rows(state.restarts),
        )
        call = LayersCall(x, before, context, options)
        x, after, hidden, surprises = run_or_replay(self._run_layers, self, call, state.replay, starts.values)
        if mask is not None:
            x, *hidden = (undo_left_align(h, mask) for h in (x, *hidden))
            surprises = [LayerSurprise(*(undo_left_align(part, mask) for part in s)) for s in surprises]
        known = None if mask is not None or starts.values is None else [value + tokens for value in starts.values]
        begun = starts.begun or (mask is None and tokens > 0)
        return StackOutput(x, state.advanced(after, position + length, tokens, known, begun), hidden, surprises)

    def _run_layers(self, call: LayersCall) -> LayersOutput:
        """The final norm's output, each layer's cache, its input and its memory's surprise."""
        x, before, context, options = call
        after: list[BlockCache] = []
        hidden: list[Tensor] = []
        surprises: list[LayerSurprise] = []
        for block, layer, cache in zip(self.blocks(), self.layers, before, strict=True):
            if options.hidden:
                hidden.append(x)
            x, cache, surprise = layer(x, cache, context._replace(bypass=block.is_bypassed()))
            after.append(cache)
            if surprise is not None:
                surprises.append(surprise)
        return rms_norm(x, self.norm), after, hidden, surprises

    def _rope(self, position: Tensor, dtype: torch.dtype) -> RotaryEmbedding:
        assert self.config.head_dim is not None
        angles = rotary_embedding(position, self.config.head_dim, self.config.rope_theta)
        return RotaryEmbedding(*(part.to(dtype) for part in angles))

    def _expected(self, state: TitansState) -> list[list[int]]:
        """The positions at which each row may continue: its number of tokens, with or without those that it began with,
        or the number of columns. Any, if it has no caches."""
        if not state.layer_caches:
            return [[]] * state.batch_size
        begun = 0 if self._beginning is None else int(self._beginning.position)
        return [[p, state.columns, p - begun] if p else [] for p in state.position.tolist()]

    def _with_pending(self, state: TitansState, x: Tensor, mask: Tensor | None) -> TitansState:
        """The state without pending tokens: a continuation reads them now; in any other state, x begins with them."""
        if state.columns:
            return state.after_pending(x, mask, self.embed_tokens)
        state = state.shallow_copy()
        ids, pending_mask = state.take_pending()
        self.forward(ids, attention_mask=pending_mask, past_key_values=state)
        state.columns = 0
        return state

    def _new_state(self, x: Tensor) -> TitansState:
        """The state of new streams, one per row of x. Unless `begin_with` was called it has no caches: the blocks make
        them."""
        if self._beginning is not None:
            return self.initial_state(x.shape[0])
        return self._state([], x.shape[0], x.device)

    def _begin_rows(self, state: TitansState, traced: bool) -> RowStarts:
        """The state's rows, where those at position 0 begin with the memory of `begin_with`."""
        starts = RowStarts.of(state, traced)
        if self._beginning is None or starts.begun:
            return starts
        begin = self.initial_state(state.batch_size)
        return starts.begin_with(RowStarts.of(begin, traced))


class TitansForCausalLM(TitansPreTrainedModel, TitansGeneration, GenerationMixin):
    """A Titans language model, with `generate`, `labels` and `past_key_values` as transformers' models have them."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def initial_state(self, batch: int) -> TitansState:
        """The state of `batch` streams before their first token."""
        return self.model.initial_state(batch)

    def begin_with(self, memory: TitansState | None) -> None:
        """See `TitansModel.begin_with`."""
        self.model.begin_with(memory)

    def begin_decoding(self, state: TitansState) -> None:
        """See `TitansModel.begin_decoding`."""
        self.model.begin_decoding(state)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TitansState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_surprise: bool = False,
        cache: TitansState | None = None,
        **kwargs: Any,
    ) -> TitansCausalLMOutput:
        """As `TitansModel.forward`. `labels` `[B, T]` (-100: ignored) give the loss of the next token.
        `logits_to_keep=n` computes logits for the last n positions only."""
        loss_arguments = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if key in kwargs}
        if labels is None and (loss_arguments.keys() - {"num_items_in_batch"}):
            raise ValueError(f"{', '.join(loss_arguments)} without labels would have no effect")
        weights = memory_weights(self.config) if labels is not None else {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=given_state(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_surprise=output_surprise or bool(weights),
            position_ids=position_ids,
            **kwargs,
        )
        (logits,) = linears(slice_logits_to_keep(out.last_hidden_state, logits_to_keep), (self.lm_head,))
        loss: Tensor | None = None
        terms = MemoryTerms(None, None)
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **loss_arguments)
        if loss is not None and labels is not None and weights and out.surprise:
            packed = {**kwargs, "position_ids": position_ids}
            added, terms = memory_terms(weights, out.surprise, labels, attention_mask, packed, loss_arguments)
            loss = loss + added if self.training else loss
        return TitansCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=out.cache,
            hidden_states=out.hidden_states,
            surprise=out.surprise if output_surprise else None,
            memory_loss=terms.loss,
            memory_theta=terms.theta,
        )


AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)
