"""What works with what: a pipeline offloaded, stopped and gone on with gives the same bits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import write_lora
from controls import make_adapter, make_controlnet, pictures
from diffusers import AutoencoderKL
from interruptions import stop_after
from inversions import STEM, all_latents
from offloading import WAYS, offloaded
from pipelines import ONE_LEVEL, make_pipeline, make_unet

from stem import Control, InversionFolder, Video, invert, load_pipeline
from stem.editing import run_edit
from stem.inversion import reconstruct_latents
from stem.names import EDIT_METHODS, INVERSION_METHODS

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
FRAMES, PIXELS, FACTOR, STEPS, CHUNK = 4, 64, 8, 4, 2
PROMPTS = "a red ball", "a blue ball"
SMALL_UNET = {**ONE_LEVEL, "attention_head_dim": 2, "transformer_layers_per_block": 1}
FAMILIES = {
    "Stable Diffusion 1.x": "sd1",
    "Stable Diffusion 2.x": "sd2",
    "Stable Diffusion XL": "sdxl",
}
CONTROLS: dict[str, tuple[str, ...]] = {
    "no control": (),
    "a ControlNet": ("net-0",),
    "two ControlNets": ("net-0", "net-1"),
    "a T2I-Adapter": ("adapter",),
}
LORAS: dict[str, tuple[str, ...]] = {"no LoRA": (), "a LoRA": ("lora.safetensors:0.7",)}
ALL_HERE = "nothing offloaded"
OFFLOADS = (ALL_HERE, *WAYS)
RECONSTRUCT = "reconstruct"
RUNS = (RECONSTRUCT, *EDIT_METHODS)
SAME, LAST = "same bits", "same but for last bits"
BOUNDS = {SAME: 0.0, LAST: 1e-4}
"""By outcome: what latents may differ by, relatively."""


class Case(NamedTuple):
    """One combination; each field is an entry of the table in its place of TABLES."""

    family: str
    control: str
    lora: str
    inversion: str
    offload: str
    run: str

    @property
    def outcome(self) -> str:
        """What comes of it, against the same run neither offloaded nor stopped."""
        return LAST if "disk" in self.offload else SAME


TABLES = (FAMILIES, CONTROLS, LORAS, INVERSION_METHODS, OFFLOADS, RUNS)


def covering(together: int) -> Iterator[Case]:
    """Cases in which any so many entries, each of another table, are together at least once."""
    places = itertools.combinations(range(len(TABLES)), together)
    wanted = {
        tuple(zip(chosen, entries, strict=True)): None
        for chosen in places
        for entries in itertools.product(*(TABLES[place] for place in chosen))
    }
    while wanted:
        fixed = dict(next(iter(wanted)))
        free = [[fixed[n]] if n in fixed else table for n, table in enumerate(TABLES)]
        found = [
            (case, [part for part in itertools.combinations(enumerate(case), together)])
            for case in itertools.product(*free)
        ]
        case, parts = max(found, key=lambda pair: sum(part in wanted for part in pair[1]))
        for part in parts:
            wanted.pop(part, None)
        yield Case(*case)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def written(root: Path, family: str) -> Path:
    """The folder of a family's files: a model, ControlNets, a T2I-Adapter, a LoRA."""
    shape = FAMILIES[family]
    folder = root / shape
    if not folder.is_dir():
        plain = make_pipeline.__wrapped__(shape)
        plain.unet = make_unet(shape, **SMALL_UNET)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            plain.vae = AutoencoderKL(
                block_out_channels=(8,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=4,
                scaling_factor=5.0,
            )
        plain.save_pretrained(folder / "base")
        for seed in (0, 1):
            net = make_controlnet(plain.unet, seed, factor=FACTOR)
            net.save_pretrained(folder / f"net-{seed}")
        make_adapter(plain.unet, factor=FACTOR).save_pretrained(folder / "adapter")
        write_lora(folder / "lora.safetensors", shape, encoder=True, pipeline=plain)
    return folder


def loaded(root: Path, case: Case, weights: Path | None = None) -> Any:
    """The pipeline of a case, loaded anew, and offloaded where files for that are given."""
    folder = written(root, case.family)
    pipeline = load_pipeline(
        str(folder / "base"),
        device="cpu",
        controlnets=[str(folder / name) for name in CONTROLS[case.control]],
        loras=[str(folder / name) for name in LORAS[case.lora]],
    )
    if weights is not None and case.offload != ALL_HERE:
        offloaded(pipeline, case.offload, weights)
    return pipeline


def inverted(pipeline: Any, case: Case, folder: Path, **settings: Any) -> InversionFolder:
    shown = [
        Control(pictures(FRAMES, PIXELS, PIXELS, seed=number))
        for number, _ in enumerate(CONTROLS[case.control])
    ]
    return invert(
        pipeline,
        Video(pictures(FRAMES, PIXELS, PIXELS, seed=9), Fraction(8)),
        PROMPTS[0],
        folder,
        method=case.inversion,
        options=STEM if case.inversion == "stem" else None,
        num_steps=STEPS,
        chunk=CHUNK,
        control=shown or None,
        progress=False,
        **settings,
    )


def ran(pipeline: Any, inversion: InversionFolder, run: str, **settings: Any) -> torch.Tensor:
    if run == RECONSTRUCT:
        return reconstruct_latents(pipeline, inversion, progress=False, **settings)
    edit = run_edit(pipeline, inversion, PROMPTS[1], method=run, progress=False, **settings)
    return edit.latents


def check(case: Case, root: Path, tmp_path: Path) -> None:
    plain = loaded(root, case)
    whole = inverted(plain, case, tmp_path / "whole")
    expected = ran(plain, whole, case.run, resume=False)
    # The second goes on with what the first was stopped in, as another process would.
    first, second = (loaded(root, case, tmp_path / "weights") for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        inverted(first, case, tmp_path, on_step=stop_after(2))
    inversion = inverted(second, case, tmp_path)
    assert inversion.path.name == whole.path.name
    assert inversion.settings == whole.settings
    with pytest.raises(KeyboardInterrupt):
        ran(first, inversion, case.run, on_step=stop_after(1))
    done: list[int] = []
    found = ran(second, inversion, case.run, on_step=lambda: done.append(1))
    assert 0 < len(done) < STEPS
    for now, before in ((all_latents(inversion), all_latents(whole)), (found, expected)):
        assert (now - before).norm() <= BOUNDS[case.outcome] * before.norm()


@pytest.mark.parametrize("case", [*covering(1)], ids=", ".join)
def test_each_entry_works(case: Case, root: Path, tmp_path: Path) -> None:
    check(case, root, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("case", [*covering(3)], ids=", ".join)
def test_any_three_entries_work_together(case: Case, root: Path, tmp_path: Path) -> None:
    check(case, root, tmp_path)


def table() -> str:
    """The table of docs/pipelines.md: outcomes by family and control, and by what is offloaded."""
    rows = [f"| | {' | '.join(OFFLOADS)} |", "|---" * (1 + len(OFFLOADS)) + "|"]
    for family, control in itertools.product(FAMILIES, CONTROLS):
        cells = []
        for offload in OFFLOADS:
            rest = itertools.product(LORAS, INVERSION_METHODS, RUNS)
            outcomes = [
                Case(family, control, lora, inversion, offload, run).outcome
                for lora, inversion, run in rest
            ]
            cells.append("; ".join(dict.fromkeys(outcomes)))
        rows.append(f"| {family}, {control} | {' | '.join(cells)} |")
    inversions, edits = (", ".join(f"`{n}`" for n in each) for each in (INVERSION_METHODS, RUNS))
    rows += ["", f"With {' and with '.join(LORAS)}; inverted by {inversions}; then {edits}."]
    return "\n".join(rows)


def test_the_page_has_this_table() -> None:
    found = re.search(r"<!-- table -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].strip() == table(), f"write it anew:\n{table()}"
