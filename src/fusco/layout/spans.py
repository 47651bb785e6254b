"""Memory that tensors and arrays can be made of."""

from __future__ import annotations

from fusco.layout.heap import Block, Heap


class Region:
    """Memory that a tensor or an array can be made of; these keep it.

    Args:
        address: where it is.
        shape: of the tensor.
        kind: the type of its elements, as the interface names it.
    """

    __slots__ = ("__array_interface__", "__cuda_array_interface__", "__weakref__")

    def __init__(self, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = self.__array_interface__ = {
            "version": 3,
            "typestr": kind,
            "shape": shape,
            "data": (address, False),
        }


class Span(Region):
    """A block of a heap, to which it returns when the last tensor or array over it is gone.

    Args:
        address, shape, kind: see `Region`.
        block: what returns.
        heap: where it returns to.
        memory: whose part it is, kept until then.
    """

    __slots__ = ("_block", "_heap", "_memory")

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        kind: str,
        block: Block,
        heap: Heap,
        memory: object,
    ) -> None:
        super().__init__(address, shape, kind)
        self._block, self._heap, self._memory = block, heap, memory

    def __del__(self) -> None:
        self._heap.release(self._block)
