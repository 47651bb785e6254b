"""Elements of rows as vectors of the compiled loops: widened for sums, and rounded back.

numba has no half precision on the CPU, so bfloat16 rows come as uint16 and float16 rows as int16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from llvmlite import ir
from numba import types

Values = list[Any]
"""One or two vectors of floats, which together hold the elements of one vector."""


class Elements(ABC):
    """Elements of one dtype.

    Attributes:
        kind: as they are loaded and stored.
        wide: what sums are taken in.
        num_bytes: of one.
    """

    kind: ir.Type
    wide: ir.Type
    num_bytes: int

    @abstractmethod
    def widen(self, builder: Any, vector: Any) -> Values:
        """A vector of elements as floats."""

    @abstractmethod
    def narrow(self, builder: Any, values: Values) -> Any:
        """The inverse, rounded to nearest even."""


class _Plain(Elements):
    """Elements that are summed as they are."""

    def __init__(self, kind: ir.Type, num_bytes: int) -> None:
        self.kind = self.wide = kind
        self.num_bytes = num_bytes

    def widen(self, builder: Any, vector: Any) -> Values:
        return [vector]

    def narrow(self, builder: Any, values: Values) -> Any:
        return values[0]


class _Half(Elements):
    """float16."""

    kind, wide, num_bytes = ir.IntType(16), ir.FloatType(), 2

    def widen(self, builder: Any, vector: Any) -> Values:
        lanes = vector.type.count
        halves = builder.bitcast(vector, ir.VectorType(ir.HalfType(), lanes))
        return [builder.fpext(halves, ir.VectorType(self.wide, lanes))]

    def narrow(self, builder: Any, values: Values) -> Any:
        lanes = values[0].type.count
        halves = builder.fptrunc(values[0], ir.VectorType(ir.HalfType(), lanes))
        return builder.bitcast(halves, ir.VectorType(self.kind, lanes))


class _Brain(Elements):
    """bfloat16: the upper half of a float32.

    Two neighbours are taken as one word, which a shift and a mask make two floats: half of what
    widening 16-bit elements costs, and nothing is shuffled on the way back.
    """

    kind, wide, num_bytes = ir.IntType(16), ir.FloatType(), 2

    def widen(self, builder: Any, vector: Any) -> Values:
        lanes = vector.type.count
        if lanes == 1:
            words = builder.zext(vector, _words(1))
            return [self._floats(builder, builder.shl(words, _all(words, 16)))]
        words = builder.bitcast(vector, _words(lanes // 2))
        low, high = builder.shl(words, _all(words, 16)), builder.and_(words, _all(words, _HIGH))
        return [self._floats(builder, low), self._floats(builder, high)]

    def narrow(self, builder: Any, values: Values) -> Any:
        rounded = [self._round(builder, value) for value in values]
        low = builder.lshr(rounded[0], _all(rounded[0], 16))
        if len(values) == 1:
            return builder.trunc(low, ir.VectorType(self.kind, 1))
        words = builder.or_(low, builder.and_(rounded[1], _all(low, _HIGH)))
        return builder.bitcast(words, ir.VectorType(self.kind, 2 * words.type.count))

    def _floats(self, builder: Any, words: Any) -> Any:
        return builder.bitcast(words, ir.VectorType(self.wide, words.type.count))

    def _round(self, builder: Any, value: Any) -> Any:
        """Floats rounded to bfloat16, in the upper half of their bits."""
        bits = builder.bitcast(value, _words(value.type.count))
        odd = builder.and_(builder.lshr(bits, _all(bits, 16)), _all(bits, 1))
        rounded = builder.add(builder.add(bits, _all(bits, 0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.select(is_nan, _all(bits, _NAN), rounded)


_HIGH, _NAN = 0xFFFF0000, 0x7FC00000


def _words(lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(32), lanes)


def _all(vector: Any, value: int) -> Any:
    return ir.Constant(vector.type, [value] * vector.type.count)


OF_TYPE: dict[Any, Elements] = {
    types.uint16: _Brain(),
    types.int16: _Half(),
    types.float32: _Plain(ir.FloatType(), 4),
    types.float64: _Plain(ir.DoubleType(), 8),
}
"""By numba's type of the elements."""
