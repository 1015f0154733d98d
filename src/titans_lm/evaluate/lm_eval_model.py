"""`--model titans` of lm-evaluation-harness: log-likelihoods and answers through the carried state, for any length.

lm-eval 0.4.13 has neither entry points for models nor an option that names a module. So run either

    titans evaluate harness --model runs/titans --tasks piqa arc_easy
    python -m titans_lm.evaluate.lm_eval_model run --model titans --model_args pretrained=runs/titans --tasks piqa

The second is lm-eval's own command with all its options. Or import this module in a program, and call
`lm_eval.simple_evaluate(model="titans", ...)`.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from titans_lm.evaluate.likelihood import Request, read_rows, scores
from titans_lm.models.blocks import PREFILL_TOKENS
from titans_lm.models.hub import load
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.utils.terminal import PlainConsole

Item = TypeVar("Item")


@register_model("titans")
class TitansLM(TemplateLM):
    """A Titans model with the interface of lm-eval.

    Unlike lm-eval's `hf`, it never truncates a context, reads a document (`loglikelihood_rolling`) as one stream
    without windows, and reads a context once for all its continuations.

    As in `hf`, an empty context becomes a prefix token, which is not scored. `hf` prefers the tokenizer's beginning
    token to its end token; here the end token comes first, because `titans train` ends each text with it and uses no
    beginning token.

    Args:
        pretrained: a folder that `titans train` wrote, or a model, which needs `tokenizer`.
        tokenizer: encodes texts, without special tokens, as in `titans train`.
        batch_size: streams per batch; lm-eval's "auto" is not supported.
        device: None: that of the model, for a folder the CPU. "cuda" is the CPU if there is no GPU, because lm-eval's
            command requests one by default.
        piece: tokens per forward call. Does not limit the text.
        prefix_token_id: another prefix token.

    Raises ValueError for a folder that `models.hub.load` refuses, and for invalid values.
    """

    def __init__(
        self,
        pretrained: str | Path | TitansForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int | str = 8,
        device: str | None = None,
        piece: int = PREFILL_TOKENS,
        prefix_token_id: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or piece < 1:
            raise ValueError(f"batch_size and piece must be numbers of at least 1, got {batch_size!r} and {piece!r}")
        if not isinstance(pretrained, TitansForCausalLM):
            pretrained, tokenizer = load(Path(pretrained))
        if tokenizer is None:
            raise ValueError("a model without a tokenizer cannot be asked: pass tokenizer as well")
        if device is not None:
            pretrained.to("cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device)
        self.model, self.tokenizer = pretrained.eval(), tokenizer
        self.batch_size, self.piece, self._prefix = int(batch_size), piece, prefix_token_id
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int | None:
        """The end token, if there is one."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context. Raises ValueError if there is none."""
        for token in (self._prefix, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither an end nor a beginning token: give prefix_token_id")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:  # noqa: ARG002 - never any
        ids: list[int] = encode(self.tokenizer, string).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one."""
        for (context, continuation), _, tokens in requests:
            if not tokens:
                raise ValueError(f"{continuation[:40]!r} after {context[-40:]!r} has no tokens of its own to score")
        # lm-eval moves trailing spaces to the continuation: a context of spaces becomes empty.
        scored = [Request(before or [self.prefix_token_id], tokens) for _, before, tokens in requests]
        answers: dict[int, tuple[float, bool]] = {}
        for number, score in self._shown(self._scores(scored), scored, "log-likelihoods", disable_tqdm):
            answers[number] = (score.log_probability, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of all tokens of each document, as one stream; 0 for an empty one."""
        scored = [Request([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        answers: dict[int, float] = {}
        for number, score in self._shown(self._scores(scored), scored, "documents", disable_tqdm):
            answers[number] = score.log_probability
            self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, answers[number])
        return [answers[number] for number in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, up to a stop string, the end token, or the maximum of tokens; greedy unless the
        task says otherwise."""
        answers: dict[int, str] = {}
        for number, answer in self._shown(self._answers(requests), requests, "answers", disable_tqdm):
            answers[number] = answer
            self.cache_hook.add_partial("generate_until", requests[number].args, answer)
        return [answers[number] for number in range(len(requests))]

    # ------------------------------------------------------------------------------------------ parts

    def _scores(self, requests: list[Request]) -> Iterator[tuple[int, Any]]:
        return scores(self.model, requests, self.batch_size, self.piece)

    def _answers(self, requests: list[Instance]) -> Iterator[tuple[int, str]]:
        """Yields (number of the request, answer), long contexts first, batched by options."""
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        order = sorted(range(len(requests)), key=lambda number: len(contexts[number]), reverse=True)
        by_options: dict[str, list[int]] = {}
        for number in order:
            by_options.setdefault(repr(requests[number].args[1]), []).append(number)
        for numbers in by_options.values():
            options = requests[numbers[0]].args[1]
            for first in range(0, len(numbers), self.batch_size):
                batch = numbers[first : first + self.batch_size]
                yield from zip(batch, self._generate([contexts[number] for number in batch], options), strict=True)

    @torch.no_grad()
    def _generate(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Answers to contexts. `options` are a task's `generation_kwargs`."""
        options = dict(normalize_gen_kwargs(options))
        until, count = [text for text in options.pop("until") if text], options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options = {name: value for name, value in options.items() if name != "temperature"}  # generate would warn
        state = read_rows(self.model, [context[:-1] for context in contexts], self.piece)
        prompt = torch.tensor([context[-1:] for context in contexts], device=self.model.device)
        ends, pad = self._ends(until), self.tokenizer.pad_token_id
        out: Any = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=state.continuation(), max_new_tokens=count,
            eos_token_id=ends or None, pad_token_id=0 if pad is None else pad,
            stopping_criteria=[_StopAtStrings(self.tokenizer, until, prompt.shape[1])] if until else None, **options,
        )  # fmt: skip
        return [self._text(row, ends, until) for row in out[:, 1:].tolist()]

    def _ends(self, until: list[str]) -> list[int]:
        """The end token, and the special tokens among a task's stop strings."""
        special = set(self.tokenizer.all_special_tokens) & set(until)
        ends = {self.eot_token_id, *map(self.tokenizer.convert_tokens_to_ids, special)} - {None}
        return sorted(ends)

    def _text(self, tokens: list[int], ends: list[int], until: list[str]) -> str:
        """The text up to the first end token or stop string."""
        count = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
        text: str = self.tokenizer.decode(tokens[:count], skip_special_tokens=True)
        for string in until:
            text = text.split(string)[0]
        return text

    @staticmethod
    def _shown(items: Iterator[Item], requests: Sequence[Any], label: str, hidden: bool) -> Iterable[Item]:
        """Track progress."""
        return track(items, label, total=len(requests), console=PlainConsole(stderr=True), disable=hidden)


class _StopAtStrings(StoppingCriteria):
    """Ends a row when its generated text, without the prompt, contains one of `strings`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: list[str], prompt: int):
        self.tokenizer, self.strings, self.prompt = tokenizer, strings, prompt
        # A token has at least one byte; 4 more, because the first may begin within a character.
        self.reach = max(len(text.encode()) for text in strings) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ARG002 - the criterion's form
        tail = input_ids[:, max(self.prompt, input_ids.shape[1] - self.reach) :]
        tails = self.tokenizer.batch_decode(tail, skip_special_tokens=True)  # "e" must not match "<eos>"
        return torch.tensor([any(s in tail for s in self.strings) for tail in tails], device=input_ids.device)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
