# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: timm's own tests, where every model that takes a compressor has one.

``.ci/timm_suite.sh`` fetches the tests and runs them. Tests over all models of timm run on
``MODELS``, others where they name a model of docs/models.md. docs/timm_tests.md says which tests
must fail, and with what error: any other failure is one here, and so is a listed test that passes.
"""

import functools
import inspect
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _factory, _features

from uhd_ops import insert_early_compressor
from uhd_ops.retrofit.registry import FAMILIES, family_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
SECTIONS = re.findall(r"^## (\w+)$(.+?)(?=^#|\Z)", (DOCS / "models.md").read_text(), re.M | re.S)
CLASSES = {name: set(re.findall(r"`(\w+)`", names)) for name, names in SECTIONS}
SUPPORTED = set().union(*CLASSES.values())
# The smallest of each class and, beside them, some that have parts of their own.
MODELS = {
    *("test_vit", "test_vit2", "test_vit3", "test_vit4", "test_vit_relpos"),
    *("deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "cait_xxs24_224"),
    *("eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"),
    *("vit_tiny_patch16_dinov3_qkvb", "samvit_base_patch16_224"),
    *("naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"),
    *("qwen3_vit_88m", "qwen3_vit_88m_merge", "qwen3_vit_88m_enc"),
    *("deepseek_vit_412m", "deepseek_vit_412m_align", "deepseek_vit_412m_enc"),
    *("gemma4_vit_167m", "gemma4_vit_167m_enc"),
}
# Blocks of most of them, where a test does not say otherwise: their classes are what is tested.
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2}
LEFT_OUT = {
    # They fetch weights.
    *("test_model_inference", "test_model_load_pretrained", "test_model_features_pretrained"),
    # They make no model: its name is an option of a script, or a key of a configuration.
    "test_clearing_pretrained_source_preserves_custom_load",
    "test_script_construction_rejects_conflicting_inputs",
    *("test_source_overlay_resets_custom_load", "test_train_pretrained_cfg_overlay"),
    # They make one by its class.
    *("test_model_rope_layout", "test_model_mixed_rejects_half_layout"),
}
FEWEST = 300  # tests, lest a change of timm's leave some out unseen
ROWS = [
    re.findall(r"`(.+?)`", line)[:3]
    for line in (DOCS / "timm_tests.md").read_text().splitlines()
    if line.startswith("| `")
]
BEFORE = pytest.StashKey()
inserted = 0  # compressors


def insert(model):
    """Give a model a compressor in its middle, where it takes one and has none."""
    global inserted
    try:
        transformer = family_of(model).transformer(model)
    except NotImplementedError:
        return model
    if not hasattr(transformer, "compression"):
        inserted += 1
        insert_early_compressor(model, layer=len(transformer.blocks) // 2)
    return model


def replace(name, *owners):
    """Decorator: put a function, which is given the original first, in its place."""

    def decorate(function):
        original = getattr(owners[0], name)

        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return function(original, *args, **kwargs)

        for owner in owners:
            setattr(owner, name, wrapper)

    return decorate


@replace("create_model", timm, timm.models, _factory)
def create_model(original, model_name, *args, **kwargs):
    name = model_name.split(".")[0]
    small = SMALL if name in MODELS and not name.startswith("test_") else {}
    return insert(original(model_name, *args, **{**small, **kwargs}))


@replace("list_models", timm, timm.models)
def list_models(original, *args, **kwargs):
    return [name for name in original(*args, **kwargs) if name.split(".")[0] in MODELS]


@replace("__init__", _features.FeatureGetterNet)
def make_getter(original, self, model, *args, **kwargs):
    """``features_only`` prunes a model and reads its reductions: the compressor comes before."""
    original(self, insert(model), *args, **kwargs)


@replace("load_state_dict", torch.nn.Module)
def load_state_dict(original, self, state_dict, *args, **kwargs):
    """What a model with a compressor has saved is loaded into one with a compressor."""
    if any(".compressor." in key for key in state_dict):
        insert(self)
    return original(self, state_dict, *args, **kwargs)


@functools.cache
def words(function):
    return set(re.findall(r"\w+", inspect.getsource(function)))


def names(item):
    """The supported models that a test is for, by its parameters or else by its source."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "model_name" in parameters:
        return SUPPORTED & {str(parameters["model_name"]).split(".")[0]}
    return SUPPORTED & words(item.function)


def covers(row, item):
    """Whether a line of the page is about a test."""
    parameters = item.callspec.id if hasattr(item, "callspec") else ""
    return row[0] == item.originalname and fnmatchcase(parameters, row[1])


@pytest.hookimpl(tryfirst=True)  # in front of -k
def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if item.originalname not in LEFT_OUT and names(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    known = {name for row in FAMILIES if row.module.startswith("timm.") for name in row.models}
    run = MODELS & set().union(*map(names, items))
    faults = [name for name in known | set(CLASSES) if not CLASSES.get(name, set()) & run]
    faults += sorted(MODELS - run) + [
        row for row in ROWS if not any(covers(row, item) for item in items)
    ]
    if faults or len(items) < FEWEST:
        raise pytest.UsageError(f"{len(items)} tests were found, and none for {faults}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that the page lists has to fail as it says; all others need a compressor."""
    before = item.stash.setdefault(BEFORE, inserted)
    report = yield
    if call.when != "call" or report.skipped:
        return report
    expected = [row[2] for row in ROWS if covers(row, item)]
    if report.passed and (expected or inserted == before):
        report.outcome = "failed"
        report.longrepr = f"passed, with {inserted - before} compressors and {expected} expected"
    elif report.failed and any(error in str(call.excinfo.value) for error in expected):
        report.outcome, report.longrepr = "passed", None
    return report
