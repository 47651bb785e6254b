"""Compile every kernel, or load it from numba's cache on disk, before anybody waits for a rank."""

from __future__ import annotations

import numpy as np

from fusco.engines.cpu.kernels import lists, memory, places, plan, reduce, scatter, sliced, waiting

_ELEMENTS = (
    (np.uint16, np.float32),
    (np.int16, np.float32),
    (np.float32, np.float32),
    (np.float64, np.float64),
)


def warm_up() -> None:
    """Run every kernel on nothing, once for each dtype."""
    none, one, table, square = (np.zeros(n, dtype=np.int64) for n in (0, 1, (0, 1), (1, 1)))
    pair = np.zeros((2, 1), dtype=np.int64)
    flag, seconds = np.zeros(1, dtype=np.int32), np.zeros(1)
    at = flag.ctypes.data
    waiting.publish(at, waiting.look(at))
    waiting.meet(at, none, 0, 1, seconds)
    waiting.wait(none, 0, 1, seconds)
    waiting.share(at, none, 0, 1, seconds, none, 1, 0)
    memory.collect(none, 1, 0)
    plan.count_pairs(table, one, one, 1)
    # Views of two records, as all ranks' are, which numba compiles for apart.
    records, two, squares = (np.zeros(n, dtype=np.int64) for n in ((2, 8), 2, (2, 2)))
    plan.outline(table, records[:, 1:], one, two, two, one, 1, 0, 1, True)
    plan.read_arrival(none, none, square, square, 0, np.int64(0))
    column = records[:, 0]
    places.place_dispatch(one, two, squares, squares, column, column, two, two)
    places.place_combine(one, records[:, 1:6], column, two, two, True)
    places.combine_need(one, 1, 0)
    sliced.describe_sends(table, one, one, one, one, 0, 1, one, pair, pair, True)
    sliced.describe_relay(one, none, none, pair, 0, 1)
    sliced.list_held(table, 0, table)
    sliced.list_final(table, 0, np.zeros(2, dtype=np.int64), none, none, 1, 1)
    sliced.sort_partials(none, square, square, square, square, one, 0)
    scatter.scatter_rows(0, 0, one, none, none, table, none)
    scatter.scatter_values(0, none, none, none, none)
    scatter.ship_slots(one, one, none, square, square, 0, square)
    lists.scatter_lists(0, 0, none, one, none, none, none)
    scatter.gather_segments(0, none, none, 0)
    scatter.scatter_segments(0, 0, none, none)
    values = np.empty(0, dtype=np.float32)
    reduce.send_values(values, one, none, one, none, values)
    for element, wide in _ELEMENTS:
        rows, terms = np.empty(0, dtype=element), reduce.new_terms(1, wide)
        reduce.send_partials(rows, 1, 0, 0, one, none, one, none, 0, none, terms)
        lists.sum_lists(rows, 1, 0, 0, one, none, none, none, none, terms)
        reduce.sum_tokens(rows, 1, pair, 0, one, none, none, table, table, 0, terms)
