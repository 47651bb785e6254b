"""Small calls in C, where there is a C compiler; otherwise, and all others, in Python.

A small dispatch or combine takes a GPU less time than Python takes to ask for it. So calls whose
like `dispatch.py` and `combine.py` have served before are served by `module.c`, which does the same
and nothing else: plain tensors, one at a time, on the same stream as before.
"""

from fusco.engines.cuda.fast_path.build import load, problem
from fusco.engines.cuda.fast_path.calls import FastPath

__all__ = ["FastPath", "load", "problem"]
