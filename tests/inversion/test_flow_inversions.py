"""Inversions through video transformers on disk: their bits, how they go on, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from flow_models import PROMPT, clip, embedded, make_transformer, make_wan, wan, write_embedded
from interruptions import stop_after
from inversions import inverted
from pipelines import make_pipeline

import stem
from stem.app.state import State
from stem.flow import EmbeddedVideoModel, VelocityModel, WanModel, load_video_model
from stem.flow.loading import known_steps
from stem.inversion import (
    InversionError,
    InversionFolder,
    invert_flow,
    invert_video,
    keep_source,
    reconstruct_flow,
    reconstruct_video,
    reconstruct_video_latents,
)
from stem.inversion.flow_inverting import video_attention
from stem.names import INVERSIONS
from stem.sources import ModelError, ModelSource

OPTIONS = {"tokens_per_base": 8, "window": 0}
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedVideoModel:
    return embedded(tmp_path_factory.mktemp("embedded"))


def made(model: VelocityModel, root: Path, **settings: Any) -> InversionFolder:
    settings = {"options": OPTIONS, "num_steps": 4, **QUIET, **settings}
    return invert_video(model, settings.pop("video", clip()), PROMPT, root, **settings)


def contents(folder: InversionFolder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in sorted(folder.path.rglob("*.safetensors"))
    }


@pytest.mark.thinned
@pytest.mark.parametrize("kind", ["embedded", "wan"])
@pytest.mark.parametrize("method", ["midpoint", "euler"])
def test_folders_hold_what_memory_does(
    model: EmbeddedVideoModel, tmp_path: Path, kind: str, method: str
) -> None:
    video = clip() if kind == "embedded" else clip(5, 32)
    through: VelocityModel = model if kind == "embedded" else wan()
    folder = made(through, tmp_path, video=video, method=method)
    x0, conditions = through.encode(video.frames), through.conditions(PROMPT)
    assert x0.shape == through.latent_shape(*video.frames.shape[:3])
    assert torch.equal(folder.x0(), x0)
    along: dict[str, Any] = {"num_steps": 4, "shift": through.shift, "solver": method}
    with stem.enabled(through.transformer, stem.VideoConfig(**OPTIONS)):
        noise = invert_flow(through.transformer, x0, conditions, **along)
        back = reconstruct_flow(through.transformer, noise, conditions, **along)
    assert torch.equal(folder.latents(-1), noise)
    assert torch.equal(reconstruct_video_latents(through, folder, **QUIET), back)
    assert torch.equal(reconstruct_video(through, folder, **QUIET), through.decode(back))
    assert folder.complete
    assert folder.verify() == []
    assert len(folder.timesteps) == 4
    assert folder.timesteps[-1] == 1000


def test_a_stopped_inversion_goes_on_to_the_same_bytes(
    model: EmbeddedVideoModel, tmp_path: Path
) -> None:
    whole = made(model, tmp_path / "whole")
    reconstruct_video_latents(model, whole, **QUIET)
    steps = random.randint(1, 4)
    with pytest.raises(KeyboardInterrupt):
        made(model, tmp_path / "stopped", on_step=stop_after(steps))
    stopped = InversionFolder.open(next((tmp_path / "stopped").iterdir()))
    assert stopped.steps_done == steps
    done: list[int] = []
    stopped = made(model, tmp_path / "stopped", on_step=lambda: done.append(1))
    assert len(done) == 4 - steps
    with pytest.raises(KeyboardInterrupt):
        reconstruct_video_latents(model, stopped, **QUIET, on_step=stop_after(steps))
    reconstruct_video_latents(model, stopped, **QUIET)
    assert stopped.path.name == whole.path.name
    assert contents(stopped) == contents(whole), f"stopped after {steps} steps"


def test_a_damaged_step_is_computed_again(
    model: EmbeddedVideoModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(model, tmp_path)
    before = contents(folder)
    damaged = sorted((folder.path / "steps").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (folder.path / "x0.safetensors").unlink()
    assert len(folder.verify()) == 2
    with caplog.at_level(logging.WARNING, "stem"):
        made(model, tmp_path)
    assert "step 2 is computed again" in caplog.text
    assert "the video is encoded again" in caplog.text
    assert contents(folder) == before


def test_what_shapes_the_latents_is_in_the_name(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    other = EmbeddedVideoModel(write_embedded(tmp_path / "other", seed=0.1))
    settings: list[dict[str, Any]] = [
        {},
        {"method": "euler"},
        {"num_steps": 3},
        {"options": {"enabled": False}},
        {"options": {"dense_blocks": 1}},
        {"video": clip(4)},
    ]
    folders = [made(model, tmp_path, **each) for each in settings]
    folders.append(made(other, tmp_path))
    assert len({folder.path for folder in folders}) == len(folders)
    assert folders[4].settings["attention"]["dense_blocks"] == [1]
    dense = folders[3]
    assert dense.settings["attention"] == {"enabled": False}
    # The transformer's own attention, whatever is enabled in it.
    with stem.enabled(model.transformer, stem.VideoConfig(tokens_per_base=48)) as handle:
        back = reconstruct_video_latents(model, dense, **QUIET)
        assert handle.active
    x0, conditions = model.encode(clip().frames), model.conditions(PROMPT)
    noise = invert_flow(model.transformer, x0, conditions, num_steps=4, shift=3.0)
    again = reconstruct_flow(model.transformer, noise, conditions, num_steps=4, shift=3.0)
    assert torch.equal(back, again)
    with pytest.raises(InversionError, match=r"configuration or weights .* differ"):
        reconstruct_video(other, dense, **QUIET)
    half = EmbeddedVideoModel(tmp_path / "other", torch.bfloat16)
    with pytest.raises(InversionError, match="made in float32, and this pipeline is in bfloat16"):
        reconstruct_video(half, dense, **QUIET)
    lower = made(half, tmp_path)
    assert lower.settings["dtype"] == "bfloat16"
    assert lower.x0().dtype == lower.latents(-1).dtype == torch.float32


def test_a_source_has_latents_and_no_steps(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    source = keep_source(model, clip(), PROMPT, tmp_path, options=OPTIONS, num_steps=4)
    assert source.path.name.startswith("source-")
    assert source.complete
    assert source.timesteps == ()
    assert torch.equal(source.x0(), model.encode(clip().frames))
    with pytest.raises(InversionError, match=r"holds no inversion.*by midpoint, euler"):
        reconstruct_video(model, source)


def test_inversions_of_unets_and_of_transformers_are_told_apart(
    model: EmbeddedVideoModel, tmp_path: Path
) -> None:
    flow = made(model, tmp_path / INVERSIONS)
    with pytest.raises(InversionError, match=r"by midpoint, through a video transformer; recon"):
        stem.reconstruct(make_pipeline(), flow)
    with pytest.raises(InversionError, match=r"by midpoint, through a video transformer; recon"):
        stem.edit(make_pipeline(), flow, "a blue ball")
    of_unet = inverted(tmp_path / INVERSIONS, method="ddim", num_steps=2)
    with pytest.raises(InversionError, match="by ddim, through a UNet"):
        reconstruct_video(model, of_unet)
    no_jobs: Any = SimpleNamespace(all=list)
    offered = State(tmp_path, no_jobs, no_jobs, ()).inversions()  # by the page of `stem app`
    assert list(offered) == [f"folder:{of_unet.path.name}"]


def test_models_are_found_by_their_folders(tmp_path: Path) -> None:
    pipeline = make_wan()
    pipeline.save_pretrained(tmp_path / "wan")
    write_embedded(tmp_path / "own")
    for folder, steps in (("wan", (4, 16)), ("own", (1, 4))):
        name = str(tmp_path / folder)
        assert ModelSource(name).is_video_model
        assert known_steps(name) == steps
        found = load_video_model(name, device="cpu", dtype="bfloat16")
        assert (found.dtype, found.vae.dtype) == (torch.bfloat16, torch.float32)
        assert (found.frames_per_latent, found.multiple) == steps
        with pytest.raises(ModelError, match=r"no UNet; load it with stem.flow.load_video_model"):
            stem.load_pipeline(name)
    found = load_video_model(str(tmp_path / "wan"), device="cpu")
    video = clip(5, 32)
    assert torch.equal(found.encode(video.frames), WanModel(pipeline).encode(video.frames))
    for name in ("embedded", "random:1", "somebody/model", "a--b", str(tmp_path), "a.safetensors"):
        assert not ModelSource(name).is_video_model
    assert known_steps("somebody/model") == (1, 1)
    with pytest.raises(ModelError, match="'embedded' is no video transformer; --model takes"):
        load_video_model("embedded")
    with pytest.raises(ModelError, match="no video model can be loaded from"):
        load_video_model(str(tmp_path))
    index = tmp_path / "wan" / "model_index.json"
    index.write_text(index.read_text().replace("WanPipeline", "LTXPipeline"))
    with pytest.raises(ModelError, match="is a LTXPipeline, no WanPipeline"):
        load_video_model(str(tmp_path / "wan"))
    (tmp_path / "own" / "latents.json").write_text(json.dumps({"mean": [0.0], "std": [1.0]}))
    with pytest.raises(ModelError, match=r"has 1 means and 1 deviations; .* have 12 channels"):
        load_video_model(str(tmp_path / "own"))
    (tmp_path / "own" / "latents.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no video model on the embedded VAE's latents"):
        load_video_model(str(tmp_path / "own"))


def test_latents_are_those_that_diffusers_gives_the_transformer() -> None:
    model, frames = wan(), clip(5, 32).frames
    pictures = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    config = model.vae.config
    mean, std = (
        torch.tensor(values).reshape(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        expected = (model.vae.encode(pictures).latent_dist.mode() - mean) * (1 / std)
        shown = model.vae.decode(expected * std + mean).sample[0]
    found = model.encode(frames)
    assert torch.allclose(found, expected, atol=1e-5)
    levels = (shown.permute(1, 2, 3, 0) + 1) * 127.5
    assert (model.decode(found).float() - levels).abs().max() < 0.51


def test_timesteps_of_single_tokens_are_the_same(model: EmbeddedVideoModel) -> None:
    """Wan 2.2's TI2V gives each token its timestep, which from text to video are all the same."""
    x0, conditions = model.encode(clip().frames), model.conditions(PROMPT)
    each = torch.full((1, 48), 500.0)
    with torch.no_grad():
        (expected,) = model.transformer(x0, each, **conditions, return_dict=False)
    assert torch.allclose(model.velocity(x0, 0.5, conditions), expected, atol=1e-5)


def test_the_shift_is_the_scheduler_s() -> None:
    assert wan().shift == 5.0
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0
    )
    assert WanModel(make_wan(scheduler=unipc)).shift == 4.0
    with pytest.raises(ModelError, match="a DDIMScheduler without one shift of flow matching"):
        WanModel(make_wan(scheduler=DDIMScheduler()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WanModel(make_pipeline()), "is a StableDiffusionPipeline; whole videos"),
        (
            lambda: WanModel(make_wan(transformer_2=make_transformer(16, 16, 2))),
            "has two transformers",
        ),
        (
            lambda: WanModel(make_wan(transformer=make_transformer(36, 16, 2))),
            r"takes 36 channels and gives 36.*it wants more than latents",
        ),
    ],
)
def test_models_that_cannot_be_inverted(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make()


def test_what_does_not_fit_is_an_error(model: EmbeddedVideoModel, tmp_path: Path) -> None:
    through = wan()
    for video, expected in (
        (clip(4, 32), r"has 4 frames; this model takes 4 k \+ 1, such as 1 or 5 \(--frames 1\)"),
        (clip(5, 24), "frames are 24x24; this model takes multiples of 16"),
    ):
        with pytest.raises(ValueError, match=expected):
            made(through, tmp_path, video=video)
    with pytest.raises(
        ValueError, match=r"has 65 frames of 16x16; .* places for 64 frames and 256"
    ):
        made(model, tmp_path, video=clip(65))
    with pytest.raises(ValueError, match="frames must be uint8"):
        model.encode(clip().frames.float())
    with pytest.raises(ValueError, match="solver is 'stem'; it must be one of midpoint, euler"):
        made(model, tmp_path, method="stem")
    with pytest.raises(ValueError, match="num_steps is 0"):
        made(model, tmp_path, num_steps=0)
    with pytest.raises(TypeError, match="prompt is a list"):
        invert_video(model, clip(), [PROMPT], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no option 'num_bases'; it has enabled, window"):
        video_attention({"num_bases": 8})
    with pytest.raises(ValueError, match="enabled is False beside window; it must be True, or"):
        video_attention({"enabled": False, "window": 1})
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_lost_are_named(
    model: EmbeddedVideoModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "stem"):
        model.conditions("a red zeppelin")
        wan().conditions(" ".join(["red"] * 600))
    assert "no words for these, they mean nothing to it: zeppelin" in caplog.text
    assert "these words are lost: red red" in caplog.text


def test_defaults_of_the_attention() -> None:
    assert video_attention(None) == stem.VideoConfig()
    assert video_attention({"enabled": False}) is None
    fields = {field.name for field in dataclasses.fields(stem.VideoConfig)}
    assert "enabled" not in fields
