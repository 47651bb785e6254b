"""`fusco.exchange`: the descriptor engine for segments of any size (FUSCO, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusco.engines import make_engine
from fusco.engines.agreement import Call
from fusco.engines.base import Engine, World
from fusco.errors import ClosedError, InputError, input_error
from fusco.groups import resolve_group
from fusco.layout.records import Operation
from fusco.layout.segments import as_bytes
from fusco.meeting import meet
from fusco.profiling import stage
from fusco.topology import Topology
from fusco.types import Ablation, Segments

_NO_PLANS = -1


def exchange(
    source: Tensor,
    send: Sequence[Segments],
    out: Tensor,
    receive: Sequence[Segments],
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    engine: str = "auto",
    timeout_s: float | None = None,
) -> Tensor:
    """Gather segments of `source`, move them, and scatter them into segments of `out`.

    The i-th segment that rank a sends to rank b lands in the i-th segment that b receives from a;
    their sizes must be equal. Windows are kept with the group for the next call.

    Args:
        source: a contiguous tensor, read as bytes.
        send: for each rank of the group, the segments of `source` that go there.
        out: a contiguous tensor, written as bytes; what no segment covers stays.
        receive: for each rank of the group, the segments of `out` that it fills.
        group: None (the default group), a ProcessGroup or a one-dimensional DeviceMesh.
        engine: "cpu", "reference", or "auto".
        timeout_s: bound of every wait in seconds; None: the group's. Counts for the group's first
            exchange with this engine.

    Returns:
        `out`.

    Raises:
        InputError: a segment lies outside its tensor, received segments overlap, or an argument
            is wrong in another way, on some rank; raised on all.
        DisagreementError: the segments of two ranks do not match; raised on all.
        PeerError: a rank died or did not come in time; the group cannot exchange any more.
        ClosedError: that happened before.
    """
    process_group = resolve_group("exchange", group)
    mover = _engine(process_group, engine, timeout_s)
    with stage("exchange"), mover:
        try:
            _check(source, send, out, receive, mover)
        except InputError as error:
            mover.agree_on_error(Call(operation=Operation.EXCHANGE, error=error))
        call = Call(operation=Operation.EXCHANGE)
        mover.exchange(call, as_bytes(source), send, as_bytes(out), receive)
    return out


_ENGINES: dict[tuple[dist.ProcessGroup, str], Engine] = {}
"""Engines made so far; one that lost a rank stays, closed, so that nobody waits for it again."""


def _engine(group: dist.ProcessGroup, name: str, timeout_s: float | None) -> Engine:
    key = (group, name)
    if key not in _ENGINES:
        meeting = meet("exchange", group, {}, engine=name, timeout_s=timeout_s, without=("cuda",))
        topology = Topology(rank=group.rank(), node_of_rank=meeting.node_of_rank, rank_of_expert=())
        world = World(
            group=group,
            topology=topology,
            key=_NO_PLANS,
            top_k=1,
            max_tokens=0,
            row_bytes=0,
            alignment=1,
            timeout_s=meeting.timeout_s,
            ablation=Ablation(),
            channel=meeting.channel,
        )
        _ENGINES[key] = make_engine(meeting.engine, world)
    if _ENGINES[key].is_closed:
        raise ClosedError("exchange: a rank of this group was lost; make a new group")
    return _ENGINES[key]


def _check(
    source: Tensor,
    send: Sequence[Segments],
    out: Tensor,
    receive: Sequence[Segments],
    engine: Engine,
) -> None:
    _check_side("source", source, "send", send, engine)
    _check_side("out", out, "receive", receive, engine)
    offset = torch.cat([each.offset for each in receive])
    size = torch.cat([each.size for each in receive])
    order = torch.argsort(offset[size > 0])
    begin, length = offset[size > 0][order], size[size > 0][order]
    overlaps = torch.nonzero(begin[1:] < (begin + length)[:-1])
    if overlaps.numel():
        raise input_error(
            "exchange",
            "receive",
            got=f"two segments that overlap at byte {int(begin[1:][overlaps[0, 0]])}",
            expected="segments that do not overlap",
            remedy="each byte of out may be filled once",
        )


def _check_side(
    buffer_name: str, buffer: Tensor, name: str, segments: Sequence[Segments], engine: Engine
) -> None:
    kinds = engine.device_types
    is_strided = isinstance(buffer, Tensor) and buffer.layout == torch.strided
    if not is_strided or not buffer.is_contiguous():
        got = type(buffer).__name__
        raise input_error(
            "exchange",
            buffer_name,
            got=f"a {got} that is not contiguous" if got == "Tensor" else got,
            expected="a contiguous tensor",
            remedy="offsets count its bytes",
        )
    if buffer.is_conj() or buffer.is_neg():
        raise input_error(
            "exchange",
            buffer_name,
            got="a tensor that torch conjugates or negates when it is read",
            expected="one whose bytes are its values",
            remedy="call resolve_conj() or resolve_neg() before",
        )
    if buffer.device.type not in kinds:
        raise input_error(
            "exchange",
            buffer_name,
            got=f"a tensor on {buffer.device}",
            expected=f"one on {' or '.join(kinds)}",
            remedy="move it, or choose another engine",
        )
    num_ranks = engine.world.topology.num_ranks
    is_sequence = isinstance(segments, Sequence)
    if not (
        is_sequence
        and len(segments) == num_ranks
        and all(isinstance(each, Segments) for each in segments)
    ):
        raise input_error(
            "exchange",
            name,
            got=_kinds(segments) if is_sequence else type(segments).__name__,
            expected=f"fusco.Segments for each of the {num_ranks} ranks",
            remedy="a rank without segments gets empty ones",
        )
    for peer, each in enumerate(segments):
        _check_descriptors(name, peer, each)
        # Not by their sums, which may be more than an int64 holds.
        is_inside = (each.offset >= 0) & (each.size >= 0)
        is_inside &= each.size <= buffer.nbytes - each.offset
        if not is_inside.all():
            wrong = int(is_inside.to(torch.uint8).argmin())
            raise input_error(
                "exchange",
                name,
                got=f"a segment of rank {peer} from byte {int(each.offset[wrong])} "
                f"of {int(each.size[wrong])} bytes",
                expected=f"segments inside the {buffer.nbytes} bytes of {buffer_name}",
                remedy="offsets and sizes count bytes",
            )


def _check_descriptors(name: str, peer: int, segments: Segments) -> None:
    for field, value in (("offset", segments.offset), ("size", segments.size)):
        got = type(value).__name__
        if isinstance(value, Tensor):
            is_on_cpu = value.device.type == "cpu"
            if value.dim() == 1 and value.dtype == torch.int64 and is_on_cpu:
                continue
            got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
        raise input_error(
            "exchange",
            name,
            got=f"for rank {peer} a {field} that is {got}",
            expected="an int64 tensor of one dimension on the CPU",
            remedy=f"pass {field}=torch.tensor([...], dtype=torch.int64)",
        )
    if segments.offset.shape != segments.size.shape:
        raise input_error(
            "exchange",
            name,
            got=f"for rank {peer} {len(segments.offset)} offsets and {len(segments.size)} sizes",
            expected="as many of each",
            remedy="every segment has an offset and a size",
        )


def _kinds(segments: Sequence[object]) -> str:
    others = sorted({type(s).__name__ for s in segments if not isinstance(s, Segments)})
    return f"{len(segments)} entries" + (f", {' and '.join(others)} among them" if others else "")


def forget_engines() -> None:
    """Close all engines of `exchange`, before their groups are destroyed; not collective."""
    for engine in _ENGINES.values():
        engine.close()
    _ENGINES.clear()
