"""Which peers a rank has at other nodes, in an order both sides know, and how slices are cut."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusco.topology import Topology
from fusco.transports.slices import Lane


@dataclass(frozen=True, kw_only=True)
class SliceSize:
    """How much a slice holds.

    Attributes:
        tokens: consecutive tokens of one rank that a slice of a combine belongs to.
        rows: the most rows of any slice; the same number, where a token is one row to a node.
    """

    tokens: int
    rows: int


def lanes_of(peer_ptr: Tensor, topology: Topology, *, away: int) -> list[int]:
    """The peers that have segments: the next node's first, so that not all send to node 0 at once.

    Args:
        peer_ptr: int64 `[P + 1]`, of a hop between nodes.
        topology: as seen from this rank.
        away: 1 for peers sent to, -1 for peers received from.
    """
    nodes, own = topology.node_of_rank, topology.node
    counts = peer_ptr.diff().tolist()
    peers = [peer for peer, count in enumerate(counts) if count]
    return sorted(peers, key=lambda peer: (away * (nodes[peer] - own) % topology.num_nodes, peer))


def make_lanes(peers: list[int], cuts: list[list[slice]], widths: list[int]) -> list[Lane]:
    """Lanes to or from these peers.

    Args:
        peers: as `lanes_of` returns them.
        cuts: by peer, the segments of each slice.
        widths: bytes of a segment of each tensor, whose slices follow one another.
    """
    return [
        Lane(peer=peer, sizes=[(cut.stop - cut.start) * width for cut in lane for width in widths])
        for peer, lane in zip(peers, cuts, strict=True)
    ]


def most_lanes(topology: Topology, *, forwarders: bool) -> int:
    """The most peers that any routing gives this rank, in one direction.

    Args:
        topology: as seen from this rank.
        forwarders: whether rows go through them; else every rank of another node may be a peer.
    """
    sizes = [topology.node_of_rank.count(node) for node in range(topology.num_nodes)]
    mine = sizes[topology.node]
    others = [size for node, size in enumerate(sizes) if node != topology.node]
    # A forwarder serves several ranks of a node that has more ranks than its own.
    return sum(-(-size // mine) for size in others) if forwarders else sum(others)
