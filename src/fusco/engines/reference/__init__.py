"""Plain torch and torch.distributed: the specification that other engines are tested against."""

from fusco.engines.reference.engine import ReferenceEngine

__all__ = ["ReferenceEngine"]
