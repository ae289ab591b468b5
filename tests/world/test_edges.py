"""The ControlNet on edges that comes with the package, and its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from stem import Control, invert, load_pipeline, reconstruct
from stem.control import canny
from stem.models import EMBEDDED_CONTROLNET, EMBEDDED_FOLDER
from stem.sources import ModelError
from stem.video import Video
from stem.world import render, sample_scene
from stem.world.training.card import EVALUATION_RECORD, TRAINING_RECORD, edges_card, model_card
from stem.world.training.edges import Recipe, make_controlnet, train
from stem.world.training.evaluate_edges import Size, edge_agreement, evaluate_edges

WITH = ("block_out_channels", "down_block_types", "cross_attention_dim", "in_channels")


def record(name: str, folder: Path = EMBEDDED_CONTROLNET) -> dict:
    return json.loads((folder / name).read_text())


def test_it_is_small_and_made_for_the_model() -> None:
    files = [file for file in EMBEDDED_CONTROLNET.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6e6
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    ours, unet = record("config.json"), record("config.json", EMBEDDED_FOLDER / "unet")
    assert {name: ours[name] for name in WITH} == {name: unet[name] for name in WITH}


def test_the_card_has_its_records() -> None:
    part = edges_card(record(TRAINING_RECORD), record(EVALUATION_RECORD))
    model = [record(name, EMBEDDED_FOLDER) for name in (TRAINING_RECORD, EVALUATION_RECORD)]
    assert (EMBEDDED_FOLDER / "README.md").read_text() == model_card(*model) + part


def test_pictures_have_the_edges_that_it_is_shown() -> None:
    measured = evaluate_edges(EMBEDDED_FOLDER, Size(frames=3, steps=4))
    for figures in (record(EVALUATION_RECORD), measured):
        assert figures["with"]["edges"] >= figures["without"]["edges"] + 0.15
        assert figures["with"]["psnr"] >= figures["without"]["psnr"] + 3


def test_edges_agree_within_a_pixel() -> None:
    edges = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    edges[:, 4, :] = 255
    assert edge_agreement(edges, edges) == 1
    assert edge_agreement(edges.roll(1, 1), edges) == 1
    assert edge_agreement(edges.roll(2, 1), edges) == 0
    more = edges.clone()
    more[:, 12, :] = 255
    assert edge_agreement(more, edges) == pytest.approx(2 / 3)  # all found, half of it right
    assert edge_agreement(edges, more) == pytest.approx(2 / 3)


def test_an_inversion_is_made_with_it_by_name(tmp_path: Path) -> None:
    pipeline = load_pipeline("embedded", controlnets=["embedded"])
    clip = render(sample_scene(1, num_things=1), 2, 64)
    edges = Control(canny(clip.frames), source="canny")
    inversion = invert(
        pipeline,
        Video(clip.frames, 8),
        clip.caption,
        tmp_path,
        method="ddim",
        num_steps=2,
        model={"name": "embedded", "controlnets": ["embedded"]},
        control=edges,
        progress=False,
    )
    assert inversion.settings["model"]["controlnets"] == ["embedded"]
    assert reconstruct(pipeline, inversion, progress=False).shape == clip.frames.shape


def test_another_model_does_not_take_it() -> None:
    with pytest.raises(ModelError, match="has in_channels 12, and the UNet has 4"):
        load_pipeline("random", controlnets=["embedded"])


def test_training_begins_at_the_model_s_own_output_and_goes_on(tmp_path: Path) -> None:
    unet = load_pipeline("embedded").unet  # type: ignore[attr-defined]
    net = make_controlnet(unet, 0)
    shown = canny(render(sample_scene(1), 1, 64).frames).permute(0, 3, 1, 2) / 255
    given = torch.randn(1, 12, 16, 16), 500, torch.randn(1, 8, 128)
    with torch.no_grad():
        down, middle = net(*given, shown, return_dict=False)
        seen, latents = net.controlnet_cond_embedding(shown), net.conv_in(given[0])
    assert not any(each.any() for each in (*down, middle))
    assert 0.3 < seen.std((2, 3)).mean() / latents.std() < 1  # what differs from place to place

    recipe = Recipe(scenes=4, steps=2, batch=2)
    assert train(recipe, tmp_path, until=1) is None
    trained = train(recipe, tmp_path)
    assert trained is not None
    changed = trained.controlnet_mid_block.weight
    assert changed.any()
    saved = ControlNetModel.from_pretrained(tmp_path / "controlnet")
    assert torch.equal(saved.controlnet_mid_block.weight, changed.float())
    assert record(TRAINING_RECORD, tmp_path / "controlnet")["stages"]["edges"]["steps"] == 2
