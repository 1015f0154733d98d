"""What starts light: the package and the command line load a heavy library where it is used, and not before."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import titans_lm
from conftest import exhaustive
from titans_lm import TitansForCausalLM
from titans_lm.cli import flags
from titans_lm.inference.reader import Mode

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "huggingface_hub", "safetensors", "numpy")
FOLDER = Path(titans_lm.__file__).parent / "models" / "shipped" / "needle"


def run(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, titans_lm\nprint(dir(titans_lm))\nassert not {{*sys.modules}} & {{*{HEAVY}}}, sys.modules"
    assert all(repr(name) in run(code) for name in titans_lm.__all__)


@pytest.mark.parametrize("module", ["tasks.babilong", *map(exhaustive, ("models.tokenizer", "models.graft_config"))])
def test_a_module_may_be_the_first_that_is_imported(module: str):
    """Importing transformers registers the models, which import others of the package."""
    run(f"import titans_lm.{module}")


def test_every_public_name_says_where_it_is_defined():
    assert set(titans_lm._MODULES) == set(titans_lm.__all__)
    assert (Path(titans_lm.__file__).parent / "py.typed").is_file()


def test_modules_are_attributes_and_others_are_not():
    assert titans_lm.utils.text_file.PIECE_BYTES > 0
    with pytest.raises(AttributeError, match="no attribute 'TitansForCausaLM'"):
        titans_lm.TitansForCausaLM  # noqa: B018


OPENED = "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)).__module__)"


def test_auto_classes_know_the_models_where_transformers_is_imported_later():
    """Looking for transformers first, as many libraries do, is not importing it."""
    code = (
        "import importlib.util, sys, titans_lm\n"
        "assert importlib.util.find_spec('transformers') is not None and 'transformers' not in sys.modules\n"
        f"from transformers import AutoModelForCausalLM\n{OPENED}\n"
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'titans_lm.models.registration']"
    )
    assert run(code, str(FOLDER)).split() == ["titans_lm.models.modeling"]


def test_auto_classes_know_the_models_where_one_of_our_modules_imports_transformers():
    """It is half imported then, and the model needs it whole."""
    code = f"import sys, titans_lm.models.generation\nfrom transformers import AutoModelForCausalLM\n{OPENED}\n"
    assert run(code, str(FOLDER)).split() == ["titans_lm.models.modeling"]


def test_a_configuration_from_another_process_has_its_models_registered():
    """It is unpickled there, not made."""
    code = (
        "import pickle, sys, titans_lm.models.configuration as config\n"
        "made = config.TitansConfig.__new__(config.TitansConfig)\n"
        "made.__dict__['use_cache'] = True\n"
        "assert 'titans_lm.models.modeling' not in sys.modules\n"
        "pickle.loads(pickle.dumps(made))\n"
        "assert 'titans_lm.models.modeling' in sys.modules"
    )
    run(code)


COMMANDS = [
    ["--help"], ["nonsense"], ["train", "--help"], ["train"], ["infer", "--help"], ["read", "--help"],
    ["memory", "show", "--help"], ["memory", "show"], ["serve", "--help"], ["evaluate", "--help"], ["bench", "--help"],
    ["study", "--help"], ["stability", "--help"], ["demo", "--help"], ["demo", "--depth", "deep"], ["learn", "--help"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_errors_of_a_command_load_nothing_heavy(command: list[str]):
    code = (
        "import sys\nfrom titans_lm.cli import main\nstatus = 0\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    status = end.code\n"
        f"assert not {{*sys.modules}} & {{*{HEAVY}}}, sorted({{*sys.modules}} & {{*{HEAVY}}})\n"
        "print(status)"
    )
    assert run(code, *command).split()[-1] == ("0" if "--help" in command else "2")


def test_flags_know_the_modes_of_a_reader():
    assert get_args(Mode) == flags.READ_MODES


def test_a_memory_file_is_shown_without_torch(model: TitansForCausalLM, tmp_path: Path):
    model.initial_state(1).save(tmp_path / "own.memory")
    code = (
        "import sys\nfrom titans_lm.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {*sys.modules} & {'torch', 'transformers', 'datasets', 'matplotlib', 'huggingface_hub'}"
    )
    assert "tokens read" in run(code, "memory", "show", str(tmp_path / "own.memory"))
