"""Plain torch and torch.distributed: the specification that every other engine is tested against."""

from fusco.engines.reference.engine import ReferenceEngine

__all__ = ["ReferenceEngine"]
