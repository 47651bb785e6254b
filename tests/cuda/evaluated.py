"""What the headers of the kernels compute, as the compiler finds out; nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fusco.engines.cuda import jit
from fusco.engines.cuda.kernels.structs import declarations

core = pytest.importorskip("cuda.core")
CompileError = core._utils.cuda_utils.NVRTCError


def expect(header: str, checks: Sequence[tuple[str, int]], setup: str = "") -> None:
    """Each expression is the number.

    A call of what is nowhere defined does not link, unless it is known never to be reached.
    Functions that are not constexpr have no static_assert.
    """
    declared = "".join(f"__device__ void differs_{i}();\n" for i in range(len(checks)))
    tests = "".join(
        f"  if (static_cast<i64>({what}) != {value}ll) differs_{i}();  // {what}\n"
        for i, (what, value) in enumerate(checks)
    )
    source = f'{declarations()}#include "{header}"\n{declared}__global__ void check() {{\n'
    options = core.ProgramOptions(arch="sm_90a", std="c++17", include_path=str(jit.source_folder()))
    program = core.Program(f"{source}{setup}{tests}}}\n", "c++", options)
    try:
        program.compile("cubin")
    finally:
        program.close()
