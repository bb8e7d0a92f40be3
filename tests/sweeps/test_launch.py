"""Every run is a process of its own: one that dies takes no other with it, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import draftplus
from draftplus.errors import Interrupted, UserError
from draftplus.runs.directory import is_held, locked
from draftplus.sweeps import launch, local
from draftplus.sweeps.local import LocalRunner, slots
from draftplus.sweeps.manifest import STATUSES, read_manifest
from draftplus.sweeps.plan import plan_sweep
from tests.support.runs import fingerprint, train_here

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(local, "COMMAND", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(local, "BETWEEN_LOOKS", 0.02)


def plan(tmp_path: Path, *seeds: object, name: str = "s"):
    return plan_sweep("emoji", {"seed": [str(seed) for seed in seeds]}, name, tmp_path)


def run_sweep(planned, jobs: int | None = None):
    return launch.run_sweep(planned, LocalRunner(planned, jobs))


def statuses(manifest) -> list[str]:
    assert {entry.status for entry in manifest.runs} <= set(STATUSES)
    return [entry.status for entry in manifest.runs]


def starts(tmp_path: Path, seed: int) -> int:
    return len((tmp_path / "s" / f"seed-{seed}" / "started").read_text().splitlines())


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, stand_in):
    manifest = run_sweep(plan(tmp_path, 0, 1, 2, 4, 5))
    assert statuses(manifest) == ["finished", "failed", "failed", "failed", "finished"]
    assert manifest.runs[1].error == "reward 'x' is not finite; look at it"
    assert "signal 9" in manifest.runs[2].error and "exit status 1" in manifest.runs[3].error
    told = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert told["recipe"] == "emoji" and told["grid"] == {"seed": ["0", "1", "2", "4", "5"]}
    assert told["runs"][0]["settings"] == ["seed=0"] and told["runs"][0]["seconds"] > 0
    assert "not finite" in (tmp_path / "s" / "logs" / "seed-1.txt").read_text()


def test_a_run_without_a_result_is_not_finished_whatever_it_says(tmp_path, stand_in):
    manifest = run_sweep(plan(tmp_path, 8, 0))
    assert statuses(manifest) == ["failed", "finished"]
    assert manifest.runs[0].error == f"it ended without a result; see {tmp_path / 's' / 'logs' / 'seed-8.txt'}"
    (tmp_path / "s" / "seed-8" / "mended").touch()
    assert statuses(run_sweep(plan(tmp_path, 8, 0))) == ["finished"] * 2
    assert (starts(tmp_path, 8), starts(tmp_path, 0)) == (2, 1)
    (tmp_path / "s" / "seed-0" / "adapter").rmdir()  # finished, and then removed
    assert statuses(run_sweep(plan(tmp_path, 8, 0))) == ["finished"] * 2
    assert (starts(tmp_path, 8), starts(tmp_path, 0)) == (2, 2)


def test_an_error_of_the_sweep_itself_removes_no_result(tmp_path, stand_in, monkeypatch):
    """Although the sweep made its directory; such as a disk that is full when the manifest is written."""
    save = launch.Manifest.save

    def full(manifest, directory):
        if any(entry.status == "finished" for entry in manifest.runs):
            raise UserError("no space left on the disk")
        save(manifest, directory)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space"):
        patch.setattr(launch.Manifest, "save", full)
        run_sweep(plan(tmp_path, 0))
    assert (tmp_path / "s" / "seed-0" / "adapter").is_dir()
    assert statuses(run_sweep(plan(tmp_path, 0))) == ["finished"]


def test_the_same_command_takes_up_what_is_not_finished(tmp_path, stand_in):
    run_sweep(plan(tmp_path, 0, 1))
    (tmp_path / "s" / "seed-1" / "mended").touch()
    assert statuses(run_sweep(plan(tmp_path, 0, 1))) == ["finished", "finished"]
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 2)
    assert statuses(run_sweep(plan(tmp_path, 0, 1))) == ["finished", "finished"]
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (1, 2)


def test_a_grid_may_grow_and_runs_that_left_it_stay(tmp_path, stand_in):
    run_sweep(plan(tmp_path, 0, 5))
    manifest = run_sweep(plan(tmp_path, 5, 6))
    assert [entry.name for entry in manifest.runs] == ["seed-5", "seed-6", "seed-0"]
    assert statuses(manifest) == ["finished"] * 3 and starts(tmp_path, 5) == 1
    grown = plan_sweep("emoji", {"seed": ["0", "5"], "train.steps": ["80", "3"]}, "s", tmp_path)  # a second key
    names = [run.name for run in grown.runs]
    assert names[0] == "seed-0" and names[2] == "seed-5" and names[1] == "seed-0_steps-3"  # what was there stays itself
    assert statuses(run_sweep(grown))[0] == "finished" and starts(tmp_path, 0) == 1
    other = plan_sweep("demo", {"seed": ["0"]}, "s", tmp_path)
    with pytest.raises(UserError, match="is a sweep of emoji, not of demo"):
        run_sweep(other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_what_is_in_flight_and_can_be_continued(tmp_path, stand_in, capsys, number):
    def stop() -> None:
        while not (tmp_path / "s" / "seed-3" / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Interrupted):
        run_sweep(plan(tmp_path, 0, 3, 5))
    stopping.join()
    assert "stopped with 1 of 3 runs finished; repeat the command to continue" in capsys.readouterr().err
    assert (tmp_path / "s" / "seed-3" / "saved").exists()
    assert statuses(read_manifest(tmp_path / "s")) == ["finished", "interrupted", "pending"]
    assert statuses(run_sweep(plan(tmp_path, 0, 3, 5))) == ["finished"] * 3
    assert starts(tmp_path, 0) == 1


@pytest.fixture
def on_path(monkeypatch):
    """For a process that a test starts."""
    here = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")]  # an empty entry is the working directory
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_killed_sweep_leaves_no_run_behind_and_can_be_continued(tmp_path, stand_in, on_path):
    sweep = subprocess.Popen([sys.executable, "-m", "tests.sweeps.killed", str(tmp_path)])
    run = tmp_path / "s" / "seed-3"
    try:
        wait_for((run / "waiting").exists)
    finally:
        sweep.kill()
        sweep.wait()
    wait_for((run / "saved").exists)  # it was asked to stop, as SIGTERM asks
    assert statuses(read_manifest(tmp_path / "s")) == ["running"]
    assert statuses(run_sweep(plan(tmp_path, 3))) == ["finished"] and starts(tmp_path, 3) == 2


def test_a_run_that_is_still_being_trained_is_waited_for(tmp_path, stand_in, capsys):
    planned, over = plan(tmp_path, 0, 5), threading.Event()
    run = tmp_path / "s" / "seed-0"

    def train() -> None:
        with locked(run):
            over.wait(60)

    training = threading.Thread(target=train)
    training.start()
    wait_for(lambda: is_held(run))

    def end() -> None:
        wait_for((tmp_path / "s" / "manifest.json").exists)
        time.sleep(0.3)
        assert not (run / "started").exists()
        (run / "free").touch()
        over.set()

    ending = threading.Thread(target=end)
    ending.start()
    manifest = run_sweep(planned)
    training.join()
    ending.join()
    assert (run / "free").exists() and statuses(manifest) == ["finished", "finished"]
    assert "seed-0: another process is still training it" in capsys.readouterr().err
    assert starts(tmp_path, 0) == 1 and not is_held(run)


def test_modules_of_the_working_directory_stand_in_for_none_of_python(tmp_path, on_path, settings, monkeypatch):
    """A queue.py there broke every run of a sweep; a reward's module there is found nevertheless."""
    for name in ("random", "queue", "typing_extensions", "secrets"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError(__file__)\n")
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (planned,) = plan_sweep(settings[0], {"reward": ["mine:red"]}, "s", tmp_path / "sweeps").runs
    whole = plan_sweep(settings[0], {"reward": ["mine:red"], "train.steps": ["1"]}, "s", tmp_path / "sweeps")
    assert planned.config.reward.keys() == {"mine:red"}
    manifest = run_sweep(whole)
    assert statuses(manifest) == ["finished"], (tmp_path / "sweeps" / "s" / "logs").glob("*").__next__().read_text()
    told = subprocess.run([sys.executable, "-m", "draftplus", "--version"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_one_process_for_each_device(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert statuses(run_sweep(plan(tmp_path, 0, 5, 6, 7))) == ["finished"] * 4
    assert seen(tmp_path, 0, 5, 6, 7) == {("0",), ("1",)}  # the device, and nothing of torchrun's
    assert together(tmp_path, 0, 5, 6, 7) == 2


def seen(tmp_path: Path, *seeds: int) -> set[tuple[str, ...]]:
    return {tuple((tmp_path / "s" / f"seed-{seed}" / "started").read_text().split()[1:]) for seed in seeds}


def together(tmp_path: Path, *seeds: int) -> int:
    """The most runs that were in flight at one time."""
    spans = []
    for seed in seeds:
        run = tmp_path / "s" / f"seed-{seed}"
        spans.append((float((run / "started").read_text().split()[0]), float((run / "ended").read_text())))
    return max(sum(a <= began < b for a, b in spans) for began, _ in spans)


def test_as_many_at_a_time_as_asked(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert statuses(run_sweep(plan(tmp_path, 0, 5, 6, 7), jobs=3)) == ["finished"] * 4
    assert together(tmp_path, 0, 5, 6, 7) == 3
    with pytest.raises(UserError, match="jobs is 0; give at least 1"):
        run_sweep(plan(tmp_path, 0), jobs=0)


def test_each_run_has_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    zero, one, two = ({"CUDA_VISIBLE_DEVICES": name} for name in "012")
    third, half = {"OMP_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "4"}
    for count, wanted, jobs, expected in (
        (0, ["auto"], None, [{}]), (1, ["auto"], None, [{}]), (2, ["auto", "auto"], None, [zero, one]),
        (2, ["cpu"], None, [{}]), (2, ["cuda:1"], None, [{}]), (3, ["cuda"], None, [zero, one, two]),
        (0, ["auto"], 1, [{}]), (0, ["auto"], 3, [third] * 3), (2, ["cpu"], 2, [half] * 2),
        (2, ["auto"], 1, [zero]), (2, ["auto"], 3, [zero | third, one | third, zero | third]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert slots(wanted, jobs) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the user says holds
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(["auto"], 3) == [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7", "4")]


def test_as_a_function(tmp_path, stand_in):
    directory = draftplus.sweep("emoji", {"seed": range(1, 3), "optim.betas": [[0.9, 0.99]]}, "s", tmp_path)
    assert directory == tmp_path / "s"
    assert [run.settings[0] for run in read_manifest(directory).runs] == ["seed=1", "seed=2"]
    assert statuses(read_manifest(directory)) == ["failed", "failed"]
    assert not (directory / "report.html").exists()  # there is nothing to show
    with pytest.raises(UserError, match="the grid is empty"):
        draftplus.sweep("emoji", directory=tmp_path)


def test_a_broken_manifest_is_a_users_mistake(tmp_path, stand_in):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "manifest.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"manifest\.json is not a sweep's manifest"):
        run_sweep(plan(tmp_path, 0))


@pytest.mark.slow
def test_a_run_of_a_sweep_is_the_run_that_train_makes(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "."]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    planned = plan_sweep(settings[0], {"seed": ["1"], "train.steps": ["2"]}, "s", tmp_path / "sweeps")
    assert [run.steps for run in planned.runs] == [2]
    assert statuses(run_sweep(planned)) == ["finished"]
    alone = train_here(settings, "seed=1", "train.steps=2")
    assert fingerprint(tmp_path / "sweeps" / "s" / planned.runs[0].name) == fingerprint(alone)
