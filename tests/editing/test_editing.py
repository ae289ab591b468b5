"""Edits: what all methods share, and `fusion`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import stop_after
from inversions import clip, inverted
from peft import LoraConfig
from pipelines import SHAPES, make_pipeline

import stem
from stem import Video, invert
from stem.attention.waiting import parked
from stem.editing import (
    METHODS,
    FusionOptions,
    check_edit,
    edit_options,
    run_edit,
)
from stem.editing.regions import consensus
from stem.editing.regions.consensus import Motion, in_consensus, moved
from stem.editing.regions.masks import dilated, warn_of_size
from stem.inversion import InversionError, InversionFolder, reconstruct_latents

pytestmark = pytest.mark.thinned

ALL_OF_FUSION = {"preset": "shape", "cross_maps": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> InversionFolder:
    return inverted(tmp_path_factory.mktemp("editing"))


def edited(folder: InversionFolder, prompt: str = "a swan", **settings: Any) -> Any:
    settings = {"pipeline": make_pipeline(), "resume": False, "progress": False, **settings}
    return run_edit(settings.pop("pipeline"), folder, prompt, **settings)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inversion", ["ddim", "st-ddim", "inflated", "stem"])
def test_every_method_edits_every_inversion(tmp_path: Path, method: str, inversion: str) -> None:
    folder = inverted(tmp_path, method=inversion)
    pipeline = make_pipeline()
    processors = dict(pipeline.unet.attn_processors)
    found = edited(folder, method=method)
    assert found.latents.shape == folder.x0().shape
    assert found.latents.isfinite().all()
    assert pipeline.unet.attn_processors == processors
    assert "forward" not in pipeline.unet.__dict__
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "sd1"])
def test_every_method_edits_with_other_models(tmp_path: Path, method: str, shape: str) -> None:
    pipeline = make_pipeline(shape, "v_prediction" if shape == "sd2" else "epsilon")
    folder = inverted(tmp_path, pipeline=pipeline)
    options = {"preset": "shape"} if method == "fusion" else None
    found = edited(folder, "a goose", method=method, pipeline=pipeline, options=options)
    assert found.latents.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_edit_goes_on_bit_for_bit(tmp_path: Path, method: str) -> None:
    folder = inverted(tmp_path)
    options = ALL_OF_FUSION if method == "fusion" else None
    expected = edited(folder, method=method, options=options)
    # Fusion's two restarts do steps 1 and 2 again, and SDEdit's strength leaves out the first.
    steps, stopped = {"fusion": (9, 4), "sdedit": (4, 2)}.get(method, (5, 2))

    with pytest.raises(KeyboardInterrupt):
        edited(folder, method=method, options=options, resume=True, on_step=stop_after(stopped))
    counted: list[int] = []
    arguments: dict[str, Any] = {"method": method, "options": options, "resume": True}
    found = edited(folder, **arguments, on_step=lambda: counted.append(1))
    assert len(counted) == steps - stopped
    again = edited(folder, **arguments, on_step=lambda: pytest.fail("a step was done again"))
    for name in ("latents", "masks", "cores", "pivots"):
        before, now, later = (getattr(edit, name) for edit in (expected, found, again))
        assert (before is None) == (now is None) == (later is None)
        if before is not None:
            assert torch.equal(before, now)
            assert torch.equal(before, later)
    assert not folder.verify()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inversion", ["ddim", "stem"])
def test_no_edit_depends_on_the_chunk(tmp_path: Path, method: str, inversion: str) -> None:
    folder = inverted(tmp_path, method=inversion)
    options = ALL_OF_FUSION if method == "fusion" else None
    expected = edited(folder, method=method, options=options).latents
    for chunk in (1, 2):
        other = dict(folder.settings, attention={**folder.settings["attention"], "chunk": chunk})
        copied, _ = InversionFolder.prepare(tmp_path / str(chunk), other, folder.timesteps)
        copied.save_x0(folder.x0(), {})
        for step in range(len(folder.timesteps)):
            copied.save_latents(step, folder.latents(step), {})
        found = edited(copied, method=method, options=options).latents
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frames", [1, 3])
def test_equal_frames_stay_equal(tmp_path: Path, method: str, frames: int) -> None:
    still = Video(clip(1).frames.expand(frames, -1, -1, -1), clip().fps)
    folder = invert(
        make_pipeline(), still, "a duck", tmp_path, method="stem", num_steps=5, progress=False,
        options={"num_bases": 8},
    )  # fmt: skip
    options = ALL_OF_FUSION if method == "fusion" else None
    # SDEdit adds other noise to every frame.
    latents = edited(folder, method=method, options=options).latents
    assert latents.isfinite().all()
    if method != "sdedit":
        assert relative(latents, latents[:1].expand_as(latents)) < 1e-5


@pytest.mark.parametrize("preset", ["colour", "texture", "shape"])
def test_the_source_s_own_prompt_gives_the_source_back(
    folder: InversionFolder, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = edited(folder, "a duck", options={"preset": preset})
    assert torch.equal(found.latents, folder.x0())
    assert found.masks is not None
    assert not found.masks.any()
    assert "nearly nothing will change" in caplog.text


def test_without_mask_or_guidance_the_source_s_own_prompt_is_a_reconstruction(
    folder: InversionFolder,
) -> None:
    found = edited(folder, "a duck", guidance=1, options={"preset": "style"}).latents
    expected = reconstruct_latents(make_pipeline(), folder, resume=False, progress=False)
    error = (expected - folder.x0()).abs().mean()
    # The source's maps come from the inversion's own step, which is nearer than an estimate.
    assert (found - folder.x0()).abs().mean() < 1.1 * error


def test_outside_the_masks_the_source_stays(folder: InversionFolder) -> None:
    found = edited(folder, "a swan", options={"mask_threshold": 0.9})
    assert found.masks is not None
    assert found.cores is not None
    assert torch.equal(found.masks, dilated(found.cores, 1))
    outside = ~found.masks.unsqueeze(1).expand_as(found.latents)
    assert outside.any()
    assert torch.equal(found.latents[outside], folder.x0()[outside])
    inside = (found.latents - folder.x0())[~outside]
    assert inside.abs().mean() > 1e-3


def test_masks_narrow_when_guidance_ends(folder: InversionFolder) -> None:
    options = {"preset": "shape", "mask_threshold": 0.8, "dilation": 2}
    found = edited(folder, "a swan", options=options)
    assert found.masks is not None
    assert found.cores is not None
    wide = dilated(found.cores, 2)
    assert not (found.masks & ~wide).any()
    assert not (found.cores & ~found.masks).any()
    assert found.masks.sum() < wide.sum()
    outside = ~found.masks.unsqueeze(1).expand_as(found.latents)
    assert torch.equal(found.latents[outside], folder.x0()[outside])
    for other in ({"narrowing": False}, {"guided_until": 1.0}, {"guided_until": 0.0}):
        kept = edited(folder, "a swan", options={**options, **other})
        assert torch.equal(kept.masks, wide)


def test_half_precision(tmp_path: Path) -> None:
    pipeline = stem.random_pipeline(0).to(torch.bfloat16)
    video = Video(clip(2).frames, clip().fps)
    folder = invert(pipeline, video, "a duck", tmp_path, num_steps=2, progress=False)
    for method in METHODS:
        found = edited(folder, "a swan", pipeline=pipeline, method=method)
        assert found.latents.dtype == torch.float32
        assert found.latents.isfinite().all()


def test_lora_is_edited_with(tmp_path: Path) -> None:
    pipeline = stem.random_pipeline(0)
    pipeline.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    video = Video(clip(2).frames, clip().fps)
    folder = invert(pipeline, video, "a duck", tmp_path, num_steps=2, progress=False)
    found = {method: edited(folder, pipeline=pipeline, method=method) for method in METHODS}
    pipeline.unet.disable_adapters()
    with pytest.raises(InversionError, match="LoRA, VAE and embeddings included"):
        edited(folder, pipeline=pipeline)
    for edit in found.values():
        assert edit.latents.isfinite().all()


def test_an_inversion_with_calibrated_bases_is_edited_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = inverted(tmp_path, options={"num_bases": 8, "calibration": "joint"})
    for method in ("fusion", "tokenflow"):
        options = {"extended": "stem"} if method == "tokenflow" else None
        found = edited(folder, method=method, options=options)
        assert found.latents.isfinite().all()
    assert caplog.text.count("has calibrated bases; the edit goes on with bases that are not") == 2


def test_what_cannot_be_edited_is_said(folder: InversionFolder, tmp_path: Path) -> None:
    for settings, error, message in (
        ({"prompt": "  "}, ValueError, "the prompt is empty"),
        ({"prompt": 3}, TypeError, "prompt is a int"),
        ({"negative_prompt": None}, TypeError, "negative_prompt is a NoneType"),
        ({"guidance": float("nan")}, ValueError, "guidance is nan"),
        ({"guidance": -1}, ValueError, "guidance is -1"),
        ({"seed": 0.5}, ValueError, "seed is 0.5"),
        ({"method": "magic"}, ValueError, "method is 'magic'; it must be one of pnp"),
        ({"options": {"bases": 3}}, ValueError, "fusion has no option 'bases'; it has preset"),
        ({"method": "pnp", "options": FusionOptions()}, TypeError, "FusionOptions; pnp takes PnP"),
        ({"options": {"mapping": "replace"}, "prompt": "a big swan"}, ValueError, "has 3"),
    ):
        arguments = {"prompt": "a swan", **settings}
        with pytest.raises(error, match=message):
            check_edit(folder, arguments.pop("prompt"), **arguments)
    half = dataclasses.replace(folder, path=tmp_path / folder.path.name)
    with pytest.raises(InversionError, match="run the inversion again"):
        check_edit(half, "a swan")
    with pytest.raises(InversionError, match="weights"):
        edited(folder, pipeline=make_pipeline("sd2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "size"}, "preset is 'size'"),
        ({"cross_maps": 1.5}, "cross_maps is 1.5; it must be a share"),
        ({"self_outside": 1}, "self_outside is 1"),
        ({"mapping": "swap"}, "mapping is 'swap'"),
        ({"mask_levels": (0.8, 0.3)}, "the first must be below"),
        ({"mask_levels": 0.5}, "must be two shares"),
        ({"mask_threshold": 0}, "mask_threshold is 0"),
        ({"dilation": -1}, "dilation is -1"),
        ({"restarts": 1.5}, "restarts is 1.5; it must be a whole number"),
        ({"restarts": 1, "mask": False}, "restarts is 1; it needs mask=True"),
        ({"consensus": True, "mask": False}, "consensus is True; it needs mask=True"),
    ],
)
def test_options_of_fusion_out_of_range_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit_options("fusion", options)


def test_presets_fill_what_is_not_given() -> None:
    shape = edit_options("fusion", {"preset": "shape", "self_maps": 0.5, "mask_levels": [0.2, 0.6]})
    assert isinstance(shape, FusionOptions)
    assert (shape.cross_maps, shape.self_maps, shape.consensus) == (0.0, 0.5, True)
    assert shape.mask_levels == (0.2, 0.6)
    assert (shape.guidance, edit_options("fusion", None).guidance) == (7.5, 3.0)


def test_consensus_along_a_motion() -> None:
    frames, side = 5, 32
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.stack([10 + 2.0 * torch.arange(frames), torch.full((frames,), 15.0)], 1)
    disc = torch.stack([((x - cx) ** 2 + (y - cy) ** 2).sqrt() for cx, cy in centres])
    masks = disc < 6
    motion = Motion.of(masks.float())
    assert torch.allclose((motion.centres + 1) * side / 2 - 0.5, centres, atol=0.1)
    # Smooth things that move along are the same in every frame already.
    clean = torch.exp(-disc.square() / 50).unsqueeze(1)
    for late in (None, 0.0, 1.0):
        agreed = in_consensus(clean, masks, motion, late)
        assert (agreed - clean).abs().max() < 0.05
    # What is in one frame alone is averaged away, later a part of it.
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    inside = masks.unsqueeze(1)
    for late, left in ((None, 0.6), (0.0, 0.8), (1.0, 0.6)):
        agreed = in_consensus(noisy, masks, motion, late)
        assert (agreed - clean)[inside].std() < left * (noisy - clean)[inside].std()
        assert torch.equal(agreed[~inside], noisy[~inside])
    # Cubic interpolation keeps more of what is as small as a cell.
    fine = (disc < 1.5).float().unsqueeze(1)
    half = Motion(motion.centres + 1 / side, motion.radii)
    cubic, linear = (moved(fine, motion, half, mode) for mode in ("bicubic", "bilinear"))
    assert cubic.max() > linear.max()


def test_a_motion_is_fitted_by_a_solver_of_fixed_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """See findings/least-squares-twice-two-answers.sh, of which runs show it in one of dozens."""
    solve, drivers = torch.linalg.lstsq, []

    def told(*args: Any, driver: str | None = None) -> Any:
        drivers.append(driver)
        return solve(*args, driver=driver)

    monkeypatch.setattr(torch.linalg, "lstsq", told)
    Motion.of(torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(0)))
    assert drivers
    assert set(drivers) <= {"gels", "gelsd"}


def test_consensus_of_some_frames_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(7, 3, 12, 12, generator=generator)
    masks = torch.rand(7, 12, 12, generator=generator) > 0.4
    motion = Motion.of(masks.float())
    expected = in_consensus(clean, masks, motion)
    for module in (consensus, parked):
        monkeypatch.setattr(module, "FRAMES_AT_ONCE", 3)
    torch.testing.assert_close(in_consensus(clean, masks, motion), expected)
    assert not torch.equal(expected, clean)


def test_masks_of_nothing_or_everything_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_size(torch.ones(2, 4, 4))
        assert "cover 100.0 % of the video: nearly everything" in caplog.text
        caplog.clear()
        warn_of_size(torch.eye(4).expand(2, 4, 4))
        assert not caplog.text
