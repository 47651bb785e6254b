"""What engines do by plain messages between all ranks: agree, and exchange segments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusco.engines.agreement import Call, disagreement, is_agreed
from fusco.engines.base import TEXT_BYTES
from fusco.transports.mailbox import Mailbox
from fusco.types import Segments


def share_records(mailbox: Mailbox, call: Call, record: Tensor) -> Tensor:
    """Everybody's records, int64 `[P, length]`, if all are alike and ready.

    Raises:
        InputError, DisagreementError, WindowMemoryError: on all ranks.
        PeerError: a rank did not come.
    """
    operation = call.operation.text
    records = mailbox.share(record, range(mailbox.group.size()), operation=operation)
    if is_agreed(records.numpy()):
        return records
    texts = share_text(mailbox, call.text, operation)
    raise disagreement(call, records.numpy(), texts, mailbox.group.rank())


def share_text(
    mailbox: Mailbox, text: str, operation: str, ranks: Sequence[int] | None = None
) -> list[str]:
    """What each of the ranks says here, cut to `TEXT_BYTES`; None: all of the group."""
    encoded = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
    mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    everybody = range(mailbox.group.size()) if ranks is None else ranks
    texts = mailbox.share(mine, everybody, operation=operation)
    return [row.tobytes().decode(errors="ignore").rstrip() for row in np.asarray(texts)]


def swap_segments(
    mailbox: Mailbox,
    source: Tensor,
    send: Sequence[Segments],
    out: Tensor,
    receive: Sequence[Segments],
    *,
    operation: str,
) -> None:
    """`Engine.exchange` once the sizes are known to match."""
    sends = [_gather(source, segments).cpu() for segments in send]
    receives = [
        torch.empty(int(each.size.sum()), dtype=out.dtype, device="cpu") for each in receive
    ]
    mailbox.swap(sends, receives, operation=operation)
    for segments, received in zip(receive, receives, strict=True):
        _scatter(received.to(out.device), out, segments)


def _gather(source: Tensor, segments: Segments) -> Tensor:
    parts = [
        source[offset : offset + size]
        for offset, size in zip(segments.offset.tolist(), segments.size.tolist(), strict=True)
    ]
    return torch.cat(parts) if parts else source.new_empty(0)


def _scatter(received: Tensor, out: Tensor, segments: Segments) -> None:
    begin = 0
    for offset, size in zip(segments.offset.tolist(), segments.size.tolist(), strict=True):
        out[offset : offset + size] = received[begin : begin + size]
        begin += size
