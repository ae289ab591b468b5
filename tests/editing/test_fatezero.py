"""FateZero: what an edit gives, in chunks, after a kill and from stored maps, and its options."""

from __future__ import annotations

import dataclasses
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import stop_after
from inversions import STEM, clip, inverted
from pipelines import make_pipeline

from stem import InversionFolder, Video, invert
from stem.diffusion.loop import denoise
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import sampling_scheduler
from stem.editing import Edit, FateZeroOptions, check_edit, edit_latents, run_edit
from stem.editing.job import Job
from stem.editing.methods.fatezero import FateZero
from stem.inversion.methods import attention_on

SOURCE, TARGET = "a duck", "a big swan"
BLEND = FateZeroOptions(
    blend_words=(["duck"], ["Swan"]),
    blend_threshold=0.97,
    blend_latents=True,
    cross_replace={"swan": 0.3, "default_": 0.8},
    equalize={"big": 3},
)


def job_of(inversion: InversionFolder, prompt: str, guidance: float, pipeline: Any = None) -> Job:
    pipeline = make_pipeline() if pipeline is None else pipeline
    texts = (encode_prompt(pipeline, text, 16, 24) for text in (SOURCE, "", prompt))
    return Job(pipeline, inversion, prompt, *texts, guidance, 0, torch.device("cpu"))


def edited(job: Job, options: FateZeroOptions, chunk: int | None) -> tuple[torch.Tensor, FateZero]:
    work = FateZero(job, options)
    work.config = dataclasses.replace(work.config, chunk=chunk)
    with work.running(), torch.no_grad():
        found = denoise(
            work.begin(),
            sampling_scheduler(job.pipeline, job.num_steps),
            work.predict,
            after_step=work.after_step,
            name="edit",
        )
    return found, work


@pytest.fixture(scope="module")
def inversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InversionFolder]:
    root = tmp_path_factory.mktemp("inverted")
    options = {**STEM, "calibration": "none"}  # edits have none
    return {
        name: inverted(root, method=name, options=options)
        for name in ("ddim", "st-ddim", "inflated", "stem")
    }


@pytest.mark.parametrize("method", ["ddim", "st-ddim", "inflated", "stem"])
def test_the_source_prompt_gives_the_source_back(
    inversions: dict[str, InversionFolder], method: str
) -> None:
    job = job_of(inversions[method], SOURCE, 1.0)
    work = FateZero(job, FateZeroOptions(cross_replace=1.0, self_replace=1.0))
    scheduler = sampling_scheduler(job.pipeline, job.num_steps)
    with work.running(), torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            # The latents that the inversion's step was predicted from, and so its prediction.
            before, after = job.level(job.num_steps - step - 1), job.level(job.num_steps - step)
            noise = work.predict(step, timestep, before)
            back = scheduler.step(noise, timestep, after).prev_sample
            torch.testing.assert_close(back, before, atol=2e-5, rtol=0)
        start, first = job.level(job.num_steps), job.timestep(job.num_steps)
        fused = work.predict(0, first, start)
    work = FateZero(job, FateZeroOptions(cross_replace=0.0, self_replace=0.0))
    with work.running(), torch.no_grad():
        assert (work.predict(0, first, start) - fused).norm() > 1e-3 * fused.norm()


@pytest.mark.parametrize("method", ["st-ddim", "stem"])
def test_nothing_depends_on_the_chunk(inversions: dict[str, InversionFolder], method: str) -> None:
    job = job_of(inversions[method], TARGET, 7.5)
    whole, work = edited(job, BLEND, None)
    assert 0.02 < work.kept["cores"].float().mean() < 0.98
    assert bool((work.kept["cores"] <= work.kept["masks"]).all())
    in_chunks, other = edited(job, BLEND, 2)
    assert (in_chunks - whole).norm() < 1e-5 * whole.norm()
    assert torch.equal(other.kept["masks"], work.kept["masks"])


def test_a_killed_edit_goes_on_bit_for_bit(inversions: dict[str, InversionFolder]) -> None:
    inversion = inversions["stem"]

    def run(resume: bool, **more: Any) -> Edit:
        arguments: dict[str, Any] = {"method": "fatezero", "options": BLEND, "progress": False}
        return run_edit(make_pipeline(), inversion, TARGET, resume=resume, **arguments, **more)

    with pytest.raises(KeyboardInterrupt):
        run(True, on_step=stop_after(3))
    done: list[int] = []
    resumed = run(True, on_step=lambda: done.append(1))
    whole = run(False)
    assert len(done) == 2
    assert torch.equal(resumed.latents, whole.latents)
    assert resumed.masks is not None
    assert whole.masks is not None
    assert torch.equal(resumed.masks, whole.masks)
    assert resumed.masks.dtype == torch.bool
    assert resumed.masks.shape == (3, 8, 12)


@pytest.mark.parametrize(
    ("method", "options", "store"),
    [
        ("ddim", FateZeroOptions(self_replace=(0.2, 0.6)), "memory"),
        ("st-ddim", BLEND, "disk"),
        ("inflated", BLEND, "disk"),
    ],
)
def test_stored_maps_are_those_that_are_computed_again(
    inversions: dict[str, InversionFolder], method: str, options: FateZeroOptions, store: str
) -> None:
    job = job_of(inversions[method], TARGET, 7.5)
    expected, _ = edited(job, options, 2)
    found, _ = edited(job, dataclasses.replace(options, store=store), 2)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not [*job.inversion.path.glob(".*")]


@pytest.mark.parametrize(
    ("shape", "kind", "space"),
    [("sd2", "v_prediction", "feature"), ("sdxl", "epsilon", "key")],
)
def test_every_shape_of_pipeline_is_edited(
    tmp_path: Path, shape: str, kind: str, space: str
) -> None:
    pipeline = make_pipeline(shape, kind)
    options = {"num_bases": 8, "space": space}
    common: dict[str, Any] = {"num_steps": 2, "progress": False}
    inversion = invert(pipeline, clip(2), SOURCE, tmp_path, options=options, **common)
    found = edit_latents(
        pipeline, inversion, TARGET, method="fatezero", options=BLEND, progress=False
    )
    assert found.shape == inversion.x0().shape
    assert bool(found.isfinite().all())
    job = job_of(inversion, SOURCE, 1.0, pipeline)
    work = FateZero(job, FateZeroOptions(cross_replace=1.0, self_replace=1.0))
    with work.running(), torch.no_grad():
        source = job.level(1)
        given = work.predict(0, job.timestep(2), source)
    with attention_on(pipeline, job.attention), torch.no_grad():
        (own,) = job.predict([source], job.timestep(2), job.source)
    torch.testing.assert_close(given, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["st-ddim", "stem"])
def test_identical_frames_stay_identical(tmp_path: Path, method: str) -> None:
    frames = clip(1).frames.expand(3, -1, -1, -1).contiguous()
    common: dict[str, Any] = {"method": method, "num_steps": 2, "progress": False}
    common["options"] = {"num_bases": 8} if method == "stem" else None
    inversion = invert(make_pipeline(), Video(frames, Fraction(25)), SOURCE, tmp_path, **common)
    found = edit_latents(
        make_pipeline(), inversion, TARGET, method="fatezero", options=BLEND, progress=False
    )
    torch.testing.assert_close(found[1:], found[:1].expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_the_late_background_is_the_level_above(inversions: dict[str, InversionFolder]) -> None:
    job = job_of(inversions["ddim"], TARGET, 7.5)
    for background, level in (("level", 3), ("late", 4)):
        options = dataclasses.replace(BLEND, background=background)
        work = FateZero(job, options)
        with work.running(), torch.no_grad():
            scheduler = sampling_scheduler(job.pipeline, job.num_steps)
            latents = work.begin()
            blended = []
            for step, timestep in enumerate(scheduler.timesteps):
                noise = work.predict(step, timestep, latents)
                latents = scheduler.step(noise, timestep, latents).prev_sample
                replaced = work.after_step(step, latents)
                blended.append(replaced is not None)
                if step == 1:
                    assert replaced is not None
                    outside = ~work.kept["masks"].unsqueeze(1).expand_as(latents)
                    assert torch.equal(replaced[outside], job.level(level)[outside])
                    assert torch.equal(replaced[~outside], latents[~outside])
        assert blended == [False, True, True, False, False]  # 1 < step + 1 < 4


def test_presets_and_json_types() -> None:
    style = FateZeroOptions(preset="style", equalize="red")
    assert (style.mapping, style.cross_replace, style.self_replace) == ("refine", 0.8, 0.8)
    assert style.equalize == FateZeroOptions(equalize=["red"]).equalize == {"red": 10.0}
    assert style == dataclasses.replace(FateZeroOptions(equalize={"red": 10}), preset="style")
    shape = FateZeroOptions(preset="shape", mapping="refine", blend_words=[["ring"], "star"])
    assert (shape.mapping, shape.cross_replace, shape.self_replace) == ("refine", 0.5, 0.5)
    assert shape.blend_words == (("ring",), ("star",))
    attribute = FateZeroOptions(preset="attribute")
    assert (attribute.mapping, attribute.cross_replace) == ("replace", 0.5)
    assert FateZeroOptions(self_replace=[0.2, 0.8]).self_bounds == (0.2, 0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "swap"}, "mapping is 'swap'; it must be one of refine, replace"),
        ({"cross_replace": {"a": 2}}, "cross_replace of 'a' is 2"),
        ({"self_replace": (0.8, 0.2)}, "the lesser first"),
        ({"self_replace": (0.1, 0.2, 0.3)}, "the lesser first"),
        ({"equalize": {"a": -1}}, "equalize of 'a' is -1"),
        ({"equalize": 3}, "must be factors by word, or words"),
        ({"equalize": {3: 1}}, "each must be a text"),
        ({"equalize": [["a"]]}, "each must be a text"),
        ({"preset": "colour"}, "preset is 'colour'; it must be one of style, attribute, shape"),
        ({"preset": "style"}, "preset is 'style'; it needs equalize, too: the words"),
        ({"preset": "shape"}, "preset is 'shape'; it needs blend_words, too"),
        ({"blend_words": ["duck"]}, "must be two lists"),
        ({"blend_words": [[], ["a"]]}, "empty list"),
        ({"blend_threshold": 1.0}, "blend_threshold is 1.0"),
        ({"blend_latents": True}, "needs blend_words"),
        ({"store": "tape"}, "store is 'tape'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FateZeroOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "replace"}, "'a duck' has 2 words and 'a big swan' has 3"),
        ({"equalize": {"small": 2}}, "no 'small' among the words of 'a big swan'"),
        ({"cross_replace": {"duck": 0.5}}, "no 'duck' among the words of 'a big swan'"),
        ({"blend_words": [["swan"], ["swan"]]}, "no 'swan' among the words of 'a duck'"),
        ({"store": "disk"}, "the inversion is STEM's"),
    ],
)
def test_words_that_are_not_there(
    inversions: dict[str, InversionFolder], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_edit(inversions["stem"], TARGET, method="fatezero", options=options)


def test_a_mask_of_everything_is_warned_of(
    inversions: dict[str, InversionFolder], caplog: pytest.LogCaptureFixture
) -> None:
    options = dataclasses.replace(BLEND, blend_threshold=0.0, blend_latents=False)
    with caplog.at_level(logging.WARNING, "stem"):
        _, work = edited(job_of(inversions["ddim"], TARGET, 7.5), options, None)
    assert caplog.text.count("cover 100.0 % of the video") == 1
    assert torch.equal(work.kept["masks"], work.kept["cores"])
