# SPDX-License-Identifier: Apache-2.0
"""Modules of somebody else: what they are, views and copies of their parts, and other methods.

They change their class in place: parameters, names and hooks stay, methods are replaced. Both the
retrofit and the integrations do so; why this and not a wrapper or a hook:
docs/adr/0003-retrofit-mechanism.md.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import is_dense, is_plain
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.ops.tile_weight import tile_vector

Model = TypeVar("Model", bound=nn.Module)

# ---- classes that change in place ----------------------------------------------------------------


class Mixed:
    """Base of the mixins that stand in front of the class of a module that the user has.

    Attributes:
        prefix: What the name of a class made from this mixin begins with. None where a library
            finds things out by the names of classes, as transformers does: which outputs a model
            records, what ``config.json`` calls it, which modules no device map may split.
        mixin: This class, in the classes made from it.
        body_class: The class that the module had, in the classes made from it.
    """

    prefix: str = ""
    mixin: type[Mixed]
    body_class: type

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if not is_mixed(type(self)):  # somebody extended ours: that is theirs
            return super().__reduce_ex__(protocol)
        # The class is made at run time, so it is pickled by those that it is made of.
        _, _, *state = super().__reduce_ex__(max(int(protocol), 2))
        mixins, cls = [], type(self)
        while is_mixed(cls):  # a block between two merges has two mixins
            mixins.append(cls.mixin)
            cls = cls.body_class
        return _new, (tuple(mixins), cls), *state


@functools.cache
def mixed(mixin: type[Mixed], cls: type) -> type:
    """Return ``cls`` with the methods of ``mixin`` in front of its own."""
    name = f"{mixin.prefix}{cls.__name__}"
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__.removesuffix(cls.__name__) + name,
        "__doc__": cls.__doc__,
        "mixin": mixin,
        "body_class": cls,
    }
    return type(name, (mixin, cls), namespace)


def is_mixed(cls: type) -> bool:
    """Whether :func:`mixed` made this very class, and not one that it extends."""
    return "body_class" in vars(cls)


def body_class(module: object) -> type:
    """The class of a module without our mixins: the one whose forward it runs."""
    cls = type(module)
    while hasattr(cls, "body_class"):
        cls = cls.body_class
    return cls


def _new(mixins: tuple[type[Mixed], ...], cls: type) -> Any:
    """Make an empty module, for pickle and copy; the first mixin stands in front."""
    for mixin in reversed(mixins):
        cls = mixed(mixin, cls)
    return cls.__new__(cls)


# ---- parts of a block: views of them, and copies -------------------------------------------------


class PartView(nn.Module):
    """A part of a module of the host, read there whenever it is used.

    It holds no parameters of its own, so what was trained, loaded or replaced since takes effect,
    and gradients arrive where the parameters are.
    """

    def tensors(self) -> list[torch.Tensor]:
        """The parameters that it reads."""
        raise NotImplementedError

    def clone(self) -> nn.Module:
        """Return an ordinary module with copies of the parameters."""
        raise NotImplementedError


class LinearView(PartView):
    """Rows or columns of a linear layer, or one with its bias elsewhere, as a layer of its own.

    A layer that is not plain (adapted, quantised, hooked) is called as a whole, with zeros in the
    other columns, and what it returns in the rows is taken.

    Args:
        layer: The layer; its weight is ``(O, I)``.
        rows: Its outputs, first and after the last; None for all.
        columns: Its inputs; likewise.
        bias: Whether to add the layer's own bias; or a function that returns another one.
        calls: Whether to call a layer that is not plain. If not, its weight is read all the same,
            as hosts do that add a bias of their own.
        shape: The shape that the weight of ``layer`` should have, where that is known.
    """

    def __init__(
        self,
        layer: nn.Module,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        bias: bool | Callable[[], torch.Tensor | None] = True,
        *,
        calls: bool = True,
        shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.calls, self.shape = layer, calls, shape
        self.rows, self.columns, self.source_of_bias = rows, columns, bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the part."""
        weight = self.layer.weight
        weight = weight if self.rows is None else weight[slice(*self.rows)]
        return weight if self.columns is None else weight[:, slice(*self.columns)]

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the part, if any."""
        if callable(self.source_of_bias):
            return self.source_of_bias()
        bias = self.layer.bias if self.source_of_bias else None
        return bias if bias is None or self.rows is None else bias[slice(*self.rows)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if not self.calls or is_plain(self.layer, nn.Linear):
            return functional.linear(x, self.weight, self.bias)
        if self.columns is not None:
            first, end = self.columns
            x = functional.pad(x, (first, self.layer.in_features - end))
        out = self._call(x)
        if self.source_of_bias is True:
            return out
        if self.layer.bias is not None:
            out = out - self._call(torch.zeros_like(x[..., :1, :]))
        bias = self.bias
        return out if bias is None else out + bias

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out if self.rows is None else out[..., slice(*self.rows)]

    def clone(self) -> nn.Module:
        """Return a Linear."""
        return linear_of(self.weight, self.bias)


class WeightView(PartView):
    """A linear layer whose parameters a module holds by names of its own.

    ``torch.nn.MultiheadAttention`` holds ``in_proj_weight`` and ``in_proj_bias``, for instance.

    Args:
        owner: The module.
        weight: Its attribute, ``(O, I)``.
        bias: Its attribute, ``(O,)``, which may be None; or None for no bias.
    """

    def __init__(self, owner: nn.Module, weight: str, bias: str | None = None) -> None:
        super().__init__()
        self.owner, self.names = owner, (weight, bias)

    @property
    def weight(self) -> torch.Tensor:
        """The weight."""
        return getattr(self.owner, self.names[0])

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, if any."""
        return None if self.names[1] is None else getattr(self.owner, self.names[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., I)`` to ``(..., O)``."""
        return functional.linear(x, self.weight, self.bias)

    def clone(self) -> nn.Module:
        """Return a Linear."""
        return linear_of(self.weight, self.bias)


class ScaleView(PartView):
    """LayerScale factors that a module of the host holds.

    Args:
        owner: The module that holds the factors ``(C,)``.
        name: Its attribute.
        calls: Whether the module is a LayerScale, and is called.
    """

    def __init__(self, owner: nn.Module, name: str, *, calls: bool) -> None:
        super().__init__()
        self.owner, self.name, self.calls = owner, name, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``(..., C)``."""
        return self.owner(x) if self.calls else x * getattr(self.owner, self.name)

    def clone(self) -> nn.Module:
        """Return a LayerScale."""
        return LayerScale(getattr(self.owner, self.name))


def clone_module(module: nn.Module | torch.Tensor | None) -> nn.Module:
    """Copy a module with its parameters, buffers and submodules.

    None becomes an Identity, and a tensor, which are the factors of a LayerScale, a LayerScale.

    The parameters are new and trainable. Unlike ``copy.deepcopy``, it leaves the hooks behind: what
    somebody observes in the host is not what the compressor does. Likewise ``module.compile()``,
    which leaves a function in the module that reads the weights of that one.
    """
    if module is None:
        return nn.Identity()
    if isinstance(module, torch.Tensor):
        return LayerScale(module)
    if isinstance(module, PartView):
        return module.clone()
    clone = type(module).__new__(type(module))
    nn.Module.__init__(clone)
    vars(clone).update(vars(module) | vars(clone))
    vars(clone).pop("_compiled_call_impl", None)
    clone.training = module.training
    for name, parameter in module._parameters.items():
        clone.register_parameter(name, _parameter(parameter))
    for name, buffer in module._buffers.items():
        copied = None if buffer is None else buffer.detach().clone()
        clone.register_buffer(name, copied, name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        clone.add_module(name, None if child is None else clone_module(child))
    return clone


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a Linear with copies of ``weight (O, I)`` and ``bias (O,)``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = _parameter(weight)
    linear.register_parameter("bias", _parameter(bias))
    return linear


def tile_norm(norm: nn.Module | None, patches: int) -> nn.Module:
    """Return a norm over ``patches * C`` channels that repeats the affine map of ``norm`` over C.

    LayerNorms become ``torch.nn.LayerNorm``; any other class with a ``weight`` over C, such as the
    RMSNorms, is copied with its weight repeated. None is Identity.
    """
    if norm is None:
        return nn.Identity()
    if isinstance(norm, nn.LayerNorm):
        tiled = nn.LayerNorm(
            patches * norm.normalized_shape[0],
            norm.eps,
            elementwise_affine=norm.weight is not None,
            bias=norm.bias is not None,
            device="meta",
        )
    else:
        tiled = clone_module(norm)
        if hasattr(norm, "normalized_shape"):
            tiled.normalized_shape = (patches * norm.normalized_shape[0],)
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            parameter = nn.Parameter(tile_vector(parameter.detach(), patches))
        tiled.register_parameter(name, parameter)
    return tiled


def _parameter(tensor: torch.Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())


class BlockLinear(nn.Module):
    """One linear layer for each patch of a window: patch p has a block of its own.

    Args:
        weight: ``(f², O, I)``; copied.
        bias: ``(f², O)``, or ``(O,)`` with ``summed``, or None; copied.
        summed: Whether to sum the products over the patches.

    Shape:
        x: ``(..., f², I)``.
        Result: ``(..., f², O)``, or ``(..., O)`` with ``summed``.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, summed: bool = False
    ) -> None:
        super().__init__()
        self.summed = summed
        self.weight = _parameter(weight)
        self.register_parameter("bias", _parameter(bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply block p to patch p."""
        out = torch.einsum("...pi,poi->...o" if self.summed else "...pi,poi->...po", x, self.weight)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, summed={self.summed}"


class Limits(nn.Module):
    """Clamp the input and the output of a layer; the limits are copied, as buffers.

    Args:
        input_min: The least input, a number.
        input_max: The greatest.
        output_min: The least output.
        output_max: The greatest.
        enabled: Whether to clamp.
    """

    def __init__(
        self,
        input_min: torch.Tensor,
        input_max: torch.Tensor,
        output_min: torch.Tensor,
        output_max: torch.Tensor,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.enabled = enabled
        self.register_buffer("input_min", input_min.detach().clone())
        self.register_buffer("input_max", input_max.detach().clone())
        self.register_buffer("output_min", output_min.detach().clone())
        self.register_buffer("output_max", output_max.detach().clone())

    def forward(
        self, x: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return ``layer(x)`` with both clamped."""
        if not self.enabled:
            return layer(x)
        out = layer(x.clamp(self.input_min, self.input_max))
        return out.clamp(self.output_min, self.output_max)

    def extra_repr(self) -> str:
        """Show whether it clamps."""
        return f"enabled={self.enabled}"


class LayerScale(nn.Module):
    """Multiply channel c by ``gamma[c]``; ``gamma`` is copied."""

    def __init__(self, gamma: torch.Tensor) -> None:
        super().__init__()
        self.gamma = _parameter(gamma)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``(..., C)``."""
        return x * self.gamma


# ---- what the parts of a block are ---------------------------------------------------------------


def present(library: ModuleType, *names: str) -> tuple[type, ...]:
    """Return the classes of these names that this version of a library has."""
    return tuple(getattr(library, name) for name in names if hasattr(library, name))


def require_version(library: str, oldest: str, what: str) -> None:
    """Refuse what is of an imported library that is older than this."""
    if torch.compiler.is_compiling():  # it was refused before, and strings take no trace
        return
    version = sys.modules[library].__version__
    # The numbers in front: "1.0.32.dev0" is 1.0.32.
    numbers = list(map(int, itertools.takewhile(str.isdigit, version.split("."))))
    if numbers < list(map(int, oldest.split("."))):
        raise NotImplementedError(f"{what} needs {library} >= {oldest}, got {library} {version}")


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


def blocks_at(vit: nn.Module, name: str) -> nn.ModuleList | nn.Sequential:
    """Return the list of blocks with this dotted name; refuse a name that is of none."""
    try:
        found = vit.get_submodule(name)
    except AttributeError:
        found = None
    if isinstance(found, (nn.ModuleList, nn.Sequential)):
        return found
    lists = [repr(path) for path, part in vit.named_modules() if isinstance(part, nn.ModuleList)]
    raise ValueError(
        f"blocks must be the dotted name of a ModuleList or Sequential in {type(vit).__name__}"
        f"{', which has ' * bool(lists)}{', '.join(lists)}; got {name!r}, which is "
        f"{'nothing' if found is None else f'a {type(found).__name__}'} there"
    )


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
        if isinstance(part, WeightView):
            name = f"{self._unnamed(part.owner)}: {part.names[0]}"
        else:
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
