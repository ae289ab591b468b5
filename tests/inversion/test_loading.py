"""Models in one file, with LoRAs, another VAE and new words: as diffusers has them by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import (
    checkpoint_tensors,
    vae_tensors,
    write_checkpoint,
    write_embedding,
    write_kohya_lora,
    write_lora,
)
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from inversions import all_latents, inverted
from packaging.version import Version
from pipelines import make_pipeline, make_unet, text_config
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stem import random_pipeline
from stem.diffusion.fingerprint import fingerprint
from stem.models import ModelError, known_schedule, known_vae_factor, load_pipeline

pytestmark = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.39"), reason="one-file models need diffusers 0.39"
)
V1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, and beside it the same pipeline in one file, LoRAs and the rest."""
    folder = tmp_path_factory.mktemp("files")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    write_checkpoint(folder / "one.safetensors", pipeline)
    write_lora(folder / "style.safetensors", encoder=True)
    write_lora(folder / "other.safetensors", seed=1)
    write_embedding(folder / "cat.safetensors")
    vae = {key: 1.01 * value.contiguous() for key, value in vae_tensors(pipeline.vae).items()}
    save_file(vae, folder / "vae.safetensors")
    return folder


def load(folder: Path, name: str = "one.safetensors", **added: Any) -> Any:
    """The model in one file, with its configuration from the folder beside it."""
    texts = {
        key: [f"{folder}/{text}" for text in value] if isinstance(value, list) else value
        for key, value in added.items()
    }
    return load_pipeline(f"{folder}/{name}", **{"config": f"{folder}/base", **texts})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub's cache without anything in it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def xl_pipeline() -> Any:
    """One whose text encoders have widths of their own, by which they are told apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        parts = {
            **make_pipeline("sdxl").components,
            "text_encoder": CLIPTextModel(text_config(12, 12)).eval(),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(20, 16)).eval(),
        }
    return StableDiffusionXLPipeline(**parts)


def test_a_file_is_the_folder_that_it_was_made_of(folder: Path) -> None:
    state = torch.random.get_rng_state()
    assert fingerprint(load(folder)) == fingerprint(load_pipeline(f"{folder}/base"))
    half = load(folder, dtype="float16")
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.float16}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert known_vae_factor("one.safetensors", f"{folder}/base") == 2
    assert known_schedule("one.safetensors", f"{folder}/base") is not None


def test_a_file_of_stable_diffusion_xl(tmp_path: Path) -> None:
    pipeline = xl_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    write_checkpoint(tmp_path / "xl.safetensors", pipeline)
    loaded = load(tmp_path, "xl.safetensors")
    assert isinstance(loaded, StableDiffusionXLPipeline)
    assert fingerprint(loaded) == fingerprint(load_pipeline(f"{tmp_path}/base"))


def test_what_a_file_says_of_its_training_is_followed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    marks = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    write_checkpoint(tmp_path / "v.safetensors", make_pipeline(), **marks)
    config = load(tmp_path, "v.safetensors").scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr
    assert load(folder).scheduler.config.prediction_type == "epsilon"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_a_file_and_a_lora_invert_as_by_hand(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, loras=["style.safetensors:0.7", "other.safetensors"])
    by_hand = StableDiffusionPipeline.from_single_file(
        f"{folder}/one.safetensors", config=f"{folder}/base"
    )
    for name in ("style", "other"):
        by_hand.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    by_hand.set_adapters(["style", "other"], [0.7, 1.0])
    found = {
        name: all_latents(inverted(tmp_path / name, pipeline=pipeline, num_steps=2))
        for name, pipeline in (("loaded", loaded), ("by hand", by_hand), ("plain", load(folder)))
    }
    assert torch.equal(found["loaded"], found["by hand"])
    by_hand.fuse_lora()
    by_hand.unload_lora_weights()
    fused = all_latents(inverted(tmp_path / "fused", pipeline=by_hand, num_steps=2))

    def difference(name: str) -> float:
        return float((found[name] - fused).norm() / fused.norm())

    assert difference("loaded") < 1e-4
    assert difference("plain") > 0.01


def test_a_lora_of_kohyas_scripts(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    plain = load_pipeline(f"{tmp_path}/base")
    lora = write_kohya_lora(tmp_path / "kohya.safetensors", plain, alpha=1.0)
    pipeline = load_pipeline(f"{tmp_path}/base", loras=[f"{lora}:0.5"])
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    given, tokens = load_file(lora), torch.randn(3, 32)
    name = f"lora_unet_{layer.replace('.', '_')}"
    low = tokens @ given[f"{name}.lora_down.weight"].T @ given[f"{name}.lora_up.weight"].T
    own = plain.unet.get_submodule(layer)(tokens)
    expected = own + 0.5 * (1.0 / 2) * low  # scale, alpha over rank
    torch.testing.assert_close(pipeline.unet.get_submodule(layer)(tokens), expected)


def test_fingerprints_tell_all_additions_apart(folder: Path) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"loras": ["style.safetensors"]},
        {"loras": ["style.safetensors:0.7"]},
        {"loras": ["style.safetensors:0.8"]},
        {"loras": ["other.safetensors:0.7"]},
        {"loras": ["style.safetensors:0.7", "other.safetensors"]},
        {"vae": f"{folder}/vae.safetensors"},
        {"textual_inversions": ["cat.safetensors"]},
        {"textual_inversions": ["cat.safetensors:<dog>"]},
    ]
    found = [json.dumps(fingerprint(load(folder, **case)), sort_keys=True) for case in cases]
    assert len(set(found)) == len(cases)
    for number in (5, 7):  # nothing of them is random
        again = json.dumps(fingerprint(load(folder, **cases[number])), sort_keys=True)
        assert again == found[number]


def test_vaes_from_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    expected = load(folder, vae=f"{folder}/vae.safetensors").vae
    own = make_pipeline().vae.state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(value, 1.01 * own[key])
    expected.save_pretrained(tmp_path / "vae")
    state = expected.state_dict()
    save_file(state, tmp_path / "diffusers.safetensors")
    prefixed = {f"first_stage_model.{k}": v.contiguous() for k, v in vae_tensors(expected).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    for name in ("vae", "", "diffusers.safetensors", "prefixed.safetensors"):
        for model in ("one.safetensors", "base"):
            config = f"{folder}/base" if model == "one.safetensors" else None
            found = load(folder, model, config=config, vae=f"{tmp_path}/{name}").vae.state_dict()
            assert all(torch.equal(found[key], state[key]) for key in state)
    # A file that has none needs one.
    tensors = checkpoint_tensors(make_pipeline())
    bare = {k: v.contiguous() for k, v in tensors.items() if not k.startswith("first_stage")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ModelError, match=r"bare.safetensors' holds no VAE; name the one .* --vae"):
        load_pipeline(f"{tmp_path}/bare.safetensors", config=f"{folder}/base")
    assert load_pipeline(
        f"{tmp_path}/bare.safetensors", config=f"{folder}/base", vae=f"{tmp_path}/vae"
    )


def test_vaes_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    AutoencoderKL(**sizes, latent_channels=16).save_pretrained(tmp_path / "of16")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "factor1")
    cut = load_file(f"{folder}/vae.safetensors")
    del cut["encoder.conv_in.weight"]
    save_file(cut, tmp_path / "cut.safetensors")
    expected = {
        "tiny": "it is a AutoencoderTiny, and latents need an AutoencoderKL",
        "of16": "has latent_channels 16, and the model's own has 4",
        "factor1": r"has block_out_channels \[8\], and the model's own has",
        "nowhere": "no VAE for this model can be loaded from .*nowhere",
        "cut.safetensors": "no VAE for this model .*cut.safetensors.*it lacks weights",
    }
    for name, message in expected.items():
        with pytest.raises(ModelError, match=message):
            load_pipeline(f"{folder}/base", vae=f"{tmp_path}/{name}")


def test_words_of_textual_inversion(folder: Path, tmp_path: Path) -> None:
    pipeline = load(folder, textual_inversions=["cat.safetensors"])
    vectors = load_file(f"{folder}/cat.safetensors")["<cat>"]
    ids = pipeline.tokenizer("<cat> <cat>_1", add_special_tokens=False).input_ids
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, vectors)
    write_embedding(tmp_path / "narrow.safetensors", channels=8)
    write_embedding(tmp_path / "dog.safetensors", name="emb_params")
    model = f"{folder}/base"
    named = load_pipeline(model, textual_inversions=[f"{tmp_path}/dog.safetensors"])
    assert "dog" in named.tokenizer.get_added_vocab()
    with pytest.raises(ModelError, match=r"narrow.safetensors' was made for another model: .* 8 c"):
        load_pipeline(model, textual_inversions=[f"{tmp_path}/narrow.safetensors"])
    with pytest.raises(ModelError, match="cannot be added as '<cat>': Token <cat> already in"):
        load_pipeline(model, textual_inversions=[f"{folder}/cat.safetensors"] * 2)


def test_words_for_both_encoders_of_stable_diffusion_xl(folder: Path, tmp_path: Path) -> None:
    xl_pipeline().save_pretrained(tmp_path / "xl")
    both = {"clip_l": torch.randn(1, 12), "clip_g": torch.randn(1, 20)}
    save_file(both, tmp_path / "cat.safetensors")
    pipeline = load_pipeline(
        f"{tmp_path}/xl", textual_inversions=[f"{tmp_path}/cat.safetensors:<c>"]
    )
    for number, name in (("", "clip_l"), ("_2", "clip_g")):
        token = getattr(pipeline, f"tokenizer{number}").convert_tokens_to_ids("<c>")
        weight = getattr(pipeline, f"text_encoder{number}").get_input_embeddings().weight
        assert torch.equal(weight[token], both[name][0])
    with pytest.raises(ModelError, match=r"cat.safetensors' was made for another model"):
        load_pipeline(f"{folder}/base", textual_inversions=[f"{tmp_path}/cat.safetensors"])


def test_loras_for_another_model(folder: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "xl.safetensors", "sdxl")
    with pytest.raises(ModelError, match=r"xl.safetensors' is no LoRA for this model: .*mismatch"):
        load_pipeline(f"{folder}/base", loras=[lora])
    tensors = load_file(f"{folder}/other.safetensors")
    more = {
        key.replace("unet.", "text_encoder_2."): value.clone() for key, value in tensors.items()
    }
    save_file({**tensors, **more}, tmp_path / "more.safetensors")
    count = len(tensors)
    message = f"is no LoRA for this model: {count} of its {2 * count} tensors have a place"
    with pytest.raises(ModelError, match=message):
        load_pipeline(f"{folder}/base", loras=[f"{tmp_path}/more.safetensors"])


def test_loras_need_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs peft, .* pip install 'stem-inversion\[lora\]'"):
        load(folder, loras=["style.safetensors"])


def test_a_configuration_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    make_pipeline("sdxl").save_pretrained(tmp_path / "xl")
    one = f"{folder}/one.safetensors"
    for config, message in {
        f"{tmp_path}/xl": "one.safetensors' does not fit the configuration",
        str(tmp_path): "has no model_index.json; name a pipeline's folder",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_pipeline(one, config=config)
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline"))
    with pytest.raises(ModelError, match="is of a FluxPipeline, and a file's model must be"):
        load_pipeline(one, config=f"{tmp_path}/xl")
    tensors = load_file(one)
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=r"lacks the text_encoder's final_layer_norm.weight"):
        load_pipeline(f"{tmp_path}/cut.safetensors", config=f"{folder}/base")


def v1_pipeline(width: int = 768) -> Any:
    """One whose UNet attends to text of Stable Diffusion 1.x's width."""
    parts = {
        **make_pipeline().components,
        "unet": UNet2DConditionModel.from_config(make_unet().config, cross_attention_dim=width),
        "text_encoder": CLIPTextModel(text_config(width, width)).eval(),
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def test_the_standard_configuration_offline(tmp_path: Path, offline: Path) -> None:
    pipeline = v1_pipeline()
    one = write_checkpoint(tmp_path / "one.safetensors", pipeline)
    with pytest.raises(ModelError) as caught:
        load_pipeline(one)
    for said in (
        f"'{one}' holds weights only, and the configuration '{V1}' is neither a folder here nor in",
        "--model-config FOLDER (config)",
        f"hf download {V1} --include",
    ):
        assert said in str(caught.value)
    snapshot = offline / f"models--{V1.replace('/', '--')}" / "snapshots" / "0"
    pipeline.save_pretrained(snapshot)
    for weights in snapshot.rglob("*.safetensors"):
        weights.unlink()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    assert fingerprint(load_pipeline(one)) == fingerprint(pipeline)


def test_a_file_of_stable_diffusion_2_does_not_say_what_it_predicts(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "two.safetensors", v1_pipeline(1024))
    with pytest.raises(ModelError, match=r"does not say whether it predicts noise .* --model-conf"):
        load_pipeline(one)
    odd = write_checkpoint(tmp_path / "odd.safetensors", make_pipeline())
    with pytest.raises(ModelError, match=r"takes text of 16 channels, and Stable Diffusion 1.x"):
        load_pipeline(odd)


def test_variants(tmp_path: Path) -> None:
    random_pipeline(3).to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    random_pipeline(4).save_pretrained(tmp_path)
    assert fingerprint(load_pipeline(str(tmp_path))) == fingerprint(random_pipeline(4))
    found = load_pipeline(str(tmp_path), variant="fp16", dtype="float16")
    assert fingerprint(found) == fingerprint(random_pipeline(3).to(dtype=torch.float16))
    with pytest.raises(ModelError, match=r"from the folder .*`variant=ema`, but no such modeling"):
        load_pipeline(str(tmp_path), variant="ema")
