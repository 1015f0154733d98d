"""transformers' `generate` with a memory: a row that ended reads no padding, and no generated token is lost."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList

from titans_lm.models.arguments import check_state
from titans_lm.models.cache import TitansState
from titans_lm.models.cache_argument import NAMES, OF_TRANSFORMERS, given_state
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"Ended": "RowEnds", "Prompt": "PromptState"})

_OF_GENERATE = ("tokenizer", "assistant_tokenizer", "row_ends", "prompt", *NAMES)
"""Arguments that are not passed on as they are: those that `generate` and `TitansGeneration` handle themselves."""


class RowEnds(StoppingCriteriaList):
    """The stopping criteria of one call of `generate`. They record where each row ended."""

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.state: TitansState | None = None
        """The state that decodes in buffers, from the first generated token on."""
        self.ends: Tensor | None = None
        """`[B]`: the columns of each row up to its end; a large number in a row that has not ended. None: no row has
        ended."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **options)
        if self.ends is not None or bool(done.any()):
            running = torch.iinfo(torch.long).max
            ends = torch.full_like(done, running, dtype=torch.long) if self.ends is None else self.ends
            self.ends = torch.where(done & (ends == running), input_ids.shape[1], ends)
        return done

    def mask(self, attention_mask: Tensor | None, columns: int, end: int) -> Tensor | None:
        """`attention_mask` of the last `columns` columns before column `end`, with 0 after the end of a row."""
        if self.ends is None:
            return attention_mask
        column = torch.arange(end - columns, end, device=self.ends.device)
        mask = (column < self.ends[:, None]).long()
        return mask if attention_mask is None else attention_mask[:, -columns:] * mask


class PromptState:
    """The state after the prompt of one call of `generate`, which `_prefill` sets."""

    state: TitansState


class TitansGeneration(GenerationMixin):
    """`generate` with a `TitansState` as its cache.

    Afterwards the state has read all generated tokens but the last one of each row (see `TitansState.pending`). A row
    that ended early has read its last token too, and none of the padding after it.
    """

    def read_pending(self, state: TitansState) -> None:
        """Read the pending tokens of `state`, if there are any, and update it."""
        if state.pending is None:
            return
        ids, mask = state.take_pending()
        self(ids, attention_mask=mask, past_key_values=state, use_cache=True, logits_to_keep=1)

    def with_pending_read(self, state: TitansState) -> TitansState:
        """`state`, or a fork of it that has read its pending tokens: to go on with tokens that do not repeat them."""
        if state.pending is None:
            return state
        fork = state.clone()
        with torch.no_grad():
            self.read_pending(fork)
        return fork

    def generate(self, *args: Any, **options: Any) -> Any:
        """As transformers' `generate`. A state is given as `past_key_values` or `cache`, which are the same."""
        state = given_state(*(options.pop(name, None) for name in NAMES))
        return super().generate(*args, **({} if state is None else {OF_TRANSFORMERS: state}), **options)

    generate.__wrapped__ = GenerationMixin.generate  # type: ignore[attr-defined]  # whose signature `help` shows

    # ------------------------------------------------------------------------------------------ before the first token

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Refuse options that a memory does not support, before any token is read. Give each beam and sample a row, and
        a chunked prefill a state, without which transformers refuses it."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a Titans model has one cache, its "
                f"own TitansState; leave cache_implementation out"
            )
        if generation_config.output_attentions:
            raise ValueError("output_attentions=True: Titans models do not return attention weights")
        state = model_kwargs.get(OF_TRANSFORMERS)
        if state is None and generation_config.prefill_chunk_size is not None and generation_config.use_cache:
            model_kwargs[OF_TRANSFORMERS] = state = self.initial_state(batch_size)
        if state is not None:
            if generation_config.use_cache is False:
                raise ValueError(
                    "use_cache=False with past_key_values would read each token several times: drop one of them"
                )
            check_state(state)
            rows = max(generation_config.num_beams, generation_config.num_return_sequences)
            if rows > 1 and state.batch_size == batch_size:
                state.batch_repeat_interleave(rows)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        raise ValueError("continuous batching needs paged keys and values, which a memory does not have: use generate")

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _prepare_position_ids_for_generation(self, *_: Any, **__: Any) -> None:
        """No position ids: a state counts its own tokens."""

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **options: Any
    ) -> Any:
        state, mask = model_kwargs.get(OF_TRANSFORMERS), model_kwargs.get("attention_mask")
        if state is not None and model_kwargs.get("inputs_embeds") is None:
            columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            if columns == input_ids.shape[1] <= state.columns:
                raise ValueError(
                    f"input_ids has {input_ids.shape[1]} columns, and past_key_values has read {state.columns}: pass "
                    f"these and new ones, or new ones alone with past_key_values=state.continuation()"
                )
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, **options)
        if "prompt" in model_kwargs:
            model_kwargs["prompt"].state = outputs.cache.shallow_copy()
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,  # by this name, transformers knows that `generate` takes embeddings
        past_key_values: TitansState | None = None,  # named for models whose `forward` is wrapped
        cache: TitansState | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # with this name, transformers lets `generate` take every argument of `forward`
    ) -> dict[str, Any]:
        state = given_state(past_key_values, cache)
        row_ends: RowEnds | None = kwargs.get("row_ends")
        kwargs = {key: value for key, value in kwargs.items() if key not in _OF_GENERATE}
        if row_ends is not None:
            columns = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
            attention_mask = row_ends.mask(attention_mask, columns, input_ids.shape[1])
            if state is not None and not is_first_iteration and row_ends.state is None:
                row_ends.state = state
                self.begin_decoding(state)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{OF_TRANSFORMERS: state},
            **kwargs,
        )
        return inputs if state is None else {**inputs, **dict.fromkeys(NAMES, state)}  # PEFT looks for the old name

    # ------------------------------------------------------------------------------------------ decoding and after it

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        row_ends = RowEnds(stopping_criteria)
        try:
            out = super()._sample(
                input_ids, logits_processor, row_ends, generation_config, row_ends=row_ends, **options
            )
        finally:
            if row_ends.state is not None:
                row_ends.state.end_decoding()
        sequences = out if isinstance(out, Tensor) else out.sequences
        state = options.get(OF_TRANSFORMERS) if isinstance(out, Tensor) else getattr(out, OF_TRANSFORMERS)
        if state is not None:
            running = True if row_ends.ends is None else row_ends.ends >= sequences.shape[1]
            state.set_pending(sequences[:, -1], running)
        return out

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        """A state that is kept reads the returned sequences, because the beams have read others."""
        given = options.get(OF_TRANSFORMERS)
        if not generation_config.use_cache or (given is None and not generation_config.return_dict_in_generate):
            return super()._beam_search(input_ids, logits_processor, stopping_criteria, generation_config, **options)
        prompt, config = PromptState(), copy.copy(generation_config)
        config.return_dict_in_generate = True
        out = super()._beam_search(input_ids, logits_processor, stopping_criteria, config, prompt=prompt, **options)
        row = torch.arange(len(out.sequences), device=out.sequences.device)
        state = prompt.state.select(row // config.num_return_sequences * config.num_beams)
        new = out.sequences[:, input_ids.shape[1] :].to(state.position.device)
        length = (out.beam_indices >= 0).sum(1).to(new.device)
        if new.shape[1] > 1:
            mask = torch.arange(new.shape[1] - 1, device=new.device) < length[:, None]
            self(new[:, :-1], attention_mask=mask.long(), past_key_values=state, logits_to_keep=1)
        state.set_pending(new[:, -1], length == new.shape[1])
        if given is not None:
            given.assign(state)
        setattr(out, OF_TRANSFORMERS, state if given is None else given)
        return out if generation_config.return_dict_in_generate else out.sequences
