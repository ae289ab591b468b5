"""Pipelines whose weights wait elsewhere than where they are computed with."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from diffusers.hooks import apply_group_offloading
from inversions import all_latents, clip, inverted
from offloading import CPU, WAYS, offloaded
from pipelines import make_pipeline

from stem import reconstruct
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.diffusion.weights import offloading
from stem.inversion import InversionFolder
from stem.loading.offloading import offload_weights
from stem.models import load_pipeline, random_pipeline
from stem_kernels.testing import max_error


@pytest.mark.parametrize("way", WAYS)
def test_an_inversion_and_its_bits_do_not_depend_on_offloading(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = make_pipeline()
    settings: dict[str, Any] = {"num_steps": 2, "chunk": 3, "keep_bases": True}
    expected = inverted(tmp_path, **settings)
    frames = reconstruct(pipeline, expected, progress=False, resume=False)
    of_bases = reconstruct(pipeline, expected, bases="cached", progress=False, resume=False)

    other = offloaded(make_pipeline.__wrapped__(), way, tmp_path)
    found = inverted(tmp_path / "other", pipeline=other, **settings)
    assert found.path.name == expected.path.name
    assert found.settings == expected.settings
    # Weights of files lie elsewhere in memory, by which a CPU sums small layers.
    bound, levels = (1e-4, 1) if "disk" in way else (0.0, 0)
    assert max_error(all_latents(found), all_latents(expected)) <= bound
    for bases, there in (("estimate", frames), ("cached", of_bases)):
        back = reconstruct(other, found, bases=bases, progress=False, resume=False)
        assert int((back.int() - there.int()).abs().max()) <= levels
    assert expected.environment(1)["offloading"] == "none"
    assert found.environment(1)["offloading"] == way

    # One that was begun without goes on.
    last = expected.latents(1)
    expected._step_file("steps", 1).unlink()
    with caplog.at_level(logging.WARNING, "stem"):
        went_on = inverted(tmp_path, pipeline=other, **settings)
    assert max_error(went_on.latents(1), last) <= bound
    # On a CPU the bits of a single row can depend on where weights lie.
    assert ("begun under other conditions (offloading" in caplog.text) == ("disk" in way)


@pytest.mark.parametrize("way", WAYS)
def test_a_vae_that_must_be_float32_for_a_while_is(way: str, tmp_path: Path) -> None:
    def made() -> Any:
        pipeline = make_pipeline.__wrapped__("sdxl").to(dtype=torch.float16)
        pipeline.vae.register_to_config(force_upcast=True)
        return pipeline

    expected, found, frames = made(), offloaded(made(), way, tmp_path), clip().frames
    latents = encode_frames(expected, frames)
    assert torch.equal(encode_frames(found, frames), latents)
    assert torch.equal(decode_latents(found, latents), decode_latents(expected, latents))
    assert fingerprint(found) == fingerprint(expected)
    if "disk" in way:
        by_hand = made()
        apply_group_offloading(
            by_hand.vae, CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "vae")
        )
        with pytest.raises(ValueError, match=r"force_upcast.*exclude_modules=\['vae'\]"):
            encode_frames(by_hand, frames)


@pytest.mark.parametrize("way", ["slicing", "tiling"])
def test_a_vae_in_slices_or_tiles_encodes_and_decodes(way: str, tmp_path: Path) -> None:
    expected, pipeline = make_pipeline(), make_pipeline.__wrapped__()
    inversion = inverted(tmp_path, num_steps=2)
    frames = reconstruct(expected, inversion, progress=False, resume=False)
    vae = pipeline.vae
    getattr(vae, f"enable_{way}")()
    found = inverted(tmp_path / way, pipeline=pipeline, num_steps=2)
    assert found.settings == inversion.settings
    back = reconstruct(pipeline, found, progress=False, resume=False)
    # 16x24 pixels are one tile of the default size.
    assert max_error(all_latents(found), all_latents(inversion)) < 1e-4
    assert int((back.int() - frames.int()).abs().max()) <= 1
    assert ("vae" in found.environment(1)) == (way == "tiling")
    if way == "tiling":
        vae.tile_sample_min_size, vae.tile_latent_min_size = 8, 4
        latents = encode_frames(pipeline, clip().frames)
        images = clip().frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            tiled = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
            assert torch.equal(latents, tiled)
            assert max_error(latents, encode_frames(expected, clip().frames)) > 1e-3
            pixels = ((vae.decode(tiled / 5.0).sample + 1) * 127.5).round().clamp(0, 255)
        assert torch.equal(decode_latents(pipeline, latents), pixels.permute(0, 2, 3, 1).byte())


def test_models_share_a_folder_on_the_disk_and_leave_nothing(tmp_path: Path) -> None:
    for seed in (0, 1):  # diffusers takes what another model left in a folder for its own
        expected = fingerprint(random_pipeline(seed))
        loaded = load_pipeline(f"random:{seed}", offload="group", offload_folder=tmp_path / "new")
        assert fingerprint(loaded) == expected
        assert offloading(loaded) == "group, on a disk"
    assert any((tmp_path / "new").iterdir())
    del loaded
    gc.collect()
    assert not any((tmp_path / "new").iterdir())


def test_what_cannot_be_offloaded_is_refused_before_loading(tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            load_pipeline("no/such-model", **{"device": "cpu", **settings})

    for way in ("model", "sequential"):
        refused(f"offload is '{way}'.*no accelerator.*--offload group --offload-f", offload=way)
        refused(f"offload is '{way}': only group", offload=way, offload_folder=tmp_path)
    refused("offload is 'block'; it must be one of model, sequential, group", offload="block")
    refused("offload is None: only group offloading keeps weights on a", offload_folder=tmp_path)
    (tmp_path / "file").touch()
    refused("which is a file; name a folder", offload="group", offload_folder=tmp_path / "file")


def test_diffusers_is_told_the_device() -> None:
    called = []

    class Pipeline:
        def enable_model_cpu_offload(self, device: torch.device) -> None:
            called.append(("model", device))

        def enable_sequential_cpu_offload(self, device: torch.device) -> None:
            called.append(("sequential", device))

    expected = [(way, torch.device("cuda:1")) for way in ("model", "sequential")]
    for way, device in expected:
        offload_weights(Pipeline(), way, None, device)
    assert called == expected


@pytest.mark.long
def test_commands_offload(video: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights"
    away = ("--offload", "group", "--offload-folder", str(weights), "--device", "cpu")
    short = ("--model", "random", "--methods", "ddim", "--steps", "2", "--size", "16x16")
    assert run("invert", video, *short, "--out", str(tmp_path / "plain")) == 0
    assert run("invert", video, *short, "--out", str(tmp_path / "away"), *away) == 0
    plain, found = (
        InversionFolder.open(next((tmp_path / name / "inversions").iterdir()))
        for name in ("plain", "away")
    )
    assert found.environment(1)["offloading"] == "group, on a disk"
    assert found.settings == plain.settings
    assert max_error(all_latents(found), all_latents(plain)) < 1e-5
    assert run("reconstruct", str(found.path), *away) == 0
    edit = ("edit", str(found.path), "--prompt", "red", "--method", "sdedit", "--out")
    assert run(*edit, str(tmp_path / "edits"), *away) == 0
    for command in (("invert", video, *short), ("reconstruct", str(found.path)), (*edit, "e")):
        assert run(*command, "--offload", "model", "--device", "cpu") == 2
        assert "no accelerator to spare" in " ".join(capfd.readouterr().err.split())
