"""What remains local of combine's backward: the product rule, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20


def weigh_gradients(
    grads: tuple[Tensor, ...], rows: tuple[Tensor, ...], row_weights: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of rows and row weights from the gradient of every row's sum.

    Args:
        grads: for each combined tensor `[R, ...]`, the gradient of its sum, 0 on padding; of any
            strides.
        rows: what was combined, `[R, ...]`, of any strides.
        row_weights: float32 `[R]`; None: the sum was plain.

    Returns:
        gradients of `rows`, weight times gradient in fp32 (fp64 for fp64), rounded once; and of
        the weights, float32 `[R]`, the dot product of gradient and row over all tensors.
    """
    num_rows = grads[0].shape[0]
    grad_weights = torch.zeros(num_rows, dtype=torch.float32, device=grads[0].device)
    if row_weights is None:
        return grads, grad_weights
    weighted = tuple(grad.new_empty(grad.shape) for grad in grads)
    for grad, row, out in zip(grads, rows, weighted, strict=True):
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        shape = (num_rows, grad.shape[1:].numel())
        flat_grad, flat_row, flat_out = (each.reshape(shape) for each in (grad, row, out))
        # Chunks bound the wide temporaries.
        step = max(1, _CHUNK_ELEMENTS // max(1, shape[1]))
        for begin in range(0, num_rows, step):
            part = slice(begin, begin + step)
            wide_grad = flat_grad[part].to(wide)
            flat_out[part] = wide_grad * row_weights[part, None].to(wide)
            grad_weights[part] += (wide_grad * flat_row[part].to(wide)).sum(dim=1).to(torch.float32)
    return weighted, grad_weights
