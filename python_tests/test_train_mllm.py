# SPDX-License-Identifier: Apache-2.0
"""The MLLM example: what its model is given, what its arms start from, and that it can go on."""

import copy
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import uhd_ops

pytest.importorskip("transformers", "5.6")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(torch, "set_num_threads", lambda threads: None)
        spec = importlib.util.spec_from_file_location("train_mllm", EXAMPLES / "05_train_mllm.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def trained(example):
    """Weights that differ from every initialisation."""
    torch.manual_seed(3)
    reader = example.Reader()
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.normal_(std=0.2)
    return reader.state_dict()


def test_a_page_is_drawn_from_its_seed(example):
    first, same, other = (example.pages.render(seed) for seed in ("7", "7", "8"))
    assert first.text == same.text
    assert first.image.tobytes() == same.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()
    assert [len(word) for word in first.text.split()] == [2, 2]
    assert first.image.size == example.pages.PAGE
    assert np.asarray(first.image).min() < 160  # ink


def test_a_page_is_larger_than_a_view(example):
    plan = example.pages.plan()
    assert plan.grid == (1, 2)
    assert list(plan.grids) == [(4, 12), (8, 8), (8, 8)]


def test_fonts_that_are_missing(example, monkeypatch):
    """Pillow's own is there everywhere, and scales."""
    pages = example.pages
    monkeypatch.setattr(pages, "FONTS", ["no such font.ttf"])
    for cached in (pages.fonts, pages.font):
        cached.cache_clear()
    try:
        assert pages.fonts() == [pages.BUILT_IN]
        small, large = (pages.font(pages.BUILT_IN, size).getlength("A") for size in (20, 40))
        assert large == pytest.approx(2 * small, rel=0.1)
        assert np.asarray(pages.render("7").image).min() < 160
    finally:
        for cached in (pages.fonts, pages.font):
            cached.cache_clear()


def test_letters_are_where_they_are_drawn(example):
    """A patch that a letter covers has ink in it or beside it; one without is nearly white."""
    pages = example.pages
    page = pages.render("7")
    numbers = torch.from_numpy(pages.letters(page))
    pixels, grids = pages.pack([page])
    assert len(numbers) == grids.num_tokens == len(pixels)
    assert set(numbers.unique().tolist()) == {0} | {
        1 + pages.ALPHABET.index(letter) for letter in page.text.replace(" ", "")
    }
    assert pixels[numbers > 0].mean() < pixels[numbers == 0].mean() - 0.3
    left = numbers[48:112].view(8, 8)  # the first slice
    words = page.text.split()
    for word, rows in zip(words, (left[:4], left[4:]), strict=True):
        assert set(rows[rows > 0].tolist()) <= {1 + pages.ALPHABET.index(word[0])}


def test_prompt_by_hand(example):
    visual = ["<visual>"]
    expected = ["<image>", *visual * 3, "</image>", *(["<slice>", *visual * 4, "</slice>"] * 2)]
    assert example.prompt(example.pages.plan(), 4) == [*expected, "\n", "<answer>"]


def test_batch_by_hand(example):
    batch = example.make_batch(["1", "2"], 4)
    assert batch.pixels.shape == (2 * 176, 3, 8, 8)
    names = list(example.NUMBER)
    for row, seed in enumerate(("1", "2")):
        text = example.pages.render(seed).text
        prompt = example.prompt(example.pages.plan(), 4)
        assert [names[i] for i in batch.ids[row].tolist()] == [*prompt, *text, "<end>"]
        assert batch.labels[row].tolist() == [
            *[example.IGNORED] * len(prompt),
            *batch.ids[row, len(prompt) :].tolist(),
        ]


def test_visual_tokens_stand_in_their_places(example, trained):
    """The decoder meets those of each page, in order, behind that page's text tokens."""
    reader = example.Reader()
    reader.load_state_dict(trained)
    seen = []
    reader.llm.model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["inputs_embeds"]), with_kwargs=True
    )
    batch = example.make_batch(["1", "2"], reader.side)
    with torch.no_grad():
        reader(batch)
        alone = []
        for seed in ("1", "2"):
            pixels, grids = example.pages.pack([example.pages.render(seed)])
            encoded = reader.tower(pixels, grids)
            alone.append(reader.connector(encoded.tokens, encoded.grids))
    places = batch.ids == example.NUMBER["<visual>"]
    for row in range(2):
        torch.testing.assert_close(seen[0][row][places[row]], alone[row], rtol=1e-4, atol=1e-4)


def test_variance_inside_windows(example):
    grids = uhd_ops.PackedGrids([(4, 6), (2, 2)])
    torch.manual_seed(0)
    means = torch.randn(7, 3)
    rows = [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6]
    equal = means[rows]
    assert example.inside_windows(equal, grids) == pytest.approx(0, abs=1e-6)
    apart = torch.tensor([1.0, -1.0]).repeat(14)[:, None]
    assert example.inside_windows(apart, grids) == pytest.approx(1)
    # One channel of each kind, of spreads that differ.
    both = torch.cat([equal, 3 * apart], 1)
    between = float((means - means.mean(0)).square().mean(0).sum())
    assert example.inside_windows(both, grids) == pytest.approx(9 / (9 + between))
    noise = torch.randn(40 * 40, 8, 2, 2)
    assert example.inside_windows(noise, [(40, 40)]) == pytest.approx(0.75, abs=0.02)


def test_redundancy_is_of_what_is_compressed(example, trained):
    """The tokens after block LAYER, and not those of another block."""
    reader = example.Reader()
    reader.load_state_dict(trained)
    shares = example.redundancy(reader, 2)
    pixels, grids = example.pages.pack([example.pages.render(f"test {page}") for page in range(2)])
    vit = copy.deepcopy(reader.tower.vit).eval()
    vit.blocks, vit.norm = vit.blocks[: example.LAYER + 1], torch.nn.Identity()
    with torch.no_grad():
        expected = example.SliceEncoder(vit)(pixels, grids).tokens
    for name, x in (("patches", pixels), ("tokens", expected)):
        assert shares[name] == pytest.approx(example.inside_windows(x, grids), abs=1e-4)


def test_exact_means_generated(example, trained):
    """What is generated token by token is what teacher forcing counts as right, and no other."""
    reader = example.Reader()
    reader.load_state_dict(trained)
    answer = example.transcribe(reader, "1")
    batch = example.make_batch(["1"], reader.side)
    question = batch.ids[:, : int((batch.labels == example.IGNORED).sum())]
    for last in (answer[-1], "A" if answer[-1] != "A" else "E"):
        ids = torch.tensor([[example.NUMBER[name] for name in (*answer[:-1], last)]])
        labels = torch.cat([torch.full_like(question, example.IGNORED), ids], 1)
        forced = batch._replace(ids=torch.cat([question, ids], 1), labels=labels)
        with torch.no_grad():
            right = reader(forced).argmax(-1) == ids[0]
        assert bool(right.all()) == (last == answer[-1])


def started(example, trained, arm):
    torch.manual_seed(0)
    reader = example.Reader()
    reader.load_state_dict(trained)
    example.compress(reader, arm)
    return reader, dict(reader.named_parameters())


def test_arms_start_from_the_trained_model(example, trained):
    starts = {arm: started(example, trained, arm) for arm in example.ARMS}
    tokens = {arm: example.prompt(example.pages.plan(), r.side) for arm, (r, _) in starts.items()}
    assert [tokens[arm].count("<visual>") for arm in example.ARMS] == [44, 11, 11, 11]
    for arm, (reader, parameters) in starts.items():
        reader(example.make_batch(["1"], reader.side))
        moved = {n.replace("stages.1.", "stages.0."): p for n, p in parameters.items()}
        for name, value in trained.items():
            found = moved if arm == example.POST else parameters
            assert torch.equal(found[name], value), (arm, name)
    _, reused = starts[example.REUSED]
    _, random = starts[example.RANDOM]
    inserted = {name for name in reused if ".compressor." in name}
    assert reused.keys() == random.keys() == trained.keys() | inserted
    block = f"tower.vit.blocks.{example.LAYER}"
    weight = f"{block}.compressor.attn.qkv.weight"
    assert torch.equal(reused[weight], trained[f"{block}.attn.qkv.weight"])
    for name in inserted:
        if "norm" in name:
            assert (random[name] == float(name.endswith("weight"))).all(), name
        else:
            bound = random[name.replace("bias", "weight")].shape[-1] ** -0.5
            assert 0.8 * bound < random[name].abs().max() <= bound, name


def test_phases_train_what_they_say(example, trained):
    trains = {}
    for number, phase in enumerate(example.PHASES):
        reader = example.Reader()
        if number >= example.INSERTION:
            example.compress(reader, example.REUSED)
        optimizer = example.prepare(reader, phase, example.ALONE)
        names = {n for n, p in reader.named_parameters() if p.requires_grad}
        in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert in_groups == {id(p) for p in reader.parameters() if p.requires_grad}
        peaks = {group["name"].partition(".")[0]: group["peak"] for group in optimizer.param_groups}
        parts = {name.split(".")[0] for name in names if ".compressor." not in name}
        trains[phase.name] = (parts, any(".compressor." in name for name in names), peaks)
    everything = {"tower", "connector", "llm"}
    assert {name: (parts, new) for name, (parts, new, _) in trains.items()} == {
        "letters": ({"tower", "letters"}, False),
        "reading": (everything, False),
        "stage 1": ({"connector"}, True),
        "stage 2": (everything, True),
        "stage 3": (everything, True),
        "stage 4": (everything, True),
    }
    assert trains["letters"][2] == {"tower": 8e-3}
    assert trains["stage 1"][2] == pytest.approx({"compressor": 8e-3, "connector": 8e-3})
    rest = dict.fromkeys(("compressor", "tower", "connector"), 8e-4)
    assert trains["stage 3"][2] == pytest.approx({**rest, "llm": 4e-3})


STEPS = (1, 2, 3, 3, 1, 1)


def phases(example):
    return [p._replace(steps=steps) for p, steps in zip(example.PHASES, STEPS, strict=True)]


@pytest.fixture(scope="module")
def straight(example):
    return example.run(example.REUSED, 0, phases(example), example.ALONE)


@pytest.mark.parametrize("stop", [(2, 3), (3, 2)])
def test_resuming_is_exact(example, straight, tmp_path, stop):
    """Stopped at the end of a phase, and in one."""

    def after(number, step, reader, optimizer):
        if (number, step) == stop:
            name = f"phase-{number}-step-{step:06}"
            example.save(tmp_path / name, reader, optimizer, example.ALONE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example.run(example.REUSED, 0, phases(example), example.ALONE, after=after)
    (tmp_path / "phase-5-step-000001").mkdir()  # not finished, so without DCP's .metadata
    at = example.newest(tmp_path)
    assert at[:2] == stop
    resumed = example.run(example.REUSED, 0, phases(example), example.ALONE, at=at)
    assert resumed.keys() == straight.keys()
    assert [name for name in straight if not torch.equal(resumed[name], straight[name])] == []


def command_line(example, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["05_train_mllm.py", *map(str, arguments)])
    example.main()


def test_command_line(example, tmp_path, monkeypatch, capsys):
    command_line(example, monkeypatch, "--quick", "--out", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for line, phase in zip(lines, example.PHASES, strict=False):
        assert line.startswith(f"{phase.name}: loss ")
    assert sum(" is read as " in line for line in lines) == 4
    assert len(list(tmp_path.glob("checkpoints/phase-?-step-000002/.metadata"))) == 6


@pytest.mark.slow
def test_experiment(example, tmp_path, monkeypatch, capsys):
    command_line(example, monkeypatch, "--quick", "--seeds", 1, "--out", tmp_path)
    (results,) = tmp_path.glob("train_mllm_*.json")
    record = json.loads(results.read_text())
    assert record["steps"] == [0, 2, 4, 6, 8]
    assert record["ends"] == {"stage 1": 2, "stage 2": 4, "stage 3": 6, "stage 4": 8}
    assert [(row["arm"], row["start"]) for row in record["rows"]] == list(example.ARMS)
    assert [row["visual_tokens"] for row in record["rows"]] == [44, 11, 11, 11]
    assert all(len(row["loss"]) == len(row["correct"]) == 5 for row in record["rows"])
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [len(shares) for shares in record["inside_windows"].values()] == [1, 1]
    assert capsys.readouterr().out.count("| compressor | random | 11 |") == 2


def test_checkpoints_are_not_overwritten(example, tmp_path, monkeypatch):
    done = tmp_path / "checkpoints" / "phase-0-step-000002"
    done.mkdir(parents=True)
    (done / ".metadata").touch()
    with pytest.raises(SystemExit, match="has checkpoints: give --resume to go on"):
        command_line(example, monkeypatch, "--quick", "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
    ],
)
def test_refusals(example, monkeypatch, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        command_line(example, monkeypatch, "--out", tmp_path, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["transformers", "PIL", "timm.layers", "matplotlib.figure"])
def test_missing_packages_are_named(monkeypatch, module):
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("pages", "experiments"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    spec = importlib.util.spec_from_file_location("without", EXAMPLES / "05_train_mllm.py")
    with pytest.raises(SystemExit, match=rf"{module}.*pip install 'uhd_ops\[examples\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_results_are_complete(example):
    """Those in docs/warm_start.md, with the settings that the example still has."""
    record = json.loads(example.experiments.newest("train_mllm").read_text())
    assert len(record["seeds"]) >= 5
    found = [(row["seed"], row["arm"], row["start"]) for row in record["rows"]]
    assert found == [(seed, *arm) for seed in record["seeds"] for arm in example.ARMS]
    settings = example.Settings()
    now = json.loads(json.dumps(example.conditions(settings)))
    assert record["settings"] == {**now, "fonts": record["settings"]["fonts"]}
    assert record["steps"] == example.measured_steps(settings)
    assert list(record["ends"].values()) == [60, 80, 400, 420]
    for row in record["rows"]:
        assert len(row["correct"]) == len(row["loss"]) == len(record["steps"])
        assert all(0 <= n <= settings.test_pages for n in row["correct"])


def test_redundancy_in_the_results(example):
    """That of the patches is that of the pages of today; it depends on the fonts a little."""
    record = json.loads(example.experiments.newest("train_mllm").read_text())
    batch = example.test_batches(example.Settings().test_pages, 4, example.ALONE)[0]
    share = example.inside_windows(batch.pixels, batch.grids)
    inside = record["inside_windows"]
    assert {len(shares) for shares in inside.values()} == {len(record["seeds"])}
    assert inside["patches"] == pytest.approx([share] * len(record["seeds"]), abs=0.03)
    sentence = example.experiments.page_tables(record).splitlines()[-1]
    assert f" packed patches {100 * inside['patches'][0]:.1f} % is inside " in sentence
    shares = [100 * share for share in inside["tokens"]]
    mean, deviation = statistics.mean(shares), statistics.stdev(shares)
    assert f", {mean:.1f} ± {deviation:.1f} %; " in sentence


def test_page_tables_by_hand(example):
    """The last column of each."""
    record = json.loads(example.experiments.newest("train_mllm").read_text())
    lines = example.experiments.page_tables(record).splitlines()
    for title, key, unit, digits in (
        ("exact", "correct", 100 / record["settings"]["test_images"], 1),
        ("loss", "loss", 1, 3),
    ):
        table = lines[next(i for i, line in enumerate(lines) if line.startswith(f"| {title} |")) :]
        last = {}
        for start in ("reused", "random"):
            rows = [row for row in record["rows"] if row["start"] == start]
            last[start] = [unit * row[key][-1] for row in rows]
            mean, deviation = statistics.mean(last[start]), statistics.stdev(last[start])
            line = next(line for line in table if line.startswith(f"| compressor | {start} | 11 |"))
            cells = line.removesuffix(" |").split(" | ")
            assert cells[9] == f"{mean:.{digits}f} ± {deviation:.{digits}f}"
            if key == "correct":
                means = np.mean([unit * np.array(row[key]) for row in rows], 0)
                reached = np.array(record["steps"])[means >= 90].tolist()
                assert cells[10:] == [str(step) for step in reached[:1] or ["never"]]
            else:
                assert cells[10:] == []
        gain = [a - b for a, b in zip(*last.values(), strict=True)]
        mean, deviation = statistics.mean(gain), statistics.stdev(gain)
        line = [line for line in table if line.startswith(f"| {title} | ")][-1]
        assert line.endswith(f"| {mean:+.{digits}f} ± {deviation:.{digits}f} |")


def restored(example, number, step, folder):
    reader, phase = example.Reader(), example.QUICK.phases[number]
    if number >= example.INSERTION:
        example.compress(reader, example.REUSED)
    optimizer = example.prepare(reader, phase, example.ALONE)
    checkpoint = folder / f"phase-{number}-step-{step:06}"
    example.load(checkpoint, reader, optimizer, example.ALONE)
    return reader, optimizer, phase


@pytest.mark.slow
def test_two_processes_train_what_one_does(example, tmp_path):
    """By torchrun, on FSDP2. One process takes its checkpoints, and makes the next step alike.

    What is compared is AdamW's mean of gradients: AdamW divides them by their size, so where they
    are zero up to rounding a step of weights has any sign.
    """
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = [EXAMPLES / "05_train_mllm.py", "--quick", "--checkpoint-every=1", "--out", tmp_path]
    subprocess.run([sys.executable, *launch, *script], check=True, capture_output=True)
    for number in (0, 1, 2, 4):  # as many sets of parameters
        folder = tmp_path / "checkpoints"
        _, expected, _ = restored(example, number, 2, folder)
        reader, optimizer, phase = restored(example, number, 1, folder)
        assert list(example.train(reader, optimizer, phase, 0, example.ALONE, 1)) == [2]
        means = [[state["exp_avg"] for state in o.state.values()] for o in (optimizer, expected)]
        assert len(means[0]) == sum(p.requires_grad for p in reader.parameters())
        largest = max(float(mean.abs().max()) for mean in means[1])
        for found, wanted in zip(*means, strict=True):
            # A few hundred roundings, as a mean over ranks and their pages adds in another order.
            torch.testing.assert_close(found, wanted, rtol=0, atol=512 * 2**-23 * largest)
