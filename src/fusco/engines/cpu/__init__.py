"""Shared-memory windows between the ranks of one host."""

from fusco.engines.cpu.engine import CpuEngine

__all__ = ["CpuEngine"]
