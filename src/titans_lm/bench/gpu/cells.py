"""The cells of each section of `titans bench gpu`: each is one contender, checked or measured."""

import itertools
from typing import Any, NamedTuple

from titans_lm.bench import lm
from titans_lm.bench.model import trained_options

SECTIONS = ("checks", "compile", "op", "model", "decode", "train")


TOY_LIMIT = 600.0
"""Seconds of a cell at toy sizes: a loaded machine is no result."""


class Cell(NamedTuple):
    """One contender: `BUILD[contender]` of a module of `titans_lm.bench`, and its actions."""

    name: str
    module: str
    contender: str
    options: dict[str, Any]
    actions: list[str] = []  # noqa: RUF012 - never changed
    backend: str = "auto"
    dtype: str = "bfloat16"
    runs: int = 3
    limit: float = 60.0
    """Seconds after which it is stopped, and that is its result."""


class Section(NamedTuple):
    name: str
    cells: list[Cell]
    share: float
    """Of the time of all sections."""
    parallel: int = 1
    """Processes at once; 1 where time is measured."""


def all_sections(device: str, *, toy: bool) -> list[Section]:
    """All sections, the most valuable first."""
    parallel = 8 if device == "cuda" else 1
    found = [
        Section("checks", toy_checks() if toy else checks(), 3, parallel),
        Section("compile", compile_cells(toy=toy), 2, parallel),
        Section("op", op_cells(toy=toy), 4),
        Section("model", model_cells(toy=toy), 3),
        Section("decode", decode_cells(toy=toy), 1),
        Section("train", [train_cell(toy=toy)], 2),
    ]
    if not toy:
        return found
    patient = [[c if c.contender == "compiled" else c._replace(limit=TOY_LIMIT) for c in s.cells] for s in found]
    return [section._replace(cells=cells) for section, cells in zip(found, patient, strict=True)]


# ------------------------------------------------------------------------------------------------ right or wrong

CHANGES: list[dict[str, Any]] = [
    {},
    {"masked": True, "inside": True},
    {"width": 64, "hidden": 128, "chunk": 64, "tokens": 147},
    {"width": 64, "hidden": 256, "chunk": 16, "tokens": 83, "masked": True, "inside": True},
    {"width": 128, "hidden": 128, "chunk": 32, "tokens": 67, "inside": True},
    {"width": 128, "hidden": 256, "chunk": 64, "tokens": 131, "masked": True},
    {"depth": 1, "width": 64, "chunk": 64, "tokens": 129, "masked": True, "inside": True},
    {"depth": 1, "residual": False, "clip": None},
    {"residual": False, "clip": None, "masked": True, "inside": True},
    {"activation": "gelu", "threshold": 0.3, "masked": True},
    {"activation": "gelu", "residual": False, "width": 32, "hidden": 48},
    {"tokens": 1, "inside": True},
    {"tokens": 15, "chunk": 16},
    {"tokens": 17, "chunk": 16, "inside": True},
    {"tokens": 40, "chunk": 1, "masked": True},
    {"tokens": 41, "chunk": 4, "masked": True, "inside": True, "width": 32},
    {"rows": 5, "heads": 3, "tokens": 97, "chunk": 32, "masked": True, "inside": True},
    {"rows": 2, "heads": 2, "tokens": 1031, "chunk": 64, "width": 64, "hidden": 128, "clip": 1.0},
]
"""Problems on which kernels and `chunked` are compared with the definition: odd lengths, padding, rows that begin
inside a chunk, every form and width."""


def _check(form: str, dtype: str, changes: dict[str, Any]) -> Cell:
    said = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as it is"
    return Cell(f"{form}, {dtype}, {said}", "gpu.checks", "check", {"form": form, **changes}, dtype=dtype, limit=90)


def checks() -> list[Cell]:
    kernels = [_check("triton", dtype, c) for c in CHANGES for dtype in ("float32", "bfloat16")]
    chunks = [_check("chunked", dtype, c) for c in CHANGES[1:10] for dtype in ("float32", "bfloat16")]
    models = [_model_check(kind, "tiny", dtype) for kind in lm.TITANS for dtype in ("float32", "bfloat16")]
    kinds = [("bfloat16", True), ("bfloat16", False), ("float32", True)]
    chosen = [_auto({"width": 64, "hidden": 128, "chunk": 64}, dtype, gradients) for dtype, gradients in kinds]
    return [*kernels[:8], *chunks[:4], *models[:2], *kernels[8:], *chosen, *models[2:], *chunks[4:]]


def toy_checks() -> list[Cell]:
    small = {"tokens": 5, "chunk": 4, "hidden": 16, "masked": True, "inside": True}
    return [
        _check("triton", "float32", small),
        _check("triton", "bfloat16", small),
        _check("chunked", "bfloat16", small),
        _model_check("mag", "tiny", "float32")._replace(options={"kind": "mag", "size": "tiny", "tokens": 20}),
        _auto({"width": 16, "hidden": 16, "chunk": 4, "tokens": 4, "memories": 1}, "float32", True),
    ]


def _model_check(kind: str, size: str, dtype: str) -> Cell:
    options = {"kind": kind, "size": size, "tokens": 301}
    return Cell(f"model {kind}, {dtype}", "gpu.checks", "model", options, dtype=dtype, limit=90)


def _auto(changes: dict[str, Any], dtype: str, gradients: bool) -> Cell:
    said = f"auto, {dtype}, {'with' if gradients else 'without'} gradients"
    return Cell(said, "gpu.checks", "auto", {**changes, "gradients": gradients}, dtype=dtype, limit=90)


# ------------------------------------------------------------------------------------------------ the operation

OP_ACTIONS = ["matmul", "forward", "training"]
FLA, SDPA = "flash-linear-attention, gated delta rule", "attention (SDPA)"


def _shapes(toy: bool) -> list[dict[str, Any]]:
    """Every size, 4K tokens before 64K, the sizes of models first."""
    if toy:
        return [{"rows": 1, "tokens": 8, "hidden": 16, "chunk": 4, "form": "residual", "width": 16, "heads": 1}]
    grid = itertools.product((4096, 65536), (64, 128), (64, 16), (128, 256))
    return [
        {"rows": 16 if tokens == 4096 else 2, "tokens": tokens, "hidden": hidden, "chunk": chunk, "form": "residual",
         "width": width, "heads": 768 // width}
        for tokens, width, chunk, hidden in grid
    ]  # fmt: skip


def shape_name(shape: dict[str, Any]) -> str:
    return f"width {shape['width']}, hidden {shape['hidden']}, chunk {shape['chunk']}, {shape['tokens']:,} tokens"


def compile_cells(*, toy: bool) -> list[Cell]:
    """Contenders that are built and run once on two chunks, in parallel: compiled code goes to Triton's cache."""
    shortest = _shapes(toy)[0]["tokens"]
    shapes = [shape for shape in _shapes(toy) if shape["tokens"] == shortest]
    small = [{**shape, "tokens": 2 * shape["chunk"], "rows": 1} for shape in shapes]
    return [Cell(f"kernels, {shape_name(s)}", "op", "ours", s, backend="triton", limit=120) for s in small]


def op_cells(*, toy: bool) -> list[Cell]:
    cells = []
    for shape in _shapes(toy):
        name, first = shape_name(shape), shape["hidden"] in (16, 128) and shape["chunk"] in (4, 64)
        cells.append(Cell(f"triton, {name}", "op", "ours", shape, OP_ACTIONS, "triton"))
        if first:  # peers have neither a hidden width nor our chunks
            cells.append(Cell(f"{SDPA}, {name}", "op", "attention", shape, OP_ACTIONS))
            cells.append(Cell(f"{FLA}, {name}", "op", "gated_delta_rule", shape, OP_ACTIONS))
        cells.append(Cell(f"chunked, {name}", "op", "ours", shape, OP_ACTIONS, "chunked", limit=30))
        limit = 15 if toy else 60
        cells.append(Cell(f"compiled, {name}", "op", "compiled", shape, OP_ACTIONS, "chunked", limit=limit))
    late = [cell for cell in cells if cell.contender == "compiled"]  # torch.compile may take all of its limit
    return [*(cell for cell in cells if cell.contender != "compiled"), *late]


# ------------------------------------------------------------------------------------------------ models, training


def model_cells(*, toy: bool) -> list[Cell]:
    """Training step and prefill of one sequence, beside attention of the same size."""
    size, lengths = ("tiny", [48]) if toy else ("170m", [4096, 16384, 65536])
    kinds = ["mag", lm.FULL] if toy else ["mag", lm.FULL, "mac", lm.WINDOW]
    cells = []
    for tokens, kind in itertools.product(lengths, kinds):
        actions = ["prefill", "step", *(["step without memory"] if kind in lm.TITANS else [])]
        options = trained_options(kind, size, tokens, checkpointing=tokens > 32768)
        cells.append(Cell(f"{kind}, {tokens:,} tokens", "model", "trained", options, actions, runs=2))
    if not toy:
        longest = trained_options("mag", size, 4096)
        cells.append(Cell("mag by chunked, 4,096 tokens", "model", "trained", longest, ["prefill", "step"], "chunked"))
    return cells


def decode_cells(*, toy: bool) -> list[Cell]:
    size, position, tokens = ("tiny", 70, 3) if toy else ("170m", 4096, 64)
    cells = []
    for kind, graph in itertools.product(("mag", lm.WINDOW), (True, False)):
        options = {"kind": kind, "size": size, "position": position, "tokens": tokens, "graph": graph}
        name = f"{kind}, {'CUDA graph' if graph else 'eager'}"
        cells.append(Cell(name, "gpu.decoding", "decoder", options, ["decode"]))
    return cells


def train_cell(*, toy: bool) -> Cell:
    """A run of `titans train`, for as long as there is time."""
    options: dict[str, Any] = {"parameters": 1e6 if toy else 20e6, "length": 64 if toy else 1024,
                               "batch_size": 2 if toy else 64, "toy": toy}  # fmt: skip
    return Cell("streams", "gpu.training", "streams", options, limit=240 if toy else 600)
