"""The answer to one request, token by token: the next input of the model, and the text from its logits."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from titans_lm.models.cache import TitansState

GREEDY = 1e-5
"""Below this temperature decoding is greedy: dividing logits by less would overflow."""


class Sampling(NamedTuple):
    """Sampling parameters and stop conditions."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()


class Answer:
    """The answer to one prompt, with its own memory, random numbers and text.

        while answer.finish_reason is None:
            ids = answer.next_ids(512)
            text += answer.take(model(ids[None], past_key_values=answer.state).logits[0, -1], len(ids))

    `Engine` advances many of them together.

    Args:
        ids: the prompt `[T]`, T >= 1.
        state: one row, the memory that the answer begins with.
        ends: tokens that end the answer.
    """

    def __init__(
        self,
        ids: Int[Tensor, " T"],
        state: TitansState,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int] = frozenset(),
    ):
        self.ids, self.state, self.sampling, self.ends = ids, state, sampling, ends
        self.finish_reason: str | None = None
        """ "stop" or "length" when the answer is complete."""
        self.read = 0
        """Prompt tokens read."""
        self.tokens: list[int] = []
        """Tokens of the answer so far."""
        self._decoder, self._stops = Decoder(tokenizer), Stops(sampling.stop)
        self._warpers = LogitsProcessorList()
        if sampling.temperature >= GREEDY:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def is_reading(self) -> bool:
        """Whether part of the prompt is unread."""
        return self.read < len(self.ids)

    @property
    def count(self) -> int:
        """Answer tokens generated."""
        return len(self.tokens)

    def next_ids(self, most: int = 1) -> Int[Tensor, " T"]:
        """The next input of the model: a piece of the prompt, `most` tokens at most, or the last token of the
        answer."""
        return self.ids[self.read : self.read + most] if self.is_reading else torch.tensor(self.tokens[-1:])

    def take(self, logits: Float[Tensor, " V"], read: int) -> str:
        """Take the logits after `next_ids()`, which were `read` tokens, and return the text that is final now.

        Raises ValueError for logits that are not finite.
        """
        if self.is_reading:
            self.read += read
            if self.is_reading:
                return ""
        token = self._draw(logits)
        self.tokens.append(token)
        text = self._decoder.push(token)
        if token in self.ends:
            self.finish_reason = "stop"
        elif self.count == self.sampling.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._decoder.flush()
        text = self._stops.push(text)
        if self._stops.found:
            self.finish_reason = "stop"
        return text if self.finish_reason is None else text + self._stops.flush()

    def _draw(self, logits: Float[Tensor, " V"]) -> int:
        if not bool(logits.isfinite().all()):
            raise ValueError("the model's logits are not finite")
        if not self._warpers:
            return int(logits.argmax())
        scores = self._warpers(torch.empty(1, 0, dtype=torch.long), logits.float().cpu()[None])
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


class Decoder:
    """Decodes tokens to text as soon as characters are complete: one may take several byte tokens."""

    WINDOW, HELD = 32, 64

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.window: list[int] = []
        """The last tokens: some tokenizers decode a token differently at the start of a text."""
        self.done = 0
        """Characters of the window's text already returned."""

    def push(self, token: int) -> str:
        """Add a token; return the characters that no later token changes."""
        self.window.append(token)
        text = self._text()
        certain = self._certain(text)
        new = certain[self.done :]
        self.done += len(new)
        if len(self.window) >= self.WINDOW and certain == text:
            self._shorten()
        return new

    def flush(self) -> str:
        """Return the rest: an incomplete character as U+FFFD."""
        new = self._text()[self.done :]
        self.done += len(new)
        return new

    def _text(self) -> str:
        return self.tokenizer.decode(self.window, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self, text: str) -> str:
        """The text without an incomplete character at its end, which decodes to U+FFFD, in some tokenizers together
        with bytes before it. More than `HELD` of them are invalid bytes, not an incomplete character."""
        kept = text.rstrip("\ufffd")
        return kept if len(text) - len(kept) <= self.HELD else text[:-3]

    def _shorten(self) -> None:
        """Shorten the window to its last complete characters."""
        whole = self.window
        for count in range(1, len(whole)):
            self.window = whole[-count:]
            text = self._text()
            if text and "\ufffd" not in text:
                self.done = len(text)
                return
        self.window = whole


class Stops:
    """Cuts text at the first stop string, holding back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return the characters that cannot be part of a stop string."""
        self.held += text
        places = [at for s in self.strings if (at := self.held.find(s)) >= 0]
        if places:
            self.found = True
            text, self.held = self.held[: min(places)], ""
            return text
        end = len(self.held) - self._begun()
        text, self.held = self.held[:end], self.held[end:]
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text

    def _begun(self) -> int:
        """Number of last characters that are the beginning of a stop string."""
        longest = min(len(self.held), max(map(len, self.strings), default=1) - 1)
        ends = (self.held[-n:] for n in range(longest, 0, -1))
        return next((len(end) for end in ends if any(s.startswith(end) for s in self.strings)), 0)
