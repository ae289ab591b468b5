"""What edits of one video are asked for, checked as far as that needs no pipeline."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..control import Control
from ..editing import check_edit, edit_options
from ..editing.checks import check_numbers
from ..editing.zoomed import check_zoom, check_zoom_prompt, zoom_prompts
from ..inversion import InversionFolder
from ..inversion.methods import check_options_used
from ..storage import check_output, tensor_bytes
from ..video.writing import most_bytes


@dataclass(frozen=True)
class EditPlan:
    """What edits of one video share; checked as far as that needs no inversion.

    Args:
        prompts: Prompts of the edits, one edit each by every method.
        methods: Names of `stem.editing.METHODS`.
        options: Fields of the methods' options, by method.
        negative_prompt: Negative prompt of all edits.
        guidance: Guidance scale; None: each method's own.
        seed: Seed of the methods' draws.
        control: What the pipeline's ControlNets are shown in the edits; None: as in the inversion.
        zoom: Whether the edits are made in a window that follows what changes, see
            `stem.editing.run_zoomed_edit`.
        zoom_prompts: Prompts that describe the edited video as the window shows it, one for each
            of `prompts` in their order; None: `prompts`.
        zoom_source: Prompt that describes the source as the window shows it; None: the
            inversion's.

    Raises:
        TypeError: prompts or methods of another type.
        ValueError: no prompt or an empty one, one that comes twice, another number of prompts for
            the window, an unknown method or option, or a number that cannot be used.
    """

    prompts: Sequence[str]
    methods: Sequence[str] = ("fusion",)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    negative_prompt: str = ""
    guidance: float | None = None
    seed: int = 0
    control: Sequence[Control] | None = None
    zoom: bool = False
    zoom_prompts: Sequence[str] | None = None
    zoom_source: str | None = None

    def __post_init__(self) -> None:
        check_texts("prompts", self.prompts)
        check_texts("methods", self.methods)
        check_prompts(self.prompts)
        for method in self.methods:
            edit_options(method, self.options.get(method))
        check_options_used(self.methods, self.options)
        check_numbers(self.guidance, self.seed)
        for name in ("zoom_prompts", "zoom_source"):
            if getattr(self, name) is not None and not self.zoom:
                raise ValueError(f"{name} describes a window, and zoom is False; set zoom=True")
        if self.zoom:
            check_zoom(self.methods, self.options, self.control)
        if self.zoom_prompts is not None:
            check_type("zoom_prompts", self.zoom_prompts)
            if len(self.zoom_prompts) != len(self.prompts):
                raise ValueError(
                    f"zoom_prompts are {len(self.zoom_prompts)} and prompts {len(self.prompts)}; "
                    "give one for each, in their order, or none"
                )
            for text in self.zoom_prompts:
                check_zoom_prompt(text)

    @property
    def count(self) -> int:
        """The number of edits."""
        return len(self.prompts) * len(self.methods)

    def zoom_prompt(self, prompt: str) -> str | None:
        """What describes the edit by `prompt` as the window shows it; None: the prompt itself."""
        if self.zoom_prompts is None:
            return None
        return self.zoom_prompts[list(self.prompts).index(prompt)]

    def _in_window(self, inversion: InversionFolder, prompt: str) -> tuple[str, str]:
        options = check_zoom(self.methods, self.options)
        given = (self.zoom_prompt(prompt), self.zoom_source)
        return zoom_prompts(inversion, prompt, options, *given)

    def arguments(self, method: str) -> dict[str, Any]:
        """Arguments of `check_edit` beside the prompt."""
        return {
            "method": method,
            "negative_prompt": self.negative_prompt,
            "guidance": self.guidance,
            "seed": self.seed,
            "options": self.options.get(method),
        }

    def arguments_with_control(self, method: str) -> dict[str, Any]:
        """Arguments of `run_edit` beside the prompt; the control only where there is one."""
        shown = {} if self.control is None else {"control": self.control}
        return {**self.arguments(method), **shown}

    def check_space(self, out: Path, num_frames: int, height: int, width: int) -> None:
        """Raise if `out` cannot be written, or has no space for the videos.

        Raises:
            OSError: with the reason.
        """
        check_output(out, self.count * most_bytes(num_frames, height, width))

    def check_pipeline(self, pipeline: Any) -> None:
        """Raise ValueError before any work if a method's options do not fit a pipeline's UNet."""
        for method in self.methods:
            edit_options(method, self.options.get(method)).check_pipeline(pipeline)

    def check(self, inversion: InversionFolder, out: Path) -> None:
        """Raise before any work if one of the edits could not be made of an inversion.

        Args:
            inversion: Inversion to edit.
            out: Folder of everything written.

        Raises:
            ValueError: an inversion that is incomplete or damaged, or words that do not fit.
            OSError: `out` cannot be written.
        """
        for prompt in self.prompts:
            for method in self.methods:
                check_edit(inversion, prompt, **self.arguments(method))
        if self.zoom:
            check_zoom(self.methods, self.options, inversion.settings.get("control"))
            for prompt in self.prompts:
                self._in_window(inversion, prompt)
        video = inversion.settings["video"]
        size = (video["num_frames"], video["height"], video["width"])
        for each in self.control or ():
            each.check_fits(*size)
        self.check_space(out, *size)

    def shaped_by(
        self,
        inversion: InversionFolder,
        prompt: str,
        method: str,
        exact: torch.Tensor | None = None,
        *,
        has_video: bool = False,
    ) -> str:
        """Everything that shapes an edit's files; of the inversion its name, which holds the rest.

        Args:
            inversion: Inversion to edit.
            prompt: Prompt of the edit.
            method: Name of its method.
            exact: Exact answer that is shown beside it, uint8 [N, H, W, 3], or None.
            has_video: Whether the video is at hand, which a window is cut from.
        """
        answer = None
        if exact is not None:
            answer = hashlib.sha256(tensor_bytes(exact.cpu().contiguous())).hexdigest()
        shaped = {
            "inversion": inversion.path.resolve().name,
            "prompt": prompt,
            **self.arguments(method),
            **({} if self.control is None else {"control": [c.record() for c in self.control]}),
            **({"zoom": [*self._in_window(inversion, prompt), has_video]} if self.zoom else {}),
            "options": asdict(edit_options(method, self.options.get(method))),
            "exact": answer,
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("stem-inversion", "torch", "diffusers")
            },
        }
        return json.dumps(shaped, sort_keys=True, default=torch.Tensor.tolist)


def check_type(name: str, values: Sequence[str]) -> None:
    """Raise TypeError where an argument of this name is no list of texts."""
    if isinstance(values, str) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} is {values!r}; pass a list of texts")


def check_texts(name: str, values: Sequence[str]) -> None:
    """Raise where an argument is no list of texts that differ.

    Args:
        name: Name of the argument.
        values: Texts.

    Raises:
        TypeError: it is no list of texts.
        ValueError: it is empty, or holds a text twice.
    """
    check_type(name, values)
    if not values:
        raise ValueError(f"{name} is empty; give at least one")
    twice = [value for value in values if list(values).count(value) > 1]
    if twice:
        raise ValueError(f"{name} holds {twice[0]!r} twice; give each of them once")


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError where a prompt is empty."""
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError(
                f"a prompt is {prompt!r}; describe the whole edited video, as the source "
                "prompt does the source"
            )
