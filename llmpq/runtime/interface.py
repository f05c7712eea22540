"""Which network interface workers talk over: loopback on one machine, and else the right one.

gloo takes the address that the machine's own name resolves to, which other machines often cannot
reach (Debian's 127.0.1.1). The right interface is the one that reaches MASTER_ADDR; on the machine
that has that address, the interface of the address. Variables that a user has set
(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) are kept.

Not covered: machines without IPv4, and systems other than Linux, where the user must name the
interface.
"""

import socket
import struct
import sys
from collections.abc import MutableMapping
from contextlib import suppress

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
ELSEWHERE = "192.0.2.1"  # an address for documentation: asking for its route sends nothing
SIOCGIFADDR = 0x8915


def name_interface(variables: MutableMapping[str, str], is_one_machine: bool) -> None:
    """Sets the variables that are not set; on one machine, gloo then listens on loopback only."""
    if is_one_machine:
        variables.setdefault("GLOO_SOCKET_IFNAME", loopback())
    elif found := interface_towards(variables.get("MASTER_ADDR", "")):
        for name in NAMES:
            variables.setdefault(name, found)


def loopback() -> str:
    """The interface that leads back to this machine."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


def interface_towards(host: str) -> str | None:
    """The interface that reaches a host; None where that is loopback or cannot be seen."""
    addresses = interface_addresses()
    for target in (host, ELSEWHERE):
        own = _own_address(target)
        names = [name for name, address in addresses.items() if address == own]
        if names and not own.startswith("127."):
            return names[0]
    others = [name for name, address in addresses.items() if not address.startswith("127.")]
    return others[0] if len(others) == 1 else None


def _own_address(host: str) -> str:
    """The source address of packets to a host; "" where there is no route."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
    return ""


def interface_addresses() -> dict[str, str]:
    """The IPv4 address of each interface that has one."""
    found: dict[str, str] = {}
    if sys.platform != "linux":
        return found
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found
