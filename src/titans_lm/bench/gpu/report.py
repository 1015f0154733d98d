"""The verdicts of `titans bench gpu`: a question, its answer, and the figures behind it."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from titans_lm.bench import lm
from titans_lm.bench.gpu.cells import FLA, SDPA
from titans_lm.bench.measure import matmul_operations

Row = dict[str, Any]
Verdict = dict[str, str]
YES, NO, UNKNOWN = "yes", "no", "not measured"


def verdicts(results: dict[str, list[Row]]) -> list[Verdict]:
    """The verdicts on the rows of each section."""
    found: list[Verdict] = []
    for section, judge in JUDGES.items():
        found += judge(results.get(section, []))
    return found


def verdict_table(found: list[Verdict]) -> Table:
    table = Table("question", "verdict", "figures", title="Verdicts")
    for verdict in found:
        table.add_row(verdict["question"], verdict["verdict"], verdict["figures"])
    return table


def _verdict(question: str, holds: bool | None, figures: str) -> Verdict:
    return {"question": question, "verdict": UNKNOWN if holds is None else YES if holds else NO, "figures": figures}


# ------------------------------------------------------------------------------------------------ by section


def _checks(rows: list[Row]) -> list[Verdict]:
    kinds: dict[str, Callable[[Row], bool]] = {
        **{
            f"{form} right in {dtype}": lambda row, form=form, dtype=dtype: (  # type: ignore[misc]
                row["options"].get("form") == form and row["dtype"] == dtype
            )
            for form in ("triton", "chunked") for dtype in ("float32", "bfloat16")
        },
        "models right": lambda row: "kind" in row["options"],
    }  # fmt: skip
    found = [_all_right(question, [row for row in rows if fits(row)]) for question, fits in kinds.items()]
    again = [row for row in rows if row["options"].get("form") == "triton" and "repeats" in row]
    moved = [row["name"] for row in again if not row["repeats"]]
    said = f"{len(again) - len(moved)} of {len(again)}" + (f"; not: {moved[0]}" if moved else "")
    found.append(_verdict("triton gives the same twice (no race seen)", None if not again else not moved, said))
    chosen = [row for row in rows if "decision" in row]
    found += [_verdict(f"triton right for {row['name']}", row["right"], row["decision"]) for row in chosen]
    return found


def _all_right(question: str, rows: list[Row]) -> Verdict:
    wrong = [row for row in rows if not row.get("right")]
    errors = [row["largest_error"] for row in rows if isinstance(row.get("largest_error"), float)]
    said = f"{len(rows) - len(wrong)} of {len(rows)}"
    if errors:
        said += f", largest error {max(errors):.1e}"
    if wrong:
        said += f"; wrong: {wrong[0]['name']}: {wrong[0].get('worst', wrong[0]['error'])}"
    return _verdict(f"{question}?", None if not rows else not wrong, said)


def _compile(rows: list[Row]) -> list[Verdict]:
    failed = [row for row in rows if row["error"]]
    said = f"{len(rows) - len(failed)} of {len(rows)}"
    if rows:
        said += f", longest {max(row['wall_seconds'] for row in rows):.0f} s"
    if failed:
        said += f"; not: {failed[0]['name']}: {failed[0]['error'][:120]}"
    return [_verdict("kernels compile and run at every size?", None if not rows else not failed, said)]


def _op(rows: list[Row]) -> list[Verdict]:
    seconds = {row["name"]: {a: m["seconds"] for a, m in row["actions"].items()} for row in rows if row["actions"]}
    parts = [
        (action, row["name"], passes * row["operations"] / matmul_operations(row) * m["matmul"] / m[action])
        for row in rows if row["name"].startswith("triton") and (m := seconds.get(row["name"])) and "operations" in row
        for action, passes in (("forward", 1), ("training", 3))
    ]  # fmt: skip
    found = []
    for action in ("forward", "training"):
        own = sorted((part, name) for a, name, part in parts if a == action)
        said = f"{own[0][0]:.3f} ({own[0][1]}) to {own[-1][0]:.3f} ({own[-1][1]})" if own else ""
        found.append(_verdict(f"triton's part of the matmul rate, {action}", bool(own) or None, said))
    for rival, question in (
        ("chunked", "triton faster than chunked?"),
        ("compiled", "triton faster than compiled chunked?"),
        (FLA, f"triton at most 4 times {FLA}?"),
        (SDPA, f"triton at most 4 times {SDPA}?"),
    ):
        most = 1.0 if rival in ("chunked", "compiled") else 4.0
        found.append(_times(question, seconds, rival, most))
    missing = [row["error"] for row in rows if row["name"].startswith(FLA) and row["error"]]
    if missing:
        found[-2] = _verdict(found[-2]["question"], None, missing[0][:160])
    return found


def _times(question: str, seconds: dict[str, dict[str, float]], rival: str, most: float) -> Verdict:
    """triton's time over that of a rival, at the same sizes."""
    ratios = [
        (m["training"] / other["training"], name.removeprefix("triton, "))
        for name, m in seconds.items()
        if name.startswith("triton, ") and (other := seconds.get(f"{rival}, {name.removeprefix('triton, ')}"))
    ]
    if not ratios:
        return _verdict(question, None, "")
    least, largest = min(ratios), max(ratios)
    said = f"training {least[0]:.2f} ({least[1]}) to {largest[0]:.2f} ({largest[1]}) times"
    return _verdict(question, largest[0] <= most, said)


def _model(rows: list[Row]) -> list[Verdict]:
    measured = {(r["options"]["kind"], r["options"]["tokens"]): r["actions"] for r in rows
                if r["actions"] and r["backend"] == "auto"}  # fmt: skip
    found = []
    for action in ("step", "prefill"):
        said = list(_ratios(measured, action))
        longest = said[-1][1] if said else None
        text = ", ".join(f"{tokens:,}: {ratio:.2f}" for tokens, ratio in said)
        question = f"MAG at most attention's time at the longest text, {action}?"
        found.append(_verdict(question, None if longest is None else longest <= 1, text))
        lengths = sorted(tokens for kind, tokens in measured if kind == "mag" and action in measured[kind, tokens])
        if len(lengths) > 1:
            a, b = (measured["mag", n][action]["seconds"] / n for n in (lengths[0], lengths[-1]))
            said_growth = f"{b / a:.2f} from {lengths[0]:,} to {lengths[-1]:,} tokens"
            found.append(_verdict(f"MAG's time a token grows by at most 5 %, {action}?", b <= 1.05 * a, said_growth))
    failed = [f"{row['name']}: {row['error'][:80]}" for row in rows if row["error"]]
    if failed:
        found.append(_verdict("all models measured?", False, "; ".join(failed)))
    return found


def _ratios(measured: dict[tuple[str, int], Any], action: str) -> Iterator[tuple[int, float]]:
    """MAG's time over full attention's, by length."""
    for tokens in sorted({n for _, n in measured}):
        pair = [measured.get((kind, tokens), {}).get(action) for kind in ("mag", lm.FULL)]
        if pair[0] and pair[1]:
            yield tokens, pair[0]["seconds"] / pair[1]["seconds"]


def _decode(rows: list[Row]) -> list[Verdict]:
    ms = {row["name"]: 1e3 * row["actions"]["decode"]["seconds"] / row["options"]["tokens"] for row in rows
          if row["actions"]}  # fmt: skip
    graph, eager, window = (ms.get(n) for n in ("mag, CUDA graph", "mag, eager", f"{lm.WINDOW}, CUDA graph"))
    captured = [row for row in rows if row["options"]["graph"]]
    right = None if not captured else all(row.get("right") for row in captured)
    wrong = next(
        (f"{row['name']}: {row['error'] or row.get('difference')}" for row in captured if not row.get("right")), ""
    )
    found = [_verdict("decoding by a CUDA graph right?", right, wrong[:200])]
    said = ", ".join(f"{name} {value:.3f} ms" for name, value in ms.items())
    found.append(_verdict("a graph decodes faster?", None if not (graph and eager) else graph < eager, said))
    over = None if not (graph and window) else graph / window
    found.append(_verdict("MAG at most 1.2 windows a token?", None if over is None else over <= 1.2,
                          "" if over is None else f"{over:.2f}"))  # fmt: skip
    return found


def _train(rows: list[Row]) -> list[Verdict]:
    question = "a model of 20M parameters learns streams?"
    if not rows or rows[0]["error"]:
        return [_verdict(question, False if rows else None, rows[0]["error"][:200] if rows else "")]
    row = rows[0]
    rate = "" if row["tokens_per_second"] is None else f", {row['tokens_per_second']:,.0f} tokens/s"
    said = f"loss {row['first_loss']:.2f} to {row['last_loss']:.2f} in {row['steps']:,} steps{rate}"
    return [_verdict(question, row["last_loss"] < row["first_loss"], said)]


JUDGES: dict[str, Callable[[list[Row]], list[Verdict]]] = {
    "checks": _checks, "compile": _compile, "op": _op, "model": _model, "decode": _decode, "train": _train,
}  # fmt: skip
