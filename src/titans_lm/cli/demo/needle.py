"""First part of the demo: a shipped model reads a haystack of any length once, and answers the question for its needle.

Its state keeps one size while it reads. Its surprise is plotted along the text. Each seed gives another needle.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from titans_lm.analyze.attribution import prediction_sources
from titans_lm.analyze.page import PageText, page
from titans_lm.analyze.report import page_data
from titans_lm.analyze.trace import trace
from titans_lm.bench.measure import resident
from titans_lm.evaluate.needle import begins
from titans_lm.inference.generate import generate_from, prefill
from titans_lm.models.cache import TitansState
from titans_lm.models.hub import RUN, load
from titans_lm.models.model_identity import identity
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.models.tokenizer import encode
from titans_lm.tasks.haystack import encoder
from titans_lm.tasks.needle import Needle
from titans_lm.utils.figures import figure_file
from titans_lm.utils.record import write_text

COLUMNS = 60
"""Columns of the chart in the terminal."""
BINS = 1000
"""Maximum points of the figure."""
PAGE, PAGE_TOKENS = "needle.html", 2000
"""The page, and the most tokens of the haystack that it shows."""
BARS = "▁▂▃▄▅▆▇█"


class Hidden(NamedTuple):
    """A haystack with its needle."""

    ids: Tensor  # [1, T], up to the answer
    value: str
    key: str
    """The last word of the question, with the equals sign."""
    start: int
    """Tokens before the needle."""
    length: int
    """Tokens of the needle: space, key, equals sign, value and full stop."""


@dataclass
class Reading:
    """Measurements after each piece."""

    surprise: NDArray[np.float32]  # [T], reconstruction loss, mean over layers and heads
    tokens: list[int] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    resident_bytes: list[int | None] = field(default_factory=list)
    """Resident memory of the process; None if the system does not report it."""
    seconds: float = 0.0


def show(folder: Path, task: Needle, seed: int, console: Console) -> tuple[Hidden, Reading, dict[str, Any]]:
    """Hide a needle, read, ask and print. Returns the haystack, the measurements and the results."""
    model, tokenizer = load(folder)
    if model.config.variant == "attention":
        raise ValueError(f"--model {folder} has no memory to show")
    hidden = hide(task, seed)
    console.print(
        f"The needle {hidden.key}{hidden.value} is hidden after {hidden.start:,} of {task.length:,} tokens. "
        f"The question comes at the end."
    )
    reading, state = read_through(model, hidden.ids[:, :-1], console)
    results = summary(hidden, reading, ask(model, tokenizer, state, hidden))
    print_summary(hidden, reading, results, console)
    return hidden, reading, {**identity(model), **results}


# ------------------------------------------------------------------------------------------------ the haystack


def task_for(folder: Path, tokens: int, haystack: str, depth: float) -> Needle:
    """The task for the model in `folder`, with the number of digits of its run.yaml; else 7.

    Raises ValueError for a length, haystack or depth that `Needle` refuses.
    """
    options: dict[str, Any] = {"style": "short", "haystack": haystack, "depth": depth, "tokenizer": str(folder)}
    return Needle(length=tokens, digits=_digits(folder), **options)


def _digits(folder: Path) -> int:
    """Digits of the first needle task in the model's run.yaml."""
    if not (folder / RUN).is_file():
        return Needle.digits
    try:
        task = (yaml.safe_load((folder / RUN).read_text())["data"] or {}).get("task") or {}
        needles = [one for one in (task, *task.get("tasks", ())) if one.get("name") == "needle"]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RUN} is not the settings of a run: {error!r}") from None
    digits: int = needles[0].get("digits", Needle.digits) if needles else Needle.digits
    return digits


def hide(task: Needle, seed: int) -> Hidden:
    """The first example of this seed, with the position of its needle."""
    (prompt,), (value,) = task.examples(np.random.default_rng(seed), 1)
    question = re.search(r"(\s\S+)=$", task.decode(prompt[-100:]))
    assert question is not None
    parts = (question[1], "=", value, ".")  # each encoded separately, as in the task
    needle = np.concatenate([encoder(task.tokenizer).fresh(part) for part in parts])
    (start,) = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(prompt, len(needle)) == needle).all(1))
    return Hidden(torch.from_numpy(prompt)[None], value, question[0].strip(), int(start), len(needle))


# ------------------------------------------------------------------------------------------------ reading, asking


@torch.no_grad()
def read_through(model: TitansForCausalLM, ids: Tensor, console: Console) -> tuple[Reading, TitansState]:
    """Read ids `[1, T]` piece by piece, with rate and time left. Returns the measurements and the memory."""
    state, done = model.initial_state(1), 0
    reading = Reading(np.zeros(ids.shape[1], np.float32))
    columns = [TextColumn("reading"), BarColumn(), TaskProgressColumn(),
               TextColumn("{task.fields[status]}", markup=False), TimeRemainingColumn()]  # fmt: skip
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=ids.shape[1], status="")
        for part, out in prefill(model, ids, state):
            if out.surprise:
                loss = torch.stack([one.loss.mean((0, 2)) for one in out.surprise]).mean(0)
                reading.surprise[done : done + part.shape[1]] = loss.float().numpy()
            done += part.shape[1]
            reading.seconds = bars.tasks[0].elapsed or 0.0
            _note(reading, done, state)
            bars.update(bar, completed=done, status=_status(reading))
    return reading, state


def _note(reading: Reading, tokens: int, state: TitansState) -> None:
    reading.tokens.append(tokens)
    reading.state_bytes.append(state.nbytes)
    reading.resident_bytes.append(resident())


def _status(reading: Reading) -> str:
    rate = reading.tokens[-1] / max(reading.seconds, 1e-9)
    status = f"{rate:,.0f} tokens/s, memory {reading.state_bytes[-1] / 1024:,.1f} KiB"
    process = reading.resident_bytes[-1]
    return status if process is None else f"{status}, process {process / 2**20:,.0f} MiB"


def ask(model: TitansForCausalLM, tokenizer: PreTrainedTokenizerBase, state: TitansState, hidden: Hidden) -> str:
    """Decode the answer greedily: as many tokens as the value has characters. `state` has read all but the last
    token."""
    count = len(hidden.value)
    ids = generate_from(
        model, tokenizer, state, hidden.ids[:, -1:], max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    answer: str = tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    return answer


# ------------------------------------------------------------------------------------------------ output


def stretches(hidden: Hidden, surprise: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """Mean surprise `[N]` of stretches as long as the needle, and the number of the one that is the needle."""
    first = hidden.start % hidden.length
    whole = surprise[first : first + (len(surprise) - first) // hidden.length * hidden.length]
    return whole.reshape(-1, hidden.length).mean(1), hidden.start // hidden.length


def summary(hidden: Hidden, reading: Reading, answer: str) -> dict[str, Any]:
    """The results as numbers. `rank` 1: no stretch of the text is more surprising than the needle."""
    means, needle = stretches(hidden, reading.surprise)
    return {
        "key": hidden.key, "value": hidden.value, "said": answer, "right": begins(hidden.value, answer),
        "needle_at": hidden.start, "tokens_read": reading.tokens[-1], "seconds": round(reading.seconds, 3),
        "state_bytes": {"least": min(reading.state_bytes), "most": max(reading.state_bytes)},
        "resident_bytes": {"after_first_piece": reading.resident_bytes[0], "at_the_end": reading.resident_bytes[-1]},
        "surprise": {
            "needle": float(means[needle]), "median": float(np.median(means)), "most": float(means.max()),
            "rank": int((means > means[needle]).sum()) + 1, "stretches": len(means),
            "highest_by_percent": highest(means, 100).tolist(),
        },
    }  # fmt: skip


def highest(means: NDArray[np.float32], parts: int) -> NDArray[np.float32]:
    """The maximum of each of `parts` parts of the text, or of each stretch if they are fewer, `[<= parts]`."""
    return np.array([part.max() for part in np.array_split(means, min(parts, len(means)))], np.float32)


def chart(means: NDArray[np.float32], needle: int) -> Iterator[str]:
    """Two lines: bars for the maximum of each part of the text, and a mark at the needle."""
    bars = highest(means, COLUMNS)
    levels = (bars - means.min()) / max(float(np.ptp(means)), 1e-9) * (len(BARS) - 1)
    yield "".join(BARS[round(float(level))] for level in levels)
    column = next(i for i, part in enumerate(np.array_split(np.arange(len(means)), len(bars))) if needle in part)
    yield " " * column + "^ the needle"


def print_summary(hidden: Hidden, reading: Reading, results: Mapping[str, Any], console: Console) -> None:
    """Print memory, answer and surprise."""
    state, process, surprise = results["state_bytes"], results["resident_bytes"], results["surprise"]
    size = f"{state['most']:,} bytes throughout" if state["least"] == state["most"] else f"{state} bytes, which CHANGED"
    lines = [f"Read {results['tokens_read']:,} tokens in {results['seconds']:.1f} s. The memory took {size}."]
    if process["at_the_end"] is not None:
        first, last = (process[name] / 2**20 for name in ("after_first_piece", "at_the_end"))
        lines.append(f"The process took {first:,.1f} MiB after {reading.tokens[0]:,} tokens, {last:,.1f} at the end.")
    lines += ["", "Surprise along the text (the highest in each part):", *chart(*stretches(hidden, reading.surprise))]
    lines.append(
        f"The needle: {surprise['needle']:.3g}, number {surprise['rank']:,} of {surprise['stretches']:,} stretches of "
        f"{hidden.length} tokens; the median is {surprise['median']:.3g}, the highest {surprise['most']:.3g}."
    )
    verdict = "right" if results["right"] else "WRONG: the model did not find it"
    lines += ["", f"Asked:   {hidden.key}", f"Truth:   {hidden.value}", f"Answer:  {results['said']}   {verdict}", ""]
    for line in lines:
        console.print(line)


def plot(hidden: Hidden, reading: Reading, path: Path) -> None:
    """Plot surprise along the text with the needle marked, and memory use."""
    means, needle = stretches(hidden, reading.surprise)
    most = highest(means, BINS)
    parts = np.array_split(np.arange(len(means)), len(most))  # as in `highest`
    at = np.array([part.mean() + 0.5 for part in parts]) * hidden.length + hidden.start % hidden.length
    with figure_file(path, 2, 1, figsize=(9, 5), sharex=True, height_ratios=(3, 1)) as (above, below):
        above.plot(at, most, color="C0", linewidth=0.8)
        above.plot(hidden.start, means[needle], "o", color="C3", label=f"the needle, {hidden.key}{hidden.value}")
        above.set_ylabel("surprise\n(reconstruction loss)")
        above.legend(frameon=False)
        above.set_title(f"Surprise while reading {reading.tokens[-1]:,} tokens, highest of each part")
        below.plot(reading.tokens, np.array(reading.state_bytes) / 2**20, color="C0", label="memory")
        if reading.resident_bytes[0] is not None:
            below.plot(reading.tokens, np.array(reading.resident_bytes) / 2**20, color="C1", label="process")
        below.set_yscale("log")
        below.set_ylabel("MiB")
        below.set_xlabel("tokens read")
        below.legend(frameon=False, ncols=2)


def write_page(folder: Path, task: Needle, seed: int, path: Path) -> None:
    """Write a page that shows the model reading a haystack of at most `PAGE_TOKENS`, its needle, question and answer,
    with the sources of the answer."""
    model, tokenizer = load(folder)
    hidden = hide(replace(task, length=min(task.length, PAGE_TOKENS)), seed)
    value = encode(tokenizer, hidden.value)
    ids = torch.cat([hidden.ids[0], torch.from_numpy(value)])
    places = range(len(ids) - len(value), len(ids))
    sources = prediction_sources(model, ids, places) if model.config.memory_gates_of == "token" else []
    text = PageText(f"a haystack with {hidden.key}{hidden.value} in it", len(ids))
    write_text(path, page(page_data(folder.name, model, tokenizer, trace(model, ids), [text], attributions=sources)))
