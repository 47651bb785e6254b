"""What the host fills in is what kernels read: every size, offset and number is the same in C++."""

from __future__ import annotations

import ctypes
import inspect

import pytest

from fusco.engines.cuda import jit
from fusco.engines.cuda.kernels import structs
from fusco.engines.cuda.kernels.structs import Verdict, declarations
from fusco.layout.records import Status

core = pytest.importorskip("cuda.core")
NVRTCError = core._utils.cuda_utils.NVRTCError

STRUCTURES = [
    each
    for _, each in inspect.getmembers(structs, inspect.isclass)
    if issubclass(each, ctypes.Structure) and each is not ctypes.Structure
]


def compile_source(source: str) -> None:
    options = core.ProgramOptions(arch="sm_90a", std="c++17", include_path=str(jit.source_folder()))
    program = core.Program(source, "c++", options)
    try:
        program.compile("cubin")
    finally:
        program.close()


def same(what: str, value: int) -> str:
    return f'static_assert({what} == {value}, "{what}");\n'


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda each: each.__name__)
def test_layout(structure: type[ctypes.Structure]) -> None:
    name = structure.__name__
    checks = same(f"sizeof({name})", ctypes.sizeof(structure))
    for member, *_ in structure._fields_:
        found = getattr(structure, member)
        # What the compiler's own offsetof is made of; NVRTC has no header for it.
        checks += same(f"__INTADDR__(&((({name}*)0)->{member}))", found.offset)
        checks += same(f"sizeof({name}::{member})", found.size)
    compile_source(declarations() + checks)


def test_a_wrong_size_is_noticed() -> None:
    with pytest.raises(NVRTCError, match="static assertion failed"):
        compile_source(declarations() + same("sizeof(World)", 1))


def test_verdicts_and_statuses() -> None:
    checks = '#include "agree.cuh"\n'
    for verdict in Verdict:
        checks += same(f"k{verdict.name.title()}", verdict)
    checks += same("kReady", Status.READY) + same("kBadInput", Status.BAD_INPUT)
    compile_source(declarations() + checks)
