"""`titans bench --against`: what got slower since an earlier file of the same machine, and nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from titans_lm.bench.against import change_table, changes, load_earlier
from titans_lm.cli import main
from titans_lm.utils.terminal import PlainConsole

RESULTS = Path(__file__).parents[1] / "results"
EARLIER: dict[str, Any] = json.loads((RESULTS / "bench_op.json").read_text())
HERE = {key: EARLIER[key] for key in ("machine", "threads")}


def later(**factors: float) -> list[dict[str, Any]]:
    """The rows of the file, with the seconds and CPU seconds of the first row's training times these factors, as a
    later version writes them: with a field more."""
    rows = copy.deepcopy(EARLIER["rows"])
    for key, factor in factors.items():
        rows[0]["actions"]["training"][key] *= factor
    return [{**row, "width": 64, "operations": 1} for row in rows]


@pytest.mark.parametrize(
    ("factors", "slower"),
    [
        ({}, 0),
        ({"seconds": 1.2, "cpu_seconds": 1.2}, 1),
        ({"seconds": 1.05, "cpu_seconds": 1.05}, 0),
        ({"seconds": 3.0}, 0),  # other processes took the machine: the CPU seconds are as before
        ({"seconds": 0.5, "cpu_seconds": 0.5}, 0),
    ],
)
def test_what_got_slower_is_found(factors: dict[str, float], slower: int):
    found = changes(later(**factors), EARLIER)
    assert len(found) == 2 * len(EARLIER["rows"]), "forward and training of each row"
    worse = [change for change in found if change.is_slower(0.1)]
    assert [(change.name, change.action) for change in worse] == [("hidden 128, chunk 64: plain", "training")] * slower
    assert max(change.seconds for change in found) == pytest.approx(max(1.0, factors.get("seconds", 1.0)))


def test_only_the_same_contenders_are_compared():
    rows = later()
    rows[0]["tokens"], rows[1]["heat"] = 2048, "another"
    assert len(changes(rows, EARLIER)) == 2 * (len(EARLIER["rows"]) - 2)
    rows[2]["actions"] = {}
    assert len(changes(rows, EARLIER)) == 2 * (len(EARLIER["rows"]) - 3)


def test_on_a_gpu_seconds_alone_count():
    earlier = {**EARLIER, "setting": {**EARLIER["setting"], "device": "cuda"}}
    assert [c.is_slower(0.1) for c in changes(later(seconds=1.2), earlier)].count(True) == 1


def test_the_table_has_the_slowest_first(capsys: pytest.CaptureFixture[str]):
    found = changes(later(seconds=1.5, cpu_seconds=1.5), EARLIER)
    PlainConsole(width=200).print(change_table(found, 0.1, Path("before.json")))
    said = capsys.readouterr().out
    first = next(line for line in said.splitlines() if "hidden" in line)
    assert "1.50 slower" in first
    assert said.count("slower") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "4 cores, arm64, Darwin"}, "was measured with machine 2 cores, x86_64, Linux, here it is 4 cores"),
        ({"threads": "2"}, "with threads 1, here it is 2"),
        ({"dtype": "bfloat16"}, "with dtype float32, here it is bfloat16"),
        ({"device": "NVIDIA H200"}, "with device cpu, here it is NVIDIA H200"),
    ],
)
def test_another_machine_is_refused(change: dict[str, str], message: str):
    setting = {**EARLIER["setting"], "dtype": change.get("dtype", "float32"), "threads": change.get("threads", 1)}
    with pytest.raises(ValueError, match=message):
        load_earlier(RESULTS / "bench_op.json", {**HERE, **change}, setting)


def test_the_same_machine_is_read():
    assert load_earlier(RESULTS / "bench_op.json", HERE, EARLIER["setting"])["rows"] == EARLIER["rows"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not a result file of titans bench"),
        ('{"rows": 3}', "is not a result file of titans bench"),
        ('{"rows": []}', "has no measurement"),
    ],
)
def test_what_is_no_result_is_refused_before_anything_is_measured(content, message, tmp_path, capsys):
    earlier, out = tmp_path / "earlier.json", tmp_path / "out.json"
    if content is not None:
        earlier.write_text(content)
    assert main(["bench", "op", "--out", str(out), "--against", str(earlier)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
