"""Two hosts on one machine: network namespaces that a cable joins. They need root, and `ip` of iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Unavailable(Exception):
    """Why there can be no such hosts here."""


@dataclass(frozen=True)
class Host:
    """A namespace, its end of the cable and its address there."""

    namespace: str
    link: str
    address: str

    def unplug(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.link, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Raises Unavailable where the machine does not let us."""
    if shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        raise Unavailable("ip is not installed; run tests/cluster/install.sh")
    if os.getuid() != 0:
        raise Unavailable("network namespaces need root")
    mine = os.getpid()
    hosts = [Host(f"draftplus{mine}-{i}", f"dp{mine}-{i}", f"10.213.77.{i}") for i in (1, 2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", hosts[0].namespace, "link", "add", hosts[0].link, "type", "veth", "peer", "name", hosts[1].link,
            "netns", hosts[1].namespace)  # fmt: skip
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.namespace, "link", "set", host.link, "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:  # the cable goes with them
            subprocess.run([_program(), "netns", "delete", host.namespace], capture_output=True)


def _program() -> str:
    return shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "ip"


def _ip(*arguments: str) -> None:
    done = subprocess.run([_program(), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
