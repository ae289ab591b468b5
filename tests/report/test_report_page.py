"""A report's page in a browser: videos in step, no requests, no errors, any width, both schemes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Page, open_page
from PIL import Image
from test_report import FRAMES, HEIGHT, WIDTH, grays, write_compared, write_edit

from stem.report.pages.contents import read_report
from stem.report.pages.page import Picture, Report, Section, write_report
from stem.video import read_video

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

READY = "![...document.querySelectorAll('.controls *')].some(control => control.disabled)"
# The frame that each pane says it shows, and the level of gray that it does show.
SHOWN = """[...document.querySelectorAll('canvas')].map(canvas => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  context.drawImage(canvas, -8, -8);
  return [Number(canvas.dataset.frame), context.getImageData(0, 0, 1, 1).data[1]];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_page() as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compared(tmp_path_factory.mktemp("results") / "ducks-0")


@pytest.fixture
def page(browser: Page, folder: Path) -> Iterator[Page]:
    """The page of a comparison, in a window of 1280 pixels; at the end it has done no wrong."""
    path = folder / "report.html"
    write_report(read_report(folder), path)
    browser.requests.clear()
    browser.problems.clear()
    browser.open(path, 1280)
    browser.wait_for(READY)
    yield browser
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
    assert browser.problems == []


def levels(offset: int, frame: int) -> int:
    return int(grays(offset)[frame, 0, 0, 0])


def assert_in_step(page: Page, frame: int) -> None:
    for (said, level), offset in zip(page.value(SHOWN), (0, 0, 10), strict=True):
        assert said == frame
        assert abs(level - levels(offset, frame)) <= 3  # H.264
    assert page.value("document.querySelector('output').value") == f"frame {frame + 1} of {FRAMES}"


def test_all_panes_show_the_frame_that_the_keys_ask_for(page: Page) -> None:
    assert_in_step(page, 0)
    page.value("document.querySelector('input[type=range]').focus()")
    for key, frame in (("ArrowRight", 1), ("End", 5), ("ArrowRight", 0), ("ArrowLeft", 5)):
        page.press(key)
        assert_in_step(page, frame)
    page.press("Home")
    assert_in_step(page, 0)
    page.value("document.querySelector('[data-action=on]').click()")
    assert_in_step(page, 1)
    figures = page.value("[...document.querySelectorAll('.figure')].map(it => it.textContent)")
    assert figures[1].endswith(" dB")
    assert page.value("document.querySelector('.now').getAttribute('x1')") == "200"


def test_playing_all_panes_change_at_once_and_keep_to_the_clock(page: Page) -> None:
    """Sampled at every refresh of the display, for the time of nine frames."""
    page.value("document.querySelector('.panes').click()")
    assert page.value("document.querySelector('[data-action=play]').title") == "Pause"
    samples = page.value(f"""new Promise(resolve => {{
      const found = [], start = performance.now();
      const look = now => {{
        found.push([now, {SHOWN}]);
        if (now - start < 1500) requestAnimationFrame(look); else resolve(found);
      }};
      requestAnimationFrame(look);
    }})""")
    times, frames, passed = [], [], 0
    for time, shown in samples:
        frame = shown[0][0]
        for (said, level), offset in zip(shown, (0, 0, 10), strict=True):
            assert said == frame
            assert abs(level - levels(offset, frame)) <= 3
        passed += (frame - frames[-1]) % FRAMES if frames else 0
        frames.append(frame)
        times.append(time)
    assert set(frames) == set(range(FRAMES))
    assert abs(passed - 6 * (times[-1] - times[0]) / 1000) <= 1.5  # frames at 6 a second
    page.value("document.querySelector('input[type=range]').focus()")
    page.press(" ")
    assert page.value("document.querySelector('[data-action=play]').title") == "Play"
    stopped = page.value(SHOWN)
    page.value("new Promise(resolve => setTimeout(resolve, 300))")
    assert page.value(SHOWN) == stopped


def test_every_pixel_is_one_of_the_file(page: Page, folder: Path) -> None:
    whole = read_video(folder / "compare.mp4", multiple_of=1).frames
    page.value("document.querySelector('[data-action=on]').click()")
    data = page.value("""(() => {
      const canvas = document.querySelectorAll('canvas')[2];
      const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return btoa(String.fromCharCode(...pixels));
    })()""")
    pixels = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
    scale = 8  # 24x16 magnified to 192x128; the third video lies below the first, and its label
    tile = whole[1, 152 + 24 :, : WIDTH * scale].float()
    means = tile.view(HEIGHT, scale, WIDTH, scale, 3).mean((1, 3))
    assert (pixels.view(HEIGHT, WIDTH, 4)[..., :3] - means).abs().max() <= 0.5


def test_a_difference_is_eight_times_what_it_is(page: Page) -> None:
    before = [level for _, level in page.value(SHOWN)]
    page.value("document.querySelector('input[type=checkbox]').click()")
    source, vae, stem = (level for _, level in page.value(SHOWN))
    assert source == before[0]
    assert vae == 8 * abs(before[1] - before[0])
    assert stem == 8 * abs(before[2] - before[0]) > 40
    labels = page.value("[...document.querySelectorAll('.name')].map(it => it.textContent)")
    assert labels == ["source", "Δ vae alone", "Δ stem"]
    page.value("document.querySelector('input[type=checkbox]').click()")
    assert [level for _, level in page.value(SHOWN)] == before


CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = text => rgb(text).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('h1, .facts, .hint, .figure, figcaption, .label i, dt, th')]
    .map(it => light(getComputedStyle(it).color))
    .map(ink => (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05));
})()"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_at_any_width_in_both_schemes(
    browser: Page, tmp_path: Path, width: int, dark: bool
) -> None:
    path = tmp_path / "report.html"
    write_report(read_report(write_edit(tmp_path / "edit-0", "goose" * 30)), path)
    browser.open(path, width, dark=dark)
    browser.wait_for(READY)
    browser.value("document.querySelectorAll('details').forEach(it => { it.open = true })")
    root = "document.documentElement"
    assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")
    assert min(browser.value(CONTRAST)) >= 4.5
    luminance = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, luminance[4:-1].split(","))) < 60) == dark


def test_the_source_is_wiped_over_an_edit_and_what_may_not_change_is_dim(
    browser: Page, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(read_report(write_edit(tmp_path / "edit-0", "a", exact=False)), path)
    browser.open(path, 1280)
    browser.wait_for(READY)
    source, _, edit, mask = (level for _, level in browser.value(SHOWN))
    move = """(() => {{
      const slider = document.querySelector('.wiped');
      slider.value = {share};
      slider.dispatchEvent(new Event('input'));
    }})()"""
    browser.value(move.format(share=80))
    levels = [level for _, level in browser.value(SHOWN)]  # at a third of the width
    assert levels == [source, source, source, mask]
    assert source != edit
    browser.value(move.format(share=10))
    assert [level for _, level in browser.value(SHOWN)][2] == edit
    browser.value("document.querySelector('.masked').click()")  # all of the mask is black
    dimmed = [level for _, level in browser.value(SHOWN)]
    assert dimmed[0] == source
    assert abs(dimmed[2] - 0.3 * edit) <= 2


def test_a_wide_picture_is_scrolled_by_itself(browser: Page, tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (2000, 100)).save(data, "png")
    section = Section("a part", pictures=[Picture("a plot", data.getvalue())])
    path = tmp_path / "report.html"
    write_report(Report("Analysis", "a video", [], "", [section]), path)
    browser.requests.clear()
    browser.problems.clear()
    browser.open(path, 390)
    root = "document.documentElement"
    assert browser.value(f"{root}.scrollWidth <= {root}.clientWidth")
    assert (
        browser.value("document.querySelector('img').clientWidth") == 720
    )  # not too small to read
    assert browser.value("document.querySelector('.scroll').scrollWidth") == 720
    browser.resize(1280)
    assert browser.value("document.querySelector('img').clientWidth") > 1000
    assert [url for url in browser.requests if not url.startswith("data:")] == [path.as_uri()]
    assert browser.problems == []


def test_every_control_has_a_name(page: Page) -> None:
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if role in ("button", "slider", "combobox", "checkbox", "image", "region"):
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert sorted(named["button"]) == ["One frame back", "One frame on", "Play"]
    assert named["slider"] == ["Frame"]
    assert named["combobox"] == ["Speed"]
    assert named["checkbox"] == ["Difference from source, eight times as large"]
    assert all(name for names in named.values() for name in names), named
