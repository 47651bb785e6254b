"""The demo: a small MoE language model trained through fusco, checked, and measured."""

from fusco.demo.output import DemoResult
from fusco.demo.run import run_demo

__all__ = ["DemoResult", "run_demo"]
