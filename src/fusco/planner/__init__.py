"""Planning: pure functions from routing and topology to a `SegmentPlan`.

topk_idx -> sort_pairs -> count_pairs -> (exchange of counts) -> plan_sends
-> (exchange of slot lists) -> assemble
"""

from fusco.planner.balance import assign_forwarders, choose_forwarders
from fusco.planner.cluster import plan_cluster
from fusco.planner.compact import plan_compact
from fusco.planner.counts import SortedPairs, count_pairs, sort_pairs
from fusco.planner.plan import (
    Sends,
    assemble,
    assemble_rows,
    expert_layout,
    plan_relay,
    plan_sends,
)
from fusco.planner.sorting import offsets
from fusco.planner.traffic import HopSizes, Traffic, measure_traffic

__all__ = [
    "HopSizes",
    "Sends",
    "SortedPairs",
    "Traffic",
    "assemble",
    "assemble_rows",
    "assign_forwarders",
    "choose_forwarders",
    "count_pairs",
    "expert_layout",
    "measure_traffic",
    "offsets",
    "plan_cluster",
    "plan_compact",
    "plan_relay",
    "plan_sends",
    "sort_pairs",
]
