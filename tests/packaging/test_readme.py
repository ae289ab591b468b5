"""README and docs: what they say was measured was, their code and commands run, no link is dead."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
import yaml
from controls import make_control_pipeline
from motion import make_motion_pipeline
from pipelines import make_pipeline
from torch.distributed.run import get_args_parser

import stem
from benchmarks.readme import PAGES, README, ROOT, updated
from stem.cli import app

DOCS = sorted((ROOT / "docs").glob("*.md"))
NODES = ROOT / "integrations" / "comfyui" / "README.md"
MARKDOWN = [README, *DOCS, NODES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Sizes at which the pages' code is quick.
SMALLER = {
    "size=512": "size=16",
    '"0:16"': '"0:2"',
    "num_frames=16": "num_frames=2",
    "num_steps=20": "num_steps=2",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def name_of(page: Path) -> str:
    return page.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/edit/inversions/stem-0123456789ab").mkdir(parents=True)
    for name in ("video.mp4", "long.mp4", "edit.mp4", "truck-edges.mp4"):
        stem.write_video(tmp_path / name, torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 8)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_measurements_are_those_of_the_results_files(page: Path) -> None:
    assert updated(page) == page.read_text()


def test_the_front_page_is_short() -> None:
    assert len(README.read_text().split()) <= 1100


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_the_code_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str, controlnets: Sequence[str] = (), motion_adapter: str = "") -> object:
        if motion_adapter:
            return make_motion_pipeline()
        return make_control_pipeline(nets=len(controlnets)) if controlnets else make_pipeline()

    monkeypatch.setattr(stem, "load_pipeline", load)
    monkeypatch.setattr(stem, "invert", functools.partial(stem.invert, num_steps=2))
    names: dict[str, object] = {}
    for code in blocks(page, "python"):
        for large, small in SMALLER.items():
            code = code.replace(large, small)
        exec(code, names)


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page's shell blocks, without variables set before it."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    bare = [re.sub(r"^([A-Z_]+=\S+ +)+", "", line) for line in lines]
    return [words for line in bare if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_the_commands_are_ones_that_there_are(page: Path, folder: Path) -> None:
    group = typer.main.get_command(app)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for program, *words in commands(page):
        if program == "torchrun":
            found = get_args_parser().parse_args(words)
            words = [found.training_script, *found.training_script_args]
            words = ["-m", *words] if found.module else words
        if words[:2] == ["-m", "stem"]:
            program, words = "stem", words[2:]
        if Path(program).name == "stem":
            command = group.commands[words[0]]
            command.make_context(words[0], words[1:])  # raises where an option is none
        elif program == "torchrun":
            assert (ROOT / words[0]).is_file()
        elif words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words
        elif program == "make":
            assert words[0] in targets
        else:
            assert [program, words[0]] == ["pip", "install"]


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_the_configuration_files_are_taken(page: Path, folder: Path) -> None:
    compare = typer.main.get_command(app).commands["compare"]
    for text in blocks(page, "yaml"):
        (folder / "run.yaml").write_text(text)
        context = compare.make_context("compare", ["video.mp4", "--config", "run.yaml"])
        assert context.params["model"] == yaml.safe_load(text)["model"]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_no_link_is_dead(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_citation_names_the_paper() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"].startswith("A Video is Worth 256 Bases")
    assert f"arXiv {paper['identifiers'][0]['value'].removeprefix('arXiv:')}" in README.read_text()
