"""The page: three steps, the jobs, and what came of them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..names import EDIT_METHODS, INVERSION_METHODS, PRESETS
from .actions import Actions
from .state import State

_TICK_SECONDS = 1.5
_PRESETS = sorted({preset for presets in PRESETS.values() for preset in presets})
_SIZES = [("as it is", ""), ("64", "64"), ("256", "256"), ("512", "512"), ("768", "768")]
_CHUNKS = ["auto", "all", "1", "2", "4", "8", "16"]
_STEPS = [2, 4, 5, 10, 20, 25, 50, 100]
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_OWN: dict[str, Any] = {"api_visibility": "private"}


def build(state: State) -> gr.Blocks:
    """The page of a state.

    Args:
        state: State that it shows and changes.
    """
    return _Page(state).blocks


class _Page:
    def __init__(self, state: State) -> None:
        self._state = state
        with gr.Blocks(title="STEM", analytics_enabled=False, fill_width=False) as self.blocks:
            gr.HTML(
                "<h1>STEM</h1><p>Invert a video, then edit it by a prompt. What runs here are "
                "commands of <code>stem</code>, one at a time on a device; they go on when this "
                "page is closed.</p>",
                elem_classes="head",
            )
            with gr.Row(elem_classes="steps", equal_height=False):
                self._video_step()
                self._inversion_step()
                self._edit_step()
            self._jobs_part()
            self._results_part()
            self._listen()

    # What is seen

    def _video_step(self) -> None:
        with gr.Column(min_width=320, elem_classes="step"):
            gr.HTML("<h2>1 Video</h2>")
            self.upload = gr.File(label="Upload a video", type="filepath", height=136)
            self.upload_notice = gr.HTML()
            self.clip = gr.Dropdown([], label="Video", interactive=True)
            self.world = gr.Button("Draw a scene of the embedded model's world", size="sm")
            self.strip = gr.HTML()
            with gr.Row():
                self.first = gr.Number(0, label="First frame", precision=0, minimum=0, min_width=90)
                self.last = gr.Number(0, label="Last frame", precision=0, minimum=0, min_width=90)
            self.size = gr.Dropdown(
                _SIZES,
                value="",
                label="Size in pixels",
                info="The shorter side (256) or width x height (512x320).",
                allow_custom_value=True,
            )

    def _inversion_step(self) -> None:
        with gr.Column(min_width=320, elem_classes="step"):
            gr.HTML("<h2>2 Inversion</h2>")
            self.model = gr.Dropdown(
                list(self._state.models), value=self._state.models[0], label="Model"
            )
            self.prompt = gr.Textbox("", label="Prompt", info="Describes the video.", lines=2)
            self.method = gr.Dropdown(list(INVERSION_METHODS), value="stem", label="Method")
            with gr.Row():
                self.steps = gr.Dropdown(_STEPS, value=50, label="Steps", min_width=90)
                self.chunk = gr.Dropdown(
                    _CHUNKS, value="auto", label="Frames at once", min_width=90
                )
            self.expected = gr.HTML()
            self.invert = gr.Button("Invert", variant="primary")
            self.invert_notice = gr.HTML()

    def _edit_step(self) -> None:
        with gr.Column(min_width=320, elem_classes="step"):
            gr.HTML("<h2>3 Edit</h2>")
            self.inversion = gr.Dropdown([], label="Inversion", interactive=True)
            self.prompts = gr.Textbox(
                "",
                label="Prompts",
                info="Each describes the whole edited video; one a line.",
                lines=2,
            )
            self.methods = gr.CheckboxGroup(
                list(EDIT_METHODS), value=["fusion"], label="Methods, side by side"
            )
            self.preset = gr.Dropdown(
                [("none", ""), *_PRESETS],
                value="",
                label="Preset",
                info="Of fusion and fatezero.",
            )
            self.zoom = gr.Checkbox(
                False,
                label="In a window",
                info="What is small is edited large; fusion alone.",
            )
            with gr.Column(visible=False) as self.window:
                self.zoom_prompts = gr.Textbox(
                    "",
                    label="Prompts of the window",
                    info="What it shows, where what is small is large: one a line, for each prompt "
                    "above. Empty: the prompts.",
                    lines=2,
                )
                self.zoom_source = gr.Textbox(
                    "",
                    label="Source in the window",
                    info="Empty: the inversion's description.",
                )
            with gr.Accordion("More options", open=False):
                self.guidance = gr.Number(
                    None, label="Guidance scale", info="Empty: each method's own."
                )
                self.negative = gr.Textbox("", label="Negative prompt")
                self.seed = gr.Number(0, label="Seed", precision=0)
                self.options = gr.Textbox(
                    "",
                    label="Options",
                    info="METHOD.FIELD=VALUE, one a line: fusion.preset=shape",
                    lines=2,
                )
            self.edit_expected = gr.HTML()
            self.edit = gr.Button("Edit", variant="primary")
            self.edit_notice = gr.HTML()

    def _jobs_part(self) -> None:
        with gr.Column(elem_classes="part"):
            gr.HTML("<h2>Jobs</h2>")
            self.jobs = gr.HTML(elem_id="jobs")
            with gr.Row():
                self.job = gr.Dropdown([], label="Job", interactive=True, scale=3)
                self.cancel = gr.Button("Cancel", scale=1, min_width=110)
                self.again = gr.Button("Run again", scale=1, min_width=110)
            self.job_notice = gr.HTML()
            self.command = gr.Textbox(
                label="Command line that does the same", lines=1, buttons=["copy"]
            )
            with gr.Accordion("Log of the job", open=False):
                self.log = gr.Textbox(label="Log, its end", lines=4, buttons=["copy"])

    def _results_part(self) -> None:
        with gr.Column(elem_classes="part"):
            gr.HTML("<h2>Results</h2>")
            self.results = gr.Dropdown(
                [], label="Edits, side by side", multiselect=True, interactive=True
            )
            self.results_notice = gr.HTML()
            self.player = gr.HTML(elem_id="results")
            self.downloads = gr.HTML()
            self.report = gr.Textbox(
                label="Command line that shows the same", lines=1, buttons=["copy"]
            )
        self.seen = gr.State({})
        # Off until the page has loaded: of two answers at once, one would undo the other's.
        self.timer = gr.Timer(_TICK_SECONDS, active=False)

    def _listen(self) -> None:
        do = Actions(self._state)
        video = [self.clip, self.first, self.last]
        asked = [*video, self.size, self.model, self.method, self.prompt, self.steps, self.chunk]
        edit = [
            self.inversion, self.prompts, self.methods, self.preset, self.guidance, self.negative,
            self.seed, self.options, self.zoom, self.zoom_prompts, self.zoom_source,
        ]  # fmt: skip
        shape = [self.first, self.last, self.strip, self.prompt, self.expected]
        tick = [
            self.seen, self.jobs, self.job, self.inversion, self.results, self.clip, self.log,
        ]  # fmt: skip

        self.upload.upload(
            do.uploaded, [self.upload], [self.upload, self.clip, self.upload_notice], **_OWN
        )
        self.world.click(do.drawn, None, [self.clip, self.upload_notice], **_OWN)
        self.clip.change(do.chosen, [self.clip, *asked[3:]], shape, **_QUIET)
        for frame in (self.first, self.last):
            frame.change(do.strip, video, self.strip, **_QUIET)
        for each in asked[1:]:
            each.change(do.expected, asked, self.expected, **_QUIET)
        self.invert.click(
            do.inverted, asked, [self.invert_notice, self.inversion, self.job], **_OWN
        )
        self.zoom.change(do.windowed, self.zoom, self.window, **_QUIET)
        for field in (
            self.inversion, self.prompts, self.methods, self.zoom, self.zoom_prompts,
            self.zoom_source,
        ):  # fmt: skip
            field.change(do.edit_expected, edit, self.edit_expected, **_QUIET)
        self.edit.click(do.edited, edit, [self.edit_notice, self.job], **_OWN)
        self.cancel.click(do.cancelled, self.job, self.job_notice, **_OWN)
        self.again.click(do.again, self.job, self.job_notice, **_OWN)
        self.job.change(do.job, self.job, [self.command, self.log], **_QUIET)
        self.results.change(
            do.shown,
            self.results,
            [self.results_notice, self.player, self.downloads, self.report],
            api_visibility="private",
        )
        self.timer.tick(do.tick, [self.seen, self.job, self.results], tick, queue=False, **_QUIET)
        begin = [
            *tick, self.prompt, self.steps, self.method, self.prompts, self.methods, self.zoom,
            self.zoom_prompts, self.zoom_source,
        ]  # fmt: skip
        loaded = self.blocks.load(do.loaded, None, begin, queue=False, **_QUIET)
        loaded.then(lambda: gr.Timer(active=True), None, self.timer, queue=False, **_QUIET)
