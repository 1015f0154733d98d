"""What "auto" runs on a GPU: forms are compared with one that is right, and timed; a wrong one is never taken.

The candidates are functions of the package and changed ones, run on the CPU.
"""

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titans_lm.ops import ScanInputs, choice
from titans_lm.ops.agreement import TOLERANCE, Problem, Run, cast_inputs, random_inputs, relative_errors, results
from titans_lm.ops.api import run_with
from titans_lm.ops.types import ScanOutput

KIND = choice.CallKind("cpu", "float32", 2, 16, 16, 4, True, True, "silu", False, True, 16, 2)
CPU = torch.device("cpu")
chunked, naive = run_with("chunked"), run_with("naive")


seconds = [0.0]


def clock() -> float:
    """Seconds that only `slow` spends, so that no other load decides."""
    return seconds[0]


def slow(inputs: ScanInputs) -> ScanOutput:
    seconds[0] += 1
    return chunked(inputs)


def decide(kind: choice.CallKind, candidates: dict[str, Run]) -> choice.Decision:
    return choice.decide(kind, candidates, "chunked", CPU, clock)


def choose(inputs: ScanInputs, candidates: dict[str, Run]) -> str:
    return choice.choose(inputs, candidates, clock=clock)


def changed(change: Callable[[ScanOutput], ScanOutput]) -> Run:
    return lambda inputs: change(chunked(inputs))


def scaled(x: torch.Tensor) -> torch.Tensor:
    return 1.001 * x


class _HalfGradient(torch.autograd.Function):
    """The same number with a gradient that is not its own."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return 0.5 * gradient


def fails(_: ScanInputs) -> ScanOutput:
    raise RuntimeError("out of resource: shared memory")


WRONG = {
    "output": changed(lambda out: out._replace(y=scaled(out.y))),
    "not finite": changed(lambda out: out._replace(y=out.y / 0)),
    "state": changed(
        lambda out: out._replace(state=out.state._replace(momentum=tuple(map(scaled, out.state.momentum))))
    ),
    "position": changed(lambda out: out._replace(state=out.state._replace(position=out.state.position + 1))),
    "gradient": changed(lambda out: out._replace(y=_HalfGradient.apply(out.y))),
    "shape": changed(lambda out: out._replace(y=out.y[:, 1:])),
    "an error": fails,
    "padding": lambda inputs: chunked(inputs._replace(mask=None)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_decisions", {})
    monkeypatch.setattr(choice, "TIMED", 1)
    return tmp_path


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_form_is_not_taken_and_named_once(what: str):
    with pytest.warns(UserWarning, match='does not use "wrong" on cpu') as warned:
        decision = decide(KIND, {"chunked": slow, "wrong": WRONG[what]})
    assert len(warned) == 1
    assert decision.backend == "chunked", "though it is slower"
    assert not decision.trials["wrong"].right
    assert decision.trials["wrong"].seconds is None


def test_the_fastest_right_form_is_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decide(KIND, {"chunked": slow, "other": chunked}).backend == "other"
        assert decide(KIND, {"chunked": chunked, "other": slow}).backend == "chunked"


def test_without_gradients_a_wrong_gradient_does_not_matter():
    kind = KIND._replace(gradients=False)
    assert decide(kind, {"chunked": slow, "other": WRONG["gradient"]}).backend == "other"


def test_a_reference_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="shared memory"):
        decide(KIND, {"chunked": fails, "other": chunked})


def counting(run: Run) -> tuple[Run, list[int]]:
    calls: list[int] = []

    def counted(inputs: ScanInputs) -> ScanOutput:
        calls.append(1)
        return run(inputs)

    return counted, calls


def call(tokens: int = 9) -> ScanInputs:
    return random_inputs(Problem(rows=1, heads=2, tokens=tokens, hidden=16, chunk=4), CPU)


def test_a_decision_is_made_once_and_kept_for_other_processes(cache: Path, caplog: pytest.LogCaptureFixture):
    counted, calls = counting(chunked)
    candidates = {"chunked": slow, "other": counted}
    with caplog.at_level(logging.DEBUG, "titans_lm"):
        assert choose(call(), candidates) == "other"
    assert "other (chunked: " in caplog.text, "a log line says it"
    made = len(calls)
    assert choose(call(11), candidates) == "other", "of the same kind: both are rounded to 16 tokens"
    assert len(calls) == made
    kept = [json.loads(file.read_text()) for file in (cache / "titans_lm").glob("backend-*.json")]
    assert [one["backend"] for one in kept] == ["other"]
    assert kept[0]["versions"]["torch"] == torch.__version__
    choice._decisions.clear()  # as a new process has it
    assert choose(call(), candidates) == "other"
    assert len(calls) == made
    assert choose(call(40), candidates) == "other"
    assert len(calls) > made, "another kind is decided anew"
    assert choice.decided(call(), gradients=True).trials["other"].right


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "{",
        lambda _: json.dumps([]),
        lambda kept: json.dumps(kept | {"backend": "unknown"}),
        lambda kept: json.dumps(kept | {"versions": {}}),
        lambda kept: json.dumps(kept | {"trials": {"other": {}}}),
    ],
)
def test_a_damaged_decision_is_made_again(spoil, cache: Path):
    candidates = {"chunked": slow, "other": chunked}
    choose(call(), candidates)
    (file,) = (cache / "titans_lm").glob("backend-*.json")
    file.write_text(spoil(json.loads(file.read_text())))
    choice._decisions.clear()
    counted, calls = counting(chunked)
    assert choose(call(), {"chunked": slow, "other": counted}) == "other"
    assert calls


def test_a_kept_failure_is_not_used_and_not_said_again():
    candidates = {"chunked": slow, "wrong": WRONG["not finite"]}
    with pytest.warns(UserWarning, match="does not use"):
        choose(call(), candidates)
    choice._decisions.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(call(), candidates) == "chunked"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose(call(), {"chunked": slow, "other": chunked}) == "other"


@pytest.mark.parametrize(
    "changes", [{}, {"masked": True, "inside": True}, {"depth": 1, "residual": False, "clip": None}]
)
def test_two_forms_agree_in_every_result(changes: dict):
    inputs = random_inputs(Problem(tokens=11, hidden=16, chunk=4, dtype=torch.float64, **changes), CPU)
    expected, actual = results(naive, inputs), results(chunked, inputs)
    names = {"d q", "d k", "d v", "d theta", "d eta", "d alpha", "d weights 0", "d momentum 0", "y", "loss", "anchor 0"}
    assert names <= expected.keys()
    assert ("d norm bias" in expected) == changes.get("residual", True)
    assert max(relative_errors(actual, expected).values()) <= TOLERANCE[torch.float64]
    narrow = results(chunked, cast_inputs(inputs, torch.float32))
    assert 1e-9 < max(relative_errors(narrow, expected).values()) <= TOLERANCE[torch.float32]


def test_a_random_problem_leaves_pytorch_s_generator_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    random_inputs(Problem(masked=True, inside=True), CPU)
    assert torch.equal(torch.randn(2), expected)
