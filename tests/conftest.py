"""What all tests share: one pool of eight ranks, the engines, and how hypothesis searches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fusco.testing.ranks import RankPool

ENGINES = ("reference", "cpu", "two_level")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)

_COMMON = settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# The same examples every time; HYPOTHESIS_PROFILE=search draws others, and more of them.
settings.register_profile("fixed", _COMMON, derandomize=True, max_examples=40)
settings.register_profile("search", _COMMON, derandomize=False, max_examples=400)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Eight ranks that live as long as the session; tests take subgroups of them."""
    with RankPool(8, timeout_s=240.0) as ranks:
        yield ranks


@pytest.fixture(params=(*ENGINES, CUDA))
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine; tensors belong on the kind of device that `cases.device_of` says."""
    return str(request.param)


@pytest.fixture(params=ENGINES)
def host_engine(request: pytest.FixtureRequest) -> str:
    """Every engine that takes tensors of the CPU."""
    return str(request.param)


@pytest.fixture
def foreign_tmp_path(tmp_path: Path) -> Iterator[Path]:
    """It may be neither read nor written, not by root either, who is another user meanwhile."""
    nobody = 65534
    user = os.geteuid()
    tmp_path.chmod(0)
    os.seteuid(user or nobody)
    yield tmp_path
    os.seteuid(user)
    tmp_path.chmod(0o700)
