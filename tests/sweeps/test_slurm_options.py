"""What `--slurm` says becomes the options of sbatch, and what cannot be meant is refused."""

from __future__ import annotations

import pytest

from draftplus.errors import UserError
from draftplus.sweeps.slurm_options import SlurmOptions, read_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SlurmOptions(1, 1, 120, {})),
        (
            "partition=gpu,time=2:00:00,gpus=1",
            SlurmOptions(1, 1, 120, {"partition": "gpu", "time": "2:00:00", "gpus-per-node": "1"}),
        ),
        (
            "nodes=2,gpus=a100:4,cpus=16,grace=300,account=lab",
            SlurmOptions(2, 4, 300, {"gpus-per-node": "a100:4", "cpus-per-task": "16", "account": "lab"}),
        ),
        (
            "partition=a,b,exclude=node[1-3,7],node9,exclusive=true,mail_user=me@lab",
            SlurmOptions(
                1, 1, 120,
                {"partition": "a,b", "exclude": "node[1-3,7],node9", "exclusive": True, "mail-user": "me@lab"},
            ),
        ),
        ("export=ALL,A=1,mem=8G", SlurmOptions(1, 1, 120, {"export": "ALL,A=1", "mem": "8G"})),
        ("gres=gpu:a100:2", SlurmOptions(1, 2, 120, {"gres": "gpu:a100:2"})),
        ("time=1-12, mem=40G", SlurmOptions(1, 1, 120, {"time": "1-12", "mem": "40G"})),
    ],
)  # fmt: skip
def test_options(text: str, expected: SlurmOptions) -> None:
    assert read_options(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpu", r"--slurm 'gpu': 'gpu' is not KEY=VALUE; for example: --slurm partition=gpu,time=2:00:00,gpus=1"),
        ("partition=", "'partition=' is not KEY=VALUE"),
        ("time=1:00,time=2:00", "time is given twice; give one value"),
        ("gpus=many", "gpus=many: give the number of GPUs of each node, such as gpus=2 or gpus=a100:2"),
        ("gpus=0", "gpus=0: give the number of GPUs"),
        ("gpus=1,exclusive", "gpus=1,exclusive: give the number of GPUs"),
        ("nodes=0", "nodes=0: give a whole number of 1 or more"),
        ("nodes=1-4", "nodes=1-4: give a whole number"),
        ("grace=2m", "grace=2m: give a whole number"),
        ("time=2h", "time=2h: give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        ("output=x.log", "the sweep sets output itself; a run's output goes to the sweep's logs/"),
        ("job_name=x", "the sweep sets job-name itself; a job has the name of its run"),
        ("array=0-3", "the sweep sets array itself; each run is one job"),
        ("signal=USR2", "the sweep sets signal itself; write grace=SECONDS"),
        ("gpus_per_node=2", "the sweep sets gpus-per-node itself; write gpus=N, of each node"),
    ],
)
def test_refusals(text: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_options(text)
    assert told in str(raised.value) and str(raised.value).startswith("--slurm ")
    assert "\n" not in str(raised.value)


def test_flags() -> None:
    options = read_options("partition=gpu,exclusive=true,nodes=2")
    assert options.flags == ["--nodes=2", "--partition=gpu", "--exclusive"]
