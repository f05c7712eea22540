"""Hosts that are network namespaces with a name of their own, joined by a bridge.

They need `ip netns`, which most containers forbid: `why_not` says so.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAMED = 'hostname "$0" && exec "$@"'  # in a namespace of its own for the host's name


@functools.cache
def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no `ip` or `unshare` (Debian's iproute2, util-linux)"
    try:
        with hosts(["probe"]) as (probe,):
            done = probe.run(["hostname"])
    except subprocess.CalledProcessError as error:
        return f"`ip netns` is not permitted: {error.stderr.strip()}"
    return "" if done.stdout.strip() == "probe" else f"unshare: {done.stderr.strip()}"


class Host:
    """A namespace. `address`: on the bridge."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.address = name, f"10.213.7.{number + 1}"
        self.space, self.outer = f"llmpq{os.getpid()}{name}", f"q{os.getpid()}{number}"

    def words(self, command: Sequence[str]) -> list[str]:
        """What runs a command there."""
        inside = ["ip", "netns", "exec", self.space, "unshare", "--uts"]
        return [*inside, "sh", "-c", NAMED, self.name, *command]

    def start(self, line: str, lead: "Host", folder: Path) -> subprocess.Popen:
        """A line that was printed for people, in the shell, with the address filled in."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        mine = {"PATH": path, f"{lead.name.upper()}_ADDRESS": lead.address, "OMP_NUM_THREADS": "1"}
        left_out = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        log = (folder / f"{self.name}.log").open("w")
        return subprocess.Popen(
            self.words(["sh", "-c", line]), env=kept | mine, stdout=log, stderr=log, cwd=folder
        )

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess:
        return subprocess.run(self.words(command), capture_output=True, text=True, timeout=60)

    def cut(self) -> None:
        """Nothing reaches it any more, and nobody is told."""
        _ip("link", "set", self.outer, "nomaster")

    def limit(self, rate: str) -> bool:
        """Limits what leaves it; False where the kernel cannot."""
        if shutil.which("tc") is None:
            return False
        shaped = ["tc", "qdisc", "add", "dev", "net0", "root", "tbf", "rate", rate]
        return self.run([*shaped, "burst", "32kbit", "latency", "400ms"]).returncode == 0


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[list[Host]]:
    """Hosts of these names, gone afterwards."""
    found, bridge = [Host(name, number) for number, name in enumerate(names)], f"q{os.getpid()}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in found:
            _ip("netns", "add", host.space)
            _ip("link", "add", host.outer, "type", "veth", "peer", "net0", "netns", host.space)
            _ip("link", "set", host.outer, "master", bridge, "up")
            inside = ("-n", host.space)
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", "net0")
            for name in ("lo", "net0"):
                _ip(*inside, "link", "set", name, "up")
        yield found
    finally:
        for host in found:  # a namespace lives as long as its last process, its link need not
            _ip("link", "del", host.outer, check=False)
            _ip("netns", "del", host.space, check=False)
        _ip("link", "del", bridge, check=False)


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
