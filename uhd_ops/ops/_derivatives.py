# SPDX-License-Identifier: Apache-2.0
"""What the operators do not differentiate, said aloud."""

import torch


def refuse_second_derivative(name: str, public: str | None = None) -> None:
    """Make differentiating ``uhd_ops::_<name>_backward`` an error; torch would give no gradient.

    Only the second backward pass raises: ``create_graph=True`` alone is fine.

    Args:
        name: Name of the operator.
        public: Public function that calls it, where that has another name.
    """
    public = public or name

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"uhd_ops.{public} has no second derivative; uhd_ops.reference.{public} has one"
        )

    torch.library.register_autograd(f"uhd_ops::_{name}_backward", backward)
