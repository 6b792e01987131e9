# SPDX-License-Identifier: Apache-2.0
"""Checks that the parts of a block are what they seem, and that they can be copied."""

from __future__ import annotations

from typing import Any

from torch import nn

from uhd_ops._reclass import body_class
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.layers import LinearView, ScaleView, is_dense


def require_exactly(module: nn.Module, name: str, classes: tuple[type, ...]) -> None:
    """Refuse a class other than these, or ours of them; a subclass may compute something else."""
    cls = body_class(module)
    if cls in classes:
        return
    known = list(dict.fromkeys(known.__name__ for known in classes))
    got = cls.__name__
    if got in known:  # somebody else's class of that name
        got = f"{cls.__module__}.{cls.__qualname__}"
        known = [f"{known.__module__}.{known.__qualname__}" for known in classes]
    raise NotImplementedError(f"{name} must be {' or '.join(known)}, got {got}")


def require_own_forward(module: nn.Module, name: str) -> None:
    """Refuse a forward set on the instance: it hides that of the class, which is understood."""
    if "forward" in vars(module):
        raise NotImplementedError(f"{name} must have the forward of its class, got one of its own")


def require_plain(
    module: nn.Module, name: str, tensors: tuple[str, ...] = ("weight", "bias")
) -> None:
    """Refuse a module whose weight something else computes.

    torch.nn.utils.prune, weight_norm and spectral_norm keep the class, but compute the weight from
    other parameters in a hook, which a copy would leave behind.
    """
    require_own_forward(module, name)
    other = (module._parameters.keys() | module._buffers.keys()) - set(tensors)
    if other:
        raise NotImplementedError(
            f"{name} must hold its weight as a plain parameter, got {', '.join(sorted(other))}"
        )


def optional(module: nn.Module | None, name: str, classes: tuple[type, ...]) -> nn.Module | None:
    """Return a module of one of these classes; None for None and Identity."""
    if module is None or type(module) is nn.Identity:
        return None
    require_exactly(module, name, classes)
    return module


def dropout(module: nn.Module, name: str) -> float:
    """Return the probability of a Dropout, 0 for an Identity."""
    require_exactly(module, name, (nn.Dropout, nn.Identity))
    return getattr(module, "p", 0.0)


def check_reusable(spec: BlockSpec) -> BlockSpec:
    """Refuse parts that cannot be copied, or do not fit together.

    A compressor takes weights as they are, so linear layers must be ``torch.nn.Linear`` itself and
    hold a plain weight; it could not keep what an adapter, a quantisation or a parametrization
    makes of them.

    Args:
        spec: What a family read.

    Returns:
        ``spec`` itself.

    Raises:
        NotImplementedError: A part cannot be copied, or a weight has another shape than expected.
    """
    check = _Reuse(spec)
    for branch in spec.attentions:
        (check.attention if isinstance(branch, AttentionSpec) else check.own_attention)(branch)
    for branch in spec.mlps:
        check.mlp(branch)
    return spec


class _Reuse:
    """The checks of one block, whose parts have the names that they have there."""

    def __init__(self, spec: BlockSpec) -> None:
        self.dim, self.name = spec.dim, spec.name
        found = () if spec.block is None else spec.block.named_modules()
        self.names = {id(module): name for name, module in found}

    def attention(self, branch: AttentionSpec) -> None:
        width = branch.num_heads * branch.head_dim
        kv_width = (branch.num_kv_heads or branch.num_heads) * branch.head_dim
        rows = [3 * width] if len(branch.projections) == 1 else [width, kv_width, kv_width]
        for part, count in zip(branch.projections, rows, strict=True):
            self.linear(part, (count, self.dim))
        self.linear(branch.proj, (self.dim, width))
        if branch.gate is not None:
            self.linear(branch.gate, (width, self.dim))
        for part in ("norm", "q_norm", "k_norm", "v_norm", "inner_norm", "post"):
            self.plain(getattr(branch, part))

    def own_attention(self, branch: OwnAttentionSpec) -> None:
        for name in branch.linears:
            rows = {"qkv": 3 * self.dim, "proj": self.dim}.get(name)
            self.linear(getattr(branch.module, name), rows and (rows, self.dim))
        for name, part in branch.module.named_children():
            if name not in branch.linears:
                self.plain(part)
        self.plain(branch.norm)
        self.plain(branch.post)

    def mlp(self, branch: MlpSpec) -> None:
        self.linear(branch.fc1)
        hidden = branch.fc1.weight.shape[0]
        self.linear(branch.fc1, (hidden, self.dim))
        self.linear(branch.fc2, (self.dim, hidden))
        if branch.gate is not None:
            self.linear(branch.gate, (hidden, self.dim))
        for part in ("norm", "patch_norm", "inner_norm", "post"):
            self.plain(getattr(branch, part))

    def linear(self, part: Any, shape: tuple[int, int] | None = None) -> None:
        """Refuse a layer that is not plain, or whose weight has another shape."""
        whole = part.layer if isinstance(part, LinearView) else part
        if isinstance(part, LinearView) and part.shape is not None:
            self.linear(whole, part.shape)
        name = self._name_of(whole)
        if hasattr(whole, "linear"):  # Gemma 4 clamps around its linear layers
            part = whole = whole.linear
            name += ".linear"
        require_exactly(whole, name, (nn.Linear,))
        require_plain(whole, name)
        if not whole.weight.is_floating_point():  # quantised in place, say
            raise NotImplementedError(
                f"{name}.weight must have a floating dtype, got {whole.weight.dtype}"
            )
        if not is_dense(whole.weight):
            raise NotImplementedError(
                f"{name}.weight must be a plain tensor, got {type(whole.weight).__name__}"
            )
        if shape is not None and part.weight.shape != shape:
            raise NotImplementedError(
                f"{name}.weight must have shape {tuple(shape)}, got {tuple(part.weight.shape)}"
            )

    def plain(self, part: Any) -> None:
        """Refuse a norm or a LayerScale whose parameters something else computes."""
        if isinstance(part, ScaleView):
            part = part.owner if part.calls else None
        if isinstance(part, nn.Module):
            require_plain(part, self._name_of(part), ("weight", "bias", "gamma", "lambda1"))

    def _name_of(self, module: nn.Module) -> str:
        inner = self.names.get(id(module))
        return f"{self.name}.{inner}" if inner else f"a {type(module).__name__} of {self.name}"
