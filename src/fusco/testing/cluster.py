"""A cluster on one machine: every rank has a network namespace and a shaped link of its own.

    with Cluster((2, 2, 2, 2), rate="400mbit") as cluster, RankPool(8, seats=cluster.seats) as pool:
        before = cluster.link_bytes()
        pool.run(...)

Ranks of one host reach each other's memory, as processes of one machine do, and each other's
sockets over a bridge without a limit. Everything else is real TCP over the rank's link `eth`, which
is shaped in both directions, and one bridge for all. Linux and root only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusco.errors import input_error
from fusco.testing.namespaces import (
    add_namespaces,
    ip,
    namespace_prefix,
    queue_bytes,
    remove_namespaces,
    remove_stale_namespaces,
    require_namespaces,
    tc,
)
from fusco.testing.ranks import Seat

_MTU = 9000
_QUEUE = "burst 128kb latency 50ms"
"""Bursts hold the largest packet that the kernel hands to a queue, 64 KiB; tuned at 400 Mbit/s."""
CONGESTION_CONTROL = "cubic"
"""Linux's default, whatever this machine's is: BBR leaves a tenth of such a link idle where three
peers send to it in bursts."""
_UNIT = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class LinkBytes:
    """What has gone over each rank's link so far: bytes sent and received, by rank."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def since(self, before: LinkBytes) -> LinkBytes:
        """What has gone over them since `before`."""
        return LinkBytes(
            sent=tuple(b - a for a, b in zip(before.sent, self.sent, strict=True)),
            received=tuple(b - a for a, b in zip(before.received, self.received, strict=True)),
        )


class Cluster:
    """A context manager of network namespaces; what an earlier crash has left is removed first.

    Args:
        ranks_of_host: how many ranks each host has; ranks are numbered host by host.
        rate: of every link in each direction, as `tc` writes it, such as "400mbit".

    Raises:
        InputError: this machine or user cannot have one, or an argument is wrong.
    """

    def __init__(self, ranks_of_host: Sequence[int], *, rate: str) -> None:
        bytes_per_second(rate)
        require_namespaces("hosts", len(ranks_of_host))
        self.rate = rate
        self._prefix = f"{namespace_prefix()}{next(_numbers)}-"
        self._hosts = [host for host, ranks in enumerate(ranks_of_host) for _ in range(ranks)]
        self._switch = f"{self._prefix}switch"
        self.seats = tuple(
            Seat(
                namespace=f"{self._prefix}rank{rank}",
                interface="eth",
                switch=self._switch,
                port=_port(rank),
                node=host,
            )
            for rank, host in enumerate(self._hosts)
        )

    def __enter__(self) -> Cluster:
        remove_stale_namespaces()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all namespaces. Idempotent. Close the ranks first: they keep theirs alive."""
        remove_namespaces(self._prefix)

    def link_bytes(self) -> LinkBytes:
        """What has gone over the links so far, from the counters of their queues."""
        return LinkBytes(
            sent=tuple(queue_bytes(seat.namespace, seat.interface) for seat in self.seats),
            received=tuple(queue_bytes(seat.switch, seat.port) for seat in self.seats),
        )

    def cut(self, rank: int) -> None:
        """Pull the plug of a rank's link: nothing arrives any more, nobody is told."""
        ip(self._switch, [f"link set {_port(rank)} down"])

    def slow_down(self, rank: int, rate: str) -> None:
        """Change the rate of a rank's link, in both directions."""
        bytes_per_second(rate)
        tc(self.seats[rank].namespace, [f"qdisc change dev eth root tbf rate {rate} {_QUEUE}"])
        tc(self._switch, [f"qdisc change dev {_port(rank)} root tbf rate {rate} {_QUEUE}"])

    def lose(self, rank: int, fraction: float) -> None:
        """Drop this fraction of the packets of a rank's link, in both directions, at random."""
        port = _port(rank)
        lines = [f"qdisc add dev {port} clsact"]
        for direction in ("ingress", "egress"):
            lines.append(f"filter add dev {port} {direction} bpf da bytecode {_drop(fraction)}")
        tc(self._switch, lines)

    def _build(self) -> None:
        add_namespaces([self._switch, *(seat.namespace for seat in self.seats)])
        shape = f"root tbf rate {self.rate} {_QUEUE}"
        bridges = ["network", *(f"host{host}" for host in sorted(set(self._hosts)))]
        lines = []
        for bridge in bridges:
            lines += [f"link add {bridge} type bridge", f"link set {bridge} up"]
        for rank, (host, seat) in enumerate(zip(self._hosts, self.seats, strict=True)):
            for port, end, bridge in (
                (_port(rank), "eth", "network"),
                (f"near{rank}", "near", f"host{host}"),
            ):
                lines += [
                    f"link add {port} mtu {_MTU} type veth "
                    f"peer name {end} mtu {_MTU} netns {seat.namespace}",
                    f"link set {port} master {bridge} up",
                ]
        ip(self._switch, lines)
        tc(self._switch, [f"qdisc add dev {_port(r)} {shape}" for r in range(len(self.seats))])
        for rank, (host, seat) in enumerate(zip(self._hosts, self.seats, strict=True)):
            address = f"10.77.{host}.{rank + 1}"
            ip(
                seat.namespace,
                [
                    *(f"link set {end} addrgenmode none up" for end in ("eth", "near")),
                    f"addr add {address}/32 dev eth",
                    f"route add 10.77.0.0/16 dev eth src {address} congctl {CONGESTION_CONTROL}",
                    f"route add 10.77.{host}.0/24 dev near src {address}",
                ],
            )
            tc(seat.namespace, [f"qdisc add dev eth {shape}"])


def bytes_per_second(rate: str) -> float:
    """A rate as `tc` writes it, in bytes a second.

    Raises:
        InputError: it is not a number of kbit, mbit or gbit.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]bit)", rate)
    if parts is None or float(parts[1]) == 0:
        raise input_error(
            "cluster",
            "nic",
            got=repr(rate),
            expected="a rate such as 400mbit",
            remedy="give a number of kbit, mbit or gbit",
        )
    return float(parts[1]) * _UNIT[parts[2]] / 8


def _port(rank: int) -> str:
    return f"port{rank}"


def _drop(fraction: float) -> str:
    """A classic BPF program: drop (2) a packet where a random 32-bit word is small, else go on."""
    random_word, go_on = 0xFFFFF000 + 56, 0xFFFFFFFF
    return f"'4,32 0 0 {random_word},37 1 0 {int(fraction * 2**32)},6 0 0 2,6 0 0 {go_on}'"
