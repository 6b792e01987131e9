# SPDX-License-Identifier: Apache-2.0
"""Insert compressors into a vision transformer of any family, and take them out again.

The classes of the model and of its blocks change in place; no module is added to the list of
blocks, so every index and every parameter name stays. Why, and what else was considered:
docs/adr/0003.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.early_compressor import (
    AttentionKind,
    CompressorConfig,
    EarlyCompressor,
    MlpKind,
)
from uhd_ops.nn.mlp_forms import Form
from uhd_ops.nn.modules import Mixed, Model, blocks_at, check_reusable, is_mixed, mixed
from uhd_ops.nn.positions import Positions
from uhd_ops.nn.window_token_compressor import Pool, WindowTokenCompressor
from uhd_ops.retrofit.adapter import CoarsePart, CompressedBlock, CompressedWrapper, Family
from uhd_ops.retrofit.registry import family_of, read_in


def insert_early_compressor(
    vit: Model,
    layer: int = 6,
    *,
    attention: bool | AttentionKind = "window",
    mlp: MlpKind = "reuse",
    form: Form = "dense",
    window: int = 2,
    positions: Positions = "center",
) -> Model:
    """Merge each window of patch tokens into one token after block ``layer``, in place.

    The blocks after ``layer`` then work on ``ceil(h / window) * ceil(w / window)`` tokens instead
    of ``h * w``. Class and register tokens pass the compressor unchanged and never enter a window.
    Every parameter keeps its name; the compressor's own are ``blocks.<layer>.compressor.*``, or
    ``encoder.layers.<layer>.compressor.*`` and the like in transformers, initialised from block
    ``layer`` as :meth:`uhd_ops.nn.EarlyCompressor.from_block` says.

    The model stays what it was for its users: ``forward``, ``forward_features``,
    ``forward_intermediates`` (whose maps from block ``layer`` on are coarse; ``feature_info`` says
    so), gradient checkpointing of either kind, FSDP2, ``copy.deepcopy``, pickling and
    ``torch.compile`` work as before. In transformers, ``hidden_states``, ``attentions`` and feature
    maps after ``layer`` are those of merged tokens; ``save_pretrained`` writes the options too,
    and where ``uhd_ops.integrations.transformers`` is imported, ``from_pretrained`` reads them.
    Padded batches (NaFlex, SigLIP 2, Idefics) are merged sample by sample, and packed images
    (Pixtral, Qwen-VL, GLM-4V, MoonViT) image by image; masks, ``patch_valid`` and starts of
    sequences after the compressor are those of the merged tokens, and the grids are read from the
    device once for each forward pass. Refused at run time are attention masks made for the full
    sequence, causal attention, patch dropout in training, ``torch.jit.script`` and
    ``torch.fx.symbolic_trace``.

    Args:
        vit: A plain vision transformer of timm: ``VisionTransformer`` (SigLIP, CLIP, DeiT, DINOv2,
            AIMv2, ViTamin and others built on it), ``Eva`` (EVA-02, DINOv3, Perception Encoder),
            ``Beit``, ``VisionTransformerRelPos``, ``VisionTransformerSAM``, ``NaFlexVit``,
            ``Cait``, and the encoders of Qwen 3, DeepSeek and Gemma 4. Or one of transformers: the
            vision models of SigLIP, SigLIP 2, CLIP, DINOv2 and DINOv3, and the towers of Idefics 2
            and 3, SmolVLM, InternVL, BLIP, Janus, AIMv2, Pixtral, and Qwen2-VL, Qwen2.5-VL,
            Qwen3-VL, GLM-4V and MoonViT (Kimi K2.5), whose images then need sides that are
            multiples of ``window`` times the side of their own merger. docs/models.md has the list
            of timm's.
        layer: 0-based index of the block after whose body the compressor runs; the last block is
            allowed.
        attention: ``"window"`` if tokens attend inside their window before they are merged,
            ``"none"``, or which query attends to its window; as for
            :class:`uhd_ops.nn.EarlyCompressor`.
        mlp: ``"reuse"`` for the block's own MLP, ``"plain"`` or ``"none"``; likewise.
        form: Weight form of the reused MLP: ``"dense"`` as in the released checkpoints,
            ``"block"``, or ``"tied"``. They start as the same function. Other MLPs have one form.
        window: Side of a window, in tokens.
        positions: What position a merged token has in the blocks after the compressor, where they
            have rotary embeddings or relative positions: ``"center"``, the centre of its window,
            which keeps all distances, or ``"reindex"``, its index on the merged grid, which divides
            them by ``window``. Models with absolute positions only take either.

    Returns:
        ``vit`` itself. Where it holds a compressor with the same options already, nothing is done.
        An optimiser made before does not know the compressor's parameters, which are new.

    Raises:
        NotImplementedError: The class of the model, a part of block ``layer``, or ``mlp`` is not
            supported.
        TypeError: An argument has the wrong type.
        ValueError: ``layer``, ``form`` or ``window`` is out of range, ``vit`` holds a compressor
            with other options, or DistributedDataParallel wraps it already. After an error, the
            model is as it was.

    Source:
        LLaVA-UHD v4, section 3.2.

    Example:
        >>> import torch
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = insert_early_compressor(vit, layer=0)
        >>> vit.forward_features(torch.randn(1, 3, 32, 32)).shape  # class token and 2 x 2 patches
        torch.Size([1, 5, 32])
    """
    options = {"attention": attention, "mlp": mlp, "form": form, "window": window}
    return insert(vit, layers=layer, **options, positions=positions)


def remove_early_compressor(vit: Model) -> Model:
    """Take the compressor out again, in place; its weights are lost.

    Args:
        vit: A model that :func:`insert_early_compressor` returned.

    Returns:
        ``vit`` itself: class, attributes and parameters are those it had before the insertion,
        updated by whatever training happened since.

    Raises:
        NotImplementedError: The class of the model is not supported.
        TypeError: ``vit`` is not a module.
        ValueError: The model holds no compressor.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> type(remove_early_compressor(insert_early_compressor(vit, layer=0))).__name__
        'VisionTransformer'
    """
    family = family_of(vit)
    present = getattr(family.transformer(vit), "compression", None)
    if present is None:
        raise ValueError("vit holds no compressor, so there is nothing to remove")
    if present.pool is not None:
        raise ValueError(f"vit holds {present}; call {present.removed_by}(vit) to remove it")
    return _remove(vit, family)


def insert_progressive_compression(
    vit: Model,
    layers: Sequence[int] = (3, 17),
    *,
    pool: Pool = "adaptive",
    hidden_dim: int | None = None,
    window: int = 2,
    positions: Positions = "center",
) -> Model:
    """Merge each window of patch tokens into one token after several blocks, in place.

    After each of the ``layers`` a :class:`uhd_ops.nn.WindowTokenCompressor` divides the tokens by
    ``window²``: N, N/4, N/16, ... Grids are carried through all merges, with ragged windows at odd
    sides; so are positions, and a merged token of the second merge has the position of all the
    tokens that it came from. Class and register tokens never enter a window. The pooling starts as
    the mean of a window, and trains.

    In all other respects the model is what :func:`uhd_ops.insert_early_compressor` leaves: every
    parameter keeps its name, and the compressors' own are ``blocks.<index>.compressor.*``.

    Args:
        vit: A model that :func:`uhd_ops.insert_early_compressor` takes.
        layers: 0-based indices of the blocks after which tokens are merged, ascending. The paper
            counts the blocks in front of each merge: its "4-18" is ``(3, 17)``, and "4-18-27", the
            three stages of 4, 14 and 9 blocks, is ``(3, 17, 26)``.
        pool: ``"adaptive"``, ``"mean"`` or ``"unshuffle"``; see WindowTokenCompressor.
        hidden_dim: Hidden channels of the pooling's MLP, or None for its default.
        window: Side of a window, in tokens.
        positions: As for insert_early_compressor: ``"center"`` keeps physical distances,
            ``"reindex"`` counts merged tokens anew, as the released encoder does.

    Returns:
        ``vit`` itself. Where it was compressed with the same options already, nothing is done.

    Raises:
        NotImplementedError: The class of the model, or a part of one of its blocks, is not
            supported.
        TypeError: An argument has the wrong type.
        ValueError: An option is out of range, ``vit`` holds a compressor with other options, or
            DistributedDataParallel wraps it already. After an error, the model is as it was.

    Source:
        LLaVA-UHD v3, progressive visual compression.

    Example:
        >>> import torch
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2)
        >>> vit = insert_progressive_compression(vit, layers=(0, 1))
        >>> vit.forward_features(torch.randn(1, 3, 64, 64)).shape  # class token and 2 x 2 patches
        torch.Size([1, 5, 32])
    """
    options = {"pool": pool, "hidden_dim": hidden_dim, "window": window}
    return insert(vit, layers=layers, **options, positions=positions)


def remove_progressive_compression(vit: Model) -> Model:
    """Take all merges out again, in place; their weights are lost.

    Args:
        vit: A model that :func:`insert_progressive_compression` returned.

    Returns:
        ``vit`` itself, with the class, attributes and parameters that it had before.

    Raises:
        NotImplementedError: The class of the model is not supported.
        TypeError: ``vit`` is not a module.
        ValueError: The model holds no progressive compression.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> vit = insert_progressive_compression(vit, layers=(0, 1))
        >>> type(remove_progressive_compression(vit)).__name__
        'VisionTransformer'
    """
    family = family_of(vit)
    config = getattr(family.transformer(vit), "compression", None)
    if config is None or config.pool is None:
        raise ValueError("vit holds no progressive compression, so there is nothing to remove")
    return _remove(vit, family)


def insert(vit: nn.Module, **options: Any) -> nn.Module:
    """Insert what the options of CompressorConfig say."""
    if isinstance(vit, DistributedDataParallel):
        _refuse_data_parallel(vit)
    family, config = family_of(vit), CompressorConfig(**options)
    transformer = family.transformer(vit)
    present = getattr(transformer, "compression", None)
    if present not in (None, config):  # to insert others would lose trained weights
        raise ValueError(
            f"vit holds a compressor already, {present}; call {present.removed_by}(vit) before "
            f"inserting {config}"
        )
    if "transformers.modeling_utils" in sys.modules:
        # vit may be inside a model of transformers, which then must save the compressor too.
        importlib.import_module("uhd_ops.retrofit.families._hf_checkpoints")
    if present is None:
        return _insert_new(vit, transformer, config, family)
    if vit is not transformer and not isinstance(vit, CompressedWrapper):
        vit.__class__ = mixed(family.wrapper, type(vit))  # a model around it that knows nothing yet
        _remember(vit, config)
    return vit


def _insert_new(
    vit: nn.Module, transformer: nn.Module, config: CompressorConfig, family: Family
) -> nn.Module:
    """Insert the compressors; everything that can fail comes before the first change."""
    _refuse_data_parallel(transformer)
    if isinstance(vit, CompressedWrapper):  # the compressor was removed from its transformer only
        restore_model(vit)
    blocks = blocks_at(transformer, family.model.blocks_name)
    config.check_depth(len(blocks))
    family.check(vit, config)
    compressors = {
        index: _build(config, read_in(family, transformer, blocks[index]))
        for index in config.layers
    }
    changes: list[tuple[nn.Module, type[Mixed], int]] = [(transformer, family.model, 1)]
    if vit is not transformer:
        changes.append((vit, family.wrapper, 1))
    merged = 1  # side of the windows that became one token in front of a block
    for index, block in enumerate(blocks):
        if merged > 1:
            inner = dict(block.named_modules())
            changes += [
                (inner[name], mixin, merged)
                for name, mixin in family.parts.items()
                if name in inner
            ]
            changes += [(block, family.coarse, merged)] if family.coarse else []
        if index in compressors:
            changes.append((block, family.compressed, merged))
            merged *= config.window
    children = dict(transformer.named_children())
    changes += [
        (children[name], mixin, merged) for name, mixin in family.heads.items() if name in children
    ]
    for module, mixin, window in changes:
        module.__class__ = mixed(mixin, type(module))
        if issubclass(mixin, (CoarsePart, CompressedBlock)):
            module.window = window
        if issubclass(mixin, CoarsePart):
            module.positions = config.positions
    for index, compressor in compressors.items():
        blocks[index].compressor = compressor.train(blocks[index].training)
    for model in dict.fromkeys((transformer, vit)):
        _remember(model, config)
    return vit


def _build(config: CompressorConfig, host: BlockSpec) -> nn.Module:
    """Make the compressor after a block."""
    if config.pool is None:
        return EarlyCompressor.from_host(host, config)
    like = check_reusable(host).mlps[0].fc2.weight
    return WindowTokenCompressor(
        host.dim,
        pool=config.pool,
        hidden_dim=config.hidden_dim,
        window=config.window,
        device=like.device,
        dtype=like.dtype,
    )


def _refuse_data_parallel(vit: nn.Module) -> None:
    """Refuse a model that DistributedDataParallel wraps, or holds somewhere.

    Its reducer knows the parameters that there were when it was made: the gradients of others would
    not be averaged, and the ranks would drift apart without a word. Nothing in the model
    points to the wrapper, so all wrappers in the process are asked.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for wrapper in gc.get_objects():
        if not issubclass(type(wrapper), DistributedDataParallel):
            continue
        if any(module is vit for module in wrapper.modules()):
            raise ValueError(
                f"vit must not be wrapped yet, got a {type(vit).__name__} inside "
                "DistributedDataParallel, which would not average the gradients of a compressor "
                "that it does not know: insert first, and wrap the model then"
            )


def _remove(vit: nn.Module, family: Family) -> nn.Module:
    """Undo :func:`insert`."""
    transformer = family.transformer(vit)
    models = [transformer, vit] if isinstance(vit, CompressedWrapper) else [transformer]
    blocks = transformer.get_submodule(transformer.blocks_name)
    inner = (*blocks.modules(), *transformer.children())
    changed = [module for module in inner if isinstance(module, Mixed)]
    for module in (*models, *changed):
        if not is_mixed(type(module)):
            raise NotImplementedError(
                "vit and its blocks must have the classes that the insertion gave them, got "
                f"{type(module).__name__}: undo what extended it (a parametrization, say) first"
            )
    for module in changed:
        if isinstance(module, CompressedBlock):
            del module.compressor
        for name in ("layout_while_tracing", "window", "positions"):
            vars(module).pop(name, None)
        while isinstance(module, Mixed):  # a block between two merges has two mixins
            module.__class__ = module.body_class
    for model in models:
        restore_model(model)
    return vit


def restore_model(model: nn.Module) -> None:
    """Undo what the insertion changed in the model itself; its blocks are another matter."""
    config = model.compression
    for info in _merged_features(model, config):
        info["reduction"] //= config.window
    model._forget()
    model.__class__ = model.body_class


def _remember(model: nn.Module, config: CompressorConfig) -> None:
    model._remember(config)
    for info in _merged_features(model, config):
        info["reduction"] *= config.window


def _merged_features(vit: nn.Module, config: CompressorConfig) -> list[dict]:
    """The entries of ``feature_info`` after each merge, once for every merge."""
    info = getattr(vit, "feature_info", [])
    # Gemma 4's classifier shows the list of its encoder, which is changed there.
    if info is getattr(getattr(vit, "encoder", None), "feature_info", None):
        return []
    return [entry for index in config.layers for entry in info[index:]]
