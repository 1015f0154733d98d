"""Imports go along the data flow, light parts stand alone, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import titans_lm

SOURCE = Path(titans_lm.__file__).parent
FILES = sorted(file for file in SOURCE.rglob("*.py") if "shipped" not in file.parts)  # these are models' own

STOREYS = [
    ["_moved", "utils"],
    ["ops"],
    ["layers"],
    ["models"],
    ["tasks"],
    ["training", "inference"],
    ["evaluate", "analyze"],
    ["bench", "study"],
    ["cli"],
    ["__main__"],
]
"""What is in a storey imports from its own and from those before it; two of one line do not know each other."""
WITHIN_OPS = [
    ["types", "grouping", "decays", "autograd", "cpu.build"],
    ["library", "agreement", "factored", "ragged"],
    ["choice"],
    ["reference", "mlp", "cpu.compiled"],
    ["chunked.chunk", "cpu.recorder"],
    ["chunked.group"],
    ["chunked.scan"],
    ["decode", "delta_rule"],
    ["cpu.native"],
    ["cpu.saved_call"],
    ["operators"],
    ["flops"],
    ["triton.kernel_mlp"],
    ["triton.kernel_parts"],
    ["triton.kernels", "triton.kernel_backward"],
    ["triton.fused"],
    ["api"],
    [""],
]
"""From the definition outwards: a module imports from those before its own line, and none of its own line."""


def name_of(file: Path) -> str:
    """`ops.api` for ops/api.py, `ops` for ops/__init__.py, "" for the package's own."""
    parts = [part for part in file.relative_to(SOURCE).with_suffix("").parts if part != "__init__"]
    return ".".join(parts)


MODULES = {name_of(file): file for file in FILES}


def imported(file: Path) -> set[str]:
    """The package's modules that a file imports, wherever in it, also those that only type checkers read."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    ours = (name.split(".")[1:] for name in names if name.split(".")[0] == "titans_lm")
    return {next(n for k in range(len(p), -1, -1) if (n := ".".join(p[:k])) in MODULES) for p in ours}


def test_every_module_has_a_storey():
    assert {name.split(".")[0] for name in MODULES} - {""} == {name for line in STOREYS for name in line}


def test_imports_go_only_downwards():
    storey = {name: number for number, line in enumerate(STOREYS) for name in line}
    for name, file in MODULES.items():
        own = name.split(".")[0]
        for other in imported(file) if name else ():
            below = other.split(".")[0]
            assert below == own or storey[below] < storey[own], f"{name} imports {other}"


def test_no_modules_import_one_another_in_a_circle():
    left = {name: imported(file) - {name} for name, file in MODULES.items() if name}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, {name: others & left.keys() for name, others in left.items()}


def test_the_operation_s_files_go_from_the_definition_outwards():
    place = {f"ops.{name}".rstrip("."): number for number, line in enumerate(WITHIN_OPS) for name in line}
    packages = {name_of(file) for file in (SOURCE / "ops").glob("*/__init__.py")}
    files = {name: file for name, file in MODULES.items() if name.split(".")[0] == "ops" and name not in packages}
    assert files.keys() == place.keys()
    for name, file in files.items():
        for other in imported(file) & place.keys():
            assert place[other] < place[name], f"{name} imports {other}"


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
        if file.stem == "terminal":
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
