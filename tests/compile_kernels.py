"""Compile the Triton kernels for GPUs, which need not be present, and print the compiler's facts as JSON.

    python tests/compile_kernels.py --head 64 --hidden 128 --chunk 64 --arch 80 90 > facts.json

The facts are about the binary (registers, spills, shared memory), not about speed: nothing is run.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from titans_lm.ops.triton.fused import KernelPlan
from titans_lm.ops.triton.kernel_backward import backward_kernel
from titans_lm.ops.triton.kernels import forward_kernel
from titans_lm.ops.types import MemoryForm

KERNELS = {
    "forward": forward_kernel,
    "states": forward_kernel,
    "backward": backward_kernel,
}  # "states": the state of every chunk
NARROW = {"q", "k"}  # in the tokens' dtype; all else is float32
WHOLE = {"last_chunk": "*i32", "chunks": "i32", "rows": "i32", "width": "i32", "units": "i32"}
FIRST_LAYER = {"anchor1", "w1", "s1", "grad_anchor1", "grad_w1", "grad_s1"}


def compiled(name: str, plan: KernelPlan, arch: int, *, norm: bool, surprise: bool) -> Any:
    constants = plan.constants(norm or None) | {"ALL_STATES": name == "states", "SURPRISE": surprise}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    kernel = KERNELS[name]
    absent = (FIRST_LAYER if plan.depth == 1 else set()) | (set() if norm else {"norm_weight", "grad_norm_weight"})
    absent |= set() if surprise else {"loss", "gradient_norm", "grad_loss"}
    absent |= {"y", "loss", "gradient_norm"} if name == "states" else set()
    signature, values, attributes = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants or argument in absent:
            signature[argument], values[argument] = "constexpr", constants.get(argument)
            continue
        half = plan.precision == "bf16" and argument in NARROW
        signature[argument] = WHOLE.get(argument, "*bf16" if half else "*fp32")
        if WHOLE.get(argument) != "i32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def facts(name: str, plan: KernelPlan, arch: int, **asked: bool) -> dict[str, Any]:
    began = time.perf_counter()
    binary = compiled(name, plan, arch, **asked)
    registers, stack, stores, loads = assembled(binary.asm["ptx"], arch)
    return {
        "kernel": name, "arch": f"sm_{arch}", "depth": plan.depth, "head": plan.k, "units": plan.units,
        "block": plan.block, "chunk": plan.c, "at_boundary": plan.at_boundary, "precision": plan.precision,
        "threads": 32 * binary.metadata.num_warps, "shared_bytes": binary.metadata.shared,
        "registers": registers, "stack_bytes": stack, "spill_store_bytes": stores, "spill_load_bytes": loads,
        "seconds_to_compile": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def assembled(ptx: str, arch: int) -> tuple[int, ...]:
    """ptxas on the binary: registers of a thread, its stack, bytes spilled."""
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert stack, said
    assert registers, said
    return int(registers[1]), *map(int, stack.groups())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (
        ("depth", [2]),
        ("head", [64]),
        ("hidden", [128, 256]),
        ("chunk", [64]),
        ("arch", [80, 90]),
    ):
        parser.add_argument(f"--{option}", type=int, nargs="+", default=default)
    parser.add_argument("--precision", nargs="+", default=["bf16", "tf32x3"])
    parser.add_argument("--kernel", nargs="+", default=["forward", "backward"])
    parser.add_argument("--block", type=int, default=None)
    parser.add_argument("--mid-chunk", action="store_true", help="what completes a chunk that an earlier call began")
    parser.add_argument("--plain", action="store_true", help="neither the residual form nor clip, threshold, surprise")
    options = parser.parse_args()
    grid = itertools.product(
        options.arch, options.kernel, options.depth, options.head, options.hidden, options.chunk, options.precision
    )
    form = MemoryForm() if options.plain else MemoryForm(clip=1.0)
    for arch, name, depth, head, hidden, chunk, precision in grid:
        units = hidden if depth == 2 else head
        plan = KernelPlan(depth, head, units, chunk, form, not options.mid_chunk, precision)
        if options.block:
            plan = plan._replace(block=options.block)
        try:
            print(json.dumps(facts(name, plan, arch, norm=not options.plain, surprise=not options.plain)), flush=True)
        except Exception as error:
            print(json.dumps({"plan": str(plan), "arch": arch, "kernel": name, "error": str(error)[:300]}), flush=True)


if __name__ == "__main__":
    main()
