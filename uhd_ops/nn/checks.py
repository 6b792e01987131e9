# SPDX-License-Identifier: Apache-2.0
"""Checks that the parts of a block are what they seem, and that they can be copied."""

from __future__ import annotations

from typing import Any

from torch import nn

from uhd_ops._checks import is_dense
from uhd_ops._reclass import body_class
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.layers import LinearView, ScaleView


def require_exactly(module: nn.Module, name: str, classes: tuple[type, ...]) -> None:
    """Refuse a class other than these, or ours of them; a subclass may compute something else."""
    if type(module) in classes or (cls := body_class(module)) in classes:
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
        raise _other_forward(name)


def _other_forward(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name} must have the forward of its class, got one of its own")


def require_plain(
    module: nn.Module, name: str, tensors: tuple[str, ...] = ("weight", "bias")
) -> None:
    """Refuse a module whose weight something else computes.

    torch.nn.utils.prune, weight_norm and spectral_norm keep the class, but compute the weight from
    other parameters in a hook, which a copy would leave behind.
    """
    if "forward" in vars(module):
        raise _other_forward(name)
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
    if type(module) is nn.Dropout:
        return module.p
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
        self.names = {id(module): f"{spec.name}.{name}" for name, module in found if name}

    def attention(self, branch: AttentionSpec) -> None:
        width = branch.num_heads * branch.head_dim
        kv_width = (branch.num_kv_heads or branch.num_heads) * branch.head_dim
        rows = [3 * width] if len(branch.projections) == 1 else [width, kv_width, kv_width]
        for part, count in zip(branch.projections, rows, strict=True):
            self.linear(part, (count, self.dim))
        self.linear(branch.proj, (self.dim, width))
        if branch.gate is not None:
            self.linear(branch.gate, (width, self.dim))
        norms = branch.q_norm, branch.k_norm, branch.v_norm, branch.inner_norm
        self.plain(branch.norm, *norms, branch.post)

    def own_attention(self, branch: OwnAttentionSpec) -> None:
        for name in branch.linears:
            rows = {"qkv": 3 * self.dim, "proj": self.dim}.get(name)
            self.linear(getattr(branch.module, name), rows and (rows, self.dim))
        children = branch.module.named_children()
        others = [part for name, part in children if name not in branch.linears]
        self.plain(*others, branch.norm, branch.post)

    def mlp(self, branch: MlpSpec) -> None:
        self.linear(branch.fc1, (None, self.dim))
        hidden = branch.fc1.weight.shape[0]
        self.linear(branch.fc2, (self.dim, hidden))
        if branch.gate is not None:
            self.linear(branch.gate, (hidden, self.dim))
        self.plain(branch.norm, branch.patch_norm, branch.inner_norm, branch.post)

    def linear(self, part: Any, shape: tuple[int | None, int] | None = None) -> None:
        """Refuse a layer that is not plain, or whose weight has another shape; None is any."""
        whole = part.layer if isinstance(part, LinearView) else part
        if isinstance(part, LinearView) and part.shape is not None:
            self.linear(whole, part.shape)
        name = self.names.get(id(whole)) or self._unnamed(whole)
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
        if shape is None:
            return
        expected = shape[0] or part.weight.shape[0], shape[1]
        if part.weight.shape != expected:
            raise NotImplementedError(
                f"{name}.weight must have shape {expected}, got {tuple(part.weight.shape)}"
            )

    def plain(self, *parts: Any) -> None:
        """Refuse norms and LayerScales whose parameters something else computes."""
        for part in parts:
            if isinstance(part, ScaleView):
                part = part.owner if part.calls else None
            if isinstance(part, nn.Module):
                name = self.names.get(id(part)) or self._unnamed(part)
                require_plain(part, name, ("weight", "bias", "gamma", "lambda1"))

    def _unnamed(self, module: nn.Module) -> str:
        return f"a {type(module).__name__} of {self.name}"
