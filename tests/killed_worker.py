"""Trains with `kill -9` at random moments, and resumed: `killed_worker.py SETTINGS KILLS PROCESSES SEED`.

Each run is forked, as PyTorch takes long to load, and is killed up to 0.3 s after its first checkpoint. Of several
processes one is killed; the others have to end by themselves. Prints how each run ended, and the last checkpoint.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from processes_worker import started
from titans_lm.training.run_folder import last_checkpoint


def main(path: str, kills: str, count: str, seed: str) -> None:
    settings, chance = json.loads(Path(path).read_text()), random.Random(int(seed))
    output = Path(settings["training"]["output_dir"])
    for left in range(int(kills), -1, -1):
        before, begun = last_checkpoint(output), time.monotonic()
        settings["training"]["resume"] = before is not None
        children = started(int(count), {"killed": settings})
        if left:
            while last_checkpoint(output) == before and time.monotonic() < begun + 60:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(chance.choice(children), signal.SIGKILL)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        assert left or not any(statuses), statuses
        hit = any(os.WIFSIGNALED(status) for status in statuses)
        print("killed" if hit else "ended", last_checkpoint(output), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
