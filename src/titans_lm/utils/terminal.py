"""Safe printing of untrusted text: no escape sequences, no markup of rich."""

from typing import Any

from rich.console import Console
from rich.text import Text

_KEPT = "\n\t"


def shown(text: str, keep: str = "") -> str:
    r"""Escape every character of `text` that is not printable: an escape sequence becomes `\x1b[31m`.

    Escapes control characters, lone surrogates (bytes of a file name that are not UTF-8) and bidirectional marks,
    except the characters of `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def red(text: str) -> Text:
    """`shown(text)` in red, for errors in a table."""
    return Text(shown(text, _KEPT), "red")


class PlainConsole(Console):
    """A console that prints strings as `shown(text)`: no markup, no emoji codes, no highlighting.

    The same holds for strings in tables and progress bars. For colour pass `rich.text.Text` or `style`. A `TextColumn`
    of a progress bar interprets markup itself: pass `markup=False`."""

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text, _KEPT), **options)

    def on_broken_pipe(self) -> None:
        """Re-raise: rich would exit here, but the command line handles a closed pipe."""
        raise  # the BrokenPipeError being handled
