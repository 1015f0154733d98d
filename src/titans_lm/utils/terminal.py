"""What is printed: text as text. A name in a file, or of one, neither moves the cursor nor opens a tag of rich."""

from typing import Any

from rich.console import Console
from rich.text import Text

_KEPT = "\n\t"


def shown(text: str, keep: str = "") -> str:
    r"""`text` with every character that does not print as Python writes it: an escape sequence as `\x1b[31m`.

    Control characters, lone surrogates (bytes of a file name that are not UTF-8) and marks that reverse the direction
    of writing are replaced; the characters of `keep` are not.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def red(text: str) -> Text:
    """`text` as `shown` gives it, in red: for what went wrong, within a table."""
    return Text(shown(text, _KEPT), "red")


class PlainConsole(Console):
    """A console that prints each string as `shown` gives it: no markup, no emoji codes, no highlighting.

    Strings in tables and progress bars go the same way; what is to be coloured is passed as `rich.text.Text`, or with
    `style`. A `TextColumn` of a progress bar interprets markup by itself: pass `markup=False` to it.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text, _KEPT), **options)

    def on_broken_pipe(self) -> None:
        """rich would end the process here; the command line decides what a closed pipe means."""
        raise  # the BrokenPipeError, which is being handled
