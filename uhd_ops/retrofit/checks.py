# SPDX-License-Identifier: Apache-2.0
"""Checks that the parts of a block are what they seem; shared by all families."""

from __future__ import annotations

from torch import nn

from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec


def require_exactly(module: nn.Module, name: str, classes: tuple[type, ...]) -> None:
    """Refuse a class other than these; a subclass may compute something else."""
    if type(module) not in classes:
        known = " or ".join(dict.fromkeys(cls.__name__ for cls in classes))
        raise NotImplementedError(f"{name} must be {known}, got {type(module).__name__}")


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


def linear(module: nn.Module, name: str) -> nn.Linear:
    """Return a plain Linear."""
    require_exactly(module, name, (nn.Linear,))
    require_plain(module, name)
    if not module.weight.is_floating_point():  # quantised in place, say
        raise NotImplementedError(
            f"{name}.weight must have a floating dtype, got {module.weight.dtype}"
        )
    return module


def optional(module: nn.Module | None, name: str, classes: tuple[type, ...]) -> nn.Module | None:
    """Return a plain module of one of these classes; None for None and Identity."""
    if module is None or type(module) is nn.Identity:
        return None
    require_exactly(module, name, classes)
    require_plain(module, name)
    return module


def dropout(module: nn.Module, name: str) -> float:
    """Return the probability of a Dropout, 0 for an Identity."""
    require_exactly(module, name, (nn.Dropout, nn.Identity))
    return getattr(module, "p", 0.0)


def check_shapes(host: BlockSpec, prefix: str = "block") -> BlockSpec:
    """Check that the weights of all branches fit together."""
    for branch in host.attentions:
        if isinstance(branch, AttentionSpec):
            _check_attention(branch, host.dim, f"{prefix}.attn")
        else:
            _check_own_attention(branch.module, host.dim, f"{prefix}.attn")
    for branch in host.mlps:
        _check_mlp(branch, host.dim, f"{prefix}.mlp")
    return host


def _check_attention(branch: AttentionSpec, dim: int, name: str) -> None:
    width = branch.num_heads * branch.head_dim
    kv_width = (branch.num_kv_heads or branch.num_heads) * branch.head_dim
    if len(branch.projections) == 1:
        expected = {"qkv": (branch.projections[0], (3 * width, dim))}
    else:
        q, k, v = branch.projections
        expected = {
            "q_proj": (q, (width, dim)),
            "k_proj": (k, (kv_width, dim)),
            "v_proj": (v, (kv_width, dim)),
        }
    expected["proj"] = (branch.proj, (dim, width))
    _check_weights(expected, name)


def _check_own_attention(module: nn.Module, dim: int, name: str) -> None:
    _check_weights({"qkv": (module.qkv, (3 * dim, dim)), "proj": (module.proj, (dim, dim))}, name)


def _check_mlp(branch: MlpSpec, dim: int, name: str) -> None:
    hidden = branch.fc1.weight.shape[0]
    expected = {"fc1": (branch.fc1, (hidden, dim)), "fc2": (branch.fc2, (dim, hidden))}
    if branch.gate is not None:
        expected["gate"] = (branch.gate, (hidden, dim))
    _check_weights(expected, name)


def _check_weights(expected: dict[str, tuple[nn.Module, tuple[int, int]]], name: str) -> None:
    for part, (module, shape) in expected.items():
        weight = getattr(module, "linear", module).weight  # Gemma 4 clamps around its linear layers
        if weight.shape != shape:
            raise NotImplementedError(
                f"{name}.{part}.weight must have shape {shape}, got {tuple(weight.shape)}"
            )
