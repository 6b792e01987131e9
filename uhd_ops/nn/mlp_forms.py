# SPDX-License-Identifier: Apache-2.0
"""The MLP branch of a transformer block on whole windows, in three weight forms.

Every tied MLP is a block MLP, and every block MLP is a dense one; the conversions between the forms
of :func:`uhd_ops.pixel_unshuffle_mlp` are exact. The way back exists only for weights that have the
structure of the smaller form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.nn import functional

from uhd_ops._checks import is_plain
from uhd_ops.grids import Grids
from uhd_ops.nn.attention import drop_views
from uhd_ops.nn.block_spec import MlpSpec
from uhd_ops.nn.modules import BlockLinear, clone_module, linear_of, tile_norm
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.pixel_unshuffle_mlp import ACTIVATIONS, mlp_form, pixel_unshuffle_mlp
from uhd_ops.ops.tile_weight import tile_average, tile_block_diagonal, tile_vector
from uhd_ops.ops.window_mean import window_mean

Form = Literal["dense", "block", "tied"]
FORMS: tuple[Form, ...] = get_args(Form)


__all__ = ["MlpWeights", "convert_mlp", "form_of"]


class MlpWeights(NamedTuple):
    """Weights of one MLP in any form; the biases may be None.

    Attributes:
        fc1_weight: ``(J, f²C)`` dense, ``(f², I, C)`` block, ``(I, C)`` tied.
        fc1_bias: ``(J,)`` dense, ``(f², I)`` block, ``(I,)`` tied.
        fc2_weight: ``(C_out, J)`` dense, ``(f², C_out, I)`` block, ``(C_out, I)`` tied.
        fc2_bias: ``(C_out,)`` in every form.
    """

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


def form_of(weights: MlpWeights, *, factor: int = 2, channels: int | None = None) -> str:
    """Name the form of ``weights``: ``"dense"``, ``"block"`` or ``"tied"``.

    Args:
        weights: Weights in any form.
        factor: Side f of a window, in tokens.
        channels: C, the channels of one token; None means C_out, as with a residual. It tells
            dense ``(J, f²C)`` from tied ``(I, C)``. With ``factor=1`` both are dense.

    Returns:
        The name.

    Raises:
        ValueError: The shapes are those of no weight form.

    Example:
        >>> form_of(MlpWeights(torch.randn(12, 4), None, torch.randn(4, 12), None))
        'tied'
    """
    channels = weights.fc2_weight.shape[-2] if channels is None else channels
    form = mlp_form(weights.fc1_weight, channels, factor)
    if form is None or not _shapes_agree(weights):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in weights]
        raise ValueError(
            f"weights must be dense, block or tied for C = {channels} and factor = {factor}, "
            f"got shapes {shapes}"
        )
    return form


def convert_mlp(
    weights: MlpWeights, form: Form, *, factor: int = 2, channels: int | None = None
) -> MlpWeights:
    """Return the same network in another form; differentiable by ``torch.autograd``.

    Towards dense, the result computes what ``weights`` compute: every value is copied, and from
    tied on fc2 is divided by f², without rounding for ``factor`` 1, 2, 4, ... unless it underflows.
    From tied to dense is the reuse initialisation. Towards tied, the conversion succeeds only if
    converting back gives the same weights bit for bit. It compares values, so it waits for a device
    that holds them.

    Args:
        weights: Weights in any form.
        form: The form to return: ``"dense"``, ``"block"`` or ``"tied"``.
        factor: Side f of a window, in tokens.
        channels: C, as for :func:`form_of`.

    Returns:
        Weights in ``form``; ``weights`` itself where it has that form. fc2's bias is shared.

    Raises:
        ValueError: ``form`` is unknown, the shapes are those of no weight form, or ``form``
            cannot represent the network exactly.

    Example:
        >>> tied = MlpWeights(torch.randn(12, 4), torch.randn(12), torch.randn(4, 12), None)
        >>> dense = convert_mlp(tied, "dense")
        >>> dense.fc1_weight.shape, torch.equal(convert_mlp(dense, "tied").fc2_weight, tied[2])
        (torch.Size([48, 16]), True)
    """
    if form not in FORMS:
        raise ValueError(f'form must be "dense", "block" or "tied", got {form!r}')
    have = form_of(weights, factor=factor, channels=channels)
    if factor == 1 and form == "tied" and have == "dense":
        return weights  # the same network and the same shapes
    if have == "tied" and form == "dense":
        return tied_to_dense(weights, factor=factor)
    # Every other conversion is a walk along dense - block - tied.
    while have != form:
        if have == "tied":
            weights, have = tied_to_block(weights, factor=factor), "block"
        elif have == "dense":
            weights, have = dense_to_block(weights, factor=factor), "block"
        elif form == "dense":
            weights, have = block_to_dense(weights), "dense"
        else:
            weights, have = block_to_tied(weights), "tied"
    return weights


def tied_to_dense(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Put the one FFN on the diagonal of fc1 and, divided by f², side by side in fc2."""
    patches = factor**2
    return MlpWeights(
        tile_block_diagonal(weights.fc1_weight, patches),
        None if weights.fc1_bias is None else tile_vector(weights.fc1_bias, patches),
        tile_average(weights.fc2_weight, patches),
        weights.fc2_bias,
    )


def tied_to_block(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Repeat the one FFN for every patch; fc2 / f² turns the sum over patches into the mean."""
    patches = factor**2

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tile_vector(tensor.flatten(), patches).view(patches, *tensor.shape)

    fc1_bias = None if weights.fc1_bias is None else repeat(weights.fc1_bias)
    return MlpWeights(
        repeat(weights.fc1_weight), fc1_bias, repeat(weights.fc2_weight / patches), weights.fc2_bias
    )


def block_to_dense(weights: MlpWeights) -> MlpWeights:
    """Put fc1's blocks on the diagonal and fc2's blocks side by side."""
    fc1_bias = None if weights.fc1_bias is None else weights.fc1_bias.flatten()
    return MlpWeights(
        torch.block_diag(*weights.fc1_weight),
        fc1_bias,
        torch.cat(tuple(weights.fc2_weight), 1),
        weights.fc2_bias,
    )


def dense_to_block(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Take the blocks of a block-diagonal fc1; ValueError where another entry is not zero."""
    patches = factor**2
    rows, columns = weights.fc1_weight.shape
    if rows % patches or columns % patches:
        raise ValueError(
            f"fc1_weight of shape {(rows, columns)} does not divide into {patches} diagonal blocks"
        )
    fc1_bias = None if weights.fc1_bias is None else weights.fc1_bias.unflatten(0, (patches, -1))
    tiles = weights.fc1_weight.unflatten(1, (patches, columns // patches))
    tiles = tiles.unflatten(0, (patches, rows // patches))  # (f², I, f², C)
    block = MlpWeights(
        torch.stack([tiles[p, :, p] for p in range(patches)]),
        fc1_bias,
        torch.stack(weights.fc2_weight.chunk(patches, 1)),
        weights.fc2_bias,
    )
    _check_exact(block_to_dense(block), weights, "block", "fc1_weight is not block-diagonal")
    return block


def block_to_tied(weights: MlpWeights) -> MlpWeights:
    """Take the one FFN that all patches share; ValueError where the blocks differ."""
    patches = weights.fc1_weight.shape[0]
    tied = MlpWeights(
        weights.fc1_weight[0],
        None if weights.fc1_bias is None else weights.fc1_bias[0],
        weights.fc2_weight[0] * patches,
        weights.fc2_bias,
    )
    back = tied_to_block(tied, factor=round(patches**0.5))
    _check_exact(back, weights, "tied", "the patches have different blocks")
    return tied


def _check_exact(back: MlpWeights, weights: MlpWeights, form: str, reason: str) -> None:
    for converted, original in zip(back, weights, strict=True):
        if original is not None and not torch.equal(converted, original):
            raise ValueError(f"weights have no exact {form} form: {reason}")


def _shapes_agree(weights: MlpWeights) -> bool:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    *blocks, hidden, _ = fc1_weight.shape
    return (
        fc2_weight.dim() == fc1_weight.dim()
        and (*fc2_weight.shape[:-2], fc2_weight.shape[-1]) == (*blocks, hidden)
        and (fc1_bias is None or fc1_bias.shape == (*blocks, hidden))
        and (fc2_bias is None or fc2_bias.shape == fc2_weight.shape[-2:-1])
    )


# ---- modules -----------------------------------------------------------------------------------


def merge_windows(
    x: torch.Tensor,
    grids: Grids,
    norm: nn.Module,
    fc1: nn.Module,
    fc2: nn.Module,
    *,
    window: int,
    activation: str | nn.Module,
    residual: bool,
) -> torch.Tensor:
    """Return ``fc2(activation(fc1(norm(pixel_unshuffle(x)))))``, plus the mean if ``residual``.

    Where the layers are exactly plain, the operator reads their weights. A layer that is not
    (adapted, quantised, hooked, offloaded) is called, and so are the others.

    Args:
        x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid.
        grids: Their grids.
        norm: LayerNorm over the ``window² * C`` channels.
        fc1: First layer, over all channels of a window.
        fc2: Second layer.
        window: Side of a window, in tokens.
        activation: As for :func:`uhd_ops.pixel_unshuffle_mlp`, or a module.
        residual: Whether to add the mean of the window's tokens.

    Returns:
        Merged tokens ``(M, D)``, or ``(B, M / B, D)``, with D the outputs of ``fc2``.
    """
    name = activation if isinstance(activation, str) else _activation_name(activation)
    if name is not None and _are_plain(norm, fc1, fc2):
        options = {"factor": window, "activation": name, "residual": residual}
        return _read_layers(x, grids, norm, fc1, fc2, **options)
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    y = fc2(act(fc1(norm(pixel_unshuffle(x, grids, window)))))
    return y + window_mean(x, grids, window) if residual else y


class WindowMlp(nn.Module):
    """``post(fc2(activation(fc1(norm(pixel_unshuffle(x))))))``, with the host's weights tiled.

    The norm in front is over all f²C channels of a window. Norms inside the MLP stay per patch, so
    after the first norm the branch starts as the mean of what the host's MLP does to each patch.

    The layers are ordinary modules: ``torch.nn.Linear`` in the dense form, over the f²C channels of
    a window, and in the tied form, over the C of a patch; ``BlockLinear`` in the block form.
    One operator computes the branch from their weights where all of them are exactly plain;
    otherwise they are called, so adapters, hooks, quantised and offloaded weights take effect.

    Args:
        spec: The branch whose parts are tiled and copied.
        dim: Channels C of a token.
        window: Side f of a window, in tokens.
        form: Weight form: ``"dense"``, ``"block"`` or ``"tied"``; a gate has the form of fc1.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one grid.
        Result: ``(M, C)``, or ``(B, M / B, C)``.
    """

    def __init__(self, spec: MlpSpec, dim: int, window: int, form: str) -> None:
        super().__init__()
        self.dim, self.window, self.form = dim, window, form
        self.activation = spec.activation
        self.hidden_dropout, self.drop_path = spec.hidden_dropout, spec.drop_path
        self.norm = tile_norm(spec.norm, window**2)
        self.patch_norm = clone_module(spec.patch_norm)
        with torch.no_grad():
            self.fc1, self.fc2 = self._tile(spec.fc1, spec.fc2)
            self.gate = None if spec.gate is None else self._tile(spec.gate, spec.fc2)[0]
        self.inner_norm = clone_module(spec.inner_norm)
        self.limits = nn.ModuleDict({n: clone_module(limits) for n, limits in spec.limits.items()})
        self.output_drop = nn.Dropout(spec.output_dropout)
        self.post = clone_module(spec.post)

    def _tile(self, fc1: nn.Module, fc2: nn.Module) -> tuple[nn.Module, nn.Module]:
        """Make both layers in the form of this MLP from those for one patch."""
        weights = MlpWeights(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if self.form == "block":
            weights = tied_to_block(weights, factor=self.window)
            return BlockLinear(*weights[:2]), BlockLinear(*weights[2:], summed=True)
        if self.form == "dense":
            weights = tied_to_dense(weights, factor=self.window)
        return linear_of(*weights[:2]), linear_of(*weights[2:])

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """Return the branch; with ``residual``, plus the mean over the tokens of each window."""
        drops = self.training and (self.hidden_dropout or self.output_drop.p or self.drop_path)
        if self.reads_layers():
            ends_here = not drops and isinstance(self.post, nn.Identity)
            options = {"factor": self.window, "activation": self.activation}
            options["residual"] = residual and ends_here
            branch = _read_layers(x, grids, self.norm, self.fc1, self.fc2, **options)
            if ends_here:
                return branch
        else:
            branch = self._call_layers(x, grids)
        branch = self.post(self.output_drop(branch))
        if self.training and self.drop_path:
            branch = drop_views(branch, self.drop_path, grids, self.window)
        return window_mean(x, grids, self.window) + branch if residual else branch

    def reads_layers(self) -> bool:
        """Whether the operator computes this MLP from the weights of its layers, now."""
        return (
            self.gate is None
            and len(self.limits) == 0
            and not (self.training and self.hidden_dropout)
            and type(self.patch_norm) is nn.Identity
            and type(self.inner_norm) is nn.Identity
            and _are_plain(self.norm, self.fc1, self.fc2)
        )

    def _call_layers(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """The branch by the steps of its definition: any norm, layer, gate and dropout."""
        merged = self.norm(pixel_unshuffle(x, grids, self.window))
        patches = self.patch_norm(merged.unflatten(-1, (self.window**2, self.dim)))
        act = ACTIVATIONS[self.activation]
        hidden = self._limited("fc1", functools.partial(self._first, self.fc1), patches)
        if self.gate is None:
            hidden = act(hidden)
        else:
            gate = self._limited("gate", functools.partial(self._first, self.gate), patches)
            hidden = act(gate) * hidden
        hidden = functional.dropout(hidden, self.hidden_dropout, self.training)
        return self._limited("fc2", self._second, self.inner_norm(hidden))

    def _limited(
        self, name: str, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """Return ``layer(x)`` within the limits of that name, if there are any."""
        return self.limits[name](x, layer) if name in self.limits else layer(x)

    def _first(self, layer: nn.Module, patches: torch.Tensor) -> torch.Tensor:
        """``(..., f², C)`` to ``(..., f², I)``."""
        if self.form == "dense":
            return layer(patches.flatten(-2)).unflatten(-1, (self.window**2, -1))
        return layer(patches)

    def _second(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(..., f², I)`` to ``(..., C)``: over the whole window, or per patch and then merged."""
        if self.form == "dense":
            return self.fc2(hidden.flatten(-2))
        if self.form == "tied":  # the mean first: one product instead of f²
            return self.fc2(hidden.mean(-2))
        return self.fc2(hidden)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"window={self.window}, form={self.form!r}, activation={self.activation!r}"


class PlainMlp(nn.Module):
    """``fc2(gelu(fc1(norm(pixel_unshuffle(x)))))`` from f²C over f²C to C channels.

    It takes no weights from the host and starts with torch's own initialisation.

    Args:
        dim: Channels C of a token.
        window: Side f of a window, in tokens.
        like: Parameters are made on its device and in its dtype.

    Source:
        LLaVA-UHD v4, Table 4: "Pixel-unshuffle MLP" and "Window attention with MLP".
    """

    def __init__(self, dim: int, window: int, like: torch.Tensor) -> None:
        super().__init__()
        factory = {"device": like.device, "dtype": like.dtype}
        wide = window**2 * dim
        self.window = window
        self.norm = nn.LayerNorm(wide, eps=1e-6, **factory)
        self.fc1 = nn.Linear(wide, wide, **factory)
        self.fc2 = nn.Linear(wide, dim, **factory)

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """``(N, C)`` to ``(M, C)``; with ``residual``, plus the mean of each window."""
        layers = self.norm, self.fc1, self.fc2
        return merge_windows(
            x, grids, *layers, window=self.window, activation="gelu", residual=residual
        )


class NoMlp(nn.Module):
    """The mean of each window and nothing else.

    Args:
        window: Side of a window, in tokens.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: torch.Tensor, grids: Grids, *, residual: bool) -> torch.Tensor:
        """``(N, C)`` to ``(M, C)``."""
        mean = window_mean(x, grids, self.window)
        return mean if residual else torch.zeros_like(mean)

    def extra_repr(self) -> str:
        """Show the side of a window."""
        return f"window={self.window}"


def _are_plain(norm: nn.Module, fc1: nn.Module, fc2: nn.Module) -> bool:
    linear = BlockLinear if type(fc1) is BlockLinear else nn.Linear
    return is_plain(norm, nn.LayerNorm) and is_plain(fc1, linear) and is_plain(fc2, linear)


def _read_layers(
    x: torch.Tensor, grids: Grids, *layers: nn.Module, **options: object
) -> torch.Tensor:
    norm, fc1, fc2 = layers
    weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    return pixel_unshuffle_mlp(x, grids, *weights, **options)


def _activation_name(activation: nn.Module) -> str | None:
    """What the operator calls the activation of somebody else's module; None for any other."""
    if is_plain(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    cls = type(activation)
    known = f"{cls.__module__}.{cls.__qualname__}" == "transformers.activations.GELUTanh"
    return "gelu_tanh" if known and is_plain(activation, cls) else None
