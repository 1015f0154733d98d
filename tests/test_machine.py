"""A busy machine: what others use of it, how threads wait there, what is said of it; and freed memory."""

import os
import subprocess
import sys
import time

import pytest

from titans_lm.bench.busy import NEIGHBOUR, WAITING
from titans_lm.bench.measure import Setting
from titans_lm.bench.race import Entrant, _environment
from titans_lm.cli import thread_count
from titans_lm.training.progress import line
from titans_lm.utils import machine
from titans_lm.utils.machine import OtherLoad, is_busy, own_seconds, wait_policy

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def test_threads_sleep_where_others_leave_no_core_for_each():
    assert wait_policy(2.0, 2, 2, {}) == wait_policy(1.0, 2, 2, {"HOME": "/"}) == wait_policy(1.0, 8, 8, {}) == PASSIVE
    assert wait_policy(0.1, 2, 2, {}) == wait_policy(2.0, 4, 8, {}) == {}  # there is room
    assert wait_policy(9.0, 1, 2, {}) == {}  # one thread waits for nobody
    assert wait_policy(None, 2, 2, {}) == {}


@pytest.mark.parametrize("variable", machine.WAIT_VARIABLES)
def test_what_a_user_says_of_waiting_stays(variable: str):
    assert wait_policy(2.0, 2, 2, {variable: "ACTIVE"}) == {}


def test_threads_are_those_that_pytorch_will_have():
    assert thread_count({}, 4) == thread_count({"OMP_NUM_THREADS": "9"}, 4) == 4
    assert thread_count({"OMP_NUM_THREADS": "3,2"}, 4) == 3
    assert thread_count({"OMP_NUM_THREADS": "zero"}, 4) == thread_count({"OMP_NUM_THREADS": "0"}, 4) == 4


@pytest.mark.parametrize("said", [None, "ACTIVE"])
def test_a_training_run_waits_passively_before_torch_is_loaded(said: str | None):
    code = (
        "import os, sys\nfrom titans_lm.cli import main\n"
        "class Found(Exception): pass\n"
        "class Look:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ.get('OMP_WAIT_POLICY')); os._exit(0)\n"
        "sys.meta_path.insert(0, Look())\n"
        "main(['train', 'no.yaml'])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in (*machine.WAIT_VARIABLES, "OMP_NUM_THREADS")}
    environment |= {"OMP_NUM_THREADS": "2"} | ({} if said is None else {"OMP_WAIT_POLICY": said})
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    several = len(os.sched_getaffinity(0)) > 1
    assert out.stdout.split() == [said or ("PASSIVE" if several else "None")]


BURN = """
import sys, time
while time.process_time() < 0.4: pass
print(flush=True)
sys.stdin.read()
"""


def test_children_are_not_others():
    """Running and ended ones count as this process's own."""
    before = own_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = own_seconds() - before
        child.communicate()
    ended = own_seconds() - before
    assert 0.35 < running < ended + 0.05


def test_what_others_use_is_the_difference(monkeypatch):
    snapshots = [machine._Snapshot(10.0, 100.0, 5.0), machine._Snapshot(12.0, 103.5, 6.0)]
    monkeypatch.setattr(machine, "_snapshot", iter([*snapshots, None, snapshots[0]]).__next__)
    assert OtherLoad().cores() == pytest.approx(1.25)
    assert OtherLoad().cores() is None
    monkeypatch.undo()
    load = OtherLoad()
    time.sleep(0.05)
    found = load.cores()
    assert found is not None
    assert 0 <= found <= (os.cpu_count() or 1) * 1.5


def test_a_line_of_progress_says_that_the_machine_is_busy():
    found = {"step": 3, "max_steps": 6, "part": 0.5, "tokens_per_second": 4000, "seconds": 60, "seconds_left": 60}
    assert "busy" not in line(found)
    busy = {**found, "other_cores": 1.9, "cores": 2, "idle_tokens_per_second": 7300}
    assert line(busy).startswith(line(found))
    assert line(busy).endswith("busy machine: other processes use 1.9 of 2 cores, without them at most 7,300 tokens/s")
    assert not is_busy(1.0, 1, 2)
    assert is_busy(1.0, 2, 2)


def test_neighbours_of_a_benchmark_end_with_it():
    start = f"subprocess.Popen([sys.executable, '-c', {NEIGHBOUR!r}, str(os.getpid())])"
    code = f"import os, subprocess, sys\nprint({start}.pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    until = time.monotonic() + 120
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_contender_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    made = [
        _environment(Entrant("a", "busy", "trainer", [], {}, WAITING[name]), Setting(threads=2)) for name in WAITING
    ]
    assert [one.get("OMP_WAIT_POLICY") for one in made] == ["PASSIVE", None]
    assert made[0]["OMP_NUM_THREADS"] == "2"


# ------------------------------------------------------------------------------------------------ freed memory

FAULTS = """
import resource, sys, titans_lm
if sys.argv[1] == "kept": print(titans_lm.keep_freed_memory())
import torch
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(16 * 2**20)
print(faults(15 * 2**20))
"""


def test_freed_memory_is_kept_where_a_program_asks_for_it():
    """A tensor that fits into the place of one freed before it takes no new pages."""
    found = {}
    for how in ("kept", "returned"):
        out = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
        *said, faults = out.split()
        found[how] = int(faults)
        assert said == ["True"] * (how == "kept")
    assert found["kept"] < 100 < found["returned"]
