"""Which lines of a log are new: bits per byte of a model that reads it, against the rule "a template not seen before".

    python examples/new_in_a_log.py BGL.log

For a log whose lines begin with a label, `-` where all is well (as BGL of loghub, arXiv:2008.06448). The labels are cut
off before anything is read. Precision and recall of as many lines as there are alerts, and as the rule names.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

import titans_lm
from titans_lm.inference.reader import Reader
from titans_lm.inference.surprising import SurprisingLines
from titans_lm.inference.token_bits import by_bytes


class LabelledLine(NamedTuple):
    """One line of the log, without its label."""

    text: str
    alert: bool


def labelled_lines(path: Path) -> list[LabelledLine]:
    lines = path.read_text(errors="replace").splitlines()
    return [LabelledLine(line.partition(" ")[2], line.partition(" ")[0] != "-") for line in lines]


def bits_per_byte(model_name: str, lines: list[LabelledLine]) -> np.ndarray:
    """Of each line, given all lines before it, `[N]`."""
    model, tokenizer = titans_lm.load(model_name)
    kept = SurprisingLines(len(lines))
    reader = Reader(model, tokenizer, on_tokens=lambda _, ids, bits: kept.add(*by_bytes(tokenizer, ids, bits)))
    reader.read("".join(f"{line.text}\n" for line in lines))
    found = np.zeros(len(lines))
    for line in kept.most():
        found[line.number - 1] = line.bits_per_byte
    return found


def new_templates(lines: list[LabelledLine]) -> np.ndarray:
    """Whether each line's template, its words with digits and hexadecimal numbers left out, was not seen before."""
    seen: set[str] = set()
    found = []
    for line in lines:
        template = re.sub(r"0x[0-9a-fA-F]+|[0-9]+", "#", line.text)
        found.append(template not in seen)
        seen.add(template)
    return np.array(found)


def precision_and_recall(named: np.ndarray, alerts: np.ndarray) -> dict[str, float]:
    right = int((named & alerts).sum())
    return {
        "lines": int(named.sum()),
        "precision": right / max(int(named.sum()), 1),
        "recall": right / int(alerts.sum()),
    }


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    named = np.zeros(len(scores), bool)
    named[np.argsort(-scores, kind="stable")[:count]] = True
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--model", default="streams", help="a model folder, or the name of a shipped model")
    arguments = parser.parse_args()
    lines = labelled_lines(arguments.log)
    alerts = np.array([line.alert for line in lines])
    if not alerts.any():
        parser.error(f"{arguments.log} has no line that is labelled as an alert")
    scores, rule = bits_per_byte(arguments.model, lines), new_templates(lines)
    found = {
        "alerts": int(alerts.sum()),
        "of_lines": len(lines),
        "new_template": precision_and_recall(rule, alerts),
        "model_as_many_as_the_rule": precision_and_recall(highest(scores, int(rule.sum())), alerts),
        "model_as_many_as_alerts": precision_and_recall(highest(scores, int(alerts.sum())), alerts),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
