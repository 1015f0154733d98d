"""What all tests stand on: shapes checked, uninitialised memory NaN, one thread, and tiny models of every kind."""

import atexit
import ctypes
import gc
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, operation by operation
# Before the hook below: what a module with checks is the first to import is compiled anew, in every process.
LIBRARIES = ("accelerate", "torch._dynamo", "torch.distributed.tensor", "torch.export", "transformers.modeling_utils")
for library in LIBRARIES:
    if importlib.util.find_spec(library.partition(".")[0]):  # the tests of a GPU do without some of them
        importlib.import_module(library)
CHILD = "TITANS_UNCHECKED_TESTS"
"""Set by `test_compile.py` for the pytest that it starts: shapes are not checked there, as checks prevent compiling."""
PR_SET_PDEATHSIG = 1
SOURCE = Path(importlib.util.find_spec("titans_lm").origin).parent
# Before anything imports the package. Modules that state shapes: mypy knows all other types, and a check takes time.
if CHILD not in os.environ:
    hook = install_import_hook(
        [
            f"titans_lm.{path.relative_to(SOURCE).with_suffix('').as_posix().replace('/', '.')}"
            for path in SOURCE.rglob("*.py")
            if "from jaxtyping import" in path.read_text(encoding="utf-8")
        ],
        "beartype.beartype",
    )

from titans_lm import TitansConfig, TitansForCausalLM, TitansState  # noqa: E402
from titans_lm.layers.neural_memory import NeuralMemory  # noqa: E402
from titans_lm.models.tokenizer import byte_tokenizer  # noqa: E402
from tolerance import assert_close  # noqa: E402


def pytest_configure() -> None:
    """`nohup` and a shell's `&` ignore signals, in the processes that tests send them to as well."""
    for name, default in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)
    if CHILD in os.environ and sys.platform == "linux":  # ends with the pytest that has started it, even a killed one
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pytest_collection_finish() -> None:
    """What was imported is left out when garbage is searched for, as after each training."""
    gc.collect()
    gc.freeze()


torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN

atexit.register(gc.freeze)  # a last search for garbage would take seconds

VOCABULARY, SEGMENT, WINDOW, CHUNK, PERSISTENT = 23, 7, 5, 4, 3

TITANS = ("mac", "mag", "mal", "lmm")
KINDS: dict[str, dict[str, Any]] = {
    **{variant: {"variant": variant} for variant in TITANS},
    "window": {"variant": "attention"},
    "full": {"variant": "attention", "window_size": None},
}
"""The architectures, and attention without a memory: over a window, over everything."""

each_kind = pytest.mark.parametrize("kind", KINDS)
each_titan = pytest.mark.parametrize("kind", TITANS)


def exhaustive(*values: Any) -> Any:
    """A case of a parametrized test that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and types unchecked, as for a user: what is wrong has to be found by the package itself."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Made(TorchDispatchMode):
    """Shows `see` every tensor that any operation makes."""

    def __init__(self, see: Callable[[Tensor], None]):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.see(made)
        return out


def tiny_config(kind: str, **changes: Any) -> TitansConfig:
    """Borders everywhere: segments, windows and chunks are short, and none divides another."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "segment_size": SEGMENT,
        "window_size": WINDOW,
        "num_persistent_tokens": PERSISTENT,
        "memory_head_dim": 16,
        "memory_dim": 24,
        "memory_chunk_size": CHUNK,
        "memory_lr": 0.5,
        "initializer_range": 0.3,  # at 0.02 a memory's mistakes are too small to see
    }
    return TitansConfig(**{**fields, **KINDS[kind], **changes})


def tiny_model(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> TitansForCausalLM:
    """A model in which every parameter matters: no norm is 1, no bias 0, and the memory forgets."""
    torch.manual_seed(seed)
    model = TitansForCausalLM(tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if name.endswith("alpha.bias"):
                parameter.add_(5)
    return model.to(dtype)


def memory_layer(dim: int, heads: int, **options: Any) -> NeuralMemory:
    """A memory in which every parameter matters: no norm is 1, no bias 0, and it forgets."""
    torch.manual_seed(0)
    memory = NeuralMemory(dim, heads, **{"memory_dim": 8, "lr": 0.5, **options})
    with torch.no_grad():
        for name, parameter in memory.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
            if name == "alpha.bias":
                parameter.add_(6)
    return memory.double()


@pytest.fixture(scope="module")
def model() -> TitansForCausalLM:
    """One that reads bytes. Its memory's steps are small: a text that repeats makes rounding grow with large ones."""
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config("mag", vocab_size=260, memory_lr=0.1)).eval()


@pytest.fixture(scope="module")
def folder(model: TitansForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a user has it: saved, with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def of_other_configuration(folder: Path, path: Path) -> Path:
    """A copy of a saved model, at `path`: the same weights, but it computes something else."""
    model = TitansForCausalLM.from_pretrained(folder)
    model.config.surprise_threshold = 6.0
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def read_in_calls(model: TitansForCausalLM, ids: Tensor, calls: list[Tensor]) -> tuple[list[Tensor], TitansState]:
    """Read rows `[B, T]` of tokens in calls. A call is a mask `[B, S]`, True where the next token of that row stands.
    -> the logits of each row's tokens `[T_row, V]`, and the state."""
    state, read = model.initial_state(len(ids)), [0] * len(ids)
    logits: list[list[Tensor]] = [[] for _ in ids]
    for mask in calls:
        padded = torch.full(mask.shape, VOCABULARY - 1)
        for row, here in enumerate(mask):
            count = int(here.sum())
            padded[row, here] = ids[row, read[row] : read[row] + count]
            read[row] += count
        out = model(padded, attention_mask=mask.long(), past_key_values=state).logits
        for row, here in enumerate(mask):
            logits[row].append(out[row, here])
    return [torch.cat(parts) for parts in logits], state


def state_tensors(state: TitansState) -> dict[str, Tensor]:
    """Every tensor of a state by a name."""
    named = {}

    def walk(name: str, tree: Any) -> None:
        if isinstance(tree, Tensor):
            named[name] = tree
        elif tree is not None:
            for field, part in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
                walk(f"{name}.{field}", part)

    for number, layer in enumerate(state.layer_caches):
        walk(f"layer {number}", layer)
    return {**named, "position": state.position}


def assert_bitwise(actual: TitansState, expected: TitansState) -> None:
    """The same tensors of the same types, to the last bit."""
    ours, theirs = state_tensors(actual), state_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert actual.columns == expected.columns


def assert_has_read(model: TitansForCausalLM, state: TitansState, rows: list[Tensor]) -> None:
    """Each row of the state is as if it had read that row's tokens alone, in one call."""
    assert_is_joined(state, [model(row[None], use_cache=True).past_key_values for row in rows])


def assert_is_joined(state: TitansState, alone: list[TitansState]) -> None:
    """Each row of the state is the one row of one of these."""
    assert state.position.tolist() == [int(one.position) for one in alone]
    for i, one in enumerate(alone):
        expected = state_tensors(one)
        for name, tensor in state_tensors(state).items():
            mine, its = tensor[i], expected[name][0]
            if ".attention" in name:  # attention over everything keeps empty slots on the left
                mine = mine[:, mine.shape[1] - its.shape[1] :]
            assert_close(mine, its, name)
