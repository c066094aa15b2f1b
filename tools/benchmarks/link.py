"""Two network namespaces and a link of limited speed between them. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

SOURCE_HOST: Final = "10.99.7.1"
TARGET_HOST: Final = "10.99.7.2"
GIGABIT: Final = 1_000_000_000
PAYLOAD_SHARE: Final = 1448 / 1514
"""Of an Ethernet frame that TCP fills."""


@dataclass(frozen=True)
class Link:
    """`bits` a second, in each direction, with a queue of 20 ms as a switch has one."""

    source: str
    target: str
    device: str
    bits: int

    @property
    def payload_rate(self) -> float:
        """Bytes a second that TCP can carry at best."""
        return self.bits / 8 * PAYLOAD_SHARE

    def at(self, namespace: str) -> Sequence[str]:
        """What a command begins with that is to run there."""
        return ["ip", "netns", "exec", namespace]

    def sent_bytes(self, namespace: str = "") -> int:
        """What has left the source so far, or another end."""
        shown = _run("ip", "-n", namespace or self.source, "-s", "-j", "link", "show", "dev", self.device)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def limited_link(bits: int = GIGABIT) -> Iterator[Link]:
    """Makes both namespaces, and removes them, whatever happens."""
    if os.geteuid() != 0:
        raise SystemExit("rows over a limited link make network namespaces: run them as root")
    name = f"writelog-{os.getpid()}"
    link = Link(f"{name}-a", f"{name}-b", "link0", bits)
    try:
        for namespace in (link.source, link.target):
            _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", link.device, "netns", link.source, "type", "veth",
             "peer", "name", link.device, "netns", link.target)
        for namespace, host in ((link.source, SOURCE_HOST), (link.target, TARGET_HOST)):
            _run("ip", "-n", namespace, "addr", "add", f"{host}/30", "dev", link.device)
            _run("ip", "-n", namespace, "link", "set", link.device, "up")
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("tc", "-n", namespace, "qdisc", "add", "dev", link.device, "root", "tbf",
                 "rate", f"{bits}bit", "burst", "128kb", "latency", "20ms")
        yield link
    finally:
        for namespace in (link.source, link.target):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False, timeout=20)


def _run(*command: str) -> str:
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if outcome.returncode:
        raise SystemExit(f"{' '.join(command)}: {outcome.stderr.strip()}")
    return outcome.stdout
