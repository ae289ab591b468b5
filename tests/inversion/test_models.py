"""Models by name: random ones, folders and the embedded one, on a device and in a dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import vae_factor
from stem.models import ModelError, known_schedule, known_vae_factor, load_pipeline, random_pipeline


def test_the_random_pipeline_is_stable_diffusion_shaped_and_seeded() -> None:
    state = torch.random.get_rng_state()
    first, again, other = random_pipeline(0), random_pipeline(0), random_pipeline(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first, StableDiffusionPipeline)
    assert vae_factor(first) == 8
    assert fingerprint(first) == fingerprint(again)
    assert fingerprint(first) != fingerprint(other)
    ids = first.tokenizer("a duck").input_ids
    assert ids[0] == 512
    assert ids[-1] == 513
    assert first.tokenizer.decode(ids[1:-1]).replace(" ", "") == "aduck"


def test_loading_from_a_folder(tmp_path) -> None:  # type: ignore[no-untyped-def]
    original = random_pipeline(3)
    original.save_pretrained(tmp_path / "model")
    assert fingerprint(load_pipeline("random:3")) == fingerprint(original)
    loaded = load_pipeline(str(tmp_path / "model"))
    assert fingerprint(loaded) == fingerprint(original)
    assert loaded.tokenizer("a duck").input_ids == original.tokenizer("a duck").input_ids


def test_models_that_cannot_be_used(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"can be loaded from the folder.*model_index\.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ModelError, match="can be loaded from the hub id 'no/such-model'"):
        load_pipeline("no/such-model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "WanPipeline",
            "'some/model' is a video transformer, which has no UNet; load it with stem",
        ),
        ("FluxPipeline", "'some/model': the target is a FluxPipeline, not a UNet2DConditionModel"),
    ],
)
def test_pipelines_of_other_kinds_are_refused_by_their_index(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"_class_name": kind, "transformer": ["diffusers", "Transformer"]}
    asked: list[str] = []

    def download(name: str, filename: str, **_: Any) -> str:
        asked.append(f"{name}/{filename}")
        return str(tmp_path / filename)

    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: None)
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was downloaded")
    )
    with pytest.raises(ModelError, match=message):
        load_pipeline("some/model")
    assert asked == ["some/model/model_index.json"]
    with pytest.raises(ModelError, match=message.replace("some/model", str(tmp_path))):
        load_pipeline(str(tmp_path))
    assert len(asked) == 1


def test_loading_a_folder_of_half_precision_weights_only(tmp_path: Path) -> None:
    original = random_pipeline(3).to(dtype=torch.float16)
    original.save_pretrained(tmp_path, variant="fp16")
    expected = fingerprint(original)
    assert not list(tmp_path.glob("*/*model.safetensors"))
    assert fingerprint(load_pipeline(str(tmp_path), dtype="float16")) == expected
    # Parts may have other weights, too, or those alone.
    encoder = tmp_path / "text_encoder"
    (encoder / "model.fp16.safetensors").rename(encoder / "model.safetensors")
    assert fingerprint(load_pipeline(str(tmp_path), dtype="float16")) == expected
    random_pipeline(4).save_pretrained(tmp_path)
    assert fingerprint(load_pipeline(str(tmp_path))) == fingerprint(random_pipeline(4))


def test_sharded_weights_have_variants_too(tmp_path: Path) -> None:
    random_pipeline(3).save_pretrained(tmp_path, variant="fp16", max_shard_size="8MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = load_pipeline(str(tmp_path), dtype="float32")
    assert fingerprint(loaded) == fingerprint(random_pipeline(3))


def test_a_file_and_a_path_to_nothing_are_no_hub_ids(tmp_path: Path) -> None:
    file, pickle = tmp_path / "v1-5.safetensors", tmp_path / "v1-5.ckpt"
    file.touch()
    pickle.touch()
    advice = r".*from_single_file\(FILE\)\.save"
    with pytest.raises(ModelError, match=f"'{file}' is damaged, or no .safetensors file"):
        load_pipeline(str(file))
    with pytest.raises(ModelError, match=f"'{pickle}' is no .safetensors file; {advice}"):
        load_pipeline(str(pickle))
    for model in ("v1-5.safetensors", "models/v1-5.safetensors"):
        with pytest.raises(ModelError, match=f"^there is no file '{model}' for --model"):
            load_pipeline(model)
    with pytest.raises(ModelError, match=f"^there is no file 'v1-5.ckpt' here; {advice}"):
        load_pipeline("v1-5.ckpt")
    for model in (str(tmp_path / "absent"), "~/model", "a/b/c"):
        with pytest.raises(ModelError, match=f"'{model}' is no folder here, and cannot be a hub"):
            load_pipeline(model)


def test_loading_with_a_device_and_a_dtype(tmp_path: Path) -> None:
    assert load_pipeline("random", dtype="bfloat16").unet.dtype == torch.bfloat16
    assert load_pipeline("random", dtype=torch.float16, device="cpu").vae.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype is 'half'; it must be one of float32, float16"):
        load_pipeline("random", dtype="half")
    with pytest.raises(ValueError, match="device is 'gpu'; write cpu, cuda"):
        load_pipeline("random", device="gpu")
    for device in ("cuda:99", "cuda:256"):
        with pytest.raises(ValueError, match=rf"device is '{device}', and torch .* sees \d+ CUDA"):
            load_pipeline("random", device=device)
    random_pipeline(0).save_pretrained(tmp_path)
    for model in ("random", "random:3", "embedded", str(tmp_path)):
        pipeline = load_pipeline(model)
        assert known_vae_factor(model) == vae_factor(pipeline)
        schedule = known_schedule(model)
        assert schedule is not None
        assert schedule["num_train_timesteps"] == 1000
        assert schedule["steps_offset"] == pipeline.scheduler.config.steps_offset
    assert known_vae_factor("some/hub-id") is None
    assert known_schedule("some/hub-id") is None
