"""The tolerance of each dtype, for errors relative to the root mean square."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64; 0 for equal tensors, also for zeros and empty ones."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = torch.linalg.vector_norm(actual - expected)
    return 0.0 if difference == 0 else float(difference / torch.linalg.vector_norm(expected))


def assert_close(actual: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Assert that `actual` is finite, has `expected`'s shape, and is within the tolerance of its own dtype."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)} is not {list(expected.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: {actual.tolist()} is not {expected.tolist()}"
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[actual.dtype], f"{name}: relative error {error:.2e} in {actual.dtype}"
