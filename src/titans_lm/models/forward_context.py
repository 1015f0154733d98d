"""`ForwardContext`: the positions, masks and options of a call, the same for every block."""

from typing import NamedTuple

from torch import Tensor

from titans_lm.layers.attention import RotaryEmbedding
from titans_lm.ops import is_traced, select_rows
from titans_lm.utils.deprecation import renamed

__getattr__ = renamed(__name__, {"Reading": "ForwardContext"})


class ForwardContext(NamedTuple):
    """Positions and options of a call. Rows are left-aligned: a row's valid tokens come first."""

    position: Tensor  # [B], the tokens that each row has read before
    uniform_position: int | None  # the position of all rows, if they agree and all tokens are valid
    rope: RotaryEmbedding
    valid: Tensor | None  # [B, T], True for each row's first tokens; None: all tokens are valid
    update: bool  # False: the memory is read, not written
    surprise: bool  # the memory's surprise is returned
    eager: bool = False  # attn_implementation="eager"
    bypass: bool = False  # see `bypass_memory`
    new_rows: Tensor | None = None  # [B], True in rows at their first token, if others are further; None: else

    def advanced(self, tokens: int) -> "ForwardContext":
        """The context after the valid ones of these `tokens`."""
        count = tokens if self.valid is None else self.valid.sum(1)
        uniform = None if self.uniform_position is None else self.uniform_position + tokens
        return self._replace(position=self.position + count, uniform_position=uniform)

    def in_segment(self, size: int) -> "ForwardContext":
        """The context with positions in segments of `size`."""
        uniform = None if self.uniform_position is None else self.uniform_position % size
        return self._replace(position=self.position % size, uniform_position=uniform)

    def where_position(self, position: int, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`yes` in the rows at `position`, `no` in the others."""
        if self.uniform_position is None:
            return select_rows(self.position == position, yes, no)
        return yes if self.uniform_position == position else no

    def may_be_at(self, position: int) -> bool:
        """Whether a row may be at `position`. Without looking: a GPU would have to be waited for, and a traced call has
        no values."""
        if self.uniform_position is not None:
            return self.uniform_position == position
        return self.position.device.type != "cpu" or is_traced(self.position) or position in self.position.tolist()

    def part(self, start: int, end: int) -> "ForwardContext":
        """The context of the tokens from `start` to `end`, with the position of the first of all tokens."""
        rope = RotaryEmbedding(*(part[:, start:end] for part in self.rope))
        return self._replace(rope=rope, valid=None if self.valid is None else self.valid[:, start:end])
