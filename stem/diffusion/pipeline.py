"""A pipeline's parts as a denoising loop uses them: VAE, text and UNet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stem_kernels.shared.memory import lacks_memory

from ..attention.families import family_of_unet
from ..attention.waiting.parked import current_parking
from .control import Shown, rows_shown
from .weights import keeps_copies

logger = logging.getLogger("stem")

VAE_FRAMES = 8
"""Frames that the VAE takes at once; each is independent of the others."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is given beside latents and timestep, a row for each guidance branch.

    Args:
        embeddings: Embeddings of the prompts, [branches, tokens, channels].
        added: SDXL's `text_embeds` [branches, channels] and `time_ids` [branches, 6]; else empty.
        shown: What ControlNets are shown in each branch, None: nothing; empty: nothing in any.
    """

    embeddings: torch.Tensor
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    shown: tuple[Shown | None, ...] = ()

    @property
    def branches(self) -> int:
        """The number of guidance branches."""
        return self.embeddings.shape[0]

    def joined(self, other: Conditioning) -> Conditioning:
        """The branches of both, `other`'s last."""
        return Conditioning(
            torch.cat([self.embeddings, other.embeddings]),
            {name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
            sum((one.shown or (None,) * one.branches for one in (self, other)), ()),
        )

    def showing(self, shown: Shown | None) -> Conditioning:
        """The same, with what ControlNets are shown in every branch."""
        return replace(self, shown=(shown,) * self.branches)

    def for_frames(self, frames: int, *, frame_axis: bool = False) -> dict[str, Any]:
        """The UNet's keyword arguments for so many frames of each branch.

        Args:
            frames: Number of frames.
            frame_axis: Whether the UNet's samples have an axis of frames: it then repeats for them
                what is added, but not the embeddings.
        """
        of_frames = [row.expand(frames, *row.shape) for row in self.embeddings]
        # Those of one branch are one row, however many frames there are.
        whole = of_frames[0] if len(of_frames) == 1 else current_parking().joined(of_frames)
        arguments: dict[str, Any] = {"encoder_hidden_states": whole}
        if self.added:
            repeated = 1 if frame_axis else frames
            arguments["added_cond_kwargs"] = {
                name: value.repeat_interleave(repeated, dim=0) for name, value in self.added.items()
            }
        return arguments


@torch.no_grad()
def encode_prompt(pipeline: Any, prompt: str, height: int, width: int) -> Conditioning:
    """The conditioning of `prompt`, one branch. `height` and `width` are in pixels.

    Words that the tokenizers have no room for, and words that they do not know, are named in a
    warning.
    """
    unet = pipeline.unet
    device, dtype = execution_device(pipeline), unet.dtype
    warn_of_words(pipeline, prompt)
    if getattr(unet.config, "addition_embed_type", None) == "text_time":
        # Of one picture or video: the number's name differs, and 1 is its default.
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            prompt, device=device, do_classifier_free_guidance=False
        )
        # SDXL was trained with (original size, crop corner, target size) of each picture.
        size = [height, width, 0, 0, height, width]
        time_ids = torch.tensor([size], device=device, dtype=dtype)
        added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        return Conditioning(embeddings.to(dtype), added)
    embeddings, _ = pipeline.encode_prompt(
        prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning(embeddings.to(dtype))


def warn_of_words(pipeline: Any, prompt: str, longest: int | None = None) -> None:
    """Warn of words of a prompt that are cut off, and of those that mean nothing to the model.

    Args:
        pipeline: Pipeline with the tokenizers.
        prompt: Prompt.
        longest: Number of tokens that are kept, as for `truncated_words`.
    """
    lost = truncated_words(pipeline, prompt, longest)
    if lost:
        logger.warning(
            "the prompt is longer than the text encoder takes; these words are lost: %s", lost
        )
    unknown = unknown_words(pipeline, prompt)
    if unknown:
        logger.warning("the model has no words for these, they mean nothing to it: %s", unknown)


def truncated_words(pipeline: Any, prompt: str, longest: int | None = None) -> str:
    """The words of a prompt that its tokenizers cut off; empty where all fit.

    Args:
        pipeline: Pipeline with the tokenizers.
        prompt: Prompt.
        longest: Number of tokens that are kept; None: as each tokenizer says.
    """
    lost = ""
    for tokenizer in tokenizers_of(pipeline):
        kept = longest or tokenizer.model_max_length
        text = as_encoded(pipeline, prompt, tokenizer)
        encoded = tokenizer(
            text, truncation=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
        )
        if len(encoded.input_ids) <= kept:
            continue
        # The last token kept is the end mark.
        first = kept - 1
        if tokenizer.is_fast:
            starts = [start for start, end in encoded["offset_mapping"][first:] if end > start]
            rest = text[min(starts) :] if starts else ""
        else:
            rest = tokenizer.decode(encoded.input_ids[first:], skip_special_tokens=True)
        lost = max(lost, rest.strip(), key=len)
    return lost


def unknown_words(pipeline: Any, prompt: str) -> str:
    """The words of a prompt that a tokenizer of whole words has no token for."""
    unknown = []
    for tokenizer in tokenizers_of(pipeline):
        mark = tokenizer.unk_token_id
        if mark is None or mark == tokenizer.eos_token_id:  # CLIP's spells everything
            continue
        for word in dict.fromkeys(prompt.split()):
            if mark in tokenizer(word, add_special_tokens=False).input_ids:
                unknown.append(word)
    return ", ".join(unknown)


def as_encoded(pipeline: Any, text: str, tokenizer: Any) -> str:
    """A prompt or one of its words as the pipeline's text encoder is given it.

    A word of textual inversion with several vectors is written out, a token for each vector.
    """
    known = tokenizer.added_tokens_encoder
    several = any(word in text and f"{word}_1" in known for word in known)
    if not several or not hasattr(pipeline, "maybe_convert_prompt"):
        return text
    return str(pipeline.maybe_convert_prompt(text, tokenizer))


def tokenizers_of(pipeline: Any) -> list[Any]:
    """The pipeline's tokenizers: one, or Stable Diffusion XL's two."""
    found = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def vae_factor(pipeline: Any) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_frames(pipeline: Any, frames: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """Latents of a video: the VAE's posterior mean, scaled as the UNet expects it.

    Args:
        frames: Frames, uint8 [N, H, W, 3], H and W multiples of the VAE's factor; or parts of a
            video that are so, one after the other.

    Returns:
        float32 [N, channels, H / factor, W / factor] on the pipeline's device.

    Raises:
        ValueError: another dtype or shape, or a size that the VAE cannot divide.
    """
    vae, device = pipeline.vae, execution_device(pipeline)
    shift, scale = _shift_and_scale(vae, device)
    given = [frames] if isinstance(frames, torch.Tensor) else frames
    latents: list[torch.Tensor] = []
    with _upcast_vae(pipeline) as dtype:

        def encoded(part: torch.Tensor) -> torch.Tensor:
            images = part.to(device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
            mean = vae.encode(images).latent_dist.mean.float()
            return (mean - shift) * scale

        for frames in given:
            _check_frames(pipeline, frames)
            latents += _in_parts(encoded, frames)
    return torch.cat(latents)


def _shift_and_scale(vae: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What latents [N, c, h, w] are made of the VAE's by: (its - shift) * scale, float32.

    Source: diffusers' StableDiffusionXLImg2ImgPipeline, for `latents_mean` and `latents_std`.
    """

    def by_channel(name: str, default: float) -> torch.Tensor:
        value = getattr(vae.config, name, None)
        found = torch.tensor(default if value is None else value, device=device).float()
        return found.reshape(1, -1, 1, 1)

    shift = by_channel("shift_factor", 0.0) + by_channel("latents_mean", 0.0)
    return shift, by_channel("scaling_factor", 1.0) / by_channel("latents_std", 1.0)


def check_pixels(frames: torch.Tensor) -> None:
    """Raise ValueError where frames are no uint8 [N, H, W, 3]."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}; scale "
            "floating point frames to 0 ... 255 first"
        )


def _check_frames(pipeline: Any, frames: torch.Tensor) -> None:
    check_pixels(frames)
    factor = vae_factor(pipeline)
    if frames.shape[1] % factor or frames.shape[2] % factor:
        raise ValueError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}; the VAE needs multiples of {factor} "
            "(read_video crops to them)"
        )


def decode_latents(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Frames of float32 latents [N, channels, h, w]: uint8 [N, H, W, 3] on the CPU."""
    return torch.cat(list(decoded_parts(pipeline, latents)))


@torch.no_grad()
def decoded_parts(pipeline: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The frames of `decode_latents`, a few at a time."""
    vae, device = pipeline.vae, execution_device(pipeline)
    shift, scale = _shift_and_scale(vae, device)

    def decoded(part: torch.Tensor) -> torch.Tensor:
        part = part.to(device) / scale + shift
        images = vae.decode(part.to(dtype)).sample
        pixels = ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu()

    with _upcast_vae(pipeline) as dtype:
        yield from _in_parts(decoded, latents)


def decoded_in_turns(pipeline: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The frames of `decode_latents` in parts of `VAE_FRAMES`, each decoded by itself: several
    videos may take turns, while a VAE is of one dtype at a time."""
    return (decode_latents(pipeline, part) for part in latents.split(VAE_FRAMES))


def _in_parts(
    work: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor
) -> Iterator[torch.Tensor]:
    """`work` on a few frames at a time; on fewer where memory runs out."""
    size, first = VAE_FRAMES, 0
    while first < frames.shape[0]:
        try:
            done = work(frames[first : first + size])
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            if size == 1:
                raise torch.OutOfMemoryError(
                    f"the VAE has no memory for one frame: {error}. Call "
                    "pipeline.vae.enable_tiling(), or take smaller frames"
                ) from error
            done = None
        if done is None:
            torch.cuda.empty_cache()
            size //= 2
            logger.warning("memory ran out in the VAE; it takes %d frames at a time now", size)
            continue
        first += size
        yield done


@contextlib.contextmanager
def _upcast_vae(pipeline: Any) -> Iterator[torch.dtype]:
    """SDXL's VAE overflows float16, and its configuration says so: float32 for a while."""
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if not upcast:
        yield dtype
        return
    if keeps_copies(vae):
        raise ValueError(
            "the VAE's configuration asks for float32 (force_upcast), its weights are float16, and "
            "group offloading onto a disk or with streams gives them back as they were; offload "
            "without it (exclude_modules=['vae']), or load the VAE in float32"
        )
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(dtype)


def execution_device(pipeline: Any) -> torch.device:
    """Where the pipeline computes, which under CPU offloading is not where its weights are."""
    return getattr(pipeline, "_execution_device", pipeline.device)


@torch.no_grad()
def predict(
    pipeline: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    frames: Sequence[int] | None = None,
) -> torch.Tensor:
    """The UNet's prediction at one timestep; ControlNets need a block of `controlled` around it.

    A UNet whose samples have an axis of frames (AnimateDiff's) gets a branch as one video of it.

    A UNet that was distilled with its guidance (`time_cond_proj_dim`) is told a scale of 1, as its
    pipeline does without guidance, so that it predicts what the prompt says and no more: the same
    in either direction, and in every branch of an edit's guidance.

    Args:
        pipeline: Pipeline whose UNet is called.
        latents: Latents [branches * N, c, h, w], float32, rows [branch, frame].
        timestep: Timestep, an integer tensor of one element.
        conditioning: Conditioning of the branches.
        frames: Numbers of the N frames, for ControlNets; None: all, from 0 on.

    Returns:
        float32 [branches * N, c, h, w].
    """
    unet, given = pipeline.unet, latents.to(pipeline.unet.dtype)
    count, axis = latents.shape[0] // conditioning.branches, family_of_unet(unet).frame_axis
    if axis is not None:
        given = given.unflatten(0, (-1, count)).movedim(1, axis)
    arguments = conditioning.for_frames(count, frame_axis=axis is not None)
    if any(conditioning.shown):
        arguments["control"] = rows_shown(
            conditioning.shown, int(timestep), range(count) if frames is None else frames
        )
    if unet.config.time_cond_proj_dim is not None:
        arguments["timestep_cond"] = _unguided(unet.config.time_cond_proj_dim, given)
    found = unet(given, timestep, return_dict=False, **arguments)[0].float()
    return found if axis is None else found.movedim(axis, 1).flatten(0, 1)


def _unguided(channels: int, latents: torch.Tensor) -> torch.Tensor:
    """diffusers' `get_guidance_scale_embedding` of w = 0: sines, cosines; [rows, channels]."""
    half = channels // 2
    row = latents.new_zeros(channels)
    row[half : 2 * half] = 1.0
    return row.expand(latents.shape[0], -1)
