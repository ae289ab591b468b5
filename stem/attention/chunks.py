"""A UNet call over all frames of a video, cut into chunks of frames."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from stem_kernels.shared.memory import lacks_memory

from ..config import scenes_of
from .families import Family
from .families.family import Tensors
from .layers.exchange import Lockstep
from .layers.hooks import Recording, Replay
from .layers.rows import RowLayout
from .layers.stem import StemState
from .others import check_chunks
from .released import released_when_used
from .waiting.parked import current_parking

logger = logging.getLogger("stem")

_INSIDE = "_old_forward"  # what accelerate's hooks call
_PLACES = ("forward", _INSIDE)


class ChunkedForward:
    """Takes the place of a UNet's `forward`: rows [video, frame] go through it chunk by chunk.

    A compiled UNet runs uncompiled here; of blocks that are compiled one by one, their
    self-attention does. Where memory runs out within a chunk, the chunk is halved
    and the pass begins again; the log says so. (Not with several processes: there a rank that fails
    ends the run.)

    Args:
        unet: UNet or ControlNet whose `forward` this is to be.
        family: Family that it belongs to, whose frames can go through in chunks.
        layout: Layout of the rows, shared with the attention processors.
        chunk: Number of frames in a chunk.
        cuts: Numbers of the frames that begin another scene, which meets no other.
        fit_frames: Number of frames of a scene that STEM's bases are found on; None: all.
        state: State of STEM's layers; None for other mechanisms.
        group: Process group whose ranks share the chunks; None: this process runs all.

    Attributes:
        on: Whether it cuts. Off, it only calls the UNet: another's wrapper around it may stay
            when the mechanism goes.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        family: Family,
        layout: RowLayout,
        chunk: int,
        *,
        cuts: Sequence[int] = (),
        fit_frames: int | None = None,
        state: StemState | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        assert family.outputs is not None  # see `Family.check_whole`
        self.unet = unet
        self.outputs = family.outputs
        self.forward = unet.forward
        self._standing: Any = None
        self._before: Any = None
        self.layout = layout
        self.chunk = chunk
        self.cuts = cuts
        self.fit_frames = fit_frames
        self.state = state
        self.group = group
        self.on = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ChunkedForward:
        """A copy that has the same process group, of which a process has but one."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            setattr(copied, name, value if name == "group" else copy.deepcopy(value, memo))
        return copied

    def put_on(self) -> None:
        """Take the place of the UNet's `forward`, and cut.

        Where accelerate's hook is outermost, it goes inside: pipelines take that hook off and put
        it on again after each call, and what stood around it would go with it.
        """
        if self._standing is None:
            held = vars(self.unet)
            outermost = getattr(held.get("forward"), "func", None)
            hooked = getattr(outermost, "__module__", None) == "accelerate.hooks"
            place = _INSIDE if hooked and _INSIDE in held else "forward"
            self._before = held.get(place)
            # Now, not when this was made: then another's chunks may have been on.
            self.forward = getattr(self.unet, place)
            # A method: export and others look for a function's code.
            self._standing = self.__call__
            setattr(self.unet, place, self._standing)
        self.on = True

    def take_off(self) -> None:
        """Put the UNet's `forward` back, and cut no more."""
        self.on = False
        if self._standing is None:
            return
        held = vars(self.unet)
        place = next((place for place in _PLACES if held.get(place) is self._standing), None)
        if place is None:
            return
        if place == "forward" and self._before is None:
            del self.unet.forward
        else:
            setattr(self.unet, place, self._before or self.forward)
        self._standing = None

    def check_in_place(self) -> None:
        """Raise where somebody has put another `forward` in this one's place.

        Raises:
            RuntimeError: the UNet's calls would not be cut.
        """
        found = [vars(self.unet).get(place) for place in _PLACES]
        if any(forward is self._standing for forward in found):
            return
        own = type(self.unet).forward
        if found[0] is None or any(getattr(one, "__func__", None) is own for one in found):
            raise RuntimeError(
                f"the forward of the {type(self.unet).__name__} was put back since the attention "
                "was enabled, so its frames would no longer go through in chunks, scenes or "
                "shares; call stem.enable again after what did that (offloading, hooks)"
            )

    @torch.compiler.disable(
        reason="chunks of a video take turns, which no graph can hold; "
        "run all frames at once (chunk=None)"
    )
    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.on:
            return self.forward(sample, *args, **kwargs)
        self._check()
        return_dict = kwargs.pop("return_dict", True)
        while True:
            try:
                with _scaled_once(self.unet, kwargs) as given:
                    found = self._in_chunks(sample, args, given)
                break
            except (MemoryError, RuntimeError) as error:
                if not lacks_memory(error) or self.chunk == 1 or self.group is not None:
                    raise
                # Outside the handler, whose traceback holds the failed pass's memory.
                failed = min(self.chunk, max(map(len, self._scenes(sample))))
            self.chunk = (failed + 1) // 2
            if sample.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "memory ran out in a chunk of %d frames; going on in chunks of %d, whose results "
                "differ in the last bits",
                failed,
                self.chunk,
            )
        returned = self.outputs.nested(found)
        return self.outputs.named()(*returned) if return_dict else returned

    def _check(self) -> None:
        """Raise where the UNet cannot run in chunks."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export cannot hold chunks of a video, which take turns; export with all "
                "frames at once (chunk=None, no fit_frames, no group)"
            )
        if torch.is_grad_enabled() and self.unet.is_gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing runs layers again where the chunks of a video no longer "
                "meet; call unet.disable_gradient_checkpointing(), run under torch.no_grad(), or "
                "run all frames at once (chunk=None)"
            )
        frames = self.layout.num_frames
        if self.cuts or self.fit_frames is not None or frames is None or self.chunk < frames:
            check_chunks(self.unet)

    def _in_chunks(self, sample: torch.Tensor, args: Any, kwargs: Any) -> Tensors:
        rows = sample.shape[0]
        frames = self.layout.frames(rows)
        videos = rows // frames

        def call(chosen: list[int]) -> Tensors:
            # Names of this call are the caller's; what it makes for a chunk may be put away.
            returned = self._called(
                *(_rows_of(given, rows, videos, chosen) for given in (sample, args, kwargs))
            )
            return tuple(
                out.unflatten(0, (videos, len(chosen))) for out in self.outputs.flat(returned)
            )

        def together(chosen: Sequence[int]) -> Tensors:
            group = self.group
            if group is not None and len(chosen) < frames and not self._enough(len(chosen)):
                group = None  # a part of the video too short to share: every rank runs it
            exchange = Lockstep(chosen, min(self.chunk, len(chosen)), group)
            with (
                self.layout.exchanging(exchange),
                released_when_used(self.unet, self.forward, exchange),
            ):
                return exchange.run(call, dim=1)

        scenes = self._scenes(sample)
        if len(scenes) == 1:
            return _as_rows(self._of_scene(scenes[0], together))
        state = self.state
        if state is not None and (state.hooks.having("bases") or state.hooks.having("converged")):
            raise ValueError(
                f"bases are recorded and replayed of one scene, and cuts is {tuple(self.cuts)}; "
                "enable without cuts"
            )
        found = [self._of_scene(scene, together) for scene in scenes]
        parking = current_parking()
        return _as_rows([parking.joined(column, 1) for column in zip(*found, strict=True)])

    def _of_scene(self, scene: range, together: Callable[[Sequence[int]], Tensors]) -> Tensors:
        """Outputs [videos, frames, ...] of one scene, whose chunks `together` runs."""
        state = self.state
        if self.fit_frames is None or state is None or state.hooks.having("bases"):
            return together(scene)
        fit = spread_frames(scene, self.fit_frames)
        recording = Recording()
        with state.hooks.added("fitting", recording):
            fitted = together(fit)
        left = sorted(set(scene) - set(fit))
        if not left:
            return fitted
        with state.hooks.added("fitted", Replay(recording.found)):
            rest = together(left)
        found = []
        for of_fit, of_left in zip(fitted, rest, strict=True):
            out = of_fit.new_empty((of_fit.shape[0], len(scene), *of_fit.shape[2:]))
            for frames, part in ((fit, of_fit), (left, of_left)):
                out[:, [frame - scene.start for frame in frames]] = part
            found.append(out)
        return tuple(found)

    def _scenes(self, sample: torch.Tensor) -> list[range]:
        return scenes_of(self.layout.frames(sample.shape[0]), self.cuts)

    def _called(self, sample: torch.Tensor, args: Any, kwargs: Any) -> Any:
        return self.forward(sample, *args, **kwargs, return_dict=False)

    def _enough(self, frames: int) -> bool:
        """Whether so many frames are a chunk for each rank at least."""
        return self.group is not None and -(-frames // self.chunk) >= self.group.size()


@contextlib.contextmanager
def _scaled_once(unet: torch.nn.Module, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments without the scale of LoRA weights, which is on in the block: a UNet's `forward`
    multiplies it in and out again, and those of all chunks are under way at once."""
    from diffusers.utils import USE_PEFT_BACKEND
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    given = kwargs.get("cross_attention_kwargs") or {}
    if "scale" not in given or not USE_PEFT_BACKEND:
        yield kwargs
        return
    rest = {name: value for name, value in given.items() if name != "scale"}
    scale_lora_layers(unet, given["scale"])
    try:
        yield {**kwargs, "cross_attention_kwargs": rest}
    finally:
        unscale_lora_layers(unet, given["scale"])


def spread_frames(frames: range, count: int) -> list[int]:
    """`count` frame numbers spread evenly over a run of frames, the middle of equal stretches."""
    count = min(count, len(frames))
    return [frames[(2 * index + 1) * len(frames) // (2 * count)] for index in range(count)]


def _as_rows(outputs: Sequence[torch.Tensor]) -> Tensors:
    """Outputs [videos, frames, ...] as rows [video, frame]."""
    return tuple(out.flatten(0, 1) for out in outputs)


def _rows_of(given: Any, rows: int, videos: int, frames: list[int]) -> Any:
    """The rows [video, frame] of some frames, of every tensor that has a row for each."""
    if isinstance(given, torch.Tensor):
        if given.ndim == 0 or given.shape[0] != rows:
            return given
        by_frame = given.unflatten(0, (videos, rows // videos))
        first, last = frames[0], frames[-1]
        if last - first + 1 == len(frames):
            return by_frame[:, first : last + 1].flatten(0, 1)
        return by_frame[:, frames].flatten(0, 1)
    if isinstance(given, dict):
        return {name: _rows_of(value, rows, videos, frames) for name, value in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(_rows_of(value, rows, videos, frames) for value in given)
    return given
