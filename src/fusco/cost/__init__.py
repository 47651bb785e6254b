"""Cost: pure functions from what a plan moves, and the hardware, to bytes a link and time."""

from fusco.cost.model import Cost, Hardware, predict

__all__ = ["Cost", "Hardware", "predict"]
