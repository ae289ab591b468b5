"""Find the tiles that are fastest on this machine's GPU: `python -m benchmarks.suite.tune`.

For every row of the tables it compiles the candidates, drops those that spill or ask for too much
shared memory, checks the others' results, times them, and writes stem_kernels/configs/smXY.json.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from stem_kernels.triton import device_capability
from stem_kernels.triton.program import forget_programs
from stem_kernels.triton.tuning import table

from ..cases.attention import attention_case, moments_case, partial_case
from ..cases.case import AnyCase, Trial
from ..cases.editing import blended_case, nearest_case
from ..cases.em import NUM_BASES, em_case
from ..cases.operators import TOKENS
from ..cases.timing import time_call
from ..counting.forms import AS_WIDE_AS_TILES, CALIBRATED, DTYPES, TOO_MANY_BASES, Form, forms
from ..counting.launches import launches
from ..counting.resources import measure

CONFIGS = Path(__file__).parents[2] / "stem_kernels" / "configs"
HEADS = 8
WARPS, STAGES = (4, 8), (1, 2, 3)
TILES: dict[str, dict[str, tuple[int, ...]]] = {
    "em_fused": {"block_n": (16, 32, 64, 128)},
    "em_wide logits": {"block_n": (64, 128), "block_d": (32, 64)},
    "em_wide products": {"block_n": (32, 64, 128), "block_e": (64, 128)},
    "em_general": {"block_n": (32, 64, 128), "block_k": (64, 128), "block_d": (32, 64)},
    "resident_attention": {"block_n": (32, 64, 128), "parts": (1, 2), "ahead": (0, 1)},
    "basis_attention": {"query_bytes": (16384, 32768), "basis_bytes": (8192, 16384, 32768)},
    "blended_attention": {"query_bytes": (16384, 32768), "basis_bytes": (8192, 16384)},
    "nearest_token": {"block_n": (64, 128), "block_m": (64, 128), "block_d": (32, 64)},
    "partial_attention": {"query_bytes": (16384, 32768), "key_bytes": (4096, 8192, 16384)},
    "moments": {"block_n": (64,), "block_r": (64, 128), "block_c": (32, 64), "block_d": (32, 64)},
}
WITHOUT_PROGRAMS = ("em_wide logits", "basis_attention", "blended_attention", "moments")
WITHOUT_FORMS = ("video_attention", "em_many", "nearest_narrow", "token_")
"""Of video transformers, whose kernels the suite does not call yet."""
MARK = 77  # a number of stages that no row has
PROGRAMS = (1, 2, 3, 4)  # for each multiprocessor, of the ops whose rows have "programs"


def candidates(op: str, arch: int) -> Iterator[dict[str, int]]:
    """Rows for `op` that compile for sm_`arch` without a fault in any form that takes them."""
    (tiles,) = (found for prefix, found in TILES.items() if op.startswith(prefix))
    choices = {**tiles, "num_warps": WARPS, "num_stages": STAGES}
    programs = {} if op.startswith(WITHOUT_PROGRAMS) else {"programs": 1}
    calls: list[Form] = []
    for values in itertools.product(*choices.values()):
        row = dict(zip(choices, values, strict=True)) | programs
        if not calls:
            calls, kernels = forms_of(op, row, arch)
        if not _faulty(op, row, arch, calls, kernels):
            for each in PROGRAMS if programs else (0,):
                yield row | dict.fromkeys(programs, each)


def forms_of(op: str, row: dict[str, int], arch: int) -> tuple[list[Form], set[str]]:
    """The forms, of one dtype, that launch kernels with the tiles of the row `op`, and those."""
    for dtype in DTYPES:
        found: list[Form] = []
        kernels: set[str] = set()
        with mock.patch.dict(table(f"sm{arch}"), {op: {**row, "num_stages": MARK}}):
            for form in forms(dtype):
                taken = launches(arch, form.call)
                names = {each.name for each in taken if each.options.get("num_stages") == MARK}
                kernels |= names
                found += [form] if names else []
        if found:
            return found, kernels
    raise ValueError(f"no form of the suite takes the row {op!r} on sm_{arch}")


def _faulty(op: str, row: dict[str, int], arch: int, calls: list[Form], kernels: set[str]) -> bool:
    with mock.patch.dict(table(f"sm{arch}"), {op: row}):
        found = {
            each.digest(): each
            for form in calls
            for each in launches(arch, form.call)
            if each.name in kernels
        }
    dtype = calls[0].dtype_name
    return any(measure(each, op, dtype).faults() for each in found.values())


def known() -> list[str]:
    """Every row of the tables for GPUs that the suite has forms of."""
    names = sorted(file.stem for file in CONFIGS.glob("*.json"))
    rows = dict.fromkeys(op for name in names if name != "interpreter" for op in table(name))
    return [op for op in rows if not op.startswith(WITHOUT_FORMS)]


def case_for(op: str, device: torch.device) -> AnyCase:
    """The shape that a row is tuned at: SD 1.5's largest layer, N = 32 frames; or the nearest that
    takes the row wherever other rows are there, too."""
    half = torch.float16
    dtype = torch.float32 if op.endswith("float32") else half
    extra = next((word for word in ("bias", "correction") if word in op), "")
    if op == "em_general":
        return em_case((1, TOKENS, 320), device, torch.float32)
    if op.startswith("em_wide"):
        return em_case((1, TOKENS, 320), device, half)
    if op.startswith("basis_attention"):
        bases = TOO_MANY_BASES if dtype == half else NUM_BASES
        return attention_case(HEADS, TOKENS, 160, device, dtype, num_bases=bases, extra=extra)
    if op.startswith("partial_attention"):
        return partial_case(HEADS, CALIBRATED, TOKENS, 160, device, dtype)
    if op == "moments":
        return moments_case(HEADS, 40, device, dtype)
    if op.startswith("blended_attention"):
        return blended_case(HEADS, TOKENS, 160, device, dtype)
    if op.startswith("nearest_token"):
        return nearest_case(TOKENS // 4, 8192, 320, device, dtype)
    width = int(op.split()[1])
    width = 40 if width == AS_WIDE_AS_TILES and op != "em_fused 48" else width
    if op.startswith("resident_attention"):
        return attention_case(HEADS, TOKENS, width, device, half, extra=extra)
    return em_case((HEADS, TOKENS, width), device, half, payload=op.endswith("payload"))


def tune(op: str, device: torch.device) -> dict[str, int]:
    """The fastest row for `op`; the one in use stays where nothing is faster by a hundredth."""
    major, minor = device_capability(device)
    arch = 10 * major + minor
    trial = Trial(case_for(op, device))
    rows = table(f"sm{arch}")
    used = rows.get(op)
    best, least = used, float("inf") if used is None else 0.99 * _seconds(trial, device)
    try:
        for row in candidates(op, arch):
            rows[op] = row
            forget_programs()
            seconds = _seconds(trial, device)
            if seconds < least:
                best, least = row, seconds
                print(f"{op}: {1e6 * seconds:.1f} us with {row}", flush=True)
    finally:
        if used is None:
            rows.pop(op, None)
        else:
            rows[op] = used
        forget_programs()
    if best is None:
        raise SystemExit(f"no tiles of {op} serve {torch.cuda.get_device_name(device)}")
    return best


def _seconds(trial: Trial[Any], device: torch.device) -> float:
    """Time of one call; infinite where its result is wrong."""
    call = trial.start("triton")
    if not trial.error("triton", call()) <= 1:
        return float("inf")
    return time_call(call, device=device, budget=0.1).median


def text(rows: dict[str, dict[str, int]]) -> str:
    """A table as the files in configs/ are written, a row a line."""
    lines = (f"  {json.dumps(op)}: {json.dumps(row)}" for op, row in rows.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(
    only: Annotated[str, typer.Option(help="Comma-separated rows. Default: all.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the table.")] = CONFIGS,
) -> None:
    """Tune for this machine's GPU."""
    every = known()
    wanted = [op.strip() for op in only.split(",")] if only else every
    for op in wanted:
        if op not in every:
            raise typer.BadParameter(f"{op!r} is none of {', '.join(every)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA GPU, and tiles are timed on one")
    if torch.version.hip is not None:
        raise typer.BadParameter("tiles of AMD's GPUs cannot be tuned yet")
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = device_capability(device)
    rows = dict(table(f"sm{major}{minor}"))
    for op in wanted:
        rows[op] = tune(op, device)
        (out / f"sm{major}{minor}.json").write_text(text(rows))


if __name__ == "__main__":
    typer.run(main)
