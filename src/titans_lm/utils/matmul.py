"""How fast a device multiplies matrices: what the rates of training and of the memory are compared with."""

import time

import torch

WIDTHS = (128, 8192)
"""The least and the largest width of the product that `matmul_rate` times."""
TIMED_SECONDS = 2e-3
"""What a product takes at least that is timed, unless it is of the largest width."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matmul. Its width doubles until one takes TIMED_SECONDS: without instructions for
    bfloat16, a processor takes seconds for one that another does in a millisecond."""
    width, largest = WIDTHS
    while (seconds := matmul_seconds(width, device, dtype)) < TIMED_SECONDS and width < largest:
        width *= 2
    return 2 * width**3 / seconds


def width_within(largest: int, seconds: float, device: torch.device, dtype: torch.dtype) -> int:
    """`largest`, or the largest width of its halves, quarters and so on at which a matmul should end in `seconds`."""
    rate, width = matmul_rate(device, dtype), largest
    while width > WIDTHS[0] and 2 * width**3 / rate > seconds:
        width //= 2
    return width


def matmul_seconds(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """The best of three."""
    a = torch.ones(width, width, dtype=dtype, device=device)  # draws no random numbers
    best = float("inf")
    for _ in range(4):  # the first one warms up
        _wait(device)
        begin = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
