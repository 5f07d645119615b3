"""A link with a rate and a delay between two network namespaces, for kernels without netem.

    python delay_link.py NAMESPACE NAMESPACE --mbit 100 --delay-ms 1

Each namespace gets a TUN interface, and this process carries the packets. Per direction, a packet
of n bytes that arrives at time t

    leaves at      sent ← max(t, sent) + 8·n / rate         the wire is busy with one at a time
    is delivered   at sent + delay                          as many on the way as there are

A queue that holds more than QUEUE_SECONDS of the rate is no longer fed: then the kernel's own queue
in front of it fills, and drops, as in front of a slow link. Says `up` once the link is up and ends
when its standard input is closed, so that it does not outlive who started it. Needs root.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # from linux/if_tun.h
MTU = 9000  # jumbo frames: one packet costs this process the same whatever its size
QUEUE_SECONDS = 0.05
PACKETS_AT_ONCE = 64  # of one direction, before the other has its turn


class Direction:
    """Packets on their way from one end to the other; times in seconds of any one clock."""

    def __init__(self, mbit: float, delay_ms: float) -> None:
        self._seconds_per_byte = 8 / (mbit * 1e6)
        self._delay = delay_ms / 1e3
        self._sent = 0.0
        self._packets: deque[tuple[float, bytes]] = deque()

    def accept(self, packet: bytes, now: float) -> None:
        """Put a packet on the wire."""
        self._sent = max(now, self._sent) + len(packet) * self._seconds_per_byte
        self._packets.append((self._sent + self._delay, packet))

    def full(self, now: float) -> bool:
        return self._sent - now > QUEUE_SECONDS

    def due(self, now: float) -> list[bytes]:
        """Take out what has arrived by now, in order."""
        arrived = []
        while self._packets and self._packets[0][0] <= now:
            arrived.append(self._packets.popleft()[1])
        return arrived

    def wait(self, now: float) -> float | None:
        """Seconds until the next packet arrives or the queue takes packets again."""
        times = [self._packets[0][0] - now] if self._packets else []
        if self.full(now):
            times.append(self._sent - QUEUE_SECONDS - now)
        return max(0.0, min(times)) if times else None


def make_end(namespace: str, interface: str) -> int:
    """A TUN interface in a namespace, as a file descriptor: one packet for each read and write."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    # The kernel puts a free number for %d: the name is unique while it is in our own namespace.
    asked = struct.pack("16sH22x", b"dlora%d", IFF_TUN | IFF_NO_PI)
    born = fcntl.ioctl(end, TUNSETIFF, asked)[:16].rstrip(b"\0").decode()
    rename = f"ip -n {namespace} link set {born} name {interface} mtu {MTU}"
    for command in (f"ip link set {born} netns {namespace}", rename):
        subprocess.run(command.split(), check=True)
    return end


def relay(ends: list[int], directions: list[Direction], stop: int) -> None:
    """Carry packets between two ends until `stop` has something to read, or is closed."""
    while True:
        now = time.monotonic()
        waits = [seconds for d in directions if (seconds := d.wait(now)) is not None]
        fed = [end for end, d in zip(ends, directions, strict=True) if not d.full(now)]
        ready, _, _ = select.select([*fed, stop], [], [], min(waits, default=None))
        if stop in ready:
            return
        for end, direction in zip(ends, directions, strict=True):
            if end in ready:
                take(end, direction)
        for end, direction in zip(reversed(ends), directions, strict=True):
            for packet in direction.due(time.monotonic()):
                try:
                    os.write(end, packet)
                except OSError:  # an interface that is down: the packet is lost
                    continue


def take(end: int, direction: Direction) -> None:
    """Read what lies at one end."""
    now = time.monotonic()
    for _ in range(PACKETS_AT_ONCE):
        if direction.full(now):
            return
        try:
            direction.accept(os.read(end, MTU), now)
        except BlockingIOError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("namespaces", nargs=2, metavar="NAMESPACE")
    parser.add_argument("--mbit", type=float, required=True, help="rate each way")
    parser.add_argument("--delay-ms", type=float, required=True, help="delay each way")
    parser.add_argument("--interface", default="link0", help="its name in both namespaces")
    args = parser.parse_args()
    ends = [make_end(namespace, args.interface) for namespace in args.namespaces]
    print("up", flush=True)
    relay(ends, [Direction(args.mbit, args.delay_ms) for _ in ends], sys.stdin.fileno())


if __name__ == "__main__":
    main()
