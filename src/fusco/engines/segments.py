"""What ranks check of each other's segments before an exchange moves anything."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fusco.engines.base import EXCHANGE_FIELDS
from fusco.errors import DisagreementError
from fusco.types import Segments


def exchange_payload(send: Sequence[Segments], receive: Sequence[Segments]) -> Tensor:
    """What a rank publishes: for each peer a hash of the sizes it sends, of those it expects,
    and the bytes it sends; int64 `[EXCHANGE_FIELDS * P]`."""
    facts = [[_sizes_hash(out.size) for out in send], [_sizes_hash(into.size) for into in receive]]
    facts.append([int(out.size.sum()) for out in send])
    assert len(facts) == EXCHANGE_FIELDS
    return torch.tensor(facts, device="cpu").flatten()


def check_exchange(payloads: Tensor, rank: int) -> None:
    """Raise on every rank unless what each sends is what its peer expects.

    Args:
        payloads: int64 `[P, payload]`, of all ranks.
        rank: this rank.

    Raises:
        DisagreementError: segments do not match one to one.
    """
    num_ranks = payloads.shape[0]
    sent = payloads[:, :num_ranks]
    expected = payloads[:, num_ranks : 2 * num_ranks].T
    wrong = torch.nonzero(sent != expected)
    if wrong.shape[0]:
        sender, receiver = wrong[0].tolist()
        raise DisagreementError(
            f"exchange: the segment sizes that rank {sender} sends to rank {receiver} are not "
            f"those that rank {receiver} expects; descriptors must match one to one, in the same "
            f"order and with the same sizes (this is rank {rank})"
        )


def _sizes_hash(size: Tensor) -> int:
    return zlib.crc32(size.numpy().tobytes()) | size.shape[0] << 32
