# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the time to first token: what its rivals compute, and what it records."""

import sys
from pathlib import Path

import pytest
import torch

from uhd_ops.nn import SliceEncoder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_ttft


@pytest.fixture(scope="module")
def bench():
    return bench_ttft.Bench(bench_ttft.QUICK, torch.float32)


def test_merges_per_block():
    assert bench_ttft.merges_per_block(784, 49, 12) == [63] * 11 + [42]
    # A constant number would leave the last block more than half of its tokens to merge.
    assert bench_ttft.merges_per_block(64, 4, 4) == [32, 16, 8, 4]
    assert bench_ttft.merges_per_block(5, 5, 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="2 blocks cannot merge 16 tokens to 3"):
        bench_ttft.merges_per_block(16, 3, 2)


def test_matching_by_hand():
    """The steps of the paper, in loops over tokens."""
    torch.manual_seed(0)
    batch, tokens, merged = 3, 11, 4
    x, metric = torch.randn(batch, tokens, 5), torch.randn(batch, tokens, 7)
    size = torch.randint(1, 5, (batch, tokens, 1)).float()
    joined, sizes = bench_ttft.bipartite_soft_matching(x, size, metric, merged)
    assert joined.shape == (batch, tokens - merged, 5)
    for b in range(batch):
        edges = []
        for i in range(0, tokens, 2):
            found = [
                (float(torch.cosine_similarity(metric[b, i], metric[b, j], dim=0)), j)
                for j in range(1, tokens, 2)
            ]
            edges.append((*max(found), i))
        groups = {j: [j] for j in range(tokens)}
        for _, j, i in sorted(edges, reverse=True)[:merged]:
            groups[j] += groups.pop(i)
        wanted = sorted(
            (
                float(size[b, group].sum()),
                *((x[b, group] * size[b, group]).sum(0) / size[b, group].sum()).tolist(),
            )
            for group in groups.values()
        )
        rows = torch.cat([sizes[b], joined[b]], 1).tolist()
        assert torch.allclose(torch.tensor(sorted(rows)), torch.tensor(wanted), atol=1e-5)


def test_block_that_merges_nothing_is_the_block(bench):
    x = torch.randn(2, 9, 32)
    block = bench.vit.blocks[0]
    out, size = bench_ttft.tome_block(block, x, torch.ones(2, 9, 1), 0)
    assert torch.allclose(out, block(x), atol=1e-5)
    assert size.tolist() == torch.ones(2, 9, 1).tolist()
    # A token of three patches counts as three equal tokens.
    weighted, _ = bench_ttft.tome_block(
        block, x[:1, :4], torch.tensor([1.0, 1, 1, 3]).view(1, 4, 1), 0
    )
    repeated = block(torch.cat([x[:1, :4], x[:1, 3:4], x[:1, 3:4]], 1))[:, :4]
    assert torch.allclose(weighted, repeated, atol=1e-5)


@torch.no_grad()
def test_batches_and_packed_views_are_the_same_tokens(bench):
    """The untouched tower by timm's own forward pass, and by the encoder of the other ways."""
    views = bench.views(400, 100)
    assert len({view.shape for view in views}) > 1
    packed, grids = bench.packed(views)
    tokens = bench.batched(views, bench.vit.forward_features)
    assert torch.allclose(SliceEncoder(bench.vit)(packed, grids).tokens, tokens, atol=1e-4)


@torch.no_grad()
def test_equal_tokens(bench):
    """Each way hands on what it says, whatever the image; only one hands on four times as many."""
    for image in ((64, 64), (400, 100), (100, 300)):
        tokens = {name: way() for name, way in bench.ways(*image).items()}
        assert list(tokens) == list(bench_ttft.WAYS)
        assert all(x.shape[1] == 32 and bool(x.isfinite().all()) for x in tokens.values())
        ours, (whole,) = len(tokens[bench_ttft.OURS]), bench.whole(*image)
        assert len(tokens.pop(bench_ttft.UNTOUCHED)) == 4 * ours
        assert len(tokens.pop(bench_ttft.NATIVE)) == whole[0].numel() // 64**2
        assert {len(x) for x in tokens.values()} == {ours}
        logits = bench.first_token(tokens[bench_ttft.OURS])
        assert logits.shape == (1, 1, bench_ttft.QUICK.vocabulary)


def test_quick_run(monkeypatch, capsys):
    def store(*_):
        raise AssertionError("a quick run has nothing to keep")

    monkeypatch.setattr(bench_ttft.harness, "store", store)
    assert bench_ttft.main(["--quick"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["times", "ours"]
    expected = [
        [dtype, f"{w}x{h}", way]
        for dtype in bench_ttft.DTYPES
        for w, h in bench_ttft.QUICK.images
        for way in bench_ttft.WAYS
    ]
    assert [[*line.split()[:2], line[22:42].strip()] for line in lines] == expected


def test_rows(bench):
    rows = bench_ttft.measure(bench, (64, 64), 2)
    assert [row["way"] for row in rows] == list(bench_ttft.WAYS)
    for row in rows:
        assert 0 < row["encode_ms"] < row["first_token_ms"]
        assert (row["rounds"], row["image"], row["dtype"]) == (2, [64, 64], "float32")
        assert row["ratio"] > 0
    assert rows[0]["ratio"] == 1
