"""CUDA C++ kernels and what launches them; compiled when first needed (fusco.engines.cuda.jit)."""
