"""The house's floors: which room may import which, held against the code's own imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = "stem_kernels"
# From top to bottom; a room may import the rooms named beside it, and all of these stand below it.
# A room is a package or a module, with all in it that has no row of its own.
FLOORS: dict[str, dict[str, str]] = {
    "stem": {
        "stem.__main__": "cli",
        "stem.cli": "app workflows report.pages report metrics inversion flow models diffusion "
        "control attention.waiting world video distributed sources storage names",
        "stem.app": "inversion world video storage progress names",
        "stem.workflows": "report metrics editing inversion flow models diffusion control "
        "attention attention.families world video config distributed storage progress names",
        "stem.world.training": "report metrics inversion flow models diffusion control world video",
        "stem.report.pages": "report metrics video storage",
        "stem.report": "metrics video storage names",
        "stem.metrics": "world names",
        "stem.editing": "editing.methods editing.job editing.regions inversion flow "
        "diffusion control attention attention.waiting distributed progress names",
        "stem.editing.methods": "editing.job editing.maps editing.regions inversion diffusion "
        "attention attention.layers attention.waiting attention.families config distributed names",
        "stem.editing.job": "editing.regions inversion diffusion attention attention.waiting "
        "attention.families config distributed",
        "stem.editing.maps": "editing.regions diffusion attention attention.layers "
        "attention.families distributed storage",
        "stem.editing.regions": "attention.waiting",
        "stem.inversion": "flow diffusion control attention attention.layers attention.families "
        "attention.video video config distributed sources storage progress names exports",
        "stem.flow": "models diffusion attention.video sources names exports",
        "stem.models": "loading diffusion sources names",
        "stem.loading": "sources storage names",
        "stem.diffusion": "control attention attention.waiting attention.families storage "
        "profiling progress",
        "stem.control": "storage",
        "stem.attention": "attention.layers attention.waiting attention.families attention.video "
        "config distributed",
        "stem.attention.layers": "attention.waiting attention.families config distributed "
        "profiling",
        "stem.attention.waiting": "names",
        "stem.attention.families": "",
        "stem.attention.video": "config",
        "stem.world": "",
        "stem.video": "storage exports",
        "stem.config": "",
        "stem.distributed": "",
        "stem.sources": "storage names",
        "stem.storage": "",
        "stem.profiling": "",
        "stem.progress": "",
        "stem.names": "",
        "stem.exports": "",
    },
    "stem_kernels": {
        "stem_kernels.video": "ops",
        "stem_kernels.info": "selfcheck verification backends triton cuda",
        "stem_kernels.selfcheck": "testing ops backends shared",
        "stem_kernels.testing": "ops shared",
        "stem_kernels.ops": "verification backends reference triton cuda shared",
        "stem_kernels.verification": "backends reference triton cuda shared",
        "stem_kernels.backends": "triton cuda shared",
        "stem_kernels.triton": "reference shared",
        "stem_kernels.cuda": "shared",
        "stem_kernels.reference": "shared",
        "stem_kernels.shared": "",
        "stem_kernels.measure": "",
    },
    "benchmarks": {
        "benchmarks.readme": "studies.quality studies.editing studies.features studies.drop_in "
        "studies.small_cards studies.video_transformers studies.frames_and_sizes suite counting "
        "cases records",
        "benchmarks.conftest": "cases records",
        "benchmarks.test_cpu": "suite cases",
        "benchmarks.studies.calibration": "studies.editing studies.quality cases records",
        "benchmarks.studies.video_transformers": "studies.editing records",
        "benchmarks.studies.any_length": "studies.editing cases records",
        "benchmarks.studies.editing": "studies.quality cases records",
        "benchmarks.studies.features": "studies.quality records",
        "benchmarks.studies.quality": "cases records",
        "benchmarks.studies.drop_in": "records",
        "benchmarks.studies.frames_and_sizes": "counting cases records",
        "benchmarks.studies.small_cards": "cases records",
        "benchmarks.suite": "counting cases records",
        "benchmarks.counting": "cases records",
        "benchmarks.records": "cases",
        "benchmarks.cases": "",
    },
    "integrations": {"integrations.comfyui": ""},
}
"""By package: rooms, and the rooms of the same package that each may import."""
FACES = {"stem", "stem_kernels", "benchmarks"}
"""Packages whose own __init__ hands on public names, and so knows every room."""
PACKAGES = {
    "stem": {KERNELS},
    KERNELS: set(),
    "benchmarks": {"stem", KERNELS},
    "integrations": {KERNELS},
}
"""What each may import of the other packages."""


def modules(package: str) -> dict[str, Path]:
    """Files of a package by module name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in FLOORS for name, path in modules(package).items()}


def imported(module: str, path: Path) -> Iterator[str]:
    """The modules of this repository that a file imports anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(above if node.level else []), *([node.module] if node.module else [])]
            base = ".".join(parts)
            if base in MODULES:
                inner = [f"{base}.{alias.name}" for alias in node.names]
                yield from (name if name in MODULES else base for name in inner)


def room_of(module: str) -> str | None:
    """The row of the table that a module belongs to: the longest that it stands in."""
    rooms = FLOORS[module.partition(".")[0]]
    held = [room for room in rooms if f"{module}.".startswith(f"{room}.")]
    return max(held, key=len, default=None)


@pytest.mark.parametrize("package", FLOORS)
def test_every_file_has_a_room(package: str) -> None:
    beyond = [name for name in modules(package) if name not in FACES and room_of(name) is None]
    # a package that only holds rooms has no row of its own
    beyond = [name for name in beyond if MODULES[name].name != "__init__.py"]
    assert not beyond, f"name {beyond} in FLOORS, with what they may import"


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_downwards_only(package: str) -> None:
    rooms = list(FLOORS[package])
    for above, allowed in FLOORS[package].items():
        for below in allowed.split():
            assert rooms.index(f"{package}.{below}") > rooms.index(above), (above, below)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_are_those_of_the_table(package: str) -> None:
    wrong, used = [], set()
    for module, path in modules(package).items():
        room = room_of(module)
        for target in imported(module, path):
            other = target.partition(".")[0]
            if other != package:
                if other not in PACKAGES[package]:
                    wrong.append(f"{module} -> {target}")
                continue
            below = room_of(target)
            if module in FACES or below is None or below == room:
                continue
            allowed = FLOORS[package][room].split() if room else []
            if below.removeprefix(f"{package}.") not in allowed:
                wrong.append(f"{module} -> {target}")
            used.add((room, below))
    assert not wrong
    table = {
        (room, f"{package}.{below}")
        for room, allowed in FLOORS[package].items()
        for below in allowed.split()
    }
    assert sorted(table - used) == []  # what the table allows and no file does


def test_the_house_is_drawn_with_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = set(re.findall(r"[\w.]+", page.partition("```text\n")[2].partition("```")[0]))
    rooms = {*FLOORS["stem"], *FLOORS[KERNELS]} - {"stem.__main__"}
    assert sorted(room for room in rooms if not {room, room.rpartition(".")[2]} & drawn) == []
