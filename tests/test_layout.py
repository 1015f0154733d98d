"""Imports go along the data flow, light parts stand alone, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import titans_lm

SOURCE = Path(titans_lm.__file__).parent
FILES = sorted(file for file in SOURCE.rglob("*.py") if "shipped" not in file.parts)  # these are models' own

ORDER = [
    ["_registration", "model_files"],
    ["ops", "recompute", "prediction", "associative", "called", "terminal", "text_file", "memory_lock"],
    ["features", "memory_state", "memory_options"],
    ["memory", "attention"],
    ["config", "reading"],
    ["block"],
    ["memory_file"],
    ["state"],
    ["packing"],
    ["arguments"],
    ["generation"],
    ["model"],
    ["data", "flags", "record", "surprising", "yaml_values"],
    ["checkpoint"],
    ["tasks", "baselines"],
    ["settings", "run_folder"],
    ["answer", "token_bits"],
    ["trainer", "reader", "memories"],
    ["train", "read"],
    ["infer", "serve"],
    ["evaluate", "analyze", "bench", "stability"],
    ["study", "demo", "learn"],
    ["cli"],
]
"""A module imports from modules before its own line, and none of its own line."""
WITHIN_OPS = [
    ["types", "ragged", "decays", "build"],
    ["naive", "mlp", "compiled"],
    ["chunk"],
    ["group"],
    ["chunked"],
    ["step", "linear"],
    ["native"],
    ["kernel_mlp"],
    ["kernels"],
    ["triton"],
    ["__init__"],
]


def module_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file: Path, *, for_types: bool = False) -> set[str]:
    """The package's modules that a file names, wherever in it; those that only type checkers read on request."""
    tree = ast.parse(file.read_text())
    ignored = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test) and not for_types
        for statement in test.body
        for node in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "titans_lm"}


def test_every_module_has_a_place_in_the_order():
    placed = {name for line in ORDER for name in line}
    assert {module_of(file) for file in FILES} - {"__init__", "__main__"} <= placed


def test_imports_go_only_along_the_data_flow():
    place = {name: number for number, line in enumerate(ORDER) for name in line}
    allowed = {("config", "model")}  # `count_parameters` builds a model, when called
    for file in FILES:
        own = module_of(file)
        if own in ("__init__", "__main__"):
            continue
        for name in imported(file):
            other = name.split(".")[1] if name.split(".")[1] in place else None
            if other in (None, own) or (own, other) in allowed:
                continue
            assert place[other] < place[own], f"{own} imports {name}"


def test_the_operation_s_files_go_from_the_definition_outwards():
    place = {name: number for number, line in enumerate(WITHIN_OPS) for name in line}
    for file in (SOURCE / "ops").glob("*.py"):
        for name in imported(file):
            assert name.startswith("titans_lm.ops."), f"ops/{file.name} imports {name}"
            other = name.split(".")[2]
            assert place.get(other, -1) < place[file.stem], f"ops/{file.name} imports {name}"


def test_imports_are_absolute():
    for file in FILES:
        levels = [node.level for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        assert set(levels) <= {0}, file.name


def run_without(blocked: list[str], code: str) -> None:
    """`code` in a Python that has none of the packages `blocked`."""
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_operation_needs_neither_transformers_nor_triton():
    run_without(
        ["transformers", "triton", "huggingface_hub", "safetensors", "datasets", "accelerate"],
        "import titans_lm.ops as ops, torch\n"
        "x, g = torch.randn(1, 9, 1, 4), torch.full((1, 9, 1), 0.5)\n"
        "state = ops.initial_state((torch.randn(1, 4, 4),), 1)\n"
        "assert ops.memory_scan(x, x, x, g, g, g, state, chunk_size=4)[0].isfinite().all()\n",
    )


def test_the_layer_needs_neither_transformers_nor_triton():
    run_without(
        ["transformers", "triton", "huggingface_hub", "safetensors", "datasets", "accelerate"],
        "import torch\n"
        "from titans_lm import NeuralMemory\n"
        "assert NeuralMemory(16, 2)(torch.randn(2, 9, 16))[0].isfinite().all()\n",
    )


def test_the_command_line_imports_only_what_a_verb_needs():
    run_without(["transformers", "datasets", "matplotlib"], "from titans_lm import cli\nassert cli.VERBS\n")


def test_names_are_printed_as_they_are():
    """Of files, and what models say: rich would take parts of them for styles, or end in a traceback."""
    for file in SOURCE.rglob("*.py"):
        if module_of(file) == "terminal":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            assert node.func.id != "Console", f"{file}: PlainConsole"
            if node.func.id == "TextColumn" and (
                "task.fields" in ast.unparse(node) or "description" in ast.unparse(node)
            ):
                assert "markup=False" in ast.unparse(node), file


def test_public_names_exist():
    assert all(hasattr(titans_lm, name) for name in titans_lm.__all__)


def test_no_file_is_long():
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 400, file.name
