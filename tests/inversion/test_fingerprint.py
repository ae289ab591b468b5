"""Fingerprints: which changes of a pipeline they see, and how little of it they read again."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

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
