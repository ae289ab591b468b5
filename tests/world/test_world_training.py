"""The training script: ten steps, a kill, a resume, and a model that diffusers loads alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from stem.world.grammar import VOCABULARY
from stem.world.training.fitting import Schedule, fit
from stem.world.training.networks import make_tokenizer, sample_frames
from stem.world.training.train import Recipe, train

SMALL = {
    "scenes": 8,
    "natural": 8,
    "autoencoder_steps": 4,
    "autoencoder_batch": 4,
    "diffusion_steps": 4,
    "diffusion_batch": 4,
    "refinement_steps": 2,
}


@pytest.mark.long
def test_ten_steps_resume_and_load_in_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem.world.training.train.GRID_CAPTIONS", 1)
    monkeypatch.setattr(
        "stem.world.training.train.sample_frames",
        lambda *given, **settings: sample_frames(*given, **settings | {"num_steps": 2}),
    )
    recipe = Recipe(**SMALL)
    for steps in (2, 6, 9):
        assert train(recipe, tmp_path / "resumed", until=steps) is None
    resumed = train(recipe, tmp_path / "resumed")
    whole = train(recipe, tmp_path / "whole")
    assert resumed is not None
    assert whole is not None
    for part in ("vae", "unet", "text_encoder"):
        ours, theirs = (getattr(p, part).state_dict() for p in (resumed, whole))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    for picture in ("losses.png", "samples.png"):
        assert Image.open(tmp_path / "whole" / picture).size[0] > 300
    model = tmp_path / "whole" / "model"
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    assert size <= 16e6
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    prompt = "a red ball rests on a blue background"
    made = pipeline(prompt, height=64, width=64, num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 64, 64, 3)


def test_another_recipe_does_not_take_up_a_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        return model(torch.randn(4, 2, generator=generator)).square().mean()

    losses = fit("line", model, loss, Schedule(300, 1e-1), tmp_path, seed=0).losses
    assert len(losses) == 300
    assert losses[-1] < losses[0] / 2
    with pytest.raises(ValueError, match=r"was trained with .* take another folder"):
        fit("line", model, loss, Schedule(300, 1e-2), tmp_path, seed=0)


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(" ".join(VOCABULARY[:20])).input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer("A Red zebra").input_ids[3] == tokenizer.unk_token_id
