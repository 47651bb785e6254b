"""Exchange on the CPU: segments gathered straight into the receiver's window, and out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.engines.agreement import Call
from fusco.engines.cpu.kernels.scatter import gather_segments, scatter_segments
from fusco.engines.cpu.session import Session
from fusco.engines.segments import check_exchange, exchange_payload
from fusco.errors import DisagreementError
from fusco.profiling import stage
from fusco.types import Segments


def exchange(
    session: Session,
    call: Call,
    source: Tensor,
    send: Sequence[Segments],
    out: Tensor,
    receive: Sequence[Segments],
) -> None:
    """See `Engine.exchange`. A rank's block holds what each rank sends it, in rank order."""
    rank, num_ranks = session.rank, session.world.topology.num_ranks
    incoming = [int(each.size.sum()) for each in receive]
    with stage("agree"):
        call, block = session.reserve(call, sum(incoming))
        agreement = session.agree(call, block, exchange_payload(send, receive).numpy())
    payload = agreement.payload
    try:
        check_exchange(torch.from_numpy(payload), rank)
    except DisagreementError:
        session.window.heap.release(block)
        # Nobody publishes again while another still reads this record.
        session.finish(agreement)
        raise
    sent = payload[:, 2 * num_ranks : 3 * num_ranks]
    session.map(agreement.base + sent.sum(axis=0))
    at = session.addresses + agreement.base
    at += sent[:rank].sum(axis=0)
    with stage("write"):
        for peer, segments in enumerate(send):
            gather_segments(
                source.data_ptr(), segments.offset.numpy(), segments.size.numpy(), at[peer]
            )
    with stage("wait"):
        session.finish(agreement)
    begin = session.window.address_of(block)
    with stage("scatter"):
        for segments, size in zip(receive, incoming, strict=True):
            scatter_segments(begin, out.data_ptr(), segments.offset.numpy(), segments.size.numpy())
            begin += size
    session.window.heap.release(block)
