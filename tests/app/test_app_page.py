"""The page in a browser: from an upload to results in step, through a server's death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from browser import CHROMIUM, Page, open_page
from clips import encode
from commands import run

from stem.app.jobs import Job
from stem.world import render, sample_scene

pytest.importorskip("gradio", reason="the extra `app` is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

SOURCE = "a small dotted red cross"
PROMPT = "a small dotted blue cross"
SECONDS = 240
# What a person does, by the labels that they read.
HELPERS = """
window.block = label => [...document.querySelectorAll('[data-testid=block-info]')]
  .find(found => found.textContent.trim() === label).closest('.block');
window.field = label => block(label).querySelector('input, textarea');
window.fill = (label, text) => {
  const element = field(label), inputs = {INPUT: HTMLInputElement, TEXTAREA: HTMLTextAreaElement};
  const kind = inputs[element.tagName];
  element.focus();
  Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(element, text);
  element.dispatchEvent(new Event('input', {bubbles: true}));
  element.dispatchEvent(new Event('change', {bubbles: true}));
  element.blur();
};
window.choose = async (label, text) => {
  const element = field(label);
  element.focus();
  for (let waited = 0; waited < 100; waited++) {
    const option = [...document.querySelectorAll('[role=option]')]
      .find(found => found.textContent.trim().endsWith(text));
    if (option) {
      option.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
      element.blur();
      return true;
    }
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  return false;
};
window.tick = label => [...document.querySelectorAll('label')]
  .find(found => found.textContent.trim() === label).querySelector('input').click();
window.press = text => [...document.querySelectorAll('button')]
  .find(found => found.textContent.trim() === text).click();
window.state = number => document.querySelector(`[data-job="${number}"]`)?.dataset.state;
window.inner = () => document.querySelector('iframe.player')?.contentDocument;
true
"""
READY = (
    "inner() && inner().querySelector('canvas') && "
    "![...inner().querySelectorAll('.controls *')].some(control => control.disabled)"
)
PLAYING = """new Promise(resolve => {
  const found = [], start = performance.now(), frame = inner().defaultView;
  inner().querySelector('[data-action=play]').click();
  const look = now => {
    found.push([...inner().querySelectorAll('canvas')].map(canvas => Number(canvas.dataset.frame)));
    if (now - start < 1200) frame.requestAnimationFrame(look); else resolve(found);
  };
  frame.requestAnimationFrame(look);
})"""


class Server:
    """`stem app`, in a process of its own."""

    def __init__(self, out: Path) -> None:
        command = [sys.executable, "-m", "stem", "app", f"--out={out}", "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[0]

    def kill(self) -> None:
        """End it as a loss of power does, with all that it started."""
        inner = psutil.Process(self.process.pid).children(recursive=True)
        for process in (psutil.Process(self.process.pid), *inner):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = render(sample_scene(40_500_000), 3, 64).frames
    path = tmp_path_factory.mktemp("clip") / "ducks.mp4"
    return encode(path, frames, "libx264", "yuv420p", 8, options={"crf": "1"})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_page() as page:
        yield page


def opened(page: Page, url: str, width: int = 1280, *, dark: bool = False) -> None:
    page.open(url, width, dark=dark)
    page.wait_for(HELPERS)
    page.wait_for("document.querySelectorAll('.strip img').length > 0")


def problems(page: Page) -> list[str]:
    """What the page has logged, but for a line that Gradio's client always logs."""
    return [each for each in page.problems if "Method not implemented." not in each]


def leave(page: Page) -> None:
    """Close the page for the time of a job, whose drawing would take as long as the job."""
    assert problems(page) == []
    page.open("about:blank", 1280)
    page.problems.clear()  # Gradio's client logs the requests that were under way


def is_editing(job: Job) -> bool:
    step = job.step()
    return step is not None and step.name.startswith("edit") and step.done > 0


def job_on_disk(out: Path, number: str) -> Job:
    return Job.read(out / "app" / "jobs" / number)


def wait(what: object, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.1)


def picture(page: Page, width: int, name: str) -> None:
    """Where STEM_SHOTS names a folder, the page is kept there, to be looked at."""
    folder = os.environ.get("STEM_SHOTS")
    if folder:
        time.sleep(1)
        (Path(folder) / f"{name}.png").write_bytes(page.picture(width))
        page.resize(width)


def test_a_video_is_uploaded_inverted_edited_and_played(
    browser: Page, out: Path, clip: Path, tmp_path: Path
) -> None:
    server = Server(out)
    page, url = browser, server.url
    try:
        opened(page, url)
        # A text that is called a video is refused with one line; then a video is taken.
        text = tmp_path / "notes.mp4"
        text.write_text("no video")
        page.upload("input[type=file]", text)
        page.wait_for("document.querySelector('.notice.bad') !== null")
        said = page.value("document.querySelector('.notice.bad').textContent")
        assert said.startswith("notes.mp4 is no video by what is in it")
        page.upload("input[type=file]", clip)
        page.wait_for("field('Video').value.startsWith('ducks.mp4')")
        page.wait_for("field('Last frame').value === '2'")
        page.wait_for("document.querySelectorAll('.strip figure.in').length === 3")

        page.value(f"fill('Prompt', {json.dumps(SOURCE)})")
        assert page.value("choose('Steps', '2')")
        page.wait_for("document.querySelector('.notice.expected').textContent.includes('64×64')")
        page.value("press('Invert')")
        page.wait_for("state('000001') === 'running' || state('000001') === 'done'")
        page.wait_for("field('Command line that does the same').value.startsWith('stem invert')")
        page.value(f"fill('Prompts', {json.dumps(PROMPT)})")
        page.wait_for("field('Inversion').value.includes('red cross')")
        # The window's texts are there where there is a window, and go with it.
        shown = "document.body.textContent.includes('Prompts of the window')"
        assert not page.value(shown)
        page.value("tick('In a window')")
        page.wait_for(shown)
        page.value("fill('Prompts of the window', 'a large dotted blue cross')")
        picture(page, 1280, "window-1280")
        page.value("tick('In a window')")
        page.wait_for(f"!{shown}")
        page.value("press('Edit')")
        page.wait_for("state('000002')")
        assert "--zoom" not in " ".join(job_on_disk(out, "000002").commands[0])
        picture(page, 1280, "jobs-1280")

        assert problems(page) == []
        leave(page)

        # In the middle of the edit the server is killed, and started again.
        wait(lambda: is_editing(job_on_disk(out, "000002")))
        server.kill()
        assert job_on_disk(out, "000002").state == "running"
        assert not list(out.glob("fusion-*/edit.json"))
        server = Server(out)
        opened(page, server.url)
        page.wait_for("state('000001') === 'done'")
        page.wait_for("state('000002') === 'running'")
        leave(page)
        wait(lambda: job_on_disk(out, "000002").state == "done")
        assert job_on_disk(out, "000002").printed()[-1].endswith("edit.json")
        opened(page, server.url)
        page.wait_for("state('000002') === 'done'")

        # A third job is cancelled.
        page.value("fill('Prompts', 'a gray cross')")
        page.value("press('Edit')")
        page.wait_for("state('000003') === 'running'")
        page.value("press('Cancel')")
        page.wait_for("state('000003') === 'cancelled'")

        page.wait_for(READY, SECONDS)
        shown = page.value(PLAYING)
        assert len({frames[0] for frames in shown}) == 3
        assert all(len(frames) == 4 and len(set(frames)) == 1 for frames in shown)
        assert_one_machine(page, url, server.url)
        assert problems(page) == []
        for width in (1280, 390):
            for dark in (False, True):
                opened(page, server.url, width, dark=dark)
                page.wait_for(READY)
                root = "document.documentElement"
                assert page.value(f"{root}.scrollWidth <= {root}.clientWidth")
                picture(page, width, f"results-{width}-{'dark' if dark else 'light'}")
        assert_named(page)
    finally:
        server.kill()

    # What was killed and went on is what the same command line writes at once.
    argv = list(job_on_disk(out, "000002").commands[0])
    other = tmp_path / "other"
    assert run(*(f"--out={other}" if part.startswith("--out=") else part for part in argv)) == 0
    (ours,), (theirs,) = out.glob("fusion-*blue*"), other.glob("fusion-*")
    assert ours.name == theirs.name
    for name in ("edit.mp4", "beside.mp4", "sheet.png"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def assert_one_machine(page: Page, *urls: str) -> None:
    inside = (*urls, "data:", "blob:")
    assert page.requests
    assert [each for each in page.requests if not each.startswith(inside)] == []


def assert_named(page: Page) -> None:
    """Every control has a name that a screen reader says."""
    for node in page.send("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if role in ("button", "slider", "combobox", "checkbox", "textbox", "spinbutton", "link"):
            assert node.get("name", {}).get("value"), node
