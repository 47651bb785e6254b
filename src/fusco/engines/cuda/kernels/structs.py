"""What the host and the kernels both read, declared once: C structs are generated from these."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64
from enum import IntEnum
from typing import Any

from fusco.layout.compact import BLOCK_ALIGNMENT, RECORD_HEAD
from fusco.layout.records import Field, Status

MAX_PARTS = 4
"""Tensors that one dispatch moves at once."""
REPORTS = 8
"""Places in which kernels report to the host, taken in turn."""
PIPELINES = 2
"""Pipelines in a block of a combine."""
SUMMERS = 7
"""Warps of a pipeline that sum; 7 divides 7168 elements of 2 bytes."""
PIECES = 16
"""Pieces of work that a pipeline has under way at the most."""
SENDERS = 2
"""Warps of a pipeline that send sums, each one at a time."""
COMBINE_WARPS = PIPELINES * (1 + SUMMERS + SENDERS)
"""In a block of a combine; with more than 20, kernels without bulk copies lack registers."""


class Verdict(IntEnum):
    """What a rank concluded from everybody's records; but for `LOST`, all conclude the same.

    `UNLIKE`: they did not ask for the same, or one cannot go on. `SHORT`: a block is too small.
    `STALE`: a rank has still to raise an earlier failure. `INVALID`: the plan was never made.
    `VOID`: this rank has still to raise one, and does not even ask the others.
    """

    GO = 0
    UNLIKE = 1
    SHORT = 2
    LOST = 3
    STALE = 4
    INVALID = 5
    VOID = 6


class World(ctypes.Structure):
    """What stays the same from call to call; addresses are of device memory, but the reports'."""

    _fields_ = (
        ("windows", c_uint64),
        ("heaps", c_uint64),
        ("state", c_uint64),
        ("failure", c_uint64),
        ("reports", c_uint64),
        ("wait_ns", c_uint64),
        ("sent_bytes", c_uint64),
        ("rank_of_expert", c_uint64),
        ("device_major", c_uint64),
        ("first_place", c_uint64),
        ("rank_order", c_uint64),
        ("node_of_rank", c_uint64),
        ("slot_base", c_uint64),
        ("totals", c_uint64),
        ("counted", c_uint64),
        ("timeout_ns", c_int64),
        ("record_bytes", c_int64),
        ("records_at", c_int64),
        ("record_flags_at", c_int64),
        ("arrival_flags_at", c_int64),
        ("shipments_at", c_int64),
        ("return_flags_at", c_int64),
        ("values_at", c_int64),
        ("returns_at", c_int64),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("num_experts", c_int32),
        ("num_local", c_int32),
        ("top_k", c_int32),
        ("max_tokens", c_int32),
        ("alignment", c_int32),
        ("num_returns", c_int32),
        ("static_rows", c_int32),
        ("unused", c_int32),
    )


class Call(ctypes.Structure):
    """This rank's record of an operation, and the number by which the host knows it."""

    _fields_ = (
        ("operation", c_int64),
        ("status", c_int64),
        ("plan", c_int64),
        ("signature", c_int64),
        ("base", c_int64),
        ("capacity", c_int64),
        ("chunk", c_int64),
        ("ticket", c_int64),
    )


class PlanArgs(ctypes.Structure):
    """Of kernels/plan.cu."""

    _fields_ = (
        ("topk_idx", c_uint64),
        ("pairs", c_uint64),
        ("links", c_uint64),
        ("tokens_per_expert", c_uint64),
        ("expert_offsets", c_uint64),
        ("row_bytes", c_int32 * MAX_PARTS),
        ("num_parts", c_int32),
        ("num_tokens", c_int32),
        ("chunk_tokens", c_int32),
        ("unused", c_int32),
    )


class DispatchArgs(ctypes.Structure):
    """Of kernels/dispatch.cu."""

    _fields_ = (
        ("rows", c_uint64 * MAX_PARTS),
        ("combined", c_uint64),
        ("weights", c_uint64),
        ("pairs", c_uint64),
        ("links", c_uint64),
        ("tokens_per_expert", c_uint64),
        ("expert_offsets", c_uint64),
        ("row_bytes", c_int32 * MAX_PARTS),
        ("num_parts", c_int32),
        ("num_tokens", c_int32),
        ("slot_bytes", c_int32),
        ("is_planned", c_int32),
    )


class CombineArgs(ctypes.Structure):
    """Of kernels/combine.cu."""

    _fields_ = (
        ("rows", c_uint64),
        ("out", c_uint64),
        ("row_weights", c_uint64),
        ("row_values", c_uint64),
        ("pair_values", c_uint64),
        ("pairs", c_uint64),
        ("links", c_uint64),
        ("returns_at", c_int64),
        ("row_bytes", c_int32),
        ("num_tokens", c_int32),
        ("part", c_int32),
        ("is_last", c_int32),
        ("piece_bytes", c_int32),
        ("num_slots", c_int32),
        ("num_returners", c_int32),
    )


class ReachArgs(ctypes.Structure):
    """Of kernels/reach.cu."""

    _fields_ = (
        ("there", c_uint64),
        ("here", c_uint64),
        ("num_vectors", c_int64),
        ("salt", c_uint32),
        ("is_read", c_int32),
    )


class State(ctypes.Structure):
    """What the kernels of one rank tell each other, in device memory."""

    _fields_ = (
        ("epoch", c_uint32),
        ("arrived", c_uint32),
        ("planned", c_uint32),
        ("finished", c_uint32),
        ("lost", c_uint32),
        ("pending", c_uint32),
        ("verdict", c_int32),
        ("lowest_id", c_int32),
        ("highest_id", c_int32),
        ("unused", c_uint32),
        ("num_rows", c_uint64),
        ("queue", c_uint32 * 2),
    )


class Failure(ctypes.Structure):
    """The first failure a kernel met, in host memory; a verdict other than GO says it is there."""

    _fields_ = (
        ("verdict", c_int64),
        ("epoch", c_int64),
        ("operation", c_int64),
        ("ticket", c_int64),
        ("awaited", c_int64),
        ("item", c_int64),
        ("need", c_int64),
    )


class Report(ctypes.Structure):
    """What the host waits for after a dispatch, in host memory."""

    _fields_ = (
        ("ticket", c_int64),
        ("verdict", c_int64),
        ("num_rows", c_int64),
        ("need", c_int64),
    )


COMBINE_SHARED_BYTES = 10240
"""Room in shared memory for what the warps of such a block tell each other."""
_STRUCTURES: tuple[Any, ...] = (
    World,
    Call,
    PlanArgs,
    DispatchArgs,
    CombineArgs,
    ReachArgs,
    State,
    Failure,
    Report,
)
_C_NAMES: dict[Any, str] = {
    c_int32: "int",
    c_uint32: "unsigned int",
    c_int64: "long long",
    c_uint64: "unsigned long long",
}


def declarations() -> str:
    """All of the above as C++."""
    constants = {
        "kMaxParts": MAX_PARTS,
        "kReports": REPORTS,
        "kRecordHead": RECORD_HEAD,
        "kChunk": RECORD_HEAD - 1,
        "kOperation": Field.OPERATION,
        "kStatus": Field.STATUS,
        "kPlan": Field.PLAN,
        "kSignature": Field.SIGNATURE,
        "kBase": Field.BASE,
        "kCapacity": Field.CAPACITY,
        "kBlockAlignment": BLOCK_ALIGNMENT,
        "kPipelines": PIPELINES,
        "kPieces": PIECES,
        "kSummers": SUMMERS,
        "kSenders": SENDERS,
        "kCombineWarps": COMBINE_WARPS,
        "kCombineSharedBytes": COMBINE_SHARED_BYTES,
        **{f"k{each.name.title()}": each for each in Verdict},
        "kReady": Status.READY,
        "kBadInput": Status.BAD_INPUT,
        "kPending": Status.PENDING,
    }
    lines = [f"enum : int {{ {name} = {int(value)} }};" for name, value in constants.items()]
    for structure in _STRUCTURES:
        lines.append(f"struct {structure.__name__} {{")
        lines += [f"  {_member(name, kind)};" for name, kind in structure._fields_]
        lines.append("};")
    return "\n".join(lines) + "\n"


def _member(name: str, kind: Any) -> str:
    if issubclass(kind, ctypes.Array):
        return f"{_C_NAMES[kind._type_]} {name}[{kind._length_}]"
    return f"{_C_NAMES[kind]} {name}"
