"""Bits per byte of general compressors along a stream: the alternatives without a model in `adapt`."""

import bz2
import importlib.util
import itertools
import lzma
import zlib
from collections.abc import Callable, Sequence

PPM_ORDER, PPM_BYTES = 16, 64 << 20


def _ppmd(data: bytes) -> bytes:
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(PPM_ORDER, PPM_BYTES)
    return bytes(encoder.encode(data) + encoder.flush())


_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "ppmd": _ppmd,
}


def installed() -> list[str]:
    """Names of available compressors: those of the standard library, and "ppmd" (variant H, order 16) with pyppmd."""
    return [name for name in _COMPRESSORS if name != "ppmd" or importlib.util.find_spec("pyppmd")]


def compressed_bits(name: str, data: bytes, ends: Sequence[int]) -> list[float]:
    """Bits that compressor `name` spends on each bucket of `data`, from bytes 0, `ends[0]`, `ends[1]`, ...

    The bits of a bucket are the difference in compressed size of the prefixes that end after and before it; the first
    includes the format's header. Raises ValueError for a compressor that is not `installed`.
    """
    if name not in installed():
        raise ValueError(
            f"compressor {name!r} is not at hand; there are: {', '.join(installed())} (ppmd: pip install pyppmd)"
        )
    sizes = [0, *(8 * len(_COMPRESSORS[name](data[:end])) for end in ends)]
    return [float(after - before) for before, after in itertools.pairwise(sizes)]
