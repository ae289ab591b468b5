"""Fingerprints: which changes of a pipeline they see, and how little of it they read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from pipelines import make_pipeline, unet_inputs
from torch.testing._internal.two_tensor import TwoTensor

from stem.diffusion import fingerprint as hashes
from stem.diffusion.fingerprint import fingerprint
from stem.models import random_pipeline


def test_a_fingerprint_sees_configuration_and_weights() -> None:
    pipeline = random_pipeline(0)
    before = fingerprint(pipeline)
    unet: UNet2DConditionModel = pipeline.unet
    with torch.no_grad():
        unet.conv_in.bias += 1
    changed = fingerprint(pipeline)
    assert changed["config_sha256"] == before["config_sha256"]
    assert changed["weights_sha256"] != before["weights_sha256"]
    pipeline.vae.register_to_config(scaling_factor=1.0)
    assert fingerprint(pipeline)["config_sha256"] != before["config_sha256"]


def test_a_fingerprint_sees_one_row_of_a_text_embedding() -> None:
    pipeline = random_pipeline(0)
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    seen = [fingerprint(pipeline)["weights_sha256"]]
    for row in (3, 400):
        with torch.no_grad():
            embedding[row] += 1e-3
        seen.append(fingerprint(pipeline)["weights_sha256"])
    embedding.data = embedding.data.clone()
    embedding.data[7, 1] += 1e-3
    seen.append(fingerprint(pipeline)["weights_sha256"])
    assert len(set(seen)) == 4
    assert fingerprint(pipeline)["weights_sha256"] == seen[-1]
    # In a tensor of many rows, through .data, which no counter of torch sees.
    pipeline.text_encoder.resize_token_embeddings(20_000)
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    before = fingerprint(pipeline)
    embedding.data[12_345, 6] += 1e-3
    assert fingerprint(pipeline) != before


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = random_pipeline(0)
    first = fingerprint(pipeline)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(hashes, "_tensor_hash", lambda tensor: str(read.append(tensor)))
    assert fingerprint(pipeline) == first
    assert not read
    with torch.no_grad():
        pipeline.vae.quant_conv.bias += 1
    fingerprint(pipeline)
    assert len(read) == len(pipeline.vae.state_dict())


def test_a_fingerprint_needs_weights() -> None:
    pipeline = random_pipeline(0)
    pipeline.text_encoder.to("meta")
    with pytest.raises(ValueError, match="text_encoder's weights are on the meta device"):
        fingerprint(pipeline)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_a_fingerprint_sees_every_component(component: str) -> None:
    pipeline = random_pipeline(0)
    before = fingerprint(pipeline)
    with torch.no_grad():
        for parameter in getattr(pipeline, component).parameters():
            parameter.mul_(1.3)
    assert fingerprint(pipeline) != before


def test_a_fingerprint_sees_what_lora_and_freeu_do() -> None:
    pipeline = random_pipeline(0)
    seen = [fingerprint(pipeline)]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="style")
    seen.append(fingerprint(pipeline))
    pipeline.unet.set_adapters(["style"], [0.3])
    seen.append(fingerprint(pipeline))
    pipeline.unet.disable_adapters()
    seen.append(fingerprint(pipeline))
    pipeline.enable_freeu(0.9, 0.2, 1.5, 1.6)
    seen.append(fingerprint(pipeline))
    assert len({one["weights_sha256"] for one in seen}) == len(seen)


def test_a_fingerprint_sees_configurations_and_tokenizers() -> None:
    pipeline = random_pipeline(0)
    seen = [fingerprint(pipeline)["config_sha256"]]
    pipeline.tokenizer("a much longer prompt", truncation=True, padding="max_length")
    assert fingerprint(pipeline)["config_sha256"] == seen[0]
    pipeline.text_encoder.config.hidden_act = "relu"
    seen.append(fingerprint(pipeline)["config_sha256"])
    vocabulary = dict(pipeline.tokenizer.get_vocab())
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    pipeline.tokenizer = type(pipeline.tokenizer)(vocab=vocabulary, merges=[], model_max_length=77)
    seen.append(fingerprint(pipeline)["config_sha256"])
    assert len(set(seen)) == 3


def accelerate_disk(unet: UNet2DConditionModel, folder: Path) -> None:
    accelerate.disk_offload(unet, str(folder), execution_device=torch.device("cpu"))


def accelerate_sequential(unet: UNet2DConditionModel, folder: Path) -> None:
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"), offload_buffers=True)


def group(kind: str) -> Callable[[UNet2DConditionModel, Path], None]:
    def offload(unet: UNet2DConditionModel, folder: Path) -> None:
        apply_group_offloading(
            unet,
            onload_device=torch.device("cpu"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            offload_to_disk_path=str(folder),
        )

    return offload


def scribble(unet: UNet2DConditionModel) -> None:
    """Uninitialised memory holds anything."""
    for tensor in unet.parameters():
        if not tensor.is_meta:
            tensor.data.fill_(7.0)


@pytest.mark.parametrize(
    "offload", [accelerate_disk, accelerate_sequential, group("block_level"), group("leaf_level")]
)
def test_weights_that_are_offloaded_hash_as_in_memory(
    offload: Callable[[UNet2DConditionModel, Path], None], tmp_path: Path
) -> None:
    pipeline = make_pipeline.__wrapped__()
    before = fingerprint(pipeline)
    hashes._hashed.clear()
    offload(pipeline.unet, tmp_path)
    if "group" in offload.__qualname__:
        scribble(pipeline.unet)
    assert fingerprint(pipeline) == before
    arguments, keywords = unet_inputs()
    with torch.no_grad():
        pipeline.unet(*arguments, **keywords)
    if "group" in offload.__qualname__:
        scribble(pipeline.unet)
    assert fingerprint(pipeline) == before
    # Other weights where they are kept are other weights.
    other = make_pipeline.__wrapped__()
    other.unet.conv_in.bias.data += 1
    offload(other.unet, tmp_path / "other")
    assert fingerprint(other) != before


def quantised(kind: torch.dtype) -> Callable[[torch.nn.Module], torch.nn.Module]:
    layers = {torch.nn.Linear, torch.nn.LSTM}
    return lambda module: torch.ao.quantization.quantize_dynamic(module, layers, dtype=kind)


def per_channel(module: torch.nn.Module) -> torch.nn.Module:
    weight = module[0].weight.detach()
    scales, zeros = torch.linspace(0.01, 0.02, len(weight)), torch.zeros(len(weight))
    packed = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    module[0].register_buffer("packed", packed)
    return module


def doubled(module: torch.nn.Module) -> torch.nn.Module:
    module[0].weight = torch.nn.Parameter(
        TwoTensor(module[0].weight.detach(), module[0].weight.detach() * 2)
    )
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "change", [quantised(torch.qint8), quantised(torch.float16), per_channel, doubled]
)
def test_weights_of_other_kinds_hash_by_what_they_hold(
    change: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    def found(addition: float, layer: int = 0) -> dict[str, str]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 8))
        next(module[layer].parameters()).data[2] += addition
        return fingerprint(SimpleNamespace(components={"unet": change(module)}))

    assert found(0.0) == found(0.0)
    assert len({found(addition)["weights_sha256"] for addition in (0.0, 0.1, 0.2)}) == 3
    assert found(0.1, layer=1) != found(0.0)
