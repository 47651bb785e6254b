"""Compile every kernel, or load it from numba's cache on disk, before anybody waits for a rank."""

from __future__ import annotations

import numpy as np

from fusco.engines.cpu.kernels import lists, memory, plan, reduce, scatter, sliced

_ELEMENTS = (
    (np.uint16, np.float32),
    (np.int16, np.float32),
    (np.float32, np.float32),
    (np.float64, np.float64),
)


def warm_up() -> None:
    """Run every kernel on nothing, once for each dtype."""
    none, one, table, square = (np.zeros(n, dtype=np.int64) for n in (0, 1, (0, 1), (1, 1)))
    flag = np.zeros(1, dtype=np.int32)
    memory.publish(flag.ctypes.data, 0)
    memory.spin(flag.ctypes.data, 0, 1)
    memory.first_behind(none, 0, 1)
    memory.collect(none, 1, 0)
    plan.count_pairs(table, one, one, 1)
    records = np.zeros((1, 8), dtype=np.int64)[:, 1:]
    plan.measure_traffic(records, one, one, 0, 1, True)
    plan.describe(table, one, one, one, 1, one, one, one, True)
    plan.read_arrival(none, none, square, square, 0, np.int64(0))
    twice = np.zeros((2, 1), dtype=np.int64)
    sliced.describe_sends(table, one, one, one, one, 0, 1, one, twice, twice, True)
    sliced.describe_relay(one, none, none, twice, 0, 1)
    sliced.list_held(table, 0, table)
    sliced.list_final(table, 0, np.zeros(2, dtype=np.int64), none, none, 1, 1)
    sliced.sort_partials(none, square, square, square, square, one, 0)
    scatter.scatter_rows(0, 0, one, none, none, table, none)
    scatter.scatter_values(0, none, none, none, none)
    scatter.ship_slots(one, one, none, none, none)
    lists.scatter_lists(0, 0, none, one, none, none, none)
    scatter.gather_segments(0, none, none, 0)
    scatter.scatter_segments(0, 0, none, none)
    values = np.empty(0, dtype=np.float32)
    reduce.send_values(values, one, none, one, none, values)
    for element, wide in _ELEMENTS:
        rows, terms = np.empty(0, dtype=element), reduce.new_terms(1, wide)
        reduce.send_partials(rows, 1, 0, one, none, one, none, terms)
        lists.sum_lists(rows, 1, 0, 0, one, none, none, none, none, terms)
        reduce.sum_tokens(rows, 1, none, none, 0, one, none, none, table, table, 0, terms)
