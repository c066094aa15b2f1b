"""The link between two hosts, which are network namespaces, and what happens to links. Needs root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.benchmarks.link import TARGET_HOST, Link, limited_link

WAIT_S = 20
CUT_FROM, LOCAL = 10, 100
"""Priorities of routing rules. Those of a cut come before the one that lets a host have what is sent to it."""


@dataclass
class Wire:
    """Up, until it is cut: then what arrives at either end is dropped, and nobody is told."""

    link: Link
    address: str = TARGET_HOST
    """Of the destination."""
    _cuts: list[tuple[str, int]] = field(default_factory=list)

    def cut(self, *ports: int) -> None:
        """All of it, or the connections to these TCP ports of the destination."""
        for port in ports or (0,):
            for namespace, side in ((self.link.target, "dport"), (self.link.source, "sport")):
                priority = CUT_FROM + len(self._cuts)
                chosen = ("ipproto", "tcp", side, str(port)) if port else ()
                rule(namespace, "add", "pref", str(priority), "iif", self.link.device, *chosen, "blackhole")
                self._cuts.append((namespace, priority))

    def mend(self) -> None:
        for namespace, priority in self._cuts:
            rule(namespace, "del", "pref", str(priority))
        self._cuts.clear()


def rule(namespace: str, *words: str) -> None:
    subprocess.run(["ip", "-n", namespace, "rule", *words], check=True, timeout=WAIT_S)


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    with limited_link() as link:
        for namespace in (link.source, link.target):
            rule(namespace, "add", "pref", str(LOCAL), "lookup", "local")
            rule(namespace, "del", "pref", "0")
        yield Wire(link)
