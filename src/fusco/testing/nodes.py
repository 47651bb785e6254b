"""Nodes emulated on one machine: what its ranks are told, so that NCCL joins them by sockets."""

from __future__ import annotations

from fusco import env


def node_of_rank(num_ranks: int, num_nodes: int) -> tuple[int, ...]:
    """Ranks in blocks as equal as can be."""
    return tuple(rank * num_nodes // num_ranks for rank in range(num_ranks))


def emulated_nodes(num_ranks: int, num_nodes: int) -> list[dict[str, str]]:
    """The environment of every rank.

    NCCL takes ranks with unlike host ids for ranks of different hosts, and refuses two of one host
    that share a GPU.
    """
    return [
        {
            env.NODE_ID.name: str(node),
            "NCCL_HOSTID": f"node-{node}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_NET": "Socket",
        }
        for node in node_of_rank(num_ranks, num_nodes)
    ]
