# SPDX-License-Identifier: Apache-2.0
"""``encode-dataset --engine ray`` on a Ray of this machine, one of whose workers is killed.

``.ci/ray_suite.sh`` fetches Ray, which is no dependency of the other tests.
"""

import os
import signal
from pathlib import Path

import pytest
from test_corpus import GRAY, contents, entries, picture

from uhd_ops.cli import main
from uhd_ops.corpus import CorpusModel, encode_dataset
from uhd_ops.corpus.engines import _share

ray = pytest.importorskip("ray")


@pytest.fixture
def corpus(tmp_path):
    """Sixty images, four of them broken."""
    for number in range(60):
        path = tmp_path / "corpus" / f"{number:02}.png"
        picture(path, (200 + 3 * number, 300 - 2 * number), number)
        if number % 16 == 5:
            path.write_bytes(path.read_bytes()[: 40 * number])
    return tmp_path / "corpus"


def tiny_model():
    """A function that Ray's workers need not import: it is pickled by value, being local."""
    gray = GRAY

    def make_model():
        import torch
        from timm.models.vision_transformer import VisionTransformer

        import uhd_ops
        from uhd_ops.corpus import CorpusModel
        from uhd_ops.nn import SliceEncoder

        torch.manual_seed(0)
        vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        encoder = SliceEncoder(uhd_ops.insert_early_compressor(vit.eval(), 0))
        return CorpusModel(encoder, 8, 64, gray, gray, {"name": "tiny"})

    return make_model


def actors():
    """Processes of Ray's workers that this process started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if b"MapWorker" in name and os.getpid() in ancestors(int(folder.name)):
                yield int(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def ancestors(process):
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        yield process


def test_a_killed_worker_changes_nothing(corpus, tmp_path, monkeypatch):
    killed, make_model = [], tiny_model()

    def kill(progress):
        if not killed:
            killed.append(next(actors()))
            os.kill(killed[0], signal.SIGKILL)

    # Twenty shards or so, of what the smallest unit of the option would make two.
    monkeypatch.setattr(CorpusModel, "bytes_per_token", lambda model: 320.0)
    local, distributed = tmp_path / "local", tmp_path / "ray"
    options = {"max_tokens": 2000, "shard_mb": 1}
    assert encode_dataset(corpus, local, make_model, **options).failed == 4
    done = encode_dataset(
        corpus, distributed, make_model, **options, engine="ray", workers=2, report=kill
    )
    assert killed
    assert (done.images, done.failed) == (60, 4)
    assert contents(local) == contents(distributed)
    assert len({entry["shard"] for entry in entries(local)}) > 10


def test_command_line(corpus, tmp_path, capsys):
    command = ["encode-dataset", str(corpus), "--model", "test_vit", "--layer", "2"]
    ours = [*command, "--out", str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]
    assert main(ours) == 0
    assert "60 images encoded into" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "local"), "--workers", "1"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("cluster", "workers", "threads", "device", "expected"),
    [
        ({"CPU": 2.0}, 2, 1, "cpu", {"num_cpus": 0.75}),  # half a processor for Ray's own tasks
        ({"CPU": 64.0}, 4, 8, "cpu", {"num_cpus": 8}),
        ({"CPU": 0.25}, 3, 1, "cpu", {"num_cpus": 0.01}),
        ({"CPU": 64.0, "GPU": 8.0}, 8, 1, "cuda", {"num_cpus": 1, "num_gpus": 1.0}),
        ({"CPU": 64.0, "GPU": 2.0}, 8, 1, "cuda", {"num_cpus": 1, "num_gpus": 0.25}),
        ({"CPU": 64.0, "GPU": 8.0}, 2, 1, "cuda", {"num_cpus": 1, "num_gpus": 1.0}),
    ],
)
def test_shares(cluster, workers, threads, device, expected):
    assert _share(cluster, workers, threads, device) == expected


def test_no_gpu_in_the_cluster():
    with pytest.raises(RuntimeError, match="Ray's cluster has none"):
        _share({"CPU": 4.0}, 1, 1, "cuda")
