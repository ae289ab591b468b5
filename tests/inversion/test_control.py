"""ControlNets beside the UNet: inversions and reconstructions, and what cannot be used."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from controls import make_control_pipeline, make_controlnet, pictures, shown
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from interruptions import stop_after
from inversions import STEM, all_latents, clip, inverted
from PIL import Image
from pipelines import make_pipeline, make_unet

import stem
from stem import Control
from stem.diffusion.checks import check_pipeline
from stem.diffusion.control import Shown, controlled
from stem.diffusion.loop import denoise, guided
from stem.diffusion.memory import chunk_that_fits
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import sampling_scheduler
from stem.inversion import (
    InversionError,
    InversionFolder,
    reconstruct,
    reconstruct_latents,
    round_trip,
)


def calls_of(net: Any, into: list[tuple[int, int]]) -> Any:
    """A hook that keeps the timestep and the number of rows of each call of a ControlNet."""
    return net.register_forward_pre_hook(lambda _, args: into.append((int(args[1]), len(args[0]))))


@pytest.mark.parametrize(("shape", "nets"), [("sd1", 1), ("sd1", 2), ("sd2", 1), ("sdxl", 2)])
def test_sampling_is_that_of_diffusers(shape: str, nets: int) -> None:
    pipeline = make_control_pipeline(shape, nets)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    controls = [
        Control(pictures(2, seed=n), scale=0.7 + n, start=0.2 * n, end=0.8) for n in range(nets)
    ]
    ends = []
    for frame, noise in enumerate(latents.split(1)):
        images = [Image.fromarray(control.pictures[frame].numpy()) for control in controls]
        scales = [control.scale for control in controls]
        found = pipeline(
            "a duck",
            negative_prompt="a swan",
            image=images if nets > 1 else images[0],
            controlnet_conditioning_scale=scales if nets > 1 else scales[0],
            control_guidance_start=[control.start for control in controls],
            control_guidance_end=[control.end for control in controls],
            height=16, width=24, num_inference_steps=5, latents=noise, output_type="latent",
            guidance_scale=3.0,
        )  # fmt: skip
        ends.append(found.images)
    expected = torch.cat(ends)
    scheduler = sampling_scheduler(pipeline, 5)
    told = Shown(tuple(controls), tuple(sorted(scheduler.timesteps.tolist())))
    prompt, negative = (
        encode_prompt(pipeline, text, 16, 24).showing(told) for text in ("a duck", "a swan")
    )
    prediction = guided(pipeline, prompt, negative=negative, guidance=3.0)
    with controlled(pipeline):
        found = denoise(latents, scheduler, prediction, name="x")
    assert float((found - expected).norm() / expected.norm()) < 2e-6
    plain = guided(pipeline, dataclasses.replace(prompt, shown=()), negative=negative, guidance=3.0)
    with controlled(pipeline):
        without = denoise(latents, scheduler, plain, name="x")
    assert float((without - expected).norm() / expected.norm()) > 0.01


@pytest.mark.parametrize("method", ["ddim", "stem"])
def test_an_inversion_comes_back_under_control(tmp_path: Path, method: str) -> None:
    pipeline = make_control_pipeline()
    processors = [dict(part.attn_processors) for part in (pipeline.unet, pipeline.controlnet)]
    folder = inverted(
        tmp_path, method=method, pipeline=pipeline, num_steps=20, control=shown(scale=0.5)
    )
    assert folder.complete
    assert folder.verify() == []
    latents = reconstruct_latents(pipeline, folder, progress=False)
    x0 = folder.x0()
    assert (latents - x0).norm() / x0.norm() < 0.5
    assert reconstruct(pipeline, folder, progress=False).shape == clip().frames.shape
    for part, before in zip((pipeline.unet, pipeline.controlnet), processors, strict=True):
        assert part.attn_processors == before
        assert "forward" not in vars(part)
    plain = inverted(tmp_path, method=method, num_steps=20)
    assert plain.path != folder.path
    assert not torch.equal(plain.latents(-1), folder.latents(-1))
    assert "control" not in plain.settings


def test_control_is_on_at_the_same_timesteps_in_both_directions(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    seen: list[tuple[int, int]] = []
    hook = calls_of(pipeline.controlnet, seen)
    # Of sampling steps 0 ... 4, the noisiest first: 1 and 2.
    folder = inverted(tmp_path, pipeline=pipeline, control=shown(start=0.2, end=0.7), chunk=None)
    there = [timestep for timestep, _ in seen]
    seen.clear()
    reconstruct_latents(pipeline, folder, guidance=2.0, progress=False)
    hook.remove()
    back = [timestep for timestep, _ in seen]
    assert there == [folder.timesteps[2], folder.timesteps[3]]
    assert back == there[::-1]
    assert [rows for _, rows in seen] == [6, 6]  # both branches of guidance
    both = shown(start=0.0, end=0.4)[0], shown(start=0.6, end=1.0)[0]
    for control in both:
        other = inverted(tmp_path, pipeline=pipeline, control=control)
        assert not torch.equal(other.latents(-1), folder.latents(-1))


@pytest.mark.parametrize("method", ["ddim", "stem", "inflated"])
def test_chunks_see_their_own_frames_pictures(tmp_path: Path, method: str) -> None:
    pipeline = make_control_pipeline(nets=2)
    settings: dict[str, Any] = {"method": method, "pipeline": pipeline, "control": shown(2)}
    whole = inverted(tmp_path, chunk=None, **settings)
    seen: list[tuple[int, int]] = []
    hooks = [calls_of(net, seen) for net in pipeline.controlnet.nets]
    parts = inverted(tmp_path, chunk=2, **settings)
    for hook in hooks:
        hook.remove()
    assert {rows for _, rows in seen} == {2, 1}
    difference = (parts.latents(-1) - whole.latents(-1)).norm() / whole.latents(-1).norm()
    assert difference < 1e-5
    again = inverted(tmp_path / "again", chunk=2, **settings)
    assert torch.equal(all_latents(again), all_latents(parts))
    back = reconstruct_latents(pipeline, parts, progress=False, guidance=2.0)
    expected = reconstruct_latents(pipeline, whole, progress=False, guidance=2.0)
    assert (back - expected).norm() / expected.norm() < 1e-5


def test_bases_of_a_few_frames_under_control(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    seen: list[tuple[int, int]] = []
    hook = calls_of(pipeline.controlnet, seen)
    folder = inverted(
        tmp_path, pipeline=pipeline, control=shown(), options={**STEM, "fit_frames": 2}, chunk=1
    )
    hook.remove()
    assert len(seen) == 3 * 5  # each frame once a step
    assert folder.complete


def test_going_on_gives_the_same_bits(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    settings: dict[str, Any] = {"pipeline": pipeline, "control": shown()}
    whole = inverted(tmp_path / "whole", **settings)
    expected = reconstruct_latents(pipeline, whole, progress=False, resume=False)
    with pytest.raises(KeyboardInterrupt):
        inverted(tmp_path / "broken", on_step=stop_after(3), **settings)
    assert "forward" not in vars(pipeline.unet)
    resumed = inverted(tmp_path / "broken", **settings)
    assert torch.equal(all_latents(resumed), all_latents(whole))
    with pytest.raises(KeyboardInterrupt):
        reconstruct_latents(pipeline, resumed, progress=False, on_step=stop_after(3))
    found = reconstruct_latents(pipeline, resumed, progress=False)
    assert torch.equal(found, expected)


def test_too_little_space_for_the_pictures_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=6900))
    monkeypatch.setattr("stem.inversion.inverting.encode_frames", lambda *_: pytest.fail("work"))
    # 2 ControlNets, 3 pictures of 16 x 24 pixels of 3 bytes
    with pytest.raises(OSError, match="needs 6,912 bytes, and 6,900 are free"):
        inverted(tmp_path, pipeline=make_control_pipeline(nets=2), control=shown(2))


def test_a_round_trip_in_memory_is_the_same(tmp_path: Path) -> None:
    pipeline, controls = make_control_pipeline(nets=2), shown(2, end=0.5)
    folder = inverted(tmp_path, method="ddim", pipeline=pipeline, control=controls)
    config = stem.PerFrameConfig(num_frames=3)
    back = round_trip(pipeline, folder.x0(), "a duck", 5, config, control=controls)
    assert torch.equal(back, reconstruct_latents(pipeline, folder, progress=False))


def test_the_folder_keeps_the_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = make_control_pipeline(nets=2)
    control = [*shown(scale=0.5, source="canny"), Control(pictures(seed=7), end=0.9)]
    folder = inverted(tmp_path, pipeline=pipeline, control=control)
    kept = InversionFolder.open(folder.path).control()
    for own, given in zip(kept, control, strict=True):
        assert torch.equal(own.pictures, given.pictures)
        assert own.record() == given.record()
    recorded = folder.settings["control"]
    assert [each["scale"] for each in recorded] == [0.5, 1.0]
    assert recorded[0]["source"] == "canny"
    assert recorded[0]["weights_sha256"] != recorded[1]["weights_sha256"]
    (folder.path / "control.safetensors").write_bytes(b"half")
    assert len(folder.verify()) == 1
    with pytest.raises(InversionError, match=r"control\.safetensors"):
        reconstruct_latents(pipeline, folder, progress=False)
    inverted(tmp_path, pipeline=pipeline, control=control)
    assert "the control pictures are written again" in caplog.text
    assert folder.verify() == []
    (folder.path / "control.safetensors").unlink()
    assert not folder.complete
    # Another picture, scale or share is another inversion.
    others = [
        dataclasses.replace(control[0], scale=0.6),
        dataclasses.replace(control[0], start=0.2),
        dataclasses.replace(control[0], pictures=pictures(seed=9)),
    ]
    paths = {
        inverted(tmp_path, pipeline=pipeline, control=[other, control[1]]).path for other in others
    }
    assert len(paths | {folder.path}) == 4


def test_another_control_net_than_the_inversion_s_is_named(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    folder = inverted(tmp_path, pipeline=pipeline, control=shown())

    def reconstructed(other: Any) -> None:
        reconstruct_latents(other, folder, progress=False)

    with pytest.raises(InversionError, match="with 1 ControlNets, and this pipeline has none"):
        reconstructed(make_pipeline())
    with pytest.raises(InversionError, match="with 1 ControlNets, and this pipeline has 2"):
        reconstructed(make_control_pipeline(nets=2))
    net = copy.deepcopy(pipeline.controlnet)
    changed = StableDiffusionControlNetPipeline(
        **{**pipeline.components, "controlnet": net}, requires_safety_checker=False
    )
    reconstructed(changed)
    with torch.no_grad():
        net.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(InversionError, match=r"the ControlNet '\?' \(number 1\), whose config"):
        reconstructed(changed)
    plain = inverted(tmp_path)
    with pytest.raises(InversionError, match="made without a ControlNet, and this pipeline has 1"):
        reconstruct_latents(pipeline, plain, progress=False)


def test_controls_that_do_not_fit(tmp_path: Path) -> None:
    one, two = make_control_pipeline(), make_control_pipeline(nets=2)
    refused: list[tuple[Any, Any, str]] = [
        (one, None, "StableDiffusionControlNetPipeline, has a ControlNet, and nothing to show it"),
        (two, None, "has 2 ControlNets, and nothing to show it; give control"),
        (two, shown(), "has 2 ControlNets, and control has 1"),
        (make_pipeline(), shown(), "has no ControlNet; load it with controlnets"),
        (one, Control(pictures(2)), "has 2 pictures, and the video 3 frames"),
        (
            one,
            Control(pictures(3, 16, 16), source="edges.mp4"),
            "'edges.mp4' has pictures of 16x16, and the video's frames are 24x16",
        ),
    ]
    for pipeline, control, message in refused:
        with pytest.raises(ValueError, match=message):
            inverted(tmp_path, pipeline=pipeline, control=control)
    with pytest.raises(TypeError, match=r"control holds a Tensor; pass stem\.Control objects"):
        inverted(tmp_path, pipeline=one, control=[pictures()])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="has a ControlNet, and nothing to show it"):
        round_trip(one, torch.zeros(1, 4, 8, 8), "a duck", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
        ({"scale": "1"}, "scale is '1'; it must be a number"),
        ({"start": 0.5, "end": 0.5}, "starts at 0.5 and ends at 0.5"),
        ({"end": 1.5}, "ends at 1.5"),
        ({"pictures": pictures().float()}, r"are torch.float32 \[3, 16, 24, 3\]; they must be"),
        ({"pictures": pictures()[..., 0]}, r"are torch.uint8 \[3, 16, 24\]; they must be"),
    ],
)
def test_controls_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Control(**{"pictures": pictures(), **changes})


def with_net(**changes: Any) -> Any:
    pipeline = make_control_pipeline()
    net = ControlNetModel.from_config(pipeline.controlnet.config, **changes)
    return StableDiffusionControlNetPipeline(
        **{**pipeline.components, "controlnet": net}, requires_safety_checker=False
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 32}, "has cross_attention_dim 32, and the UNet has 16"),
        ({"block_out_channels": (16,)}, r"has block_out_channels .*16.* and the UNet has"),
        ({"global_pool_conditions": True}, "needs guess mode, which an inversion does not have"),
        ({"conditioning_channels": 1}, "takes pictures of 1 channels"),
        ({"num_class_embeds": 3}, "wants class labels"),
        (
            {"conditioning_embedding_out_channels": (8, 8, 8)},
            "makes a place of 4x4 pixels, and the VAE a latent of 2x2",
        ),
    ],
)
def test_control_nets_of_another_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline(with_net(**changes))
    check_pipeline(make_control_pipeline(nets=2))


def test_the_second_of_several_is_named() -> None:
    pipeline = make_control_pipeline()
    other = make_controlnet(make_unet("sdxl"))
    both = StableDiffusionControlNetPipeline(
        **{**pipeline.components, "controlnet": [pipeline.controlnet, other]},
        requires_safety_checker=False,
    )
    with pytest.raises(ValueError, match=r"the ControlNet 2 of 2 of the pipeline.*dim 32"):
        check_pipeline(both)


def test_a_mechanism_on_the_control_net_is_off_meanwhile(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    expected = inverted(tmp_path / "a", pipeline=pipeline, control=shown())
    handle = stem.enable(pipeline.controlnet, stem.StemConfig(num_bases=4, num_frames=3))
    outer = stem.enable(pipeline.unet, stem.StemConfig(num_bases=4, num_frames=3, chunk=1))
    found = inverted(tmp_path / "b", pipeline=pipeline, control=shown())
    assert handle.active
    assert outer.active
    outer.disable()
    handle.disable()
    assert torch.equal(all_latents(found), all_latents(expected))
    assert "forward" not in vars(pipeline.unet)


def test_memory_of_the_control_nets_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    pipeline = make_control_pipeline(nets=2)
    hooks = [calls_of(net, seen) for net in pipeline.controlnet.nets]
    chunk_that_fits(pipeline, 3, 16, 24, branches=1, meets=True)
    for hook in hooks:
        hook.remove()
    assert sorted(rows for _, rows in seen) == [1, 1, 1, 1, 3, 3]


def test_a_control_net_is_loaded_with_a_model(tmp_path: Path) -> None:
    pipeline = make_control_pipeline()
    make_pipeline().save_pretrained(tmp_path / "base")
    pipeline.controlnet.save_pretrained(tmp_path / "net")
    loaded = stem.load_pipeline(str(tmp_path / "base"), controlnets=[str(tmp_path / "net")] * 2)
    assert type(loaded).__name__ == "StableDiffusionControlNetPipeline"
    model = {"name": str(tmp_path / "base"), "controlnets": [str(tmp_path / "net")] * 2}
    folder = inverted(tmp_path, pipeline=loaded, control=shown(2), model=model)
    hand = StableDiffusionControlNetPipeline(
        **{**pipeline.components, "controlnet": [pipeline.controlnet] * 2},
        requires_safety_checker=False,
    )
    by_hand = inverted(tmp_path / "hand", pipeline=hand, control=shown(2))
    assert torch.equal(all_latents(folder), all_latents(by_hand))
    with pytest.raises(InversionError, match=r"ControlNet '.*net' \(number 2\)"):
        reconstruct_latents(make_control_pipeline(nets=2), folder, progress=False)
    shutil.rmtree(tmp_path / "net")
    for name, message in (
        (str(tmp_path / "net"), "is no folder here, and cannot be a hub id"),
        ("net.safetensors", r"ControlNetModel\.from_single_file\(FILE\)"),
        (str(tmp_path / "base"), "is a folder without config.json"),
        (
            str(tmp_path / "base" / "vae"),
            "it is a AutoencoderKL, and a ControlNetModel or T2IAdapter is n",
        ),
    ):
        with pytest.raises(stem.models.ModelError, match=message):
            stem.load_pipeline(str(tmp_path / "base"), controlnets=[name])
