"""Kernels made wrong on purpose: each is found at its first launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from verified import (
    Outputs,
    attend,
    attend_corrected,
    attend_in_tiles,
    attend_nearby,
    attend_partly,
    attend_projected,
    attend_video,
    attend_without_bias,
    blend,
    correct,
    find_nearest,
    found_wrong,
    in_extension,
    in_triton,
    iterated,
    kept_empty,
    summed,
    summed_wide,
    updated,
)

pytestmark = pytest.mark.usefixtures("nothing_known")


class Launch:
    """One launch that a mutant may change."""

    def __init__(
        self, program: Any, kernel: Any, grid: Any, buffers: Any, numbers: Any, constants: Any
    ) -> None:
        names = kernel.arg_names
        self.program, self.kernel, self.grid, self.constants = program, kernel, grid, constants
        self.buffers = dict(zip(names, buffers, strict=False))
        self.numbers = dict(zip(names[len(buffers) :], numbers, strict=False))

    def spare(self, buffer: str) -> None:
        """Have the kernel write that elsewhere: what is there stays as it was."""
        layout = self.buffers[buffer].layout
        self.buffers[buffer] = self.program.memory("spare", layout.shape, layout.dtype)


def mutate(monkeypatch: pytest.MonkeyPatch, kernel: str, change: Callable[[Launch], None]) -> None:
    from stem_kernels.triton.program import Program

    launch = Program.launch

    def changed(
        self: Program, one: Any, grid: Any, buffers: Any, numbers: Any, **constants: Any
    ) -> None:
        found = Launch(self, one, grid, buffers, numbers, constants)
        if one.fn.__name__ == kernel:
            change(found)
        launch(
            self, one, found.grid, tuple(found.buffers.values()), tuple(found.numbers.values()),
            **found.constants,
        )  # fmt: skip

    monkeypatch.setattr(Program, "launch", changed)


def of(**changes: Any) -> Callable[[Launch], None]:
    """A mutant that sets constants, and numbers to a function of what they were."""

    def change(launch: Launch) -> None:
        for name, value in changes.items():
            if name in launch.constants:
                launch.constants[name] = value
            else:
                launch.numbers[name] = value(launch.numbers[name])

    return change


def fewer_programs(axis: int) -> Callable[[Launch], None]:
    def change(launch: Launch) -> None:
        grid = list(launch.grid)
        assert grid[axis] > 1
        grid[axis] -= 1
        launch.grid = tuple(grid)

    return change


def stale_directions(launch: Launch) -> None:
    if launch.constants["NORMALIZE"]:
        launch.spare("p_directions")


def other_map(launch: Launch) -> None:
    launch.buffers["p_query_source"] = launch.buffers["p_query"]


def without_values(launch: Launch) -> None:
    launch.buffers["p_payload_sums"] = launch.buffers["p_sums"]


WINDOW = "window_attention_kernel"
TRITON_MUTANTS: dict[str, tuple[Callable[[str], Outputs], str, Callable[[Launch], None]]] = {
    "a tile of bases is left out": (attend, "_resident_kernel", of(BLOCK_K=16, TWO_PARTS=False)),
    "a tile of queries is left out": (
        attend_in_tiles, "_basis_attention_kernel", fewer_programs(0)
    ),
    "a tile is cut short": (attend_in_tiles, "_basis_attention_kernel", of(BLOCK_D=32)),
    "half of a width": (attend, "_resident_kernel", of(D_REST=0)),
    # with a bias it changes nothing: that is -inf past the last base
    "the mask of bases is dropped": (attend_without_bias, "_resident_kernel", of(FULL_K=True)),
    "a wrong scale": (attend, "_resident_kernel", of(scale=lambda scale: scale / 1.4427)),
    "no bias": (attend, "_resident_kernel", of(WITH_BIAS=False)),
    "no correction": (attend_corrected, "_resident_kernel", of(CORRECTED=False)),
    "another head's keys": (attend, "_resident_kernel", of(stride_kh=lambda stride: 0)),
    "one map for two": (blend, "_blended_attention_kernel", other_map),
    "a range of keys is left out": (
        attend_partly, "_partial_attention_kernel", of(tokens_per_split=lambda tokens: tokens // 2)
    ),
    "ranges are merged but one": (
        attend_partly, "_merge_kernel", of(SPLITS=lambda count: count - 1)
    ),
    "a key is left out": (find_nearest, "_nearest_token_kernel", of(m=lambda count: count - 9)),
    "one token too few": (summed, "_fused_kernel", of(n=lambda count: count - 1)),
    "the mask of tokens is dropped": (summed, "_fused_kernel", of(n=lambda count: count + 6)),
    "a wrong temperature": (summed, "_fused_kernel", of(scale=lambda scale: scale * 1.1)),
    "a wrong unit of weights": (summed, "_update_kernel", of(unit=lambda unit: unit * 2)),
    "a wide tile is left out": (summed_wide, "_products_kernel", of(E_REST=0)),
    "stale directions": (iterated, "_update_kernel", stale_directions),
    "directions of any length": (iterated, "_update_kernel", of(NORMALIZE=False)),
    "sums of other tokens for the payload": (iterated, "_update_kernel", without_values),
    "the first tokens for spread ones": (iterated, "_directions_kernel", of(SPREAD=False)),
    "a wrong bias of the mass": (iterated, "_update_kernel", of(BIAS="mask")),
    "empty bases are not kept": (kept_empty, "_update_kernel", of(KEEP_EMPTY=False)),
    "half of the channels": (correct, "_moments_kernel", of(C=lambda count: count // 2)),
    "the last tokens are left out": (correct, "_moments_kernel", of(m=lambda count: count - 9)),
    "other heads' values": (correct, "_moments_kernel", of(stride_vh=lambda stride: 0)),
    "a wrong temperature of moments": (
        correct, "_moments_kernel", of(scale=lambda scale: 2 * scale)
    ),
    "half of the queries": (correct, "_moments_kernel", of(r=lambda count: count // 2)),
    "a part of the moments is left out": (
        correct, "_moments_sum_kernel", of(PARTS=lambda count: count - 1)
    ),
    "a narrower window": (attend_nearby, WINDOW, of(farthest=lambda square: square - 1)),
    "a frame left out": (attend_nearby, WINDOW, of(key_frames=lambda count: 3, TAIL=False)),
    "a patch left out": (attend_video, WINDOW, fewer_programs(0)),
    "no bases": (attend_video, WINDOW, of(WITH_BASES=False, CORRECTED=False)),
    "text that is masked": (attend_video, WINDOW, of(MASKED=False)),
    "no moments": (attend_video, WINDOW, of(CORRECTED=False)),
    "the means of other tokens": (attend_video, "_means_kernel", of(n=lambda count: count - 1)),
    "moments about nothing": (attend_video, "_products_of_tokens_kernel", of(CENTRED=False)),
    "no division": (updated, "_update_kernel", of(DIVIDE=False)),
}  # fmt: skip


def swapped(found: torch.Tensor) -> torch.Tensor:
    return found.flip(2)  # heads, of [B, n, h, e]


def rolled(found: torch.Tensor) -> torch.Tensor:
    return found.roll(1, dims=1)


def poisoned(found: torch.Tensor) -> torch.Tensor:
    return torch.full_like(found, float("nan"))


def first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda found: (change(found[0]), *found[1:])


EXTENSION_MUTANTS: dict[str, tuple[Callable[[str], Outputs], str, Callable[[Any], Any]]] = {
    "swapped heads": (attend, "basis_attention", swapped),
    "off by one token": (attend, "basis_attention", rolled),
    "NaN": (attend, "basis_attention", poisoned),
    "zeros": (attend, "basis_attention", torch.zeros_like),
    "heads of two maps swapped": (blend, "blended_attention", swapped),
    "projected tokens off by one": (attend_projected, "projected_attention", rolled),
    "half of the mass": (summed, "em_statistics", lambda found: (found[0], found[1] / 2, found[2])),
    "bases swapped": (summed, "em_statistics", first(lambda sums: sums.flip(-2))),
    "batch entries swapped": (summed, "em_statistics", first(lambda sums: sums.flip(1))),
    "payload by other weights": (
        summed, "em_statistics", lambda found: (found[0], found[1], found[2].roll(1, -2))
    ),
    "a token of a base lost": (
        summed_wide, "em_statistics", first(lambda sums: sums * (1 - 1e-2))
    ),
    "other bases": (iterated, "soft_em", first(lambda bases: bases.roll(1, -2))),
    "a wrong mass": (iterated, "soft_em", lambda found: (*found[:2], found[2] * 1.1)),
    "an empty base has a mass": (
        kept_empty, "soft_em", lambda found: (*found[:2], found[2].clamp(min=1.0))
    ),
    "half of the keys": (
        attend_partly, "partial_attention", lambda found: (found[0], found[1] - 0.69)
    ),
    "the next key": (find_nearest, "nearest_token", lambda found: (found + 1) % 50),
    "a key out of range": (find_nearest, "nearest_token", lambda found: found + 50),
    "a place of a video too far": (attend_video, "video_attention", rolled),
}  # fmt: skip


def with_arguments(*changed: tuple[int, object]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda given: tuple({**dict(enumerate(given)), **dict(changed)}.values())


ARGUMENT_MUTANTS = {
    "no bias": (attend, "basis_attention", with_arguments((3, None))),
    "no correction": (attend_corrected, "basis_attention", with_arguments((4, None), (5, None))),
    "a wrong scale": (attend, "basis_attention", with_arguments((6, 0.2))),
    "a wrong temperature": (summed, "em_statistics", with_arguments((3, 0.55))),
    "directions of any length": (summed, "em_statistics", with_arguments((4, False))),
    "one token too few": (
        summed,
        "em_statistics",
        lambda given: (given[0][..., 1:, :], given[1], given[2][..., 1:, :], *given[3:]),
    ),
    "an iteration too few": (iterated, "soft_em", with_arguments((3, 1))),
    "empty bases are not kept": (kept_empty, "soft_em", with_arguments((6, False))),
    "a window too narrow": (attend_nearby, "window_attention", with_arguments((6, 0))),
    "no moments": (attend_video, "video_attention", with_arguments((9, None))),
    "the window's tokens in the bases, too": (
        attend_video, "video_attention", lambda given: (*given[:5], given[5] * 1.3, *given[6:])
    ),
    "no bias of the outputs": (attend_projected, "projected_attention", with_arguments((6, None))),
    "no bias of the queries": (attend_projected, "projected_attention", with_arguments((2, None))),
    "no correction of projected tokens": (
        attend_projected, "projected_attention", with_arguments((8, None), (9, None))
    ),
    "another head's keys": (
        attend_projected, "projected_attention",
        lambda given: (*given[:3], given[3].flip(1), *given[4:]),
    ),
    "a mask of ones": (blend, "blended_attention", with_arguments((5, torch.ones(1, 70)))),
}  # fmt: skip


@pytest.mark.interpreter
@in_triton
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mutant", TRITON_MUTANTS)
def test_a_wrong_triton_kernel_is_found(
    mutant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, kernel, change = TRITON_MUTANTS[mutant]
    mutate(monkeypatch, kernel, change)
    warned = found_wrong(call, caplog)
    for part in ("gave wrong results: its", "is off by", "is allowed", "torch 2.", "Please report"):
        assert part in warned


def with_result(operator: Any, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *given: change(operator(*given))


def with_other_arguments(operator: Any, change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *given: operator(*change(given))


@in_extension
@pytest.mark.parametrize(
    ("mutant", "mutated"),
    [
        *((mutant, with_result) for mutant in EXTENSION_MUTANTS.values()),
        *((mutant, with_other_arguments) for mutant in ARGUMENT_MUTANTS.values()),
    ],
    ids=[*EXTENSION_MUTANTS, *ARGUMENT_MUTANTS],
)
def test_a_wrong_kernel_of_the_extension_is_found(
    mutant: Any, mutated: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, name, change = mutant
    operator = getattr(torch.ops.stem_kernels_ext, name)
    monkeypatch.setattr(torch.ops.stem_kernels_ext, name, mutated(operator, change))
    warned = found_wrong(call, caplog)
    assert "gave wrong results: its" in warned
    assert "avx2 kernels of the extension" in warned
