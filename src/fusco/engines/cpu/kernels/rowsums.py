"""Sums of rows, read once and written once, with everything between in registers.

Rows are summed block by block: all of a block's rows, then the next block. So a sum of any number
of rows needs no scratch memory, and rows that are needed next are asked for as this one goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fusco.engines.cpu.kernels.elements import OF_TYPE, Elements, Values

_BLOCK = 128
"""Bytes of each row at a time; a multiple of the cache line."""
_LINE = 64
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

ROW, LAST_ROW, PARTIAL, LAST_OF_NODE = 0, 1, 2, 4
"""What becomes of a term, see `sum_terms`; `LAST_OF_NODE` is added to the others."""


@intrinsic
def sum_rows(
    typing_context: Any,
    rows: Any,
    out: Any,
    address: Any,
    weight: Any,
    num_terms: Any,
    ahead: Any,
    num_ahead: Any,
    row_bytes: Any,
) -> Any:
    """Sum weighted rows: each product is rounded before it is added, the sum when it is complete.

    Args:
        rows: an array of the rows' elements; only its type means something.
        out: address of the result.
        address: where the int64 addresses of the rows lie.
        weight: where their weights lie, float64 for float64, else float32.
        num_terms: how many rows; for none the result is zeros.
        ahead: where the addresses of rows lie that are needed next.
        num_ahead: how many these are.
        row_bytes: of one row.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, out, address, weight, num_terms, ahead, num_ahead, row_bytes = args
        elements = OF_TYPE[rows.dtype]

        def block(begin: Any, lanes: int) -> Any:
            sums = _Sums(builder, elements, lanes)
            with cgutils.for_range(builder, num_terms) as term:
                vector = _load_row(builder, elements, address, term.index, begin, lanes)
                sums.add(
                    elements.widen(builder, vector),
                    _load_weight(builder, elements, weight, term.index),
                )
            return elements.narrow(builder, sums.values)

        _for_blocks(builder, elements, out, row_bytes, ahead, num_ahead, block)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 7), generate


@intrinsic
def sum_terms(
    typing_context: Any,
    rows: Any,
    out: Any,
    address: Any,
    weight: Any,
    kind: Any,
    num_terms: Any,
    ahead: Any,
    num_ahead: Any,
    row_bytes: Any,
) -> Any:
    """Sum a token's terms: rows of a rank, rounded, ranks of a node, rounded, and nodes.

    Args:
        rows: as in `sum_rows`, as is what is not said here.
        kind: where the int64 kinds of the terms lie: a weighted `ROW` of the rank whose rows come
            here, its `LAST_ROW`, or the `PARTIAL` of a rank, already summed and rounded.
            `LAST_OF_NODE` is added where another node follows.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, out, address, weight, kind, num_terms, ahead, num_ahead, row_bytes = args
        elements = OF_TYPE[rows.dtype]

        def rounded(values: Values) -> Values:
            return elements.widen(builder, elements.narrow(builder, values))

        def block(begin: Any, lanes: int) -> Any:
            rank, node, total = (_Sums(builder, elements, lanes) for _ in range(3))
            with cgutils.for_range(builder, num_terms) as term:
                vector = _load_row(builder, elements, address, term.index, begin, lanes)
                values = elements.widen(builder, vector)
                what = _load(builder, kind, term.index, _I64)
                with builder.if_else(_has(builder, what, PARTIAL)) as (is_partial, is_row):
                    with is_partial:
                        node.add(values)
                    with is_row:
                        rank.add(values, _load_weight(builder, elements, weight, term.index))
                        with builder.if_then(_has(builder, what, LAST_ROW)):
                            node.add(rounded(rank.values))
                            rank.clear()
                with builder.if_then(_has(builder, what, LAST_OF_NODE), likely=False):
                    total.add(rounded(node.values))
                    node.clear()
            total.add(rounded(node.values))
            return elements.narrow(builder, total.values)

        _for_blocks(builder, elements, out, row_bytes, ahead, num_ahead, block)
        return context.get_dummy_value()

    return types.void(rows, *[types.int64] * 8), generate


class _Sums:
    """Running sums, which the compiler keeps in registers."""

    def __init__(self, builder: Any, elements: Elements, lanes: int) -> None:
        self._builder = builder
        kind = ir.VectorType(elements.kind, lanes)
        zeros = elements.widen(builder, ir.Constant(kind, None))
        self._places = [cgutils.alloca_once(builder, zero.type) for zero in zeros]
        self.clear()

    @property
    def values(self) -> Values:
        return [self._builder.load(place) for place in self._places]

    def add(self, values: Values, weight: Any = None) -> None:
        builder = self._builder
        for place, value in zip(self._places, values, strict=True):
            if weight is not None:
                value = builder.fmul(_splat(builder, weight, value.type), value)
            builder.store(builder.fadd(builder.load(place), value), place)

    def clear(self) -> None:
        for place in self._places:
            self._builder.store(ir.Constant(place.type.pointee, None), place)


def _for_blocks(
    builder: Any,
    elements: Elements,
    out: Any,
    row_bytes: Any,
    ahead: Any,
    num_ahead: Any,
    block: Callable[[Any, int], Any],
) -> None:
    """Store `block(begin, lanes)` at every block of `out`, and element by element at the rest."""
    item = elements.num_bytes
    whole = builder.and_(row_bytes, _I64(-_BLOCK))
    # A line that is written whole, past the cache, need not be read first; it must be aligned.
    is_aligned = builder.icmp_unsigned("==", builder.urem(out, _I64(_LINE)), _I64(0))
    with builder.if_else(is_aligned) as (then, otherwise):
        for branch, alignment in ((then, _LINE), (otherwise, item)):
            with branch, _steps(builder, _I64(0), whole, _BLOCK) as begin:
                with cgutils.for_range(builder, num_ahead) as row:
                    at = builder.add(_load(builder, ahead, row.index, _I64), begin)
                    for line in range(0, _BLOCK, _LINE):
                        _prefetch(builder, builder.add(at, _I64(line)))
                vector = block(begin, _BLOCK // item)
                store = builder.store(
                    vector, _pointer(builder, builder.add(out, begin), vector.type), align=alignment
                )
                if alignment == _LINE:
                    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
    with _steps(builder, whole, row_bytes, item) as begin:
        vector = block(begin, 1)
        builder.store(vector, _pointer(builder, builder.add(out, begin), vector.type), align=item)


@contextmanager
def _steps(builder: Any, start: Any, stop: Any, step: int) -> Any:
    with cgutils.for_range_slice(builder, start, stop, _I64(step), _I64) as (begin, _):
        yield begin


def _load_row(
    builder: Any, elements: Elements, address: Any, term: Any, begin: Any, lanes: int
) -> Any:
    at = builder.add(_load(builder, address, term, _I64), begin)
    pointer = _pointer(builder, at, ir.VectorType(elements.kind, lanes))
    return builder.load(pointer, align=elements.num_bytes)


def _load_weight(builder: Any, elements: Elements, weight: Any, term: Any) -> Any:
    return _load(builder, weight, term, elements.wide)


def _load(builder: Any, address: Any, index: Any, kind: ir.Type) -> Any:
    return builder.load(builder.gep(_pointer(builder, address, kind), [index]))


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder: Any, scalar: Any, kind: ir.VectorType) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _I32(0))
    everywhere = ir.Constant(ir.VectorType(_I32, kind.count), None)
    return builder.shuffle_vector(first, undefined, everywhere)


def _has(builder: Any, value: Any, bit: int) -> Any:
    return builder.icmp_unsigned("!=", builder.and_(value, _I64(bit)), _I64(0))


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address, to be read soon."""
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), _I32(0), _I32(3), _I32(1)])
