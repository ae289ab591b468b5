"""Second derivatives of operators whose backward pass is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def differentiable_gradients(
    function: Callable[..., Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor | None],
    gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, at the price of all that `function` holds.

    Args:
        function: Function of `tensors`, made of torch's own operators.
        tensors: Tensors to differentiate by; None where there is none.
        gradients: Gradients of the function's outputs.

    Returns:
        The gradient of each tensor, None for None.
    """
    with torch.enable_grad():
        # Views, because a tensor may be given twice.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        present = [view for view in views if view is not None]
        for view in present:
            if not view.requires_grad:
                view.requires_grad_()
        made = [
            (output, gradient)
            for output, gradient in zip(function(*views), gradients, strict=True)
            if output.requires_grad
        ]
        if not made:  # of no tokens
            return [None if view is None else torch.zeros_like(view) for view in views]
        outputs, of_outputs = zip(*made, strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, present, of_outputs, create_graph=True, materialize_grads=True
            )
        )
    return [None if view is None else next(found) for view in views]
