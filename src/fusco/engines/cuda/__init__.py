"""GPUs that reach each other over NVLink: one kernel plans, one dispatches, one combines."""

from fusco.engines.cuda.engine import CudaEngine

__all__ = ["CudaEngine"]
