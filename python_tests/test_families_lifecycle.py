# SPDX-License-Identifier: Apache-2.0
"""Every family stays the model that it was: training, copying, compiling, pruning, removal."""

import copy
import functools
import inspect
import pickle

import hf_models
import pytest
import torch
from families import all_cases
from families.case import snapshot
from test_families import LAYER, VARIANTS
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay
from torch.utils._pytree import tree_leaves, tree_map

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.nn import EarlyCompressor
from uhd_ops.retrofit import CompressorConfig

TIMM = all_cases()
CASES = TIMM | hf_models.all_cases()
NAMES = pytest.mark.parametrize("name", CASES)
OF_TIMM = pytest.mark.parametrize("name", TIMM)
# Tracing takes seconds: of transformers one model for each way to write its blocks.
COMPILED = [*TIMM, *(f"transformers: {n}" for n in ("SigLIP", "InternVL", "DINOv3"))]
COMPILED += ["transformers: DINOv2 with registers"]
# One of each file of a family of timm.
EXPORTED = ["Beit", "Cait", "DeepseekVitClassifier", "Eva, rotary", "Gemma4VitClassifier"]
EXPORTED += ["NaFlexVit", "Qwen3VitClassifier", "VisionTransformer", "VisionTransformerRelPos"]
EXPORTED += ["VisionTransformerSAM"]
HEADLESS = {"Gemma4VitEncoder", "Qwen3VitEncoder", "DeepseekVitEncoder"}
COMPRESSOR = ".compressor."


def made(name, dtype=torch.float32, depth=4, **options):
    """Return the case, its model with a compressor, and an input."""
    case = CASES[name]
    model = case.make_first(depth=depth).to(dtype)
    return case, insert_early_compressor(model, LAYER, **options), case.images(model, 2, dtype)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_removal_restores_everything(name, variant):
    case = CASES[name]
    model = case.make_variant(variant)
    x, cls = case.images(model, 2, torch.float32), type(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = case.run(model, x)
        before = snapshot(model)
        insert_early_compressor(model, LAYER)
        assert isinstance(model, cls)
        assert not torch.equal(case.run(model, x), expected)
        assert remove_early_compressor(model) is model
        assert snapshot(model) == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(case.run(model, x), expected)


@NAMES
def test_original_keys_survive(name):
    case = CASES[name]
    model = case.make_first()
    keys = list(model.state_dict())
    insert_early_compressor(model, LAYER)
    new = [key for key in model.state_dict() if COMPRESSOR in key]
    assert [key for key in model.state_dict() if COMPRESSOR not in key] == keys
    assert new
    assert all(key.startswith(f"{case.blocks}.{LAYER}.compressor.") for key in new)


@NAMES
def test_twice_and_out_of_range(name):
    _, model, _ = made(name, form="tied")
    before = snapshot(model)
    assert insert_early_compressor(model, LAYER, form="tied") is model
    for options in ({"layer": LAYER}, {"layer": 2, "form": "tied"}):
        with pytest.raises(ValueError, match=r"holds a compressor .*layers=\(1,\).* remove_early_"):
            insert_early_compressor(model, **options)
    assert snapshot(model) == before
    insert_early_compressor(remove_early_compressor(model), 2)
    found = [vars(m)["compression"] for m in model.modules() if "compression" in vars(m)]
    assert found
    assert all(one == CompressorConfig(layers=2, attention="window") for one in found)
    remove_early_compressor(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer must be in 0\.\.3 for a model of 4 blocks, got 4"):
        insert_early_compressor(model, 4)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="vit holds no compressor"):
        remove_early_compressor(model)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_every_parameter_learns(name, variant):
    case = CASES[name]
    model = case.make_variant(variant)
    x = case.images(model, 2, torch.float32)
    case.run(model, x).square().sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    insert_early_compressor(model, LAYER).zero_grad()
    case.run(model, x).square().sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} == without
    for key, parameter in model.named_parameters():
        if COMPRESSOR in key:
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


# timm's own norms warn of it, in untouched models too.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        *((*both, torch.bfloat16) for both in VARIANTS),
        *((n, next(iter(case.variants)), torch.float16) for n, case in CASES.items()),
        *((n, next(iter(case.variants)), torch.float64) for n, case in CASES.items()),
    ],
    ids=str,
)
@torch.no_grad()
def test_dtypes(name, variant, dtype):
    """The reuse initialisation rounds nothing, so it does not matter when the dtype changes."""
    case = CASES[name]
    late = case.make_variant(variant)
    early = copy.deepcopy(late)
    insert_early_compressor(late.to(dtype), LAYER)
    insert_early_compressor(early, LAYER).to(dtype)
    dtypes = {p.dtype for key, p in late.named_parameters() if COMPRESSOR not in key}
    assert {p.dtype for key, p in late.named_parameters() if COMPRESSOR in key} <= dtypes
    x = case.images(late, 2, dtype)
    outs = [case.run(model, x) for model in (late, early)]
    assert outs[0].dtype == dtype
    assert outs[0].isfinite().all()
    # Tables of relative positions may be computed, by an MLP or as a sum, in the model's dtype.
    assert torch.equal(*outs) or name in ("VisionTransformerRelPos", "Beit")


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_autocast(name, variant):
    case = CASES[name]
    model = insert_early_compressor(case.make_variant(variant), LAYER).train()
    with torch.autocast("cpu", torch.bfloat16):
        case.run(model, case.images(model)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=str)
def test_the_block_is_copied_and_nothing_is_drawn(name, variant):
    case = CASES[name]
    block = case.make_variant(variant).train().get_submodule(case.blocks)[LAYER]
    state, seen = torch.get_rng_state(), []
    for module in block.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    compressor = EarlyCompressor.from_block(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen
    assert all(module.training for module in (*block.modules(), *compressor.modules()))
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    assert not own & {p.untyped_storage().data_ptr() for p in compressor.parameters()}


@NAMES
def test_meta_device(name):
    plain = CASES[name].make_first().to("meta")
    with torch.device("meta"):  # as where a model is made without memory
        model = insert_early_compressor(copy.deepcopy(plain), LAYER)
    for each in (model, insert_early_compressor(plain, LAYER)):
        assert all(p.is_meta for p in each.parameters())


@NAMES
@torch.no_grad()
def test_copies_are_their_own(name):
    case, model, x = made(name)
    expected = case.run(model, x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(clone, x), expected)
        for key, parameter in clone.named_parameters():
            if COMPRESSOR in key:
                parameter.zero_()
        assert not torch.equal(case.run(clone, x), expected)
        assert torch.equal(case.run(model, x), expected)
        assert type(remove_early_compressor(clone)) is type(model).body_class
    loaded = insert_early_compressor(case.make_first(), LAYER)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(case.run(loaded, x), expected)


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compile(name):
    case, model, x = made(name, depth=3)  # in front of the compressor, with it, and behind it
    run = model.forward_features if name in TIMM else functools.partial(case.patches, model)
    expected = run(x)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=case.fullgraph, dynamic=False)
    for actual in (compiled(x), run(x)):
        assert all(tree_leaves(tree_map(torch.equal, actual, expected)))


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exports(name):
    _, model, x = made(name, depth=3)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@NAMES
def test_gradient_checkpointing(name):
    case, model, x = made(name)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            case.checkpoint(model)
        model.zero_grad()
        torch.manual_seed(1)  # DINOv3 of transformers draws its coordinates
        # Another forward pass, of another size where that is possible, must not leave its layout.
        out = case.run(model, x)
        with torch.no_grad():
            size = case.sizes[-1] if case.sizes else None
            case.run(model, case.images(model, 1, torch.float32, size))
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@OF_TIMM
@torch.no_grad()
def test_signatures_stay_and_later_keywords_pass_through(name, monkeypatch):
    """A version of the library that adds a keyword to a method needs no change here."""
    case = CASES[name]
    model, seen = case.make_first(), []
    cls = type(model)
    names = [n for n in ("forward_features", "forward_intermediates") if hasattr(cls, n)]
    for method in names:
        owner = next(c for c in cls.__mro__ if method in vars(c))
        monkeypatch.setattr(owner, method, with_keyword(getattr(owner, method), seen))
    # A class that no earlier test has compressed: the methods are adapted once for each class.
    model.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    signatures = {n: inspect.signature(getattr(model, n)) for n in names}
    insert_early_compressor(model, LAYER)
    x = case.images(model, 2, torch.float32)
    for method, signature in signatures.items():
        assert inspect.signature(getattr(model, method)) == signature
        expected = getattr(model, method)(x)
        seen.clear()
        actual = getattr(model, method)(x, later="new")
        assert seen == ["new"]
        assert all(tree_leaves(tree_map(torch.equal, actual, expected)))


def with_keyword(method, seen):
    """``method`` as a later version might have it, with one more keyword."""

    @functools.wraps(method)
    def newer(self, *args, later="old", **kwargs):
        seen.append(later)
        return method(self, *args, **kwargs)

    signature = inspect.signature(method)
    *parameters, last = signature.parameters.values()
    added = inspect.Parameter("later", inspect.Parameter.KEYWORD_ONLY, default="old")
    variadic = last.kind is inspect.Parameter.VAR_KEYWORD
    parameters += [added, last] if variadic else [last, added]
    newer.__signature__ = signature.replace(parameters=parameters)
    return newer


@OF_TIMM
def test_optimiser_groups(name):
    case = CASES[name]
    model = case.make_first()

    def groups(model):
        return {
            key: group["lr_scale"]
            for group in param_groups_layer_decay(model)
            for key in [
                n for n, p in model.named_parameters() if any(p is q for q in group["params"])
            ]
        }

    before, kept, matched = groups(model), set(model.no_weight_decay()), model.group_matcher()
    insert_early_compressor(model, LAYER)
    after = groups(model)
    assert {key: scale for key, scale in after.items() if COMPRESSOR not in key} == before
    scales = {scale for key, scale in after.items() if COMPRESSOR in key}
    block = f"{case.blocks}.{LAYER}."
    assert scales == {scale for key, scale in before.items() if key.startswith(block)}
    assert {key for key in model.no_weight_decay() if COMPRESSOR not in key} == kept
    assert model.group_matcher() == matched or callable(matched)


@pytest.mark.parametrize("name", sorted(HEADLESS))
def test_encoders_have_no_classifier(name):
    assert not hasattr(CASES[name].make_first(), "reset_classifier")


@pytest.mark.parametrize("name", [name for name in TIMM if name not in HEADLESS])
@torch.no_grad()
def test_reset_classifier(name):
    case = CASES[name]
    model = case.make_first()
    x = case.images(model, 2, torch.float32)
    model.reset_classifier(3)
    shape = model(x).shape
    insert_early_compressor(model, LAYER)
    model.reset_classifier(7)
    assert model(x).shape == (*shape[:-1], 7)


@OF_TIMM
@torch.no_grad()
def test_prune_intermediate_layers(name):
    for last in (0, 2):  # in front of the compressor, which goes with its block, and behind it
        case, model, x = made(name)
        expected = model.forward_intermediates(x, indices=[last], intermediates_only=True)
        model.prune_intermediate_layers([last])
        assert len(model.get_submodule(case.blocks)) == last + 1
        actual = model.forward_intermediates(x, indices=[last], intermediates_only=True)
        assert torch.equal(actual[0], expected[0])
        assert case.run(model, x).isfinite().all()


@OF_TIMM
@torch.no_grad()
def test_intermediates_in_every_form(name):
    case, model, x = made(name)
    call = functools.partial(model.forward_intermediates, x)
    features, parameters = case.run(model, x), inspect.signature(call).parameters
    last, maps = call()
    assert torch.equal(tokens_of(last), features)
    assert all(y.is_contiguous() for y in maps) or name == "VisionTransformerSAM"  # timm's view
    fine = tuple(maps[0].shape[2:])
    coarse = tuple(-(-side // 2) for side in fine)
    assert [tuple(y.shape[2:]) for y in maps] == [fine, coarse, coarse, coarse]
    assert all(map(torch.equal, maps, call(intermediates_only=True)))
    last, chosen = call(indices=[0, -2])
    assert torch.equal(tokens_of(last), features)
    assert all(map(torch.equal, chosen, (maps[0], maps[2])))
    early = call(indices=[2, 0], stop_early=True, intermediates_only=True)
    assert all(map(torch.equal, early, (maps[0], maps[2])))
    assert len(early) == 2
    body = inspect.getsource(type(model).body_class.forward_intermediates)
    if "NLC" in body:
        flat = call(intermediates_only=True, output_fmt="NLC")
        for y, tokens in zip(maps, flat, strict=True):
            assert torch.equal(y.flatten(2).transpose(1, 2), tokens)
    with pytest.raises(AssertionError):  # timm's own
        call(output_fmt="NHWC")
    if "return_prefix_tokens" in parameters:
        pairs = call(intermediates_only=True, return_prefix_tokens=True)
        for y, pair in zip(maps, pairs, strict=True):
            assert torch.equal(y, pair[0] if isinstance(pair, tuple) else pair)
    if "output_dict" in parameters:
        found = call(output_dict=True)
        assert torch.equal(tokens_of(found["image_features"]), features)
        assert all(map(torch.equal, found["image_intermediates"], maps))
    if hasattr(model, "get_intermediate_layers"):
        tokens = model.get_intermediate_layers(x, n=1)
        assert tokens[0].shape[1] == maps[-1][0, 0].numel()


def tokens_of(features):
    return features["patches"] if isinstance(features, dict) else features


@OF_TIMM
@torch.no_grad()
def test_features_only(name):
    """Wrapped before and after the insertion, and cut off in front of the compressor."""
    case = CASES[name]
    for first, layer, last in (("insert", 1, 2), ("wrap", 1, 2), ("insert", 2, 1)):
        model = case.make_first()
        x = case.images(model, 2, torch.float32)
        if first == "insert":
            insert_early_compressor(model, layer)
        net = FeatureGetterNet(model, out_indices=(0, last))
        if first == "wrap":
            insert_early_compressor(net.model, layer)
        fine, coarse = (tuple(y.shape[2:]) for y in net(x))
        merged = tuple(-(-side // 2) for side in fine)
        assert coarse == (merged if last >= layer else fine), first
        reduction = net.feature_info.reduction()
        assert reduction == [reduction[0], reduction[0] * (2 if last >= layer else 1)], first


MASKED = [name for name in TIMM if name.startswith(("Eva", "VisionTransformer,", "ViTamin"))]
MASKED += ["VisionTransformer", "VisionTransformerDistilled", "ResPostBlock"]


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_refused(name):
    _, model, x = made(name)
    options = {"attn_mask": torch.zeros(50, 50), "is_causal": True}
    for method in (model, model.forward_features, model.forward_intermediates):
        for option, value in options.items():
            message = f"{option} must be (None|False) in a model with a"
            with pytest.raises(NotImplementedError, match=message):
                method(x, **{option: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("VisionTransformer", r"set vit\.patch_drop\.prob = 0"),
        ("Eva, rotary", r"set vit\.patch_drop\.prob = 0"),
        ("NaFlexVit", r"set vit\.patch_drop to None"),
        ("VisionTransformerSAM", "patch dropout leaves no grid"),
    ],
)
def test_patch_dropout_is_refused_in_training(name, message):
    case = CASES[name]
    model = insert_early_compressor(case.make(patch_drop_rate=0.5), LAYER)
    x = case.images(model, 1)
    expected = case.run(model, x)
    with pytest.raises(NotImplementedError, match=message):
        case.run(model.train(), x)
    if name == "NaFlexVit":
        model.patch_drop = None
    else:
        model.patch_drop.prob = 0
    assert torch.equal(case.run(model, x), expected)
