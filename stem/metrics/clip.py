"""CLIP, of transformers, as the judge of frames and prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..names import CLIP_MODEL
from .unmeasured import UnmeasuredError

logger = logging.getLogger("stem")

FRAMES_AT_ONCE = 32
"""Frames that are embedded at once."""


class Clip:
    """CLIP's two encoders; an `Embedder`.

    Frames go through the model's own image processor, on Pillow. They are scaled so that the
    shorter side fits, and cropped to the centre.

    Args:
        model: Hub id that is in the hub's cache on this machine, or a local folder in
            transformers' format; nothing is downloaded.
        device: Device to run on.

    Raises:
        UnmeasuredError: the model is not on this machine.
        ValueError: it is no CLIP model, or it lacks files or weights.
    """

    def __init__(self, model: str = CLIP_MODEL, device: torch.device | str = "cpu") -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self._model: Any
        self._tokenizer: Any
        self._processor: Any
        here: dict[str, Any] = {"local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(model, **here)
            if config.model_type != "clip":
                raise ValueError(f"it is a model of kind {config.model_type!r}")
            self._model, loading = CLIPModel.from_pretrained(
                model, output_loading_info=True, **here
            )
            if loading["missing_keys"]:
                raise ValueError(f"it lacks weights: {sorted(loading['missing_keys'])[:3]}")
            self._tokenizer = AutoTokenizer.from_pretrained(model, **here)
            self._processor = CLIPImageProcessorPil.from_pretrained(model, **here)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and not Path(model).is_dir():
                raise UnmeasuredError(
                    f"the CLIP model {model!r} is not on this machine", f"hf download {model}"
                ) from error
            raise ValueError(f"no CLIP model can be loaded from {model!r}: {error}") from error
        self._model.eval().to(device)
        self._device = device
        self.name = f"CLIP {model}"

    @torch.inference_mode()
    def embed_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [N, D], of frames, uint8 [N, H, W, 3]."""
        parts = []
        for part in frames.cpu().split(FRAMES_AT_ONCE):
            given = self._processor(images=list(part.numpy()), return_tensors="pt")
            found = self._model.get_image_features(given["pixel_values"].to(self._device))
            parts.append(found.pooler_output.float().cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embeddings, float32 [n, D], of n texts; a warning names a text that is cut."""
        limit = self._model.config.text_config.max_position_embeddings
        for text in texts:
            length = len(self._tokenizer(text)["input_ids"])
            if length > limit:
                logger.warning("CLIP reads %d of %d tokens of %r", limit, length, text)
        given = self._tokenizer(
            texts, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._device)
        found = self._model.get_text_features(**given)
        embeddings: torch.Tensor = found.pooler_output.float().cpu()
        return embeddings
