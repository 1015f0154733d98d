"""`--against FILE`: what got slower since an earlier result file of the same command, on the same machine."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from titans_lm.utils.terminal import red

SAME = ("machine", "device", "threads")
"""What has to be the same for times to be compared; `device` is a GPU's name."""
_MEASURED = ("actions", "repetitions", "error")


def load_earlier(path: Path, here: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """The earlier record. `here` and `setting` are those of the measurement to come.

    Raises ValueError for a file that is not a result of `titans bench`, and for one of another machine or setting."""
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
        rows = [row["actions"] for row in earlier["rows"]]
    except OSError as error:
        raise ValueError(f"--against {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--against {path} is not a result file of titans bench") from None
    if not any(rows):
        raise ValueError(f"--against {path} has no measurement")
    own = {**setting, **here}
    before = {**earlier.get("setting", {}), **{key: earlier[key] for key in SAME if key in earlier}}
    for key in (*SAME, "dtype"):
        if key in own and key in before and str(own[key]) != str(before[key]):
            raise ValueError(f"--against {path} was measured with {key} {before[key]}, here it is {own[key]}")
    return earlier


class Change(NamedTuple):
    """An action of a contender, then and now: ratios above 1 are slower."""

    name: str
    action: str
    seconds: float
    cpu_seconds: float | None
    """None on a GPU."""
    before: float
    now: float

    def is_slower(self, threshold: float) -> bool:
        """Whether it takes more than `threshold` (0.1: a tenth) longer. CPU seconds have to say so too: what other
        processes take of the machine shows in seconds alone."""
        limit = 1 + threshold
        return self.seconds > limit and (self.cpu_seconds is None or self.cpu_seconds > limit)


def changes(rows: list[dict[str, Any]], earlier: dict[str, Any]) -> list[Change]:
    """The actions that both have, of contenders with the same name, heat and options. An option that one of the two
    does not know is left out of account."""
    on_gpu = earlier.get("setting", {}).get("device") == "cuda"
    found = []
    for row in rows:
        other = next((old for old in earlier["rows"] if _same(row, old)), None)
        if other is None:
            continue
        for action, now in row["actions"].items():
            before = other["actions"].get(action)
            if before is None or not before["seconds"] or action == "matmul":  # that is the machine's
                continue
            cpu = None if on_gpu or not before["cpu_seconds"] else now["cpu_seconds"] / before["cpu_seconds"]
            name = f"{row['heat']}: {row['name']}"
            ratio = now["seconds"] / before["seconds"]
            found.append(Change(name, action, ratio, cpu, before["seconds"], now["seconds"]))
    return found


def _same(row: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether both are of one contender: what was not measured, and both have, is the same."""
    options = [
        key for key, value in row.items() if key in old and key not in _MEASURED and isinstance(value, str | int)
    ]
    facts = ("parameters", "operations", "backend", "state_bytes", "read")
    return all(row[key] == old[key] for key in options if key not in facts) and "heat" in options and "name" in options


def change_table(found: list[Change], threshold: float, path: Path) -> Table:
    table = Table(
        "contender", "action", "before, ms", "now, ms", "now/before", "CPU, now/before", title=f"Against {path}"
    )
    for change in sorted(found, key=lambda change: -change.seconds):
        cpu = "-" if change.cpu_seconds is None else f"{change.cpu_seconds:.2f}"
        ratio = f"{change.seconds:.2f}"
        slower = change.is_slower(threshold)
        table.add_row(
            change.name, change.action, f"{1e3 * change.before:,.2f}", f"{1e3 * change.now:,.2f}",
            red(f"{ratio} slower") if slower else ratio, cpu,
        )  # fmt: skip
    return table
