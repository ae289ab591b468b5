"""AnimateDiff: inversions and reconstructions through UNets whose samples have a frame axis."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import write_embedding, write_lora
from controls import make_adapter as make_t2i_adapter
from controls import make_control_pipeline, pictures, shown
from inversions import STEM, all_latents, clip, inverted
from motion import PLACES, animated, make_adapter, make_motion_pipeline, make_still_pipeline
from PIL import Image
from pipelines import make_pipeline

import stem
from stem import Control, StemConfig
from stem.diffusion.checks import check_pipeline
from stem.diffusion.control import Shown, controlled
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.loop import denoise, guided
from stem.diffusion.motion import check_frames
from stem.diffusion.pipeline import decode_latents, encode_prompt
from stem.diffusion.schedule import sampling_scheduler
from stem.inversion import InversionError, reconstruct, reconstruct_latents, round_trip
from stem.loading.motion import with_motion
from stem.models import ModelError, load_pipeline


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def sampled(pipeline: Any, latents: torch.Tensor, *controls: Control) -> torch.Tensor:
    """Latents [N, c, h, w] after two guided steps."""
    scheduler = sampling_scheduler(pipeline, 2)
    told = Shown(controls, tuple(sorted(scheduler.timesteps.tolist()))) if controls else None
    prompt, negative = (
        encode_prompt(pipeline, text, 16, 24).showing(told) for text in ("a duck", "a swan")
    )
    prediction = guided(pipeline, prompt, negative=negative, guidance=3.0)
    with controlled(pipeline):
        return denoise(latents, scheduler, prediction, name="x")


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "windows", "controlnet"])
def test_sampling_is_that_of_diffusers(kind: str) -> None:
    frames, controls, more = 3, [], {}
    pipeline = animated("sdxl" if kind == "sdxl" else "sd1")
    if kind == "windows":
        frames = 6
        pipeline.enable_free_noise(context_length=4, context_stride=1)
    if kind == "controlnet":
        pipeline = animated(controlnet=make_control_pipeline().controlnet)
        controls = [Control(pictures(frames), scale=0.7, end=0.5)]
        more = {
            "conditioning_frames": [Image.fromarray(f.numpy()) for f in controls[0].pictures],
            "controlnet_conditioning_scale": 0.7,
            "control_guidance_end": 0.5,
        }
    latents = torch.randn(1, 4, frames, 8, 12, generator=torch.Generator().manual_seed(0))
    video = pipeline(
        "a duck", negative_prompt="a swan", num_frames=frames, height=16, width=24,
        num_inference_steps=2, latents=latents, output_type="latent", guidance_scale=3.0, **more,
    ).frames  # fmt: skip
    expected, start = video[0].transpose(0, 1), latents[0].transpose(0, 1)
    assert relative(sampled(pipeline, start, *controls), expected) < 2e-6
    # The frames are one video: layers along them matter, and so do their order and windows.
    others = {
        "sd1": lambda: sampled(make_still_pipeline(), start),
        "sdxl": lambda: sampled(pipeline, start.flip(0)).flip(0),
        "windows": lambda: sampled(make_motion_pipeline(), start),
        "controlnet": lambda: sampled(make_motion_pipeline(), start),
    }
    assert relative(others[kind](), expected) > 0.01


def test_an_inversion_and_the_way_back_go_on_bit_for_bit(tmp_path: Path) -> None:
    pipeline = make_motion_pipeline()
    processors = dict(pipeline.unet.attn_processors)
    settings: dict[str, Any] = {
        "pipeline": pipeline, "num_steps": 2, "keep_bases": True, "chunk": "auto"
    }  # fmt: skip
    whole = inverted(tmp_path / "whole", **settings)
    assert whole.verify() == []
    assert whole.settings["attention"]["chunk"] is None
    in_memory = round_trip(pipeline, whole.x0(), "a duck", 2, StemConfig(**STEM, num_frames=3))
    back = reconstruct(pipeline, whole, progress=False)
    assert torch.equal(decode_latents(pipeline, in_memory), back)
    with pytest.raises(ValueError, match="chunk=1 would cut the frames of a call into chunks"):
        reconstruct_latents(pipeline, whole, chunk=1, progress=False)
    cached: dict[str, Any] = {"bases": "cached", "progress": False}
    expected = reconstruct_latents(pipeline, whole, resume=False, **cached)
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inverted(tmp_path / "broken", on_step=stop, **settings)
    resumed = inverted(tmp_path / "broken", **settings)
    assert torch.equal(all_latents(resumed), all_latents(whole))
    with pytest.raises(KeyboardInterrupt):
        reconstruct_latents(pipeline, resumed, on_step=stop, **cached)
    assert torch.equal(reconstruct_latents(pipeline, resumed, **cached), expected)
    assert pipeline.unet.attn_processors == processors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, a motion adapter's, a ControlNet's, and files that go with them."""
    folder = tmp_path_factory.mktemp("files")
    make_pipeline().save_pretrained(folder / "base")
    make_adapter().save_pretrained(folder / "motion")
    make_control_pipeline().controlnet.save_pretrained(folder / "net")
    make_t2i_adapter(make_pipeline().unet).save_pretrained(folder / "t2i")
    write_lora(folder / "style.safetensors", encoder=True)
    write_embedding(folder / "cat.safetensors")
    return folder


def test_an_adapter_is_loaded_with_all_else(files: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    arguments: dict[str, Any] = {
        "motion_adapter": f"{files}/motion",
        "loras": [f"{files}/style.safetensors:0.7"],
        "textual_inversions": [f"{files}/cat.safetensors"],
        "controlnets": [f"{files}/net"],
    }
    loaded = load_pipeline(f"{files}/base", **arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded).__name__ == "AnimateDiffControlNetPipeline"
    assert loaded.scheduler.config.beta_schedule == "linear"
    assert loaded.motion_adapter is None  # its weights are in the UNet
    by_hand = animated(controlnet=make_control_pipeline().controlnet)
    for name in ("tokenizer", "text_encoder"):  # others share them
        part = getattr(make_pipeline.__wrapped__(), name)
        by_hand.register_modules(**{name: part})
    by_hand.load_textual_inversion(f"{files}/cat.safetensors")
    by_hand.load_lora_weights(files, weight_name="style.safetensors", adapter_name="style")
    by_hand.set_adapters(["style"], [0.7])
    settings: dict[str, Any] = {"control": shown(), "num_steps": 2}
    record = {"name": f"{files}/base", **arguments}
    folder = inverted(tmp_path, pipeline=loaded, model=record, **settings)
    hand = inverted(tmp_path / "hand", pipeline=by_hand, **settings)
    assert torch.equal(all_latents(folder), all_latents(hand))
    recorded = folder.settings["model"]
    assert {key: recorded[key] for key in record} == record
    with pytest.raises(InversionError, match=rf"the model '.*base' with.*adapter {files}/motion"):
        reconstruct_latents(make_motion_pipeline(), folder, progress=False)


def test_windows_in_half_precision(files: Path) -> None:
    arguments: dict[str, Any] = {"motion_adapter": f"{files}/motion", "motion_window": 4}
    unet = load_pipeline(f"{files}/base", dtype="bfloat16", **arguments).unet
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}


def test_offloaded_layers_along_frames_give_the_same_bits(files: Path, tmp_path: Path) -> None:
    found = []
    settings: dict[str, Any] = {"options": STEM, "num_steps": 1, "progress": False}
    for offload in (None, "group"):
        pipeline = load_pipeline(
            f"{files}/base", motion_adapter=f"{files}/motion", motion_window=4, offload=offload
        )
        root = tmp_path / str(offload)
        folder = stem.invert(pipeline, clip(5), "a duck", root, **settings)
        back = reconstruct_latents(pipeline, folder, progress=False)
        found.append((folder.path.name, all_latents(folder), back))
    (name, latents, back), (other, *rest) = found
    assert name == other
    assert torch.equal(latents, rest[0])
    assert torch.equal(back, rest[1])


def test_fingerprints_tell_layers_and_windows_apart() -> None:
    own = fingerprint(make_motion_pipeline())
    kept = animated()
    assert fingerprint(kept) == own
    kept.register_modules(motion_adapter=None)
    assert fingerprint(kept) == own
    found = [own, fingerprint(animated(strength=0.5)), fingerprint(make_still_pipeline())]
    windowed = animated()
    for length, stride, weighting in ((4, 1, "pyramid"), (4, 2, "pyramid"), (4, 2, "flat")):
        windowed.enable_free_noise(length, stride, weighting)
        found.append(fingerprint(windowed))
    assert len({each["weights_sha256"] for each in found}) == len(found)


def test_frames_that_do_not_fit(tmp_path: Path) -> None:
    pipeline = make_motion_pipeline()
    settings: dict[str, Any] = {"pipeline": pipeline, "num_steps": 2}
    parts = r"the temporal parts of UNetMotionModel \(motion_modules\) attend to all frames"
    refused: dict[str, dict[str, Any]] = {
        f"^chunk=2 would cut the frames of a call into chunks, and {parts}": {"chunk": 2},
        f"^fit_frames=2 would .*{parts}": {"options": {**STEM, "fit_frames": 2}},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            inverted(tmp_path, **{**settings, **changes})
    with pytest.raises(ValueError, match=f"^group would .*{parts}.* without torchrun"):
        check_frames(pipeline, 3, group=object())
    assert not list(tmp_path.iterdir())
    check_frames(pipeline, 3, chunk=3)  # all of them
    message = r"has 9 frames, .* places for 8 \(motion_max_seq_length\).* motion_window=8\)"
    for call in (
        lambda: stem.invert(pipeline, clip(9), "a duck", tmp_path, num_steps=2),
        lambda: round_trip(pipeline, torch.zeros(9, 4, 8, 8), "a duck", 2),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_windows_that_do_not_fit() -> None:
    pipeline = animated()
    pipeline.enable_free_noise(4, 4, "pyramid")
    for frames in (4, 5, 8, 9, 12):
        check_frames(pipeline, frames)
    for frames, fitting in ((3, "4"), (6, "4 or 8"), (7, "4 or 8"), (10, "8 or 12")):
        message = f"windows of 4 frames, 4 apart .FreeNoise.; take {fitting} frames"
        with pytest.raises(ValueError, match=message):
            check_frames(pipeline, frames)
    pipeline.enable_free_noise(4, 4, "flat")
    check_frames(pipeline, 7)
    pipeline.enable_free_noise(9, 1)
    with pytest.raises(ValueError, match="see windows of 9 frames and have places for 8"):
        check_frames(pipeline, 9)


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_why_some_windows_do_not_fit(rest: int) -> None:
    # Layers that change nothing must leave every frame as it is. Of a last window that is for
    # several frames, diffusers' FreeNoise divides all of them by the weight of the first.
    from diffusers.models.attention import FreeNoiseTransformerBlock

    block = FreeNoiseTransformerBlock(
        4, 1, 4, double_self_attention=True, context_length=4, context_stride=4
    )
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    given = torch.ones(1, 8 + rest, 4)
    whole = bool(((block(given) - given).abs() < 1e-6).all())
    assert whole == (rest < 2)


def test_models_and_adapters_that_do_not_go_together(files: Path) -> None:
    base, motion = f"{files}/base", f"{files}/motion"
    refused: dict[str, dict[str, Any]] = {
        "is a ControlNetModel, and a MotionAdapter is needed": {"motion_adapter": f"{files}/net"},
        "the motion adapter '.*base' is a folder without config": {"motion_adapter": base},
        r"'a.safetensors' is no .* MotionAdapter\.from_single_file": {
            "motion_adapter": "a.safetensors"
        },
        f"is 9, and the motion adapter .* has places for {PLACES} frames": {
            "motion_adapter": motion,
            "motion_window": 9,
        },
        "motion_window is 4, and there is no motion adapter": {"motion_window": 4},
        "is a AnimateDiffPipeline, and --controlnet .* names a T2IAdapter: diffusers has no": {
            "motion_adapter": motion,
            "controlnets": [f"{files}/t2i"],
        },
        "motion_window is 1; it must be a number of frames": {
            "motion_adapter": motion,
            "motion_window": 1,
        },
    }
    for message, arguments in refused.items():
        with pytest.raises(ModelError, match=message):
            load_pipeline(base, **arguments)
    with pytest.raises(ModelError, match="was made for another model: Incompatible Motion Adapter"):
        load_pipeline("random", motion_adapter=motion)
    both = {**make_motion_pipeline().components, "adapter": make_t2i_adapter(make_pipeline().unet)}
    with pytest.raises(ValueError, match="is beside a UNetMotionModel, which takes no features"):
        check_pipeline(SimpleNamespace(**both))


def test_pipelines_that_have_an_adapter_already(files: Path, tmp_path: Path) -> None:
    make_motion_pipeline().save_pretrained(tmp_path / "own")
    own = load_pipeline(str(tmp_path / "own"))
    assert fingerprint(own) == fingerprint(make_motion_pipeline())
    with pytest.raises(ModelError, match=r"is a AnimateDiffPipeline, and --motion-adapter"):
        with_motion(own, f"{files}/motion", None)
