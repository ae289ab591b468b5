"""FlowEdit: the difference of velocities, what is equal to the bit, and how it goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import PROMPT, clip, embedded, wan
from interruptions import stop_after
from inversions import inverted

import stem
from stem.editing import FlowEditOptions, flow_edit, run_flow_edit
from stem.editing.job import generator_of
from stem.flow import EmbeddedVideoModel, VelocityModel, noise_levels
from stem.inversion import InversionError, InversionFolder, invert_video, keep_source
from stem.workflows.flow_edits import FlowEditPlan, write_flow_edits

EDITED = "a blue square"
OPTIONS = {"n_max": 3}
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedVideoModel:
    return embedded(tmp_path_factory.mktemp("embedded"))


def kept(model: VelocityModel, root: Path, **settings: Any) -> InversionFolder:
    settings = {"options": {"tokens_per_base": 8}, "num_steps": 4, **settings}
    return keep_source(model, settings.pop("video", clip()), PROMPT, root, **settings)


def edited(model: VelocityModel, source: InversionFolder, **settings: Any) -> torch.Tensor:
    settings = {"prompt": EDITED, "options": OPTIONS, "resume": False, **QUIET, **settings}
    return run_flow_edit(model, source, **settings).latents


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["embedded", "wan"])
@pytest.mark.parametrize("enabled", [True, False])
def test_equal_prompts_and_scales_give_the_source_to_the_bit(
    model: EmbeddedVideoModel, tmp_path: Path, kind: str, enabled: bool
) -> None:
    through: VelocityModel = model if kind == "embedded" else wan()
    video = clip() if kind == "embedded" else clip(5, 32)
    source = kept(through, tmp_path, video=video, options={"enabled": enabled})
    for scale in (1.0, 4.0):
        options = FlowEditOptions(n_max=2, n_avg=2, source_guidance=scale)
        asked = {"options": options, "guidance": scale, "prompt": PROMPT}
        assert torch.equal(edited(through, source, **asked), source.x0())
    frames = flow_edit(through, source, PROMPT, guidance=3.5, options={"n_max": 1}, **QUIET)
    assert torch.equal(frames, through.decode(source.x0()))


def test_steps_are_those_of_the_paper(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    """Algorithm 1, written out: the edit itself is stepped, and each side is noised by itself."""
    source = kept(model, tmp_path)
    x = source.x0()
    levels = noise_levels(4, 3.0)[::-1]
    prompts = {text: model.conditions(text) for text in (PROMPT, EDITED, "a ring")}

    def guided(latents: torch.Tensor, level: float, text: str, scale: float) -> torch.Tensor:
        without = model.velocity(latents, level, prompts["a ring"])
        return without + scale * (model.velocity(latents, level, prompts[text]) - without)

    z = x
    with stem.enabled(model.transformer, stem.VideoConfig(tokens_per_base=8)), torch.no_grad():
        for step in (1, 2, 3):
            t, following = levels[step], levels[step + 1]
            average = torch.zeros_like(x)
            for number in (0, 1):
                generator = generator_of(7, f"noise {step} {number}")
                noised = (1 - t) * x + t * torch.randn(x.shape, generator=generator)
                target = guided(z + noised - x, t, EDITED, 6.0)
                average += (target - guided(noised, t, PROMPT, 1.5)) / 2
            z = z + (following - t) * average
    options = {"n_max": 3, "n_avg": 2, "source_guidance": 1.5}
    asked: dict[str, Any] = {"options": options, "guidance": 6.0, "negative_prompt": "a ring"}
    found = edited(model, source, seed=7, **asked)
    assert not torch.allclose(found, x, atol=1e-2)
    assert torch.allclose(found, z, atol=1e-4)
    assert not torch.allclose(edited(model, source, seed=8, **asked), z, atol=1e-3)


def test_fewer_steps_stay_nearer_to_the_source(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    source = kept(model, tmp_path)
    far = [
        float((edited(model, source, options={"n_max": count}) - source.x0()).norm())
        for count in (1, 4)
    ]
    assert 0 < far[0] < far[1]


def test_a_stopped_edit_goes_on_to_the_same_bits(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    source = kept(model, tmp_path)
    whole = edited(model, source)
    steps = random.randint(1, 3)
    with pytest.raises(KeyboardInterrupt):
        edited(model, source, resume=True, on_step=stop_after(steps))
    done: list[int] = []
    found = edited(model, source, resume=True, on_step=lambda: done.append(1))
    assert torch.equal(found, whole), f"stopped after {steps} steps"
    assert len(done) == 3 - steps
    assert len(list(source.path.glob("edit-*.safetensors"))) == 1
    assert source.verify() == []
    done.clear()
    assert torch.equal(edited(model, source, resume=True, on_step=lambda: done.append(1)), whole)
    assert done == []


def test_an_inversion_is_a_source_too(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    options = {"tokens_per_base": 8}
    inversion = invert_video(model, clip(), PROMPT, tmp_path, options=options, num_steps=4, **QUIET)
    assert torch.equal(edited(model, inversion), edited(model, kept(model, tmp_path)))


def test_the_files_are_those_of_other_edits(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    source = kept(model, tmp_path)
    plan = FlowEditPlan([EDITED, "a blue ball"], OPTIONS, guidance=2.0)
    found = write_flow_edits(model, source, plan, tmp_path, video=clip(), **QUIET)
    document = json.loads(found.results[0].files.json.read_text())
    assert document["method"] == "flowedit"
    assert document["beside"] == ["source", "source, through the VAE", "flowedit"]
    assert document["inversion_settings"] == source.settings
    assert document["settings"]["options"] == {"n_max": 3, "n_avg": 1, "source_guidance": 3.5}
    assert document["settings"]["guidance"] == 2.0
    assert document["durations"]["steps_done_in_them"] == 3
    assert document["provenance"]["versions"]["diffusers"]
    frames = stem.read_video(found.results[0].files.video).frames
    latents = edited(model, source, guidance=2.0)
    assert (frames.float() - model.decode(latents).float()).abs().mean() < 8
    assert found.files is not None
    before = found.results[0].files.video.stat().st_mtime_ns
    again = write_flow_edits(model, source, plan, tmp_path, video=clip(), **QUIET)
    assert [result.reused for result in again.results] == [True, True]
    assert found.results[0].files.video.stat().st_mtime_ns == before
    other = write_flow_edits(
        model, source, FlowEditPlan([EDITED], OPTIONS), tmp_path, video=clip(), **QUIET
    )
    assert other.results[0].files.folder != found.results[0].files.folder


def test_what_does_not_fit_is_an_error(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    source = kept(model, tmp_path)
    for options, message in (
        ({"n_min": 1}, "flowedit has no option 'n_min'; it has n_max, n_avg, source_guidance"),
        ({"n_max": 0}, "n_max is 0; it must be a whole number of at least 1"),
        ({"n_max": 5}, "n_max is 5; it must be one of 4 steps at most"),
        ({"n_avg": 1.5}, r"n_avg is 1\.5"),
        ({"source_guidance": -1.0}, r"source_guidance is -1\.0; it must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            edited(model, source, options=options)
    with pytest.raises(ValueError, match="the prompt is empty"):
        edited(model, source, prompt=" ")
    with pytest.raises(ValueError, match="guidance is inf"):
        edited(model, source, guidance=float("inf"))
    with pytest.raises(TypeError, match="prompts is 'a'; pass a list of texts"):
        FlowEditPlan("a")
    with pytest.raises(ValueError, match="prompts holds 'a' twice"):
        FlowEditPlan(["a", "a"])
    of_unet = inverted(tmp_path / "unet", method="ddim", num_steps=2)
    with pytest.raises(InversionError, match="by ddim, through a UNet; edit it by another method"):
        edited(model, of_unet)
    with pytest.raises(InversionError, match="configuration or weights"):
        edited(wan(), source)
    plan = FlowEditPlan([EDITED], OPTIONS)
    with pytest.raises(ValueError, match="holds no inversion to show beside the edit; name the"):
        write_flow_edits(model, source, plan, tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"has \(frames, height, width\) \(4, 16, 16\)"):
        write_flow_edits(model, source, plan, tmp_path, video=clip(4), **QUIET)


def test_defaults_are_the_authors() -> None:
    options = FlowEditOptions()
    assert (options.n_avg, options.source_guidance, options.default_guidance) == (1, 3.5, 13.5)
    assert [options.steps_done(count) for count in (50, 12, 1)] == [33, 8, 1]
