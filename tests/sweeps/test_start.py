"""What a sweep and its runs do before the first step, by what they import and read: it decides how long they take."""

import subprocess
import sys
from pathlib import Path

from draftplus.rewards.names import COMPARING, REWARDS, resolved

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "scipy", "matplotlib", "huggingface_hub"}

SWEEP = f"""
import sys
from draftplus.cli import app
from draftplus.sweeps import local

class Started(Exception):
    pass

def started(*arguments):
    raise Started(sorted({HEAVY} & set(sys.modules)))

local.LocalRunner._process = started
try:
    app(["sweep", "emoji", "seed=0,1", "objective.method=refl,draft", "device=cpu"], standalone_mode=False)
except Started as found:
    print(*found.args[0])
    sys.exit()
sys.exit("no run was started")
"""


def printed(code: str, here: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_sweep_starts_its_first_run_without_the_libraries_of_models(tmp_path: Path) -> None:
    assert printed(SWEEP, tmp_path) == ""
    assert (
        printed(SWEEP.replace("import sys\n", "import sys, scipy\n", 1), tmp_path) == "scipy"
    )  # so that this can fail


def test_the_table_of_rewards_that_compare_images_says_what_they_say_themselves() -> None:
    comparing = {target for target in REWARDS.values() if getattr(resolved(target), "compares_images", False)}
    assert comparing == COMPARING
