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

PAGES = {"matplotlib", "pandas", "plotly", "sklearn", "torchvision", "tensorboard", "IPython"}
OURS = {f"draftplus.{name}" for name in ("report", "publish", "planning", "sweeps", "evaluation.evaluate")}

TRAIN = f"""
import sys
from draftplus.data import prompts
from draftplus.training import train

read, usual = [], prompts.read_rows

def counted(source, *column):
    read.append(source)
    return usual(source, *column)

class Ready(Exception):
    pass

def ready(*arguments):
    raise Ready(sorted({PAGES | OURS} & set(sys.modules)))

prompts.read_rows, train.drive = counted, ready
from draftplus.cli import app
try:
    app(["train", "emoji", "data.prompts=prompts.txt", "device=cpu", "log.to=[]"], standalone_mode=False)
except Ready as found:
    print(read.count("prompts.txt"), *found.args[0])
    sys.exit()
sys.exit("no training began")
"""

PLAN = """
from draftplus.data import prompts
from draftplus.sweeps.plan import plan_sweep

read, usual = [], prompts.read_rows

def counted(source, *column):
    read.append(source)
    return usual(source, *column)

prompts.read_rows = counted
plan_sweep("emoji", {"seed": ["0", "1", "2"], "data.prompts": ["prompts.txt"]})
print(read.count("prompts.txt"))
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


def test_a_training_reads_its_prompts_once_and_begins_without_what_draws_pages(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat number {number}" for number in range(20)))
    assert printed(TRAIN, tmp_path) == "1"


def test_the_runs_of_a_sweep_are_planned_with_one_reading_of_their_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat number {number}" for number in range(20)))
    assert printed(PLAN, tmp_path) == "1"


def test_the_table_of_rewards_that_compare_images_says_what_they_say_themselves() -> None:
    comparing = {target for target in REWARDS.values() if getattr(resolved(target), "compares_images", False)}
    assert comparing == COMPARING
