"""Nodes joined by a network: rows travel once to a node, in slices; a forwarder spreads them."""

from fusco.engines.two_level.engine import TwoLevelEngine

__all__ = ["TwoLevelEngine"]
