"""The two nodes that tests and benchmarks run on: packets arrive, failures are told, nothing stays.

What is shaped is tested by the schedule of packets, and not by a clock.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import network
import pytest
from delay_link import QUEUE_SECONDS, Direction
from network import ADDRESSES, INTERFACE, Link, NodeFailure, TwoNodes, permitted, two_nodes

needs_nodes = pytest.mark.skipif(bool(reason := permitted()), reason=str(reason))

SERVER = """
import hashlib, socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    print(hashlib.sha256(received).hexdigest())
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(sys.stdin.buffer.read())
"""
ONE_FAILS = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
if os.environ["RANK"] == "1":
    while not pathlib.Path(sys.argv[1], "0").exists():
        time.sleep(0.05)
    print("this went before")
    raise ValueError("wrong on purpose")
time.sleep(600)
"""


def counter(nodes: TwoNodes, node: int, which: str) -> int:
    path = f"/sys/class/net/{INTERFACE}/statistics/{which}_bytes"
    return int(subprocess.check_output([*nodes.inside(node), "cat", path]))


def resent(nodes: TwoNodes, node: int) -> int:
    program = "import network; print(network.resent_bytes())"
    command = [*nodes.inside(node), sys.executable, "-c", program]
    return int(subprocess.check_output(command, cwd=Path(network.__file__).parent))


def left_of(nodes: TwoNodes) -> list[str]:
    """Namespaces of these nodes that are still there."""
    listed = subprocess.check_output(["ip", "netns", "list"], text=True).split()
    return [name for name in listed if name in nodes.namespaces]


@needs_nodes
@pytest.mark.parametrize(
    "link", [Link(), Link(mbit=1000), Link(mbit=100, delay_ms=1)], ids=lambda link: str(link)
)
def test_bytes_cross_and_are_counted(tmp_path: Path, link: Link) -> None:
    if cannot := permitted(link):
        pytest.skip(cannot)
    payload = os.urandom(3_000_000)
    with two_nodes(link, tmp_path) as nodes:
        command = [*nodes.inside(1), sys.executable, "-c", SERVER, ADDRESSES[1]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            client = [*nodes.inside(0), sys.executable, "-c", CLIENT, ADDRESSES[1]]
            subprocess.run(client, input=payload, check=True, timeout=60)
            assert server.stdout.read().strip() == hashlib.sha256(payload).hexdigest()
        most = 1.05 * len(payload) + resent(nodes, 0)  # a busy kernel repeats what had arrived
        for node, which in ((0, "tx"), (1, "rx")):
            assert len(payload) < counter(nodes, node, which) < most
        for node, which in ((1, "tx"), (0, "rx")):  # acknowledgements alone
            assert counter(nodes, node, which) < 0.03 * len(payload)
    assert left_of(nodes) == []


@needs_nodes
def test_a_failing_rank_is_told_and_the_others_ended(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ONE_FAILS)
    with pytest.raises(NodeFailure) as failure, two_nodes(Link(), tmp_path / "logs") as nodes:
        nodes.torchrun([str(program), str(tmp_path)], limit=60)
    told = str(failure.value)
    assert "--- node 1 ended with status 1" in told
    assert "--- node 1, rank 1, stderr" in told
    assert "ValueError: wrong on purpose" in told
    assert "this went before" in told
    pids = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert left_of(nodes) == []


@needs_nodes
def test_the_time_is_limited_and_nothing_stays(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time; time.sleep(600)")
    with two_nodes(Link(), tmp_path / "logs") as nodes:
        with pytest.raises(NodeFailure, match="node 0 did not end within 0.5 s"):
            nodes.torchrun([str(program)], limit=0.5)
        for namespace in nodes.namespaces:
            assert subprocess.check_output(["ip", "netns", "pids", namespace]) == b""
    assert left_of(nodes) == []


@needs_nodes
def test_an_error_inside_removes_the_network(tmp_path: Path) -> None:
    with pytest.raises(KeyError), two_nodes(Link(mbit=100, delay_ms=1), tmp_path) as nodes:
        assert len(left_of(nodes)) == 2
        raise KeyError
    assert left_of(nodes) == []


@needs_nodes
def test_the_reason_is_told_where_it_is_not_permitted() -> None:
    user = os.geteuid()
    os.seteuid(65534)  # whom all systems call nobody
    try:
        told = permitted()
    finally:
        os.seteuid(user)
    assert told is not None
    assert told.startswith("network namespaces are not permitted here: ip netns add dlora-")


def test_where_a_tool_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert permitted() == "two nodes need the command 'ip'"


def test_packets_leave_one_after_the_other_and_arrive_after_the_delay() -> None:
    """12500 bytes take 1 ms at 100 Mbit/s; 2 ms later they are there."""
    wire = Direction(mbit=100, delay_ms=2)
    for name in (b"a", b"b"):
        wire.accept(name * 12500, now=5.0)
    assert wire.wait(5.0) == pytest.approx(0.003)
    assert wire.due(5.0029) == []
    assert wire.due(5.0031) == [b"a" * 12500]
    wire.accept(b"c" * 12500, now=5.0035)  # the wire had been idle for 1.5 ms
    assert wire.due(5.0064) == [b"b" * 12500]
    assert wire.due(5.0066) == [b"c" * 12500]
    assert wire.wait(6.0) is None


def test_a_full_queue_is_not_fed() -> None:
    wire = Direction(mbit=8, delay_ms=1000)
    wire.accept(bytes(1000), now=0.0)  # 1 ms
    assert not wire.full(0.0)
    for _ in range(round(QUEUE_SECONDS / 0.001)):
        wire.accept(bytes(1000), now=0.0)
    assert wire.full(0.0)
    assert wire.wait(0.0) == pytest.approx(0.001)  # until it may be fed, long before any arrives
    assert not wire.full(0.0011)
