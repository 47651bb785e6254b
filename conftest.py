"""Marks that depend on the machine."""

from __future__ import annotations

import pytest
import torch

from fusco.errors import InputError
from fusco.testing.namespaces import require_namespaces


def _why_no_cluster() -> str:
    try:
        require_namespaces("hosts", 2)
    except InputError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, and say so."""
    missing = {"cluster": _why_no_cluster()}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device, and torch finds none"
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
