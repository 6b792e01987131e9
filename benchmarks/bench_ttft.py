# SPDX-License-Identifier: Apache-2.0
"""Time to first token over resolutions: from the pixels of an image to the logits of one token.

    python benchmarks/bench_ttft.py            all sizes, in six minutes; prints times and ratios,
                                               writes results/
    python benchmarks/bench_ttft.py --quick    tiny models, to see that it runs; writes nothing

Every way has an encoder of the sizes of ViT-B/16, a connector, and the same small Qwen3 of
transformers, all with random weights. "untouched" hands four times as many tokens to the language
model as the others, whose tokens are equally many for one image cut into slices; the native
encoder's are as many as its whole patches of 4 x 4 tokens.

    early compressor    ours: SliceEncoder on packed slices, compressor after 3 of 12 blocks
    progressive         ours: SliceEncoder on packed slices, pooling after 2 and 8 of 12 blocks
    untouched           timm's own forward pass, slices of one size as a batch, 2x2 merge behind
    post-ViT merging    the same, merged twice behind
    ToMe                the same blocks, which merge similar tokens by bipartite soft matching
    MoonViT, native     transformers' MoonViT on the whole image in one view, merged twice behind
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import harness
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

from uhd_ops import (
    PackedGrids,
    insert_early_compressor,
    insert_progressive_compression,
    plan_native,
    plan_slices,
)
from uhd_ops.cli._variants import TokenMlp, first_token
from uhd_ops.nn import PixelUnshuffleConnector, SliceEncoder

OURS, UNTOUCHED, POST, TOME = "early compressor", "untouched", "post-ViT merging", "ToMe"
PROGRESSIVE, NATIVE = "progressive", "MoonViT, native"
WAYS = (OURS, PROGRESSIVE, UNTOUCHED, POST, TOME, NATIVE)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MERGE = 4  # patches across that become one token of the language model


@dataclass(frozen=True)
class Sizes:
    """Of encoder, language model and images; those of ``--quick`` are tiny."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_hidden: int = 3072
    patch: int = 16
    view: int = 448  # px, about the side of a slice
    layer: int = 2  # early: after 3 of 12 blocks, as 7 of 27 in LLaVA-UHD v4
    layers: tuple[int, ...] = (1, 7)  # progressive: as 4 and 18 of 27 in LLaVA-UHD v3
    llm_layers: int = 12
    vocabulary: int = 32000
    text: int = 32  # tokens beside the visual ones
    # Images (width, height) in px, and rounds of each.
    images: dict[tuple[int, int], int] = field(
        default_factory=lambda: {(448, 448): 5, (896, 896): 3, (1344, 1344): 3}
    )


QUICK = Sizes(
    dim=32,
    depth=4,
    heads=2,
    mlp_hidden=64,
    view=128,
    layer=0,
    layers=(0, 2),
    llm_layers=2,
    vocabulary=64,
    text=3,
    images={(128, 128): 1, (300, 200): 2},
)


# ---- ToMe ----------------------------------------------------------------------------------------


def merges_per_block(tokens: int, target: int, depth: int) -> list[int]:
    """How many tokens each block merges away: as constant as can be, and at most half of them.

    Raises:
        ValueError: So many blocks cannot get there.
    """
    for most in range(tokens):
        left, merged = tokens, []
        for _ in range(depth):
            merged.append(min(most, left // 2, left - target))
            left -= merged[-1]
        if left == target:
            return merged
    raise ValueError(f"{depth} blocks cannot merge {tokens} tokens to {target}")


def bipartite_soft_matching(
    x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the ``merged`` tokens that are most like one of another set into that one.

    Token Merging (Bolya et al., 2023): tokens alternate between two sets; each of the first is
    joined to the one of the second with the most similar key; of these edges the strongest are
    kept, and what they join is averaged, each token weighted by how many patches it stands for.

    Args:
        x: Tokens ``(B, N, C)``.
        size: Patches that each stands for, ``(B, N, 1)``.
        metric: Keys ``(B, N, D)``, averaged over heads.
        merged: Number of tokens that disappear, at most half.

    Returns:
        Tokens ``(B, N - merged, C)`` and their sizes.
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    strength, partner = similarity.max(-1)
    order = strength.argsort(-1, descending=True)
    going, staying = order[:, :merged, None], order[:, merged:, None]
    target = partner[..., None].gather(1, going)

    def join(values: torch.Tensor) -> torch.Tensor:
        first, second = values[:, ::2], values[:, 1::2]
        width = (-1, -1, values.shape[-1])
        second = second.scatter_add(1, target.expand(width), first.gather(1, going.expand(width)))
        return torch.cat([first.gather(1, staying.expand(width)), second], 1)

    sizes = join(size)
    return join(x * size) / sizes, sizes


def tome_block(
    block: nn.Module, x: torch.Tensor, size: torch.Tensor, merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block of timm that merges tokens between attention and MLP, by the keys of the former.

    Attention is proportional: a token of ``s`` patches counts ``s`` times.
    """
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weight = size.log()[:, None, None, :, 0]  # (B, 1, 1, N)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=weight.expand(-1, 1, x.shape[1], -1))
    x = x + attention.proj(mixed.transpose(1, 2).flatten(2))
    if merged:
        x, size = bipartite_soft_matching(x, size, k.mean(1), merged)
    return x + block.mlp(block.norm2(x)), size


def tome_features(vit: VisionTransformer, images: torch.Tensor, target: int) -> torch.Tensor:
    """Encode a batch of images of one size to ``target`` tokens each: ``(B, target, C)``."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    size = x.new_ones(*x.shape[:2], 1)
    plan = merges_per_block(x.shape[1], target, len(vit.blocks))
    for block, merged in zip(vit.blocks, plan, strict=True):
        x, size = tome_block(block, x, size, merged)
    return vit.norm(x)


# ---- from views to visual tokens -----------------------------------------------------------------


def make_vit(sizes: Sizes) -> VisionTransformer:
    """Make a ViT-B/16 without class token, as SigLIP's, which takes images of any size."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=sizes.view,
        patch_size=sizes.patch,
        embed_dim=sizes.dim,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=sizes.mlp_hidden / sizes.dim,
        class_token=False,
        global_pool="",
        num_classes=0,
        dynamic_img_size=True,
    )


def make_moonvit(sizes: Sizes) -> Kimi_K25VisionModel:
    """Make transformers' MoonViT, the tower of Kimi K2.5, in the same sizes."""
    config = Kimi_K25VisionConfig(
        patch_size=sizes.patch,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp_hidden,
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    return Kimi_K25VisionModel(config)


def make_llm(sizes: Sizes) -> Qwen3ForCausalLM:
    """Make a small Qwen3."""
    config = Qwen3Config(
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.llm_layers,
        intermediate_size=3 * sizes.dim,
        num_attention_heads=sizes.heads,
        num_key_value_heads=max(sizes.heads // 3, 1),
        head_dim=sizes.dim // sizes.heads,
        vocab_size=sizes.vocabulary,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


class Bench:
    """Everything that is timed, on the CPU.

    Args:
        sizes: Of the models.
        dtype: Of weights and pixels.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        def ready(module: nn.Module) -> nn.Module:
            return module.to(dtype).eval().requires_grad_(False)

        self.sizes, self.dtype = sizes, dtype
        self.vit, self.moonvit, self.llm = map(
            ready, (make_vit(sizes), make_moonvit(sizes), make_llm(sizes))
        )
        early = insert_early_compressor(make_vit(sizes), sizes.layer)
        progressive = insert_progressive_compression(make_vit(sizes), sizes.layers)
        self.early, self.progressive = ready(SliceEncoder(early)), ready(SliceEncoder(progressive))
        dim = sizes.dim
        self.once, self.twice = (
            ready(PixelUnshuffleConnector(dim, dim, merger_times=times)) for times in (1, 2)
        )
        self.flat = ready(TokenMlp(dim, dim))
        self.text = torch.randn(1, sizes.text, dim).to(dtype)

    def views(self, width: int, height: int) -> list[torch.Tensor]:
        """Random pixels of the views of an image: its slices, the thumbnail in front."""
        plan = plan_slices(
            width,
            height,
            scale_resolution=self.sizes.view,
            patch_size=self.sizes.patch,
            merge=MERGE,
        )
        return self._pixels(plan.grids)

    def whole(self, width: int, height: int) -> list[torch.Tensor]:
        """Random pixels of the image in one view."""
        return self._pixels(
            plan_native(width, height, patch_size=self.sizes.patch, merge=MERGE).grids
        )

    def _pixels(self, grids) -> list[torch.Tensor]:
        patch, generator = self.sizes.patch, torch.Generator().manual_seed(1)
        return [
            torch.randn(3, h * patch, w * patch, generator=generator).to(self.dtype)
            for h, w in grids
        ]

    def ways(self, width: int, height: int) -> dict[str, Callable[[], torch.Tensor]]:
        """Functions from the views of an image to tokens ``(M, D)`` of the language model."""
        views, whole = self.views(width, height), self.whole(width, height)
        packed, grids = self.packed(views)
        patches, (grid,) = self.packed(whole)
        grid_thw = torch.tensor([[1, *grid]])

        def ours(encoder: SliceEncoder, connector: nn.Module) -> torch.Tensor:
            result = encoder(packed, grids)
            return connector(result.tokens, result.grids)

        def native() -> torch.Tensor:
            tokens = self.moonvit(patches, grid_thw=grid_thw).last_hidden_state
            return self.twice(tokens, [grid])

        return {
            OURS: lambda: ours(self.early, self.once),
            PROGRESSIVE: lambda: ours(self.progressive, self.flat),
            UNTOUCHED: lambda: self.once(self.batched(views, self.vit.forward_features), grids),
            POST: lambda: self.twice(self.batched(views, self.vit.forward_features), grids),
            TOME: lambda: self.flat(self.batched(views, self.tome), grids),
            NATIVE: native,
        }

    def packed(self, views: list[torch.Tensor]) -> tuple[torch.Tensor, PackedGrids]:
        """Cut views into patches ``(N, 3, p, p)`` in raster order, one view after another."""
        p, parts = self.sizes.patch, []
        for view in views:
            cells = view.unflatten(1, (-1, p)).unflatten(3, (-1, p))  # (3, h, p, w, p)
            parts.append(cells.permute(1, 3, 0, 2, 4).flatten(0, 1))
        return torch.cat(parts), PackedGrids([(v.shape[1] // p, v.shape[2] // p) for v in views])

    def batched(
        self, views: list[torch.Tensor], encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Encode views of one size as a batch, without our packing: ``(N, C)`` in their order."""
        places: dict[torch.Size, list[int]] = {}
        for index, view in enumerate(views):
            places.setdefault(view.shape, []).append(index)
        tokens: list[torch.Tensor] = [None] * len(views)
        for found in places.values():
            batch = encode(torch.stack([views[index] for index in found]))
            for index, row in zip(found, batch, strict=True):
                tokens[index] = row
        return torch.cat(tokens)

    def tome(self, images: torch.Tensor) -> torch.Tensor:
        """Encode a batch with ToMe, to as many tokens as the others have after merging."""
        cells = images.shape[2] * images.shape[3] // (self.sizes.patch * MERGE) ** 2
        return tome_features(self.vit, images, cells)

    def first_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the language model behind visual tokens and text: ``(1, 1, vocabulary)``."""
        return first_token(self.llm, torch.cat([tokens[None], self.text], 1))


# ---- timing --------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(bench: Bench, image: tuple[int, int], rounds: int) -> list[dict]:
    """Time every way in turn, so that a slow spell of the machine hits all of them.

    Args:
        bench: The models.
        image: Width and height in px.
        rounds: Timed rounds, after one that is not.

    Returns:
        A row for each way: medians in ms, and the median of the rounds' ratios to ours.
    """
    ways = bench.ways(*image)
    encode, first, tokens = ({name: [] for name in ways} for _ in range(3))
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            visual = way()
            middle = time.perf_counter()
            bench.first_token(visual)
            end = time.perf_counter()
            encode[name].append(1e3 * (middle - start))
            first[name].append(1e3 * (end - start))
            tokens[name].append(len(visual))
    rows = []
    for name in ways:
        pairs = zip(first[name][1:], first[OURS][1:], strict=True)
        rows.append(
            {
                "dtype": str(bench.dtype).removeprefix("torch."),
                "image": list(image),
                "way": name,
                "tokens": tokens[name][-1],
                "rounds": rounds,
                "encode_ms": statistics.median(encode[name][1:]),
                "first_token_ms": statistics.median(first[name][1:]),
                "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
            }
        )
    return rows


def report(rows: list[dict]) -> str:
    """Return a table, a line for each way and image."""
    lines = [
        f"{'dtype':<10}{'image':<12}{'':<20}{'tokens':>8}{'encode ms':>12}{'first token ms':>16}"
        f"{'times ours':>12}"
    ]
    for row in rows:
        image = "x".join(map(str, row["image"]))
        lines.append(
            f"{row['dtype']:<10}{image:<12}{row['way']:<20}{row['tokens']:>8}{row['encode_ms']:>12.1f}"
            f"{row['first_token_ms']:>16.1f}{row['ratio']:>12.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and store the rows under ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models; writes nothing")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: all of them")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    rows = []
    for name in options.dtype or DTYPES:
        bench = Bench(sizes, DTYPES[name])
        for image, rounds in sizes.images.items():
            rows += measure(bench, image, rounds)
    print(report(rows))
    if not options.quick:
        harness.store("ttft", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
