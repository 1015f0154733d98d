"""How close is equal: one table by dtype, the error as a ratio of root mean squares."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64. Equal tensors give 0, also where all is 0 or empty."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.linalg.vector_norm(actual - expected)
    return 0.0 if difference == 0 else float(difference / torch.linalg.vector_norm(expected))


def assert_close(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """`actual` is finite, has `expected`'s shape, and is as close as its own dtype's row of the table asks."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)} is not {list(expected.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {actual.tolist()} is not {expected.tolist()}"
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"{name}: relative error {error:.2e} in {actual.dtype}"
