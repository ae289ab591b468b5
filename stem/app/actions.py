"""What the page does when it is used. Its actions queue commands, and say what is on the disk."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import gradio as gr

from . import shown
from .commands import AskedError, Inversion
from .estimate import estimate, inversion_of
from .jobs import DONE, Job
from .state import State, edits_asked
from .uploads import Kept, UploadError, thumbnails

_MOST_CHOSEN = 16  # frames of a video that was just chosen


class Actions:
    """The functions behind the page's controls; each gives the new values of what it changes.

    Args:
        state: State that they show and change.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    def uploaded(self, path: str | None) -> tuple[Any, Any, str]:
        if path is None:
            return gr.skip(), gr.skip(), ""
        file = Path(path)
        try:
            key = self._state.videos.keep(file, file.name)
        except UploadError as error:
            return None, gr.skip(), shown.notice(str(error), bad=True)
        finally:
            file.unlink(missing_ok=True)  # it was the browser's copy
        return None, self._clips(key), shown.notice("The video is here.")

    def drawn(self) -> tuple[Any, str]:
        return self._clips(self._state.add_world()), ""

    def _clips(self, key: str | None = None) -> Any:
        choices = [(f"{kept.label} — {kept.frames} frames, {kept.width}×{kept.height}", key)
                   for key, kept in self._state.videos.all().items()]  # fmt: skip
        return gr.update(choices=choices) if key is None else gr.update(choices=choices, value=key)

    def chosen(self, key: str, *asked: Any) -> tuple[Any, Any, str, Any, str]:
        kept = self._state.video(key)
        if kept is None:
            return gr.skip(), gr.skip(), "", gr.skip(), ""
        last = min(kept.frames, _MOST_CHOSEN) - 1
        size, model, method, prompt, steps, chunk = asked
        prompt = kept.prompt or ("" if self._is_of_a_video(prompt) else prompt)
        given = (key, 0, last, size, model, method, prompt, steps, chunk)
        return (
            gr.Number(0, maximum=kept.frames - 1),
            gr.Number(last, maximum=kept.frames - 1),
            self.strip(key, 0, last),
            prompt,
            self.expected(*given),
        )

    def _is_of_a_video(self, prompt: str) -> bool:
        return any(prompt == kept.prompt for kept in self._state.videos.all().values())

    def strip(self, key: str, first: float | None, last: float | None) -> str:
        kept = self._state.video(key)
        if kept is None or first is None or last is None:
            return ""
        return shown.strip(_pictures(kept), int(first), int(last) + 1)

    def _asked(
        self,
        key: str,
        first: float | None,
        last: float | None,
        size: str | None,
        model: str,
        method: str,
        prompt: str,
        steps: int,
        chunk: str,
    ) -> tuple[Inversion, Kept]:
        kept = self._state.video(key)
        if kept is None:
            raise AskedError("no video is chosen; upload one, or take one of the list")
        begin, end = _frame("first", first, kept), _frame("last", last, kept)
        if end < begin:
            raise AskedError(f"the last frame is {end}, before the first, which is {begin}")
        if model not in self._state.models:
            raise AskedError(f"the model {model!r} is not offered; start with --model={model}")
        asked = Inversion(
            str(kept.path),
            model,
            method,
            " ".join(prompt.split()),
            int(steps),
            chunk,
            begin,
            end + 1,
            (size or "").strip().replace("×", "x"),
            str(self._state.out),
        )
        return asked, kept

    def expected(self, *asked: Any) -> str:
        try:
            inversion, kept = self._asked(*asked)
        except AskedError:
            return ""
        jobs, size = self._state.jobs.all(), (kept.width, kept.height)
        found = estimate(inversion, inversion, size, _device(jobs), jobs)
        return shown.estimated(found, "inversion")

    def inverted(self, *asked: Any) -> tuple[str, Any, Any]:
        try:
            inversion, kept = self._asked(*asked)
        except AskedError as error:
            return shown.notice(str(error), bad=True), gr.skip(), gr.skip()
        record = {**inversion.record(), "video_size": [kept.width, kept.height]}
        job = self._state.jobs.add(inversion.title, [inversion.arguments()], record)
        choices = [(label, key) for key, label in reversed(self._state.inversions().items())]
        key = f"job:{job.number}"
        return self._queued(job), gr.update(choices=choices, value=key), self._job_choices(job)

    def _edits(
        self,
        key: str | None,
        prompts: str,
        methods: list[str],
        preset: str | None,
        guidance: float | None,
        negative: str,
        seed: float | None,
        options: str,
        zoom: bool,
        zoom_prompts: str,
        zoom_source: str,
    ) -> Any:
        if not key:
            raise AskedError("no inversion is chosen; make one in step 2")
        try:
            return edits_asked(
                self._state,
                key,
                prompts=tuple(_lines(prompts)),
                methods=tuple(methods),
                preset=preset or "",
                guidance=guidance,
                negative_prompt=" ".join(negative.split()),
                seed=int(seed or 0),
                options=tuple(_lines(options)),
                zoom=zoom,
                zoom_prompts=tuple(_lines(zoom_prompts)) if zoom else (),
                zoom_source=" ".join(zoom_source.split()) if zoom else "",
            )
        except KeyError as error:
            raise AskedError("this inversion is no longer there; choose another") from error

    @staticmethod
    def windowed(zoom: bool) -> Any:
        """The window's fields, where there is a window."""
        return gr.update(visible=zoom)

    def edit_expected(self, *asked: Any) -> str:
        try:
            edits, inversion, size = self._edits(*asked)
        except AskedError:
            return ""
        jobs = self._state.jobs.all()
        return shown.estimated(estimate(edits, inversion, size, _device(jobs), jobs), "edit")

    def edited(self, *asked: Any) -> tuple[str, Any]:
        try:
            edits, _, size = self._edits(*asked)
        except AskedError as error:
            return shown.notice(str(error), bad=True), gr.skip()
        record = {**edits.record(), "video_size": list(size)}
        job = self._state.jobs.add(edits.title, [edits.arguments()], record)
        return self._queued(job), self._job_choices(job)

    def _queued(self, job: Job) -> str:
        before = [each for each in self._state.open_jobs() if each.number < job.number]
        behind = f", behind {len(before)} others" if len(before) > 1 else ""
        behind = ", behind another" if len(before) == 1 else behind
        return shown.notice(f"Job {int(job.number)} is in the queue{behind}.")

    def _job_choices(self, chosen: Job | None = None) -> Any:
        jobs = list(reversed(self._state.jobs.all()))
        choices = [(f"{int(job.number)} {job.title}", job.number) for job in jobs]
        if chosen is None:
            return gr.update(choices=choices)
        return gr.update(choices=choices, value=chosen.number)

    def cancelled(self, number: str | None) -> str:
        with contextlib.suppress(KeyError):
            job = self._state.jobs.get(number or "")
            if job.ended is not None:
                return shown.notice(f"Job {int(job.number)} has ended already.", bad=True)
            self._state.jobs.cancel(job.number)
            return shown.notice(f"Job {int(job.number)} is cancelled; finished steps are kept.")
        return shown.notice("Choose a job first.", bad=True)

    def again(self, number: str | None) -> str:
        with contextlib.suppress(KeyError):
            job = self._state.jobs.again(self._state.jobs.get(number or "").number)
            if job.ended is None:
                return shown.notice(f"Job {int(job.number)} goes on where it stopped.")
            return shown.notice(
                f"Job {int(job.number)} is done, or still ending; only one that failed or was "
                "cancelled runs again.",
                bad=True,
            )
        return shown.notice("Choose a job first.", bad=True)

    def job(self, number: str | None) -> tuple[str, str]:
        with contextlib.suppress(KeyError):
            job = self._state.jobs.get(number or "")
            return shown.command_lines(job), shown.log_end(job)
        return "", ""

    def shown(self, names: list[str]) -> tuple[str, str, str, str]:
        found = self._state.results()
        chosen = [name for name in names or [] if name in found]
        if not chosen:
            return "", "", "", ""
        results = [found[name] for name in chosen]
        path, wrong = self._state.page_of(chosen)
        line = shown.report_line(results, path)
        if wrong:
            return shown.notice(wrong, bad=True), "", shown.downloads(results, None), line
        return "", shown.player(path), shown.downloads(results, path), line

    def loaded(self) -> tuple[Any, ...]:
        results, jobs = self._state.results(), self._state.jobs.all()
        clips = self._state.videos.all()
        seen, listed, _, _, _, _, log = self.tick({}, None, [])
        last = jobs[-1] if jobs else None
        clip = next(reversed(clips), None)
        # What was last asked for stands in the form again.
        inverted: list[Any] = [gr.skip()] * 3
        inversion = next(filter(None, (inversion_of(job.asked) for job in reversed(jobs))), None)
        if inversion is not None:
            paths = {str(kept.path): key for key, kept in clips.items()}
            clip = paths.get(inversion.video, clip)
            inverted = [inversion.prompt, inversion.steps, inversion.method]
        edited: list[Any] = [gr.skip()] * 5
        edits = [job.asked for job in jobs if job.asked.get("kind") == "edit"]
        if edits:
            last_edit = edits[-1]
            edited = [
                "\n".join(last_edit["prompts"]),
                list(last_edit["methods"]),
                last_edit.get("zoom", False),
                "\n".join(last_edit.get("zoom_prompts", ())),
                last_edit.get("zoom_source", ""),
            ]
        inversions = list(reversed(self._state.inversions().items()))
        newest = list(results)[-1:]
        for job in reversed(jobs):
            if job.state == DONE and job.asked.get("kind") == "edit":
                newest = [name for name in self._state.results_of(job) if name in results]
                break
        return (
            {**seen, "shown": newest},
            listed,
            self._job_choices(last),
            gr.update(
                choices=[(label, key) for key, label in inversions],
                value=inversions[0][0] if inversions else None,
            ),
            gr.update(choices=self._result_choices(), value=newest),
            self._clips(clip),
            log,
            *inverted,
            *edited,
        )

    def _result_choices(self) -> list[tuple[str, str]]:
        found = reversed(self._state.results().items())
        return [(result.label, name) for name, result in found]

    def tick(self, seen: dict[str, Any], number: str | None, chosen: list[str]) -> tuple[Any, ...]:
        """Only what has changed since this browser last saw it."""
        jobs = self._state.jobs.all()
        log = ""
        with contextlib.suppress(KeyError):
            log = shown.log_end(self._state.jobs.get(number or ""))
        done = [job for job in jobs if job.state == DONE and job.asked.get("kind") == "edit"]
        finished = [job.number for job in done]
        now: dict[str, Any] = {
            "jobs": shown.job_list(jobs),
            "numbers": [job.number for job in jobs],
            "inversions": self._state.inversions(),
            "results": list(self._state.results()),
            "finished": finished,
            "clips": list(self._state.videos.all()),
            "log": log,
            "shown": seen.get("shown", []),  # the results that were last shown unasked
        }
        fresh = {name for name, value in now.items() if seen.get(name) != value}
        if not fresh:
            return (gr.skip(),) * 7
        results: Any = gr.skip()
        if fresh & {"results", "finished"}:
            results = gr.update(choices=self._result_choices())
            new = [job for job in done if job.number not in seen.get("finished", finished)]
            names = self._state.results_of(new[-1]) if new else []
            # What has just been made is shown, but not in the place of what somebody chose.
            if names and (not chosen or chosen == now["shown"]):
                now["shown"] = names
                results = gr.update(choices=self._result_choices(), value=names)
        inversions = [(label, key) for key, label in reversed(now["inversions"].items())]
        return (
            now,
            now["jobs"] if "jobs" in fresh else gr.skip(),
            self._job_choices() if "numbers" in fresh else gr.skip(),
            gr.update(choices=inversions) if "inversions" in fresh else gr.skip(),
            results,
            self._clips() if "clips" in fresh else gr.skip(),
            log if "log" in fresh else gr.skip(),
        )


def _frame(name: str, number: float | None, kept: Kept) -> int:
    if number is None or not 0 <= int(number) < kept.frames:
        said = "empty" if number is None else int(number)
        raise AskedError(
            f"the {name} frame is {said}; the video has {kept.frames} frames, from 0 to "
            f"{kept.frames - 1}"
        )
    return int(number)


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _device(jobs: list[Job]) -> str:
    return next((job.device for job in reversed(jobs) if job.device is not None), "")


@functools.lru_cache(maxsize=64)
def _pictures(kept: Kept) -> list[tuple[int, str]]:
    return thumbnails(kept)
