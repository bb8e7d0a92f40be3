"""A run on two hosts, of which one comes later and is lost: it goes on with what there is, as one process would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Unavailable, two_hosts
from tests.support.elastic import Agent, steps_of
from tests.support.runs import REWARDS, assert_nearly_equal, train_here

pytestmark = pytest.mark.slow

PORT = 29417
STEPS = 24


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_host_comes_and_goes(hosts: tuple[Host, Host], settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    more = (
        f"reward={REWARDS}:held", f"train.steps={STEPS}", "train.micro_batch_size=2", "eval.every=12",
        "checkpoint.every=4", "optim.ema=0.5",
    )  # fmt: skip

    def agent(number: int) -> Agent:
        """As torchrun --nnodes=1:2 --max-restarts=3 --rdzv-backend=c10d starts it, and as docs/cluster.md says."""
        host = hosts[number - 1]
        meets = {"is_host": number == 1, "last_call_timeout": 2, "keep_alive_interval": 1, "join_timeout": 120}
        return Agent(
            ["train", *settings, *more, "parallel.timeout=0.1"], tmp_path / f"host{number}", host.namespace,
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": host.link},
            max_nodes=2, nproc_per_node=1, max_restarts=3, run_id="elastic", local_addr=host.address,
            rdzv_endpoint=f"{hosts[0].address}:{PORT}", rdzv_configs=meets,
        )  # fmt: skip

    (tmp_path / "host1").mkdir()
    (tmp_path / "host1" / "hold").touch()  # after a step
    with agent(1) as first:
        first.child.wait_until(lambda: steps_of(run) >= 1)
        with agent(2) as second:
            second.child.wait_until(lambda: bool(second.ranks()))
            (tmp_path / "host1" / "hold").unlink()
            first.child.wait_until(lambda: steps_of(run) >= 6)
            hosts[1].unplug()
        assert first.child.wait() == 0, first.child.err.read_text()
        said = first.child.err.read_text()
        assert "rank 1 on" in said and "has given no sign of life for 0.1 minutes" in said
        assert len(list((tmp_path / "host1").glob("pid-0-*"))) >= 3, "alone, with the other, and without it"
    assert_nearly_equal(run, train_here([*settings, *more], "name=alone"), ("adapter", "adapters/step-000012"))
