"""T2I-Adapters beside the UNet, by the same machinery as ControlNets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from controls import (
    make_adapter,
    make_adapter_pipeline,
    make_control_pipeline,
    pictures,
    shown,
)
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter
from inversions import all_latents, inverted
from PIL import Image
from pipelines import make_pipeline

import stem
from stem import Control
from stem.diffusion.checks import check_pipeline
from stem.diffusion.control import Shown, controlled
from stem.diffusion.loop import denoise, guided
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import sampling_scheduler
from stem.inversion import InversionError, reconstruct_latents


def with_adapter(adapter: Any) -> Any:
    parts = make_adapter_pipeline().components
    return StableDiffusionAdapterPipeline(
        **{**parts, "adapter": adapter}, requires_safety_checker=False
    )


@pytest.mark.parametrize(("shape", "nets"), [("sd1", 1), ("sd1", 2), ("sdxl", 1)])
def test_sampling_is_that_of_diffusers(shape: str, nets: int) -> None:
    pipeline = make_adapter_pipeline(shape, nets)
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    controls = tuple(Control(pictures(1, seed=n), scale=0.7 + n) for n in range(nets))
    images = [Image.fromarray(control.pictures[0].numpy()) for control in controls]
    scales = [control.scale for control in controls]
    expected = pipeline(
        "a duck", negative_prompt="a swan", image=images if nets > 1 else images[0],
        adapter_conditioning_scale=scales if nets > 1 else scales[0],
        height=16, width=24, num_inference_steps=5, latents=latents, output_type="latent",
        guidance_scale=3.0,
    ).images  # fmt: skip
    scheduler = sampling_scheduler(pipeline, 5)
    told = Shown(controls, tuple(sorted(scheduler.timesteps.tolist())))
    prompt, negative = (
        encode_prompt(pipeline, text, 16, 24).showing(told) for text in ("a duck", "a swan")
    )
    with controlled(pipeline):
        prediction = guided(pipeline, prompt, negative=negative, guidance=3.0)
        found = denoise(latents, scheduler, prediction, name="x")
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_inversions_come_back_and_name_another_adapter(tmp_path: Path) -> None:
    pipeline = make_adapter_pipeline(nets=2)
    folder = inverted(tmp_path, pipeline=pipeline, control=shown(2), num_steps=20)
    latents = reconstruct_latents(pipeline, folder, progress=False)
    assert (latents - folder.x0()).norm() / folder.x0().norm() < 0.5
    plain = inverted(tmp_path, num_steps=20)
    assert not torch.equal(plain.latents(-1), folder.latents(-1))
    parts = inverted(tmp_path, pipeline=pipeline, control=shown(2), num_steps=20, chunk=2)
    assert (parts.latents(-1) - folder.latents(-1)).norm() < 1e-4 * folder.latents(-1).norm()
    with pytest.raises(InversionError, match=r"'\?' \(number 1\), whose configuration"):
        reconstruct_latents(make_control_pipeline(nets=2), folder, progress=False)
    with pytest.raises(ValueError, match="has 2 T2I-Adapters, and nothing to show it"):
        inverted(tmp_path, pipeline=pipeline)


def test_an_adapter_sees_a_frame_once_whatever_the_branches() -> None:
    pipeline = make_adapter_pipeline()
    scheduler = sampling_scheduler(pipeline, 2)
    told = Shown(tuple(shown()), tuple(sorted(scheduler.timesteps.tolist())))
    branch = encode_prompt(pipeline, "a duck", 16, 24).showing(told)
    seen: list[int] = []
    hook = pipeline.adapter.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with controlled(pipeline):
        prediction = guided(pipeline, branch, negative=branch, guidance=3.0)
        denoise(torch.zeros(3, 4, 8, 12), scheduler, prediction, name="x")
    hook.remove()
    assert seen == [3, 3]


def test_an_adapter_of_grey_pictures() -> None:
    check_pipeline(with_adapter(make_adapter(make_pipeline().unet, channels=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": [16]},
            r"the T2I-Adapter of .* has channels \[16\], and the UNet has \[32\]",
        ),
        ({"in_channels": 2}, "takes pictures of 2 channels"),
        ({"downscale_factor": 4}, "makes a place of 4x4 pixels, and the VAE a latent of 2x2"),
    ],
)
def test_adapters_of_another_model(changes: dict[str, Any], message: str) -> None:
    own = {"in_channels": 3, "channels": [32], "num_res_blocks": 1, "downscale_factor": 2}
    with pytest.raises(ValueError, match=message):
        check_pipeline(with_adapter(T2IAdapter(**{**own, **changes})))


def test_an_adapter_is_loaded_with_a_model(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "base")
    pipeline = make_adapter_pipeline()
    pipeline.adapter.save_pretrained(tmp_path / "adapter")
    make_control_pipeline().controlnet.save_pretrained(tmp_path / "net")
    base, adapter, net = (str(tmp_path / name) for name in ("base", "adapter", "net"))
    loaded = stem.load_pipeline(base, controlnets=[adapter])
    assert type(loaded) is StableDiffusionAdapterPipeline
    found = inverted(tmp_path / "a", pipeline=loaded, control=shown())
    by_hand = inverted(tmp_path / "b", pipeline=pipeline, control=shown())
    assert torch.equal(all_latents(found), all_latents(by_hand))
    with pytest.raises(stem.models.ModelError, match="ControlNetModel and T2IAdapter; take those"):
        stem.load_pipeline(base, controlnets=[adapter, net])
