"""`fusco.exchange`: segments of any size land where the receiver says, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import fusco
from fusco.testing.ranks import RankPool, subgroup

NUM_RANKS = 4
NUM_BYTES = 5000
TIMEOUT_S = 4.0


def segments(offset: list[int], size: list[int]) -> fusco.Segments:
    return fusco.Segments(
        offset=torch.tensor(offset, dtype=torch.int64), size=torch.tensor(size, dtype=torch.int64)
    )


def draw(seed: int) -> tuple[list[list[fusco.Segments]], list[list[fusco.Segments]]]:
    """Of each rank what it sends to and receives from each: sizes of 0 to 300 bytes, any order."""
    generator = torch.Generator().manual_seed(seed)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    sizes = [
        [[below(300) for _ in range(below(4))] for _ in range(NUM_RANKS)] for _ in range(NUM_RANKS)
    ]
    send = [[segments([below(NUM_BYTES - n) for n in each], each) for each in row] for row in sizes]
    receive = []
    for rank in range(NUM_RANKS):
        incoming = [(source, n) for source in range(NUM_RANKS) for n in sizes[source][rank]]
        place, offset = 0, [0] * len(incoming)
        for i in torch.randperm(len(incoming), generator=generator).tolist():
            offset[i] = place + below(3)
            place = offset[i] + incoming[i][1]
        rows = []
        for source in range(NUM_RANKS):
            mine = [i for i, (other, _) in enumerate(incoming) if other == source]
            rows.append(segments([offset[i] for i in mine], sizes[source][rank]))
        receive.append(rows)
    return send, receive


def source_of(rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 255, (NUM_BYTES,), dtype=torch.uint8, generator=generator)


def exchanged(rank: int, engine: str) -> None:
    group = subgroup(range(NUM_RANKS))
    if group is None:
        return
    for seed in range(12):
        send, receive = draw(seed)
        out = torch.full((2 * NUM_BYTES,), 255, dtype=torch.uint8)
        expected = out.clone()
        for peer in range(NUM_RANKS):
            there = send[peer][rank]
            for begin, size, to in zip(
                there.offset.tolist(),
                there.size.tolist(),
                receive[rank][peer].offset.tolist(),
                strict=True,
            ):
                expected[to : to + size] = source_of(peer, seed)[begin : begin + size]
        got = fusco.exchange(
            source_of(rank, seed), send[rank], out, receive[rank], group=group, engine=engine
        )
        assert got is out
        assert torch.equal(out, expected), f"seed {seed}"


def test_exchange(pool: RankPool, host_engine: str) -> None:
    pool.run(exchanged, host_engine)


def large_and_typed(rank: int, engine: str) -> None:
    """Rows of floats to the next rank, more than a window holds at first."""
    group = subgroup(range(NUM_RANKS))
    if group is None:
        return
    nothing, row = segments([], []), 4 * 1000
    source = torch.arange(900 * 1000, dtype=torch.float32).view(900, 1000) + rank
    out = torch.zeros_like(source)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(1))
    sizes = torch.full((900,), row)
    send, receive = [nothing] * NUM_RANKS, [nothing] * NUM_RANKS
    send[(rank + 1) % NUM_RANKS] = fusco.Segments(offset=order * row, size=sizes)
    receive[(rank - 1) % NUM_RANKS] = fusco.Segments(offset=torch.arange(900) * row, size=sizes)
    fusco.exchange(source, send, out, receive, group=group, engine=engine)
    assert torch.equal(out, source[order] - rank + (rank - 1) % NUM_RANKS)


def test_large_and_typed(pool: RankPool, host_engine: str) -> None:
    pool.run(large_and_typed, host_engine)


MISTAKES = (
    "outside",
    "overlap",
    "too few",
    "none",
    "pairs",
    "lists",
    "narrow",
    "nested",
    "lengths differ",
    "strided",
    "sparse",
    "negated",
    "sizes differ",
)


def mistaken(rank: int, engine: str, mistake: str) -> None:
    group = subgroup(range(NUM_RANKS))
    if group is None:
        return
    source, out = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    send = [segments([4 * peer], [4]) for peer in range(NUM_RANKS)]
    receive = [segments([4 * peer], [4]) for peer in range(NUM_RANKS)]
    good = (source, send, out, receive)
    narrow = fusco.Segments(offset=torch.tensor([0], dtype=torch.int32), size=send[0].size)
    nested = fusco.Segments(offset=send[0].offset[None], size=send[0].size[None])
    bad: dict[str, tuple[Any, ...]] = {
        "outside": (source, [segments([62], [4]), *send[1:]], out, receive),
        "overlap": (source, send, out, [segments([2], [4]), *receive[1:]]),
        "too few": (source, send[1:], out, receive),
        "none": (source, None, out, receive),
        "pairs": (source, [(0, 4), *send[1:]], out, receive),
        "lists": (source, send, out, [fusco.Segments(offset=[0], size=[4]), *receive[1:]]),
        "narrow": (source, [narrow, *send[1:]], out, receive),
        "nested": (source, [nested, *send[1:]], out, receive),
        "lengths differ": (source, [segments([0, 4], [4]), *send[1:]], out, receive),
        "strided": (source[::2], send, out, receive),
        "sparse": (source.to_sparse(), send, out, receive),
        "negated": (source, send, torch._neg_view(torch.zeros(64)), receive),
        "sizes differ": (source, [segments([0], [3]), *send[1:]], out, receive),
    }[mistake]
    expected = fusco.DisagreementError if mistake == "sizes differ" else fusco.InputError
    with pytest.raises(expected) as caught:
        fusco.exchange(*(bad if rank == 2 else good), group=group, engine=engine)
    assert "exchange" in str(caught.value)
    assert rank == 2 or "rank 2" in str(caught.value)
    fusco.exchange(*good, group=group, engine=engine)
    assert out[:16].tolist() == [4 * rank + i for _ in range(NUM_RANKS) for i in range(4)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_everywhere(pool: RankPool, host_engine: str, mistake: str) -> None:
    pool.run(mistaken, host_engine, mistake)


def late(rank: int, engine: str) -> str:
    """The error of a rank whose peer does not come."""
    group = dist.new_group([0, 1])  # of its own: it cannot exchange any more
    if rank > 1:
        return ""
    nothing, empty = [segments([], [])] * 2, torch.empty(0, dtype=torch.uint8)

    def exchange() -> None:
        fusco.exchange(
            empty, nothing, empty, nothing, group=group, engine=engine, timeout_s=TIMEOUT_S
        )

    exchange()
    if rank == 1:
        return ""
    with pytest.raises(fusco.PeerError) as caught:
        exchange()
    with pytest.raises(fusco.ClosedError):
        exchange()
    return str(caught.value)


def test_a_late_rank_is_named(pool: RankPool, host_engine: str) -> None:
    text, *_ = pool.run(late, host_engine)
    assert "exchange: rank 1 " in text
    assert "Shuffle" not in text
