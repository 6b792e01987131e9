# SPDX-License-Identifier: Apache-2.0
"""Train a whole MLLM, with a compressor in its vision tower, to read words on pages.

Slices of a page go as one packed sequence through a ViT with SigLIP's parts, a connector makes
tokens of the language model of what is left, and a Qwen3 decoder answers with the words. All of it
is small and starts from random weights: first the tower learns letters, in place of a
pretraining, and the whole learns to read without a compressor. Then the compressor is inserted, and
the stages of LLaVA-UHD v4 follow, as its released scripts have them (docs/training.md).

One process on the CPU, 100 s of a core:     python examples/05_train_mllm.py
Any number of GPUs, or CPUs, with FSDP2:    torchrun --nproc-per-node 2 examples/05_train_mllm.py
Go on from the last checkpoint:             the same command with --resume
The experiment of docs/warm_start.md:       python examples/05_train_mllm.py --seeds 5
"""

import argparse
import contextlib
import functools
import math
import os
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import uhd_ops
from uhd_ops.nn import (
    PixelUnshuffleConnector,
    SliceEncoder,
    freeze_for_stage,
    param_groups,
)

try:
    import experiments
    import pages
    from pages import IGNORED, NUMBER, make_batch, prompt
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer
    from transformers import Qwen3Config, Qwen3ForCausalLM
except ImportError as error:
    raise SystemExit(
        f"{error}; this example needs timm, transformers, Pillow and matplotlib: "
        "pip install 'uhd_ops[examples]'"
    ) from None

DIM, DEPTH, HEADS, LAYER = 32, 4, 2, 1  # of the tower; the compressor stands after block 1 of 0..3
LLM_DIM, LLM_DEPTH = 48, 2
BATCH, TEST_BATCH = 16, 64  # pages, on all ranks together
LONGEST = 32  # tokens of an answer that is generated
PARTS = {"tower": ("tower", "letters"), "connector": "connector", "llm": "llm"}


SPEED = 80  # times the rates of the released scripts, which are for large models


class Phase(NamedTuple):
    """A part of the training, with an optimizer of its own."""

    name: str
    steps: int
    stage: int  # that trains the same parts
    rates: dict | None = None  # learning rates of the parts; None for SPEED times the stage's own
    recipe: str = "v4-code"


PHASES = (
    Phase("letters", 500, 2, {"tower": 8e-3}, "v4"),  # the tower alone
    Phase("reading", 320, 3, {"tower": 1.6e-3, "connector": 8e-3, "llm": 8e-3}),
    Phase("stage 1", 60, 1),  # compressor and connector
    Phase("stage 2", 20, 2),  # from here on everything
    Phase("stage 3", 320, 3),
    Phase("stage 4", 20, 4),
)
INSERTION = 2  # the first phase that has the compressor


class Settings(NamedTuple):
    """How long, and on how much; everything else is a constant above."""

    phases: tuple[Phase, ...] = PHASES
    test_pages: int = 128


QUICK = Settings(tuple(phase._replace(steps=2) for phase in PHASES), test_pages=8)


class Arm(NamedTuple):
    """One way to get from the model that reads to one with fewer tokens."""

    name: str
    start: str = ""  # "reused", "random", or "" where there is nothing to choose


UNTOUCHED, POST = Arm("untouched, 4 times the tokens"), Arm("post-ViT")
REUSED, RANDOM = (Arm("compressor", start) for start in ("reused", "random"))
ARMS = (UNTOUCHED, POST, REUSED, RANDOM)


class Reader(nn.Module):
    """Packed tower, connector and decoder."""

    def __init__(self):
        super().__init__()
        side = pages.VIEW // pages.PATCH
        vit = VisionTransformer(
            img_size=pages.VIEW,
            patch_size=pages.PATCH,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=2,
            act_layer="gelu_tanh",  # as SigLIP has it
            weight_init="jax",
            class_token=False,
            global_pool="",
            num_classes=0,
        )
        with torch.no_grad():  # a start from which so small a tower learns in minutes
            vit.pos_embed.copy_(build_sincos2d_pos_embed([side, side], DIM)[None] / 2)
        self.tower = SliceEncoder(vit)
        self.letters = nn.Linear(DIM, 1 + len(pages.ALPHABET))  # used in the phase "letters" only
        self.connector = PixelUnshuffleConnector(DIM, LLM_DIM)  # 2 x 2 tokens to one
        config = Qwen3Config(
            vocab_size=len(NUMBER),
            hidden_size=LLM_DIM,
            intermediate_size=3 * LLM_DIM,
            num_hidden_layers=LLM_DEPTH,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=LLM_DIM**-0.5,
            use_cache=False,
        )
        self.llm = Qwen3ForCausalLM(config)

    @property
    def side(self):
        """Side in patches of what becomes one token of the decoder."""
        merges = self.connector.merger_times + hasattr(self.tower.vit, "compression")
        return 2**merges

    def forward(self, batch, letters=False):
        """Return the logits of the answers' tokens, or those of the letter at each patch."""
        encoded = self.tower(batch.pixels, batch.grids)
        if letters:
            return self.letters(encoded.tokens)
        visual = self.connector(encoded.tokens, encoded.grids)
        x = self.llm.get_input_embeddings()(batch.ids)
        x = x.masked_scatter((batch.ids == NUMBER["<visual>"])[..., None], visual)
        hidden = self.llm.model(inputs_embeds=x).last_hidden_state
        # A token is predicted from those before it; the decoder's head sees answers only.
        return self.llm.lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED])


@torch.no_grad()
def transcribe(reader, seed):
    """Return the tokens that the model generates for the page of a seed, one after the other."""
    names = list(NUMBER)
    batch = make_batch([seed], reader.side, next(reader.parameters()).device)
    ids, answer = batch.ids[:, : int((batch.labels == IGNORED).sum())], []
    while len(answer) < LONGEST:
        ids = functional.pad(ids, (0, 1))  # with a token whose logits are asked for
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = 0
        ids[:, -1] = reader(batch._replace(ids=ids, labels=labels)).argmax(-1)
        answer.append(names[int(ids[0, -1])])
        if answer[-1] == "<end>":
            break
    return answer


class Ranks(NamedTuple):
    """This process among those of torchrun; alone without it."""

    rank: int
    world: int
    device: str

    def share(self, seeds):
        """This rank's part of a batch."""
        return seeds[self.rank :: self.world]

    def total(self, numbers):
        """The sum over all ranks of a list of numbers."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.tolist()


ALONE = Ranks(0, 1, "cpu")


@contextlib.contextmanager
def join():
    """Join the process group of torchrun, if it started this process."""
    if "RANK" not in os.environ:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield ALONE._replace(device=device)
        return
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


def compress(reader, arm):
    """Reduce the tokens of a trained model, in place, as ``arm`` says."""
    if arm == POST:  # a second merge, random, in front of the trained one
        trained = reader.connector.stages[0]
        reader.connector = PixelUnshuffleConnector(DIM, LLM_DIM, merger_times=2)
        reader.connector.stages[1] = trained
    elif arm != UNTOUCHED:
        uhd_ops.insert_early_compressor(reader.tower.vit, LAYER)
        if arm.start == "random":
            experiments.reinitialise(reader.tower.vit.blocks[LAYER].compressor)


def prepare(reader, phase, ranks):
    """Freeze, shard, and return the optimizer of a phase."""
    reader.to(ranks.device)
    freeze_for_stage(reader, phase.stage, recipe=phase.recipe, **PARTS)
    reader.letters.requires_grad_(phase.name == "letters")
    if ranks.world > 1:
        mesh = init_device_mesh(ranks.device, (ranks.world,))
        # The packed encoder runs the parts of the tower's blocks itself, so the tower is one unit.
        for unit in (reader.tower, *reader.llm.model.layers, reader):
            fully_shard(unit, mesh=mesh)
    options = {"recipe": phase.recipe, "rates": phase.rates, "no_decay": True}
    groups = param_groups(reader, phase.stage, **options, **PARTS)
    for group in groups:
        group["peak"] = group["lr"] * (SPEED if phase.rates is None else 1)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def train(reader, optimizer, phase, seed, ranks, done=0):
    """Train from behind step ``done`` to the end of a phase; yield the number of each step.

    A batch depends on the seed, the phase and the step only: not on how often training was
    interrupted, and not on the number of ranks.
    """
    reader.train()
    for step in range(done, phase.steps):
        seeds = [f"{seed} {phase.name} {step * BATCH + index}" for index in range(BATCH)]
        batch = make_batch(ranks.share(seeds), reader.side, ranks.device)
        if phase.name == "letters":
            loss = functional.cross_entropy(reader(batch, letters=True), batch.letters)
        else:
            loss = functional.cross_entropy(reader(batch), answers(batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        warmup = min(1.0, (step + 1) / min(40, 1 + phase.steps // 4))
        cosine = (1 + math.cos(math.pi * step / phase.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * warmup * cosine
        optimizer.step()
        yield step + 1


def answers(batch):
    return batch.labels[batch.labels != IGNORED]


@functools.cache
def test_batches(test_pages, side, ranks):
    seeds = [f"test {page}" for page in range(test_pages)]
    batches = [seeds[start:][:TEST_BATCH] for start in range(0, test_pages, TEST_BATCH)]
    return [make_batch(ranks.share(batch), side, ranks.device) for batch in batches]


@torch.no_grad()
def evaluate(reader, test_pages, ranks=ALONE):
    """Return the mean loss of an answer's token, and the number of pages that are read exactly.

    Exactly means that each token of an answer is the likeliest one behind the tokens before it,
    which is when generating token by token gives this answer.
    """
    reader.eval()
    loss, exact, tokens = 0.0, 0, 0
    for batch in test_batches(test_pages, reader.side, ranks):
        logits, expected = reader(batch), answers(batch)
        right = (logits.argmax(-1) == expected).view(len(batch.ids), -1)
        loss += float(functional.cross_entropy(logits, expected, reduction="sum"))
        exact += int(right.all(1).sum())
        tokens += expected.numel()
    reader.train()
    loss, exact, tokens = ranks.total([loss, exact, tokens])
    return loss / tokens, int(exact)


@contextlib.contextmanager
def checkpointing(ranks):
    """DCP's options; it warns where one process is alone, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield {"no_dist": ranks.world == 1}


def save(folder, reader, optimizer, ranks):
    """Write a checkpoint, which any number of ranks can read."""
    model, state = get_state_dict(reader, optimizer)
    with checkpointing(ranks) as options:
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder, **options)


def load(folder, reader, optimizer, ranks):
    model, state = get_state_dict(reader, optimizer)
    with checkpointing(ranks) as options:  # which reads into these tensors
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder, **options)
    set_state_dict(reader, optimizer, model_state_dict=model, optim_state_dict=state)


def newest(folder):
    """Return the newest complete checkpoint as (phase, step, folder), or None.

    DCP writes ``.metadata`` last.
    """
    found = []
    for path in folder.glob("phase-*-step-*/.metadata"):
        _, phase, _, step = path.parent.name.split("-")
        found.append((int(phase), int(step), path.parent))
    return max(found, default=None)


def run(arm, seed, phases, ranks, weights=None, at=(0, 0, None), after=lambda *_: None):
    """Train through the phases from ``at`` on, and return the weights, whole.

    Each phase has a new model, which takes the weights of the one before: FSDP2 knows what trains
    from the first forward pass on, and an insertion needs whole weights.

    Args:
        arm: What is inserted in front of phase ``INSERTION``.
        seed: Of the first weights, of the pages and of what is inserted at random.
        phases: What ``PHASES`` is, or its beginning.
        ranks: Who trains.
        weights: Those to begin with; None for random ones.
        at: Number of the first phase, steps that are done of it, and the checkpoint that has them.
        after: Called with the number of a phase, a step of it, the model and the optimizer, at the
            beginning of a phase and behind each step.
    """
    first, done, checkpoint = at
    for number, phase in enumerate(phases[first:], first):
        torch.manual_seed(seed)
        reader = Reader()
        if number > INSERTION:
            compress(reader, arm)
        if weights is not None:
            reader.load_state_dict(weights)
        if number == INSERTION:
            compress(reader, arm)
        optimizer = prepare(reader, phase, ranks)
        if checkpoint is not None:
            load(checkpoint, reader, optimizer, ranks)
        if done == 0:
            after(number, 0, reader, optimizer)
        for step in train(reader, optimizer, phase, seed, ranks, done):
            after(number, step, reader, optimizer)
        done, checkpoint = 0, None
        options = StateDictOptions(full_state_dict=True)
        weights = get_model_state_dict(reader, options=options)
    return weights


def train_one(arguments, settings, ranks):
    """Train one model, with checkpoints, and show what it reads."""
    folder = arguments.out / "checkpoints"
    at = newest(folder)
    if at is not None and not arguments.resume:
        raise SystemExit(f"{folder} has checkpoints: give --resume to go on, or another --out")

    def say(text):
        if ranks.rank == 0:
            print(text, flush=True)

    def after(number, step, reader, optimizer):
        phase, last = settings.phases[number], step == settings.phases[number].steps
        if last or (step and step % arguments.checkpoint_every == 0):
            save(folder / f"phase-{number}-step-{step:06}", reader, optimizer, ranks)
        if last:
            loss, exact = evaluate(reader, settings.test_pages, ranks)
            say(f"{phase.name}: loss {loss:.4f}, {exact} of {settings.test_pages} pages read")
        if last and phase == settings.phases[-1]:
            for number in range(4):
                seed = f"test {number}"
                read = "".join(transcribe(reader, seed)).removesuffix("<end>")
                say(f"{pages.render(seed).text!r} is read as {read!r}")

    if at is not None:
        say(f"resuming behind step {at[1]} of {settings.phases[at[0]].name!r}")
    run(REUSED, arguments.seed, settings.phases, ranks, at=at or (0, 0, None), after=after)


def measured_steps(settings):
    """Behind the insertion: every 40 steps, and at the end of each stage."""
    steps, before = {0}, 0
    for phase in settings.phases[INSERTION:]:
        steps |= {*range(before, before + phase.steps, 40), before + phase.steps}
        before += phase.steps
    return sorted(step for step in steps if step <= before)


def inside_windows(x, grids):
    """Share of the variance of packed tokens, or patches, that is inside their 2 x 2 windows.

    Unrelated neighbours have 3/4, equal ones 0.
    """
    x = x.flatten(1)
    spread, between = (t.var(0, correction=0).sum() for t in (x, uhd_ops.window_mean(x, grids)))
    return 1 - float(between / spread)


@torch.no_grad()
def redundancy(reader, test_pages):
    """Return the share inside windows of the patches, and that of the tokens to be compressed."""
    reader.eval()
    seen, reads_them = [], reader.tower.vit.blocks[LAYER + 1].norm1
    hook = reads_them.register_forward_pre_hook(lambda norm, arguments: seen.append(*arguments))
    batch = test_batches(test_pages, reader.side, ALONE)[0]
    reader.tower(batch.pixels, batch.grids)
    hook.remove()
    shares = {"patches": batch.pixels, "tokens": seen[0]}
    return {name: round(inside_windows(x, batch.grids), 5) for name, x in shares.items()}


def run_seed(seed, settings):
    """Train one model until it reads, and fine-tune every arm of it on the same pages.

    Returns:
        The curves of the arms, and the redundancy of the model that reads.
    """
    trained = run(UNTOUCHED, seed, settings.phases[:INSERTION], ALONE)
    reader = Reader()
    reader.load_state_dict(trained)
    rows, steps = [], measured_steps(settings)
    for arm in ARMS:
        row = {"arm": arm.name, "start": arm.start, "seed": seed, "correct": [], "loss": []}

        def after(number, step, reader, _, row=row):
            before = sum(phase.steps for phase in settings.phases[INSERTION:number])
            if before + step in steps and (step or number == INSERTION):
                loss, exact = evaluate(reader, settings.test_pages)
                row["visual_tokens"] = prompt(pages.plan(), reader.side).count("<visual>")
                row["correct"].append(exact)
                row["loss"].append(round(loss, 5))

        run(arm, seed, settings.phases, ALONE, trained, (INSERTION, 0, None), after)
        read = f"{row['correct'][0]} to {row['correct'][-1]} of {settings.test_pages} pages read"
        print(f"seed {seed}, {' '.join(arm).strip()}: {read}", flush=True)
        rows.append(row)
    return rows, redundancy(reader, settings.test_pages)


def conditions(settings):
    """All that the results depend on, but for the machine and its fonts."""
    return {
        "phases": [phase._asdict() for phase in settings.phases],
        "speed": SPEED,
        "test_images": settings.test_pages,
        "batch": BATCH,
        "model": {"dim": DIM, "depth": DEPTH, "layer": LAYER, "llm_dim": LLM_DIM},
        "pages": {
            "size": list(pages.PAGE),
            "words": pages.WORDS,
            "letters": pages.LETTERS,
            "alphabet": pages.ALPHABET,
            "font_sizes": list(pages.SIZES),
            "jitter": pages.JITTER,
            "softness": pages.SOFTNESS,
            "patch": pages.PATCH,
            "view": pages.VIEW,
        },
    }


def run_experiment(seeds, settings, out):
    """Run the seeds one after the other on one thread, and write the record after each."""
    torch.set_num_threads(1)
    environment = experiments.environment("timm", "transformers", "pillow", processes=1)
    began, rows, inside = time.process_time(), [], {"patches": [], "tokens": []}
    stages = settings.phases[INSERTION:]
    for seed in range(seeds):
        done, shares = run_seed(seed, settings)
        rows += done
        for name, share in shares.items():
            inside[name].append(share)
        seconds = time.process_time() - began
        print(f"seed {seed}: {seconds:.0f} CPU seconds since the start", flush=True)
        record = {
            "environment": environment,  # whatever is checked out while it runs
            "settings": {**conditions(settings), "fonts": pages.fonts()},
            "seeds": list(range(seed + 1)),
            "cpu_seconds": round(seconds),
            "steps": measured_steps(settings),
            "ends": {
                phase.name: sum(p.steps for p in stages[: index + 1])
                for index, phase in enumerate(stages)
            },
            "inside_windows": inside,
            "rows": rows,
        }
        experiments.write(record, out, "train_mllm", experiments.plot_pages)
    print(experiments.page_tables(record))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the one model that is trained")
    parser.add_argument("--seeds", type=int, help="run the experiment instead, for 0, 1, 2, ...")
    parser.add_argument("--out", type=Path, default=Path("demo-output/mllm"), help="for all files")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--quick", action="store_true", help="a rehearsal; it learns nothing")
    arguments = parser.parse_args()
    for name in ("seeds", "checkpoint_every"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(arguments, name)}")
    settings = QUICK if arguments.quick else Settings()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with join() as ranks:
        if BATCH % ranks.world:
            parser.error(f"a batch of {BATCH} pages cannot be shared by {ranks.world} processes")
        if arguments.seeds is None:
            train_one(arguments, settings, ranks)
        elif ranks.world > 1:
            parser.error("--seeds runs in one process, without torchrun")
        else:
            run_experiment(arguments.seeds, settings, arguments.out)


if __name__ == "__main__":
    main()
