"""The command line that made a result, for its file."""

import argparse
import shlex


def command(arguments: argparse.Namespace, first: str | None = None) -> str:
    """`titans evaluate ...` in full, defaults too; `first` is the argument that has no name on the command line."""
    words = ["titans", "evaluate", arguments.what, *map(str, getattr(arguments, first) if first else [])]
    for name, value in vars(arguments).items():
        if name not in ("what", first) and value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
