"""CLIP as a judge: its embeddings, the figures made of them, and models that are no CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import drifting
from conftest import NO_CLIP
from torch.nn.functional import normalize

from stem import random_pipeline
from stem.metrics import Clip, UnmeasuredError, frame_accuracy, temporal_consistency, text_alignment


def test_clip_embeds_as_transformers_does(
    clip_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import CLIPModel

    frames, texts = drifting(3), ["a red ball", "a blue star on a lake"]
    judge = Clip(clip_folder)
    assert judge.name == f"CLIP {clip_folder}"
    seen, said = judge.embed_frames(frames), judge.embed_texts(texts)
    assert seen.shape == (3, 8)
    assert said.shape == (2, 8)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((frames / 255 - mean) / deviation).permute(0, 3, 1, 2)
    tokens = random_pipeline().tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(normalize(seen), expected.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(normalize(said), expected.text_embeds, atol=1e-5, rtol=0)
    # The model's logits are its cosines, times a factor.
    logits = expected.logits_per_image[:, 0] / model.logit_scale.exp().detach()
    assert text_alignment(seen, said[0]) == pytest.approx(100 * float(logits.mean()), abs=1e-2)
    judge.embed_texts(["a" + " duck" * 100])
    assert "CLIP reads 77 of" in caplog.text


def test_models_that_are_no_clip(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnmeasuredError, match=f"is not on this machine; {NO_CLIP}"):
        Clip("nobody/clip")
    with pytest.raises(ValueError, match=r"no CLIP model can be loaded from .* Unrecognized"):
        Clip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="it is a model of kind 'bert'"):
        Clip(str(tmp_path))
    from safetensors.torch import load_file, save_file

    for file in Path(clip_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: \['visual_projection.weight'\]"):
        Clip(str(tmp_path))


def test_the_figures_of_embeddings() -> None:
    frames = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    source, target = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 1.0])
    assert text_alignment(frames, target) == pytest.approx(100 * (0 + 0.8 + 1) / 3, abs=1e-4)
    assert temporal_consistency(frames) == pytest.approx((0.6 + 0.8) / 2)
    assert frame_accuracy(frames, source, target) == pytest.approx(2 / 3)
    between = torch.tensor([[1.0, 1.0]])
    assert frame_accuracy(between, torch.tensor([1.0, 0.0]), target) == 0
    with pytest.raises(UnmeasuredError, match="one frame has no next one"):
        temporal_consistency(between)
    with pytest.raises(UnmeasuredError, match="are the same to it"):
        frame_accuracy(frames, source, source)
