"""What a process of its own prints while it listens in a node's network; see `watcher`. Standard library only."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from typing import Final

READY: Final = "watching"
_ALL: Final = 0x0003
_IPV4, _IPV6 = 0x0800, 0x86DD
_UDP: Final = 17
_DNS: Final = 53


def target(kind: int, packet: bytes) -> tuple[int, str, int] | None:
    """(protocol, address, port) that an IP packet is sent to; None for anything else."""
    if kind == _IPV4 and len(packet) >= 20:
        size, protocol, address = (packet[0] & 15) * 4, packet[9], packet[16:20]
    elif kind == _IPV6 and len(packet) >= 40:
        size, protocol, address = 40, packet[6], packet[24:40]
    else:
        return None
    ports = packet[size : size + 4]
    port = struct.unpack("!HH", ports)[1] if len(ports) == 4 else 0
    return protocol, str(ipaddress.ip_address(address)), port


def main(cluster: str) -> None:
    """Print what is sent outside `cluster` from the network of this process, until it is killed."""
    inside = ipaddress.ip_network(cluster)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.ntohs(_ALL)) as tap:
        print(READY, flush=True)
        while True:
            packet, (_, kind, direction, *_) = tap.recvfrom(65535)
            found = target(kind, packet) if direction == socket.PACKET_OUTGOING else None
            if found is None:
                continue
            protocol, address, port = found
            place = ipaddress.ip_address(address)
            asks_a_name = protocol == _UDP and port == _DNS
            if asks_a_name or not (place.is_loopback or place.is_multicast or place in inside):
                print(protocol, address, port, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
