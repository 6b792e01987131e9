# SPDX-License-Identifier: Apache-2.0
"""Models with a compressor inside the tools that people train, shrink and serve models with.

Each test is a row of docs/works_with.md, which `python docs/works_with.py` writes: the first word
of its docstring is the tool, the rest what holds.
"""

import copy

import pytest
import torch
import transformers
from families.case import assert_close
from hf_models import CASES, ROUNDINGS, random_images

from uhd_ops import definitions, insert_early_compressor, remove_early_compressor

# What the tools make of each other is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def tower(layer=1, **options):
    torch.manual_seed(0)
    return insert_early_compressor(CASES["SigLIP"].make(**options), layer).eval()


def images(batch=2):
    torch.manual_seed(1)
    return random_images(batch=batch, dtype=torch.float32)


def hidden(model, x=None):
    with torch.no_grad():
        return model(images() if x is None else x).last_hidden_state


def in_compressor(model, words):
    """Names of the compressor's parameters that have one of the words in them."""
    names = (name for name, _ in model.named_parameters() if ".compressor." in name)
    return {name for name in names if any(word in name for word in words)}


def assert_learns_and_is_saved(model, base, path, rate):
    """Train what peft made of ``base`` on one batch, save it, load it and merge it."""
    import peft

    x = images()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(20):
        loss = model(x).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = hidden(model)
    model.save_pretrained(path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
    assert_close(hidden(again), trained, ROUNDINGS)
    assert_close(hidden(again.merge_and_unload()), trained, ROUNDINGS)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["fc1", "fc2"], {"fc1", "fc2"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "proj", "fc1", "fc2"}),
    ],
    ids=["fc1, fc2", "q, v", "all-linear"],
)
def test_peft_lora(targets, layers, tmp_path):
    """peft: LoRA on the compressor's layers starts as nothing, learns, is saved and merged."""
    import peft

    base = tower()
    expected = hidden(base)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets, r=2))
    adapted = {name.split(".lora_")[0] for name in in_compressor(model, ["lora_"])}
    assert {name.rpartition(".")[2] for name in adapted} == layers
    assert_close(hidden(model), expected, ROUNDINGS)
    assert_learns_and_is_saved(model, base, tmp_path, rate=1e-2)


def test_peft_whole_compressor(tmp_path):
    """peft: `modules_to_save=["compressor"]` trains and saves it in full, beside LoRA."""
    import peft

    base = tower()
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["compressor"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    assert_close(hidden(model), hidden(base), ROUNDINGS)
    assert_learns_and_is_saved(model, base, tmp_path, rate=1e-3)


def test_peft_before_insertion():
    """peft: LoRA in block `layer` is refused by name; other blocks may have it already."""
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    plain = CASES["SigLIP"].make()
    adapted = peft.get_peft_model(plain, config).get_base_model()
    with pytest.raises(NotImplementedError, match=r"peft\.tuners\.lora\.layer\.Linear"):
        insert_early_compressor(adapted, 1)
    config.layers_to_transform, config.layers_pattern = [0, 2, 3], "layers"
    adapted = peft.get_peft_model(CASES["SigLIP"].make(), config).get_base_model()
    assert hidden(insert_early_compressor(adapted, 1)).shape == (2, 16, 32)


def rounding_error(bits):
    """Relative error of a model whose weights are rounded to this many bits in every layer.

    Numbers of one deviation reach about four; a step is 8 deviations / 2**bits, and the error of a
    rounding is its 12th part squared. Errors of different layers add in squares.
    """
    layers = 4 * 6 + 6 + 4  # four blocks, the compressor, the head
    return 8 / 2**bits * (layers / 12) ** 0.5


# Where both factors have 8 bits, processors without VNNI add pairs of products in 16 bits, which
# saturate: the error is the processor's. Outputs that have nothing in common differ by sqrt(2).
SATURATED = 1


@pytest.mark.parametrize("way", ["int8 weights", "dynamic int8"])
def test_torchao(way):
    """torchao: int8, of weights alone or of inputs too, in every linear layer of the compressor."""
    from torchao import quantization

    config = {
        "int8 weights": quantization.Int8WeightOnlyConfig,
        "dynamic int8": quantization.Int8DynamicActivationInt8WeightConfig,
    }[way]()
    model = tower()
    expected = hidden(model)
    quantization.quantize_(model, config)
    compressor = model.encoder.layers[1].compressor
    for name in ("attn.q_proj", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert type(compressor.get_submodule(name).weight) is not torch.nn.Parameter, name
    error = (hidden(model) - expected).norm() / expected.norm()
    assert 0 < error < (rounding_error(8) if way == "int8 weights" else SATURATED)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, tmp_path):
    """bitsandbytes: `from_pretrained(quantization_config=...)` in 4 and in 8 bits, on a CPU."""
    model = tower(hidden_size=64, intermediate_size=64)  # its blocks in 4 bits have 64 numbers
    expected = hidden(model)
    model.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    loaded = transformers.AutoModel.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    )
    compressor = loaded.encoder.layers[1].compressor
    for name in ("attn.q_proj", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert "bitsandbytes" in type(compressor.get_submodule(name)).__module__, name
    error = (hidden(loaded) - expected).norm() / expected.norm()
    assert 0 < error < (rounding_error(4) if bits == 4 else SATURATED)


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_accelerate_offload(device, tmp_path):
    """accelerate: `cpu_offload` and `disk_offload`."""
    import accelerate

    model = tower(vision_use_head=False)  # the head reads weights of layers that it does not call
    expected = hidden(model)
    if device == "cpu":
        accelerate.cpu_offload(model, "cpu")
    else:
        accelerate.disk_offload(model, tmp_path, "cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert_close(hidden(model), expected, ROUNDINGS)


def test_accelerate_device_map(tmp_path):
    """accelerate: `from_pretrained(device_map=...)`, with the compressor's block on disk."""
    model = tower(vision_use_head=False)
    model.save_pretrained(tmp_path)
    names = ["embeddings", "encoder.layers.0", "encoder.layers.2", "encoder.layers.3"]
    device_map = dict.fromkeys([*names, "post_layernorm"], "cpu")
    device_map["encoder.layers.1"] = "disk"
    loaded = transformers.AutoModel.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.encoder.layers[1].compressor.mlp.fc1.weight.device.type == "meta"
    assert_close(hidden(loaded), hidden(model), ROUNDINGS)


class Regression(torch.nn.Module):
    """What transformers' Trainer takes: a model that returns its loss."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def activation_checkpointing_enable(self, **options):
        self.vit.activation_checkpointing_enable(**options)

    def forward(self, pixel_values, labels=None):
        return {"loss": self.vit(pixel_values).last_hidden_state.square().mean()}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "new", "reentrant"])
def test_trainer(checkpointing, tmp_path):
    """transformers: `Trainer`, with gradient checkpointing of both kinds, resumed in the middle."""
    options = {"use_reentrant": checkpointing} if checkpointing is not None else None
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        activation_checkpointing=options is not None,
        activation_checkpointing_kwargs=options,
    )
    x = images(batch=4)
    data = [{"pixel_values": image, "labels": 0} for image in x]

    def train(resume):
        model = Regression(tower().train())
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return model, losses

    model, losses = train(None)
    assert losses[-1] < losses[0]
    again, resumed = train(str(tmp_path / "checkpoint-3"))
    assert resumed == losses
    assert_close(hidden(again.vit.eval()), hidden(model.vit.eval()), ROUNDINGS)


def test_torch_export(tmp_path):
    """torch: `torch.export` with batches of any size, saved and loaded."""
    model = tower()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (), {"pixel_values": images()}, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = images(batch=3)
    actual = loaded(pixel_values=x).last_hidden_state.detach()
    assert_close(actual, hidden(model, x), ROUNDINGS)


def test_aot_inductor(tmp_path):
    """torch: AOTInductor, which compiles an exported model ahead of time."""
    model = tower(num_hidden_layers=2, vision_use_head=False)
    program = torch.export.export(model, (), {"pixel_values": images()})
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    compiled = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        actual = compiled(pixel_values=images()).last_hidden_state
    assert_close(actual, hidden(model), ROUNDINGS)


def test_onnx(tmp_path):
    """onnxruntime: `torch.onnx.export(dynamo=True)` inside `with uhd_ops.definitions()`."""
    import onnxruntime

    model = tower()

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, pixel_values):
            return self.vit(pixel_values).last_hidden_state

    with definitions():
        program = torch.onnx.export(Features().eval(), (images(),), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (x.name for x in session.get_inputs())
    (actual,) = session.run(None, {name: images().numpy()})
    assert_close(torch.from_numpy(actual), hidden(model), ROUNDINGS)


def test_moving_average():
    """torch: moving averages of the weights, by `torch.optim.swa_utils.AveragedModel`."""
    model = tower()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(model)
    before = hidden(average.module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".compressor." in name:
                parameter.add_(1)
    average.update_parameters(model)
    fc1 = "encoder.layers.1.compressor.mlp.fc1.bias"
    difference = model.get_parameter(fc1) - average.module.get_parameter(fc1)
    assert_close(difference, torch.full_like(difference, 0.5), 16)
    assert not torch.equal(hidden(average.module), before)


def test_distributed_checkpoint(tmp_path):
    """torch: `torch.distributed.checkpoint`."""
    from torch.distributed import checkpoint

    model, other = tower(), insert_early_compressor(CASES["SigLIP"].make(), 1)
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    remove_early_compressor(other)
