"""What an untrained memory holds: closed forms, what is known of it, and the command."""

import json

import pytest
import torch
import torch.nn.functional as F

from test_special_cases import error_on_the_nonlinear_stream
from titans_lm.cli import main
from titans_lm.evaluate.probes import THETAS, capacity, keys, least_of_linear, stream


def test_the_stream_is_the_one_that_is_known():
    for depth, chunk in ((1, 16), (2, 16), (2, 64)):
        found = stream(depth, chunk, heads=8)
        assert found["by_theta"]["0.018"] == pytest.approx(error_on_the_nonlinear_stream(depth, chunk), rel=1e-4)


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_one_pair_in_a_linear_memory_is_forgotten_by_one_minus_two_theta(correlation):
    found = capacity(1, correlation, pairs=1, width=8, heads=4)
    for theta in THETAS:
        assert found["by_theta"][f"{theta:g}"] == pytest.approx((1 - 2 * theta) ** 2, abs=1e-5)
    assert found["theta"] == 0.5
    assert found["error"] == pytest.approx(0, abs=1e-5)


def test_pairs_at_one_key_leave_the_newest():
    """M k is then the sum of 2 theta (1 - 2 theta)^age v, and the values are uncorrelated."""
    pairs = 5
    found = capacity(1, 1.0, pairs, width=8, heads=2000)
    for theta in THETAS:
        share = 2 * theta * (1 - 2 * theta) ** torch.arange(pairs).double()
        expected = 1 + share.square().sum() - 2 * share.mean()
        assert found["by_theta"][f"{theta:g}"] == pytest.approx(float(expected), rel=0.03)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
def test_keys_are_as_correlated_as_is_said(correlation):
    torch.manual_seed(0)
    k = keys(correlation, pairs=300, width=32, heads=20)
    assert torch.allclose(k.norm(dim=-1), torch.ones(300, 20))
    cosines = torch.einsum("phk,qhk->hpq", k, k)
    assert cosines.sum((1, 2)).sub(300).div(300 * 299).mean() == pytest.approx(correlation, abs=0.02)


@pytest.mark.parametrize("pairs", [4, 8, 12, 32])
def test_the_best_linear_map_is_that_of_least_squares(pairs):
    torch.manual_seed(0)
    k, v = (F.normalize(torch.randn(500, pairs, 8).double(), dim=-1) for _ in range(2))
    left = v - k @ (torch.linalg.pinv(k) @ v)
    assert least_of_linear(pairs, 8) == pytest.approx(float(left.square().sum() / v.square().sum()), abs=0.01)


# ------------------------------------------------------------------------------------------------ the command


def finite(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("probes") / "probes.json"
    assert main(["evaluate", "probes", "--width", "8", "--heads", "16", "--tokens", "512", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["probes.json", "probes.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(out.read_text(), parse_constant=finite)


def test_the_file_says_all_there_is(result):
    assert result["command"].startswith("titans evaluate probes --width 8 --heads 16 --tokens 512 --out")
    assert result["settings"] == {"width": 8, "hidden": 32, "heads": 16, "tokens": 512}
    assert len(result["stream"]) == 4 * 3
    assert len(result["capacity"]) == 2 * 3 * 6
    for row in (*result["stream"], *result["capacity"]):
        assert list(row["by_theta"]) == [f"{theta:g}" for theta in THETAS]
        assert row["error"] == min(error for error in row["by_theta"].values() if error is not None)
        assert row["error"] == row["by_theta"][f"{row['theta']:g}"]
    assert any(None in row["by_theta"].values() for row in result["stream"])  # large steps diverge


def test_deep_beats_linear_on_the_stream_and_a_chunk_has_its_price(result):
    error = {(row["depth"], row["chunk"]): row["error"] for row in result["stream"]}
    for chunk in (1, 16, 64):
        assert 0.95 < error[1, chunk] < 1.1
        assert all(error[depth, chunk] < error[1, chunk] - 0.1 for depth in (2, 3, 4))
    for depth in (2, 3, 4):
        assert error[depth, 1] < 0.45
        assert error[depth, 1] < error[depth, 16] < error[depth, 64]


def test_more_pairs_and_keys_more_alike_are_harder(result):
    error = {(row["depth"], row["correlation"], row["pairs"]): row["error"] for row in result["capacity"]}
    sizes = [2, 4, 8, 16, 32, 64]
    assert [int(n) for n in result["least_of_linear"]] == sizes
    for depth in (1, 2):
        for correlation in (0.0, 0.5, 0.9):
            grown = [error[depth, correlation, n] for n in sizes]
            assert grown == sorted(grown)
            assert grown[-1] < 1
        for n in sizes:
            assert error[depth, 0.0, n] < error[depth, 0.5, n] < error[depth, 0.9, n]
    assert all(error[1, 0.0, n] > result["least_of_linear"][str(n)] - 0.02 for n in sizes)
    assert all(error[2, 0.9, n] < error[1, 0.9, n] for n in sizes[2:])  # what depth is good for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "3"], "--width must be at least 4, got 3"),
        (["--heads", "0"], "--heads must be at least 1, got 0"),
        (["--tokens", "3"], "--tokens must be at least 4, got 3"),
        (["--out", "{}/no/probes.json"], "the folder {}/no does not exist"),
        (["--out", "{}"], "is not a file"),
        (["--out", "{}/probes.png"], "is the name of the picture"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(arguments, words, tmp_path, capsys):
    arguments = [argument.format(tmp_path) for argument in arguments]
    default = [] if "--out" in arguments else ["--out", str(tmp_path / "probes.json")]
    assert main(["evaluate", "probes", *arguments, *default]) == 2
    said = capsys.readouterr()
    assert words.format(tmp_path) in said.err
    assert said.err.count("\n") == 1
    assert not said.out
    assert not list(tmp_path.iterdir())
