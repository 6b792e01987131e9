# SPDX-License-Identifier: Apache-2.0
"""A corpus becomes shards: once, whole, inside its folder, and the same whoever encodes it."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader

import uhd_ops
from uhd_ops.cli import main
from uhd_ops.corpus import CorpusModel, EncodedExamples, encode_dataset
from uhd_ops.corpus.sources import list_images
from uhd_ops.nn import SliceEncoder

GRAY = (0.5, 0.5, 0.5)
CLI = ["--model", "test_vit", "--layer", "2", "--shard-mb", "1", "--workers", "1"]


def make_model():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2).eval()
    encoder = SliceEncoder(uhd_ops.insert_early_compressor(vit, 0)).requires_grad_(False)
    return CorpusModel(encoder, 8, 32, GRAY, GRAY, {"name": "tiny"})


def picture(path, size=(60, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def corpus(tmp_path):
    """Twelve images, two of them broken, in two folders."""
    root = tmp_path / "corpus"
    for number in range(10):
        folder = root / "a" if number % 3 else root
        picture(folder / f"{number:02}.png", (30 + 17 * number, 120 - 9 * number), number)
    whole = (root / "00.png").read_bytes()
    (root / "a" / "broken.jpg").write_bytes(b"no image")
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("no image, and not taken for one")
    return root


@pytest.fixture
def small_shards(monkeypatch):
    """Three images or so in a shard; the smallest unit of the option is a megabyte."""
    monkeypatch.setattr(CorpusModel, "bytes_per_token", lambda model: 5000.0)


def encode(corpus, out, **options):
    return encode_dataset(corpus, out, make_model, **{"shard_mb": 1, "max_tokens": 300, **options})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entries(out):
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def by_hand(path, model):
    image = uhd_ops.load_image(path)
    plan = uhd_ops.plan_slices(*image.size, scale_resolution=32, patch_size=8)
    pixels, grids = uhd_ops.pack_views(uhd_ops.slice_image(image, plan), 8, mean=GRAY, std=GRAY)
    return model.encoder(pixels, grids)


def test_tokens_are_those_of_each_image_alone(corpus, tmp_path, small_shards):
    out = tmp_path / "out"
    done = encode(corpus, out)
    images = uhd_ops.open_dataset(out)
    assert (done.images, done.failed, done.skipped) == (12, 2, 0)
    assert done.tokens == sum(len(image.tokens) for image in images.values())
    expected = [*(f"{n:02}.png" for n in range(0, 10, 3))]
    expected += [f"a/{n:02}.png" for n in range(10) if n % 3]
    assert list(images) == expected  # in the order of the corpus, file by file
    assert set(images.failed) == {"a/broken.jpg", "a/cut.png"}
    assert len({entry["shard"] for entry in entries(out)} - {None}) >= 3
    model = make_model()
    for identity, image in images.items():
        alone = by_hand(corpus / identity, model)
        assert image.grids == alone.grids
        # Sums of 16 to 64 terms, in five layers, of values below 4: 2^-24 * 64 * 5 * 4.
        assert torch.allclose(image.tokens, alone.tokens, rtol=0, atol=1e-4), identity


def test_native_resolution(corpus, tmp_path):
    """One view of each image, at most the budget, which is one of the options of a run."""
    out = tmp_path / "out"
    assert encode(corpus, out, native_tokens=64).failed == 2
    model, images, sizes = make_model(), uhd_ops.open_dataset(out), set()
    for identity, image in images.items():
        picture = uhd_ops.load_image(corpus / identity)
        plan = uhd_ops.plan_native(*picture.size, max_tokens=64, patch_size=8)
        views = uhd_ops.slice_image(picture, plan)
        pixels, grids = uhd_ops.pack_views(views, 8, mean=GRAY, std=GRAY)
        alone = model.encoder(pixels, grids)
        assert image.grids == alone.grids
        assert torch.allclose(image.tokens, alone.tokens, rtol=0, atol=1e-4), identity
        sizes.add(plan.thumbnail)
    assert len(sizes) > 2
    before = contents(out)
    assert encode(corpus, out, native_tokens=64).skipped == 12
    assert contents(out) == before
    with pytest.raises(ValueError, match="holds a run with native_tokens = 64, got None"):
        encode(corpus, out)
    with pytest.raises(ValueError, match="native_tokens must be at least 16, got 15"):
        encode(corpus, tmp_path / "other", native_tokens=15)
    assert not (tmp_path / "other").exists()


def test_the_index_says_where_everything_came_from(corpus, tmp_path):
    import hashlib

    out = tmp_path / "out"
    encode(corpus, out)
    found = {entry["id"]: entry for entry in entries(out)}
    whole, cut = found["00.png"], found["a/cut.png"]
    digest = hashlib.sha256((corpus / "00.png").read_bytes()).hexdigest()
    assert whole["digest"] == f"sha256:{digest}"
    assert whole["image_size"] == [30, 120]
    assert whole["tokens"] == sum(h * w for h, w in whole["grids"])
    assert (cut["status"], cut["shard"], cut["tokens"]) == ("failed", None, 0)
    assert "cannot be read" in cut["error"]
    assert str(corpus) not in (out / "index.jsonl").read_text()


def test_batches_are_the_same_whoever_asks(corpus, tmp_path, small_shards):
    """Readers that overtake each other, and a run that is stopped at each of its shards."""
    encode(corpus, tmp_path / "plain")
    encode(corpus, tmp_path / "readers", readers=3)
    assert contents(tmp_path / "plain") == contents(tmp_path / "readers")

    class StopError(Exception):
        pass

    def stop(progress):
        raise StopError

    shards = len(list((tmp_path / "plain").glob("shard-*")))
    for _ in range(shards):
        with pytest.raises(StopError):
            encode(corpus, tmp_path / "stopped", report=stop)
    assert encode(corpus, tmp_path / "stopped") == (0, 0, 12, 2)
    assert contents(tmp_path / "plain") == contents(tmp_path / "stopped")


def test_no_finished_image_is_encoded_again(corpus, tmp_path, small_shards, monkeypatch):
    encode(corpus, tmp_path / "out")
    monkeypatch.setattr(CorpusModel, "encode", None)
    assert encode(corpus, tmp_path / "out") == (0, 0, 12, 2)


def test_what_has_come_is_encoded(corpus, tmp_path, small_shards):
    out = tmp_path / "out"
    encode(corpus, out)
    before = contents(out)
    picture(corpus / "0.png")  # the first of all, by its name
    tokens = len(by_hand(corpus / "0.png", make_model()).tokens)
    assert encode(corpus, out)[:3] == (1, tokens, 12)
    after = contents(out)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"index.jsonl", "plan.jsonl", max(n for n in after if "shard" in n)}


def test_what_a_kill_leaves_is_mended(corpus, tmp_path, small_shards):
    out = tmp_path / "out"
    encode(corpus, out)
    whole = contents(out)
    shards = sorted(name for name in whole if "shard" in name)
    (out / shards[-1]).unlink()
    (out / f".{shards[-1]}.unfinished").write_bytes(b"half a shard")
    for name in ("index.jsonl", "plan.jsonl"):  # lines are cut off; a shard was not yet listed
        lines = whole[name].splitlines(keepends=True)
        (out / name).write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    assert uhd_ops.open_dataset(out)  # while it is so, too
    encode(corpus, out)
    assert contents(out) == whole


@pytest.mark.slow
def test_workers_give_the_same_bits(corpus, tmp_path, small_shards, monkeypatch):
    encode(corpus, tmp_path / "one")
    encode(corpus, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    """SIGKILL, again and again, a little later each time; no worker outlives its run."""
    corpus, out, whole = tmp_path / "corpus", tmp_path / "out", tmp_path / "whole"
    for number in range(48):
        picture(corpus / f"{number:02}.png", (500 + number, 400), number)
    command = [sys.executable, "-m", "uhd_ops", "encode-dataset", str(corpus), *CLI[:-1], "2"]
    seen = set()
    for shards in (1, 2):
        run = subprocess.Popen([*command, "--out", str(out)], start_new_session=True)
        deadline = time.monotonic() + 120
        while len(list(out.glob("shard-*"))) < shards and run.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.kill()
        run.wait()
        for name in seen:
            assert (out / name[0]).stat().st_mtime_ns == name[1], "written twice"
        seen = {(path.name, path.stat().st_mtime_ns) for path in out.glob("shard-*")}
        while _group_is_alive(run.pid):
            assert time.monotonic() < deadline, "a worker outlived the run it worked for"
            time.sleep(0.05)
    subprocess.run([*command, "--out", str(out)], check=True)
    assert main(["encode-dataset", str(corpus), *CLI, "--out", str(whole)]) == 0
    assert contents(out) == contents(whole)
    assert len(list(out.glob("shard-*"))) == 3


def _group_is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_command_line(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["encode-dataset", str(corpus), "--out", str(out), *CLI]
    assert main(command) == 0
    assert "12 images encoded into" in capsys.readouterr().out
    assert main([*command, "--strict", "--json"]) == 3  # failed images of earlier runs count
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"images": 0, "tokens": 0, "skipped": 12, "failed": 2, "out": str(out)}
    (corpus / "a" / "broken.jpg").unlink()
    (corpus / "a" / "cut.png").unlink()
    assert main([*command[:3], str(tmp_path / "strict"), *CLI, "--strict"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{corpus}/a"], "holds a run with root = '{corpus}', got '{corpus}/a'"),
        (["nowhere"], "must be a folder, a glob or a text file of paths"),
        (["{corpus}", "--model", "resnet18"], "takes no compressor"),
        (["{corpus}", "--layer", "6"], "layer must be in 0..5"),
        (["{corpus}", "--seed", "1"], "holds a run with model = "),
        (["{corpus}", "--threads", "2"], "holds a run with threads = 1, got 2"),
        (["{corpus}", "--native", "64"], "holds a run with native_tokens = None, got 64"),
        (["{corpus}", "--out", "{corpus}"], "must be empty or hold an encoded corpus, and holds"),
        (["{corpus}", "--out", "{corpus}/00.png"], "File exists"),
    ],
)
def test_refusals(arguments, message, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["encode-dataset", str(corpus), "--out", str(out), *CLI]
    assert main(command) == 0
    before, listed = contents(out), sorted(corpus.rglob("*"))
    arguments = [argument.format(corpus=corpus) for argument in arguments]
    capsys.readouterr()
    assert main([command[0], *arguments[:1], *command[2:], *arguments[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(corpus=corpus) in line
    assert contents(out) == before
    assert sorted(corpus.rglob("*")) == listed


def test_no_gpu(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["encode-dataset", str(corpus), "--out", str(tmp_path / "out"), "--device", "cuda"]
    assert main(command) == 2
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


def test_two_runs_on_one_folder(corpus, tmp_path, capsys):
    out = tmp_path / "out"

    def another(progress):
        assert main(["encode-dataset", str(corpus), "--out", str(out), *CLI]) == 2

    encode(corpus, out, report=another)
    assert f"another run is writing to '{out}'" in capsys.readouterr().err


def test_full_disk(corpus, tmp_path, small_shards, monkeypatch):
    out = tmp_path / "out"
    encode(corpus, tmp_path / "whole")

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("000002.safetensors.unfinished"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        encode(corpus, out)
    monkeypatch.undo()
    assert sorted(path.name for path in out.glob("*shard*")) == [
        "shard-000000.safetensors",
        "shard-000001.safetensors",
    ]
    monkeypatch.setattr(CorpusModel, "bytes_per_token", lambda model: 5000.0)
    encode(corpus, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_files_that_go_away_or_change(corpus, tmp_path, small_shards):
    """After the head of the file was read, and before the image is."""
    out, changes = tmp_path / "out", []

    def change(progress):
        if not changes:
            changes.append(True)
            (corpus / "a" / "07.png").unlink()
            picture(corpus / "a" / "08.png", (20, 20))

    model = make_model()
    encoded = []
    original = CorpusModel.encode

    def encode_and_change(model, views):
        change(None)
        encoded.append(len(views))
        return original(model, views)

    CorpusModel.encode = encode_and_change
    try:
        encode_dataset(corpus, out, lambda: model, shard_mb=100, max_tokens=100)
    finally:
        CorpusModel.encode = original
    failed = uhd_ops.open_dataset(out).failed
    assert failed["a/07.png"] == "cannot be opened: No such file or directory"
    assert failed["a/08.png"].startswith("the file has changed: it has 20x20 px")
    assert sum(encoded) == 8


NAMES = ["...png", "-rf.png", "a b\n.png", "ü/ö.png", "back\\slash.png", b"\xff.png", "%2e%2e.png"]


def test_names_cannot_do_anything(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    for name in NAMES:
        picture(os.fsdecode(os.path.join(os.fsencode(corpus), os.fsencode(name))))
    encode(corpus, out)
    images = uhd_ops.open_dataset(out)
    expected = {"...png", "-rf.png", "a b\n.png", "ü/ö.png", "%2e%2e.png"}
    assert set(images) == expected | {"back\\\\slash.png", "\\udcff.png"}
    assert all(len(image.tokens) for image in images.values())
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out"}


def test_a_name_that_the_format_keeps(tmp_path):
    picture(tmp_path / "__metadata__")
    (tmp_path / "list.txt").write_text("__metadata__\n")
    encode(tmp_path / "list.txt", tmp_path / "out")
    failed = uhd_ops.open_dataset(tmp_path / "out").failed
    assert failed == {"__metadata__": "no image of a corpus can have this name"}


def test_links_and_pipes_in_a_corpus(tmp_path):
    picture(tmp_path / "secret" / "s.png")
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    picture(corpus / "own.png")
    (corpus / "link.png").symlink_to(tmp_path / "secret" / "s.png")
    (corpus / "folder.png").symlink_to(tmp_path / "secret")
    (corpus / "loop").symlink_to(corpus)
    os.mkfifo(corpus / "pipe.png")
    (corpus / "list.txt").write_text("own.png\n\nlink.png\nown.png\nnowhere.png\n")
    encode(corpus, out)
    images = uhd_ops.open_dataset(out)
    assert list(images) == ["own.png"]
    assert images.failed == {
        "folder.png": "cannot be opened: it is a symbolic link",
        "link.png": "cannot be opened: it is a symbolic link",
        "pipe.png": "cannot be opened: it is not a regular file",
    }
    encode(corpus / "list.txt", tmp_path / "listed")
    images = uhd_ops.open_dataset(tmp_path / "listed")
    assert list(images) == ["own.png"]  # named twice, encoded once
    assert list(images.failed) == ["link.png", "nowhere.png"]


@pytest.mark.parametrize(
    "name", ["run.json", "plan.jsonl", "index.jsonl", ".lock", "shard-000000.safetensors"]
)
def test_links_in_the_folder_of_results(name, corpus, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    outside.write_text("mine")
    out.mkdir()
    (out / name).symlink_to(outside)
    if name == "index.jsonl":  # replaced, and never opened
        encode(corpus, out)
        assert not (out / name).is_symlink()
    else:
        with pytest.raises(OSError, match=f"'{name}'.*it is a symbolic link"):
            encode(corpus, out)
    assert outside.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "outside"}


def test_sources(corpus, tmp_path):
    def ids(source):
        return [image.id for image in list_images(source)[1]]

    assert ids(corpus) == sorted(ids(corpus), key=lambda i: (i.count("/"), i))
    assert ids(corpus / "*.png") == ["00.png", "03.png", "06.png", "09.png"]
    assert ids(corpus / "**" / "0[12].png") == ["a/01.png", "a/02.png"]
    assert ids(corpus / "**" / "*.t?t") == ["notes.txt"]
    assert list_images(corpus / "a" / "*.png")[0] == str(corpus / "a")
    binary = tmp_path / "list"
    binary.write_bytes(b"a.png\n\xff.png\n")
    with pytest.raises(ValueError, match="must be a text file of paths in UTF-8"):
        ids(binary)
    with pytest.raises(FileNotFoundError, match="got no such file"):
        list_images(corpus / "nowhere" / "*.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers, corpus, tmp_path, small_shards):
    encode(corpus, tmp_path / "out")
    images = uhd_ops.open_dataset(tmp_path / "out")
    assert len(next(iter(images.values())).tokens)  # a file is open when processes begin
    loader = DataLoader(
        images.examples(), 4, num_workers=workers, collate_fn=EncodedExamples.collate
    )
    batches = list(loader)
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    for batch in batches:
        alone = [images[identity] for identity in batch.ids]
        assert torch.equal(batch.tokens, torch.cat([image.tokens for image in alone]))
        assert list(batch.grids) == [pair for image in alone for pair in image.grids]
        assert batch.views_per_image == tuple(image.grids.num_views for image in alone)


def test_mapping(corpus, tmp_path, small_shards):
    out = tmp_path / "out"
    encode(corpus, out)
    images = uhd_ops.open_dataset(str(out))
    first = images["00.png"]
    copy = pickle.loads(pickle.dumps(images))
    assert list(copy) == list(images)
    assert torch.equal(copy["00.png"].tokens, first.tokens)
    assert "00.png" in images
    assert "a/broken.jpg" not in images
    with pytest.raises(KeyError, match=r"a/broken\.jpg"):
        images["a/broken.jpg"]
    assert repr(images) == f"EncodedDataset({str(out)!r}: 10 images, 2 failed)"
    expected = first.tokens.clone()
    shutil.rmtree(out)  # what is mapped stays
    assert torch.equal(first.tokens, expected)


def test_an_index_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError):
        uhd_ops.open_dataset(tmp_path)
    (tmp_path / "index.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 of index\.jsonl .* is none of an encoded"):
        uhd_ops.open_dataset(tmp_path)


def test_interrupt(corpus, tmp_path, capsys, monkeypatch):
    def interrupt(model, views):
        raise KeyboardInterrupt  # as Ctrl-C does; pytest's workers are deaf to the signal

    monkeypatch.setattr(CorpusModel, "encode", interrupt)
    out = tmp_path / "out"
    assert main(["encode-dataset", str(corpus), "--out", str(out), *CLI]) == 130
    monkeypatch.undo()
    assert main(["encode-dataset", str(corpus), "--out", str(out), *CLI]) == 0
    assert "12 images encoded" in capsys.readouterr().out


def test_page(corpus, tmp_path, monkeypatch, capsys):
    """The code of docs/corpus.md runs, on the folders that it names."""
    page = Path(__file__).resolve().parent.parent / "docs" / "corpus.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for name in ("a/cat.png", "a/dog.png", "b.png"):
        picture(f"photos/{name}")
    encode("photos", "tokens")
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/corpus.md", "exec"), namespace)  # that is the point of this test
    assert "Progress(images=3, tokens=" in capsys.readouterr().out
    assert namespace["batch"].ids == ("b.png",)
    assert namespace["image"].tokens.shape == (namespace["image"].grids.num_tokens, 16)
    for file, text in (("shard-", "safetensors"), ("index.jsonl", "digest"), ("run.json", "")):
        assert file in page.read_text()
        assert any(path.name.startswith(file) for path in Path("tokens").iterdir()), text
    listed = set(re.search(r"a line for each image: (.*?)\|", page.read_text())[1].split("`")[1::2])
    assert listed - {"ok", "failed"} == set(entries(Path("tokens"))[0])
