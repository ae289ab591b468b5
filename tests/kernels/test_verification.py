"""Kernels made wrong on purpose: each is found at its first launch, and what happens then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from stem_kernels import (
    BackendError,
    basis_attention,
    blended_attention,
    cuda,
    em_statistics,
    em_update,
    nearest_token,
    soft_em,
)
from stem_kernels.ops.calibration import moments
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.soft_em import attended_bases
from stem_kernels.shared import forms
from stem_kernels.testing import clustered_tokens, max_error
from stem_kernels.verification import VERIFY_VARIABLE

Outputs = tuple[torch.Tensor, ...]
BACKEND = "triton" if INTERPRETED else "cuda"
"""The backend whose kernels are made wrong."""
needs_kernels = pytest.mark.skipif(
    not INTERPRETED and cuda.load_error("cpu") is not None, reason="there is no extension"
)
in_triton = pytest.mark.skipif(not INTERPRETED, reason="its launches are Triton's")
in_extension = pytest.mark.skipif(
    INTERPRETED or cuda.load_error("cpu") is not None, reason="its results are the extension's"
)


def forget() -> None:
    forms.forget()
    if INTERPRETED:
        from stem_kernels.triton.program import forget_programs

        forget_programs()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VERIFY_VARIABLE, raising=False)
    if not INTERPRETED:
        monkeypatch.setattr(cuda, "instructions", lambda: "avx2")  # for "auto" to take it
    forget()
    yield
    forget()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(dtype)


def attend(backend: str, dtype: torch.dtype = torch.float16, num_bases: int = 48) -> Outputs:
    query = drawn(2, 3, 70, 40, dtype=dtype)
    key, value = (drawn(2, 3, num_bases, 40, seed=seed, dtype=dtype) for seed in (1, 2))
    return (basis_attention(query, key, value, bias=BIAS[:, :num_bases], backend=backend),)


BIAS = torch.linspace(-2, 2, 3 * 48).view(3, 48)


def attend_without_bias(backend: str) -> Outputs:
    query, key, value = (drawn(2, 3, n, 40, seed=n, dtype=torch.float16) for n in (70, 48, 49))
    return (basis_attention(query, key, value[:, :, :48], backend=backend),)


def attend_in_tiles(backend: str) -> Outputs:
    return attend(backend, torch.float32)


def attend_corrected(backend: str) -> Outputs:
    query = drawn(2, 3, 70, 40, dtype=torch.float16)
    key, value = (drawn(2, 3, 48, 40, seed=seed, dtype=torch.float16) for seed in (1, 2))
    more = {"correction": 0.05 * drawn(1, 3, 41, 40, seed=3), "query_mean": drawn(1, 3, 40, seed=4)}
    return (basis_attention(query, key, value, **more, backend=backend),)


def blend(backend: str) -> Outputs:
    queries = [drawn(1, 2, 70, 40, seed=seed) for seed in (0, 1)]
    keys = [drawn(1, 2, 20, 40, seed=seed) for seed in (2, 3)]
    mask = torch.linspace(-0.2, 1.2, 70).clamp(0, 1)[None]
    value = drawn(1, 2, 20, 40, seed=4)
    return (
        blended_attention(queries[0], keys[0], queries[1], keys[1], value, mask, backend=backend),
    )


def attend_partly(backend: str) -> Outputs:
    query, key, value = (drawn(1, 2, n, 40, seed=n) for n in (20, 600, 601))
    return tuple(partial_attention(query, key, value[:, :, :600], backend=backend))


def find_nearest(backend: str) -> Outputs:
    return (nearest_token(drawn(2, 70, 40), drawn(2, 50, 40, seed=1), backend=backend),)


def narrow_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Views, so that what lies behind the tokens is memory of ours."""
    return drawn(2, 300, 40, dtype=torch.float16)[:, :250], drawn(2, 300, 24, seed=1).half()[
        :, :250
    ]


def summed(backend: str) -> Outputs:
    features, payload = narrow_tokens()
    bases = features[:, ::20].float()
    found = em_statistics(features, bases, temperature=0.5, payload=payload, backend=backend)
    assert found.payload_sums is not None
    return found.sums, found.mass, found.payload_sums


def summed_wide(backend: str) -> Outputs:
    features = drawn(1, 300, 200, dtype=torch.float16)
    found = em_statistics(features, features[:, ::20].float(), temperature=0.5, backend=backend)
    return found.sums, found.mass


def iterated(backend: str) -> Outputs:
    features, payload = narrow_tokens()
    found = attended_bases(
        features, 12, num_iters=2, temperature=0.5, payload=payload, proportional=True,
        backend=backend,
    )  # fmt: skip
    assert found.found.payload is not None
    assert found.bias is not None
    return *found.found[:2], found.found.mass, found.bases, found.bias


def kept_empty(backend: str) -> Outputs:
    features, _ = narrow_tokens()
    bases = features[:, ::20].float()
    bases[:, :2] = -9.0
    found = soft_em(1 + features, bases, num_iters=1, temperature=0.1, backend=backend)
    return found.bases, found.mass


def updated(backend: str) -> Outputs:
    sums, bases = drawn(2, 30, 40), drawn(2, 30, 40, seed=1)
    found = em_update(sums, 1 + sums[..., 0].abs(), bases, num_tokens=70, backend=backend)
    return found.bases, found.mass


def correct(backend: str) -> Outputs:
    query, key, value, base_key, base_value = (
        drawn(1, 2, n, 40, seed=n, dtype=torch.float16) for n in (70, 130, 131, 19, 20)
    )
    features = drawn(1, 130, 48, dtype=torch.float16)
    bases = features[:, ::7].float()
    found = moments(
        2 * query, features, key, value[:, :, :130], bases, base_key, base_value[:, :, :19],
        temperature=0.5, backend=backend,
    )  # fmt: skip
    return found.correction, found.query_mean


CALLS: tuple[Callable[[str], Outputs], ...] = (
    attend, attend_without_bias, attend_in_tiles, attend_corrected, blend, attend_partly,
    find_nearest, summed, summed_wide, iterated, kept_empty, updated,
    correct,
)  # fmt: skip


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
    "a mask of ones": (blend, "blended_attention", with_arguments((5, torch.ones(1, 70)))),
}  # fmt: skip


def close(found: Outputs, right: Outputs) -> bool:
    return all(
        max_error(ours.nan_to_num(neginf=-99.0), theirs.nan_to_num(neginf=-99.0)) < 0.05
        for ours, theirs in zip(found, right, strict=True)
    )


def found_wrong(call: Callable[[str], Outputs], caplog: pytest.LogCaptureFixture) -> str:
    """The warning of a call whose kernel is wrong; asserts all that has to happen."""
    right = call("torch")
    with pytest.raises(BackendError, match="the kernel of backend") as caught:
        call(BACKEND)
    with pytest.raises(BackendError) as again:  # and it is not launched again
        call(BACKEND)
    assert str(again.value) == str(caught.value)
    forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "stem_kernels"):
        first, second = call("auto"), call("auto")
    warned = [record.getMessage() for record in caplog.records]
    assert sum(f"the kernel of backend {BACKEND}" in text for text in warned) == 1, warned
    assert close(first, right)
    assert all(map(torch.equal, first, second))
    return warned[0]


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


@in_extension
@pytest.mark.parametrize("mutant", EXTENSION_MUTANTS)
def test_a_wrong_result_of_the_extension_is_found(
    mutant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, name, change = EXTENSION_MUTANTS[mutant]
    operator = getattr(torch.ops.stem_kernels_ext, name)
    monkeypatch.setattr(
        torch.ops.stem_kernels_ext, name, lambda *arguments: change(operator(*arguments))
    )
    warned = found_wrong(call, caplog)
    assert "gave wrong results: its" in warned
    assert "avx2 kernels of the extension" in warned


@in_extension
@pytest.mark.parametrize("mutant", ARGUMENT_MUTANTS)
def test_a_kernel_of_the_extension_that_does_something_else_is_found(
    mutant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, name, change = ARGUMENT_MUTANTS[mutant]
    operator = getattr(torch.ops.stem_kernels_ext, name)
    monkeypatch.setattr(torch.ops.stem_kernels_ext, name, lambda *given: operator(*change(given)))
    assert "gave wrong results: its" in found_wrong(call, caplog)


class OutOfResources(Exception):
    """What Triton raises where a kernel asks for more than a multiprocessor has."""


@pytest.mark.interpreter
@needs_kernels
def test_a_launch_that_raises_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OutOfResources("shared memory, Required: 262144, Hardware limit: 101376")

    if INTERPRETED:
        from stem_kernels.triton.program import _Launch

        monkeypatch.setattr(_Launch, "__call__", fail)
    else:
        monkeypatch.setattr(torch.ops.stem_kernels_ext, "basis_attention", fail)
    warned = found_wrong(attend, caplog)
    assert "could not be launched: OutOfResources: shared memory, Required: 262144" in warned


@pytest.mark.interpreter
@needs_kernels
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["CUDA", "CPU", "Triton"],
)
def test_lacking_memory_is_no_fault_of_the_kernel(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if INTERPRETED:
            from stem_kernels.triton.program import _Launch

            patch.setattr(_Launch, "__call__", fail)
        else:
            patch.setattr(torch.ops.stem_kernels_ext, "basis_attention", fail)
        with pytest.raises(type(error), match="memory"):
            attend("auto")
    attend(BACKEND)


@pytest.mark.interpreter
@needs_kernels
@pytest.mark.parametrize("call", CALLS)
def test_a_right_kernel_is_compared_once(
    call: Callable[[str], Outputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = counted(monkeypatch)
    if call in (updated, correct) and not INTERPRETED:
        pytest.skip("the extension's update and moments are torch's")
    bits = [call(BACKEND)]
    assert compared == [True]  # something was compared, and it was right
    for _ in range(2):
        bits.append(call(BACKEND))
    assert len(compared) == 1
    monkeypatch.setenv(VERIFY_VARIABLE, "always")
    forget()
    for _ in range(3):
        bits.append(call(BACKEND))
    assert compared == [True] * 4
    monkeypatch.setenv(VERIFY_VARIABLE, "never")
    forget()
    bits.append(call(BACKEND))
    assert len(compared) == 4
    for later in bits[1:]:
        assert all(map(torch.equal, bits[0], later))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every comparison from now on gave: whether there was something, and it was right."""
    from stem_kernels import verification

    compared: list[bool] = []

    def wrong(fresh: Any, tensors: Any, check: Callable[[], Any]) -> Any:
        def noted() -> Any:
            found = check()
            compared.append(bool(found) and all(one.ratio() <= 1 for one in found))
            return found

        return before(fresh, tensors, noted)

    before = verification._wrong
    monkeypatch.setattr(verification, "_wrong", wrong)
    return compared


@pytest.mark.interpreter
@needs_kernels
def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = counted(monkeypatch)
    monkeypatch.setenv(VERIFY_VARIABLE, "sometimes")
    with pytest.raises(ValueError, match='STEM_KERNELS_VERIFY is "sometimes"; it must be one of'):
        attend(BACKEND)
    monkeypatch.setenv(VERIFY_VARIABLE, "never")
    attend(BACKEND)
    assert compared == []


@pytest.mark.interpreter
@needs_kernels
def test_what_has_nothing_to_compare_is_compared_later(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = counted(monkeypatch)
    query, key = torch.zeros(1, 1, 20, 16), torch.zeros(1, 1, 9, 16)
    for value in (key, key * float("nan")):
        basis_attention(query, key, value, backend=BACKEND)
    assert compared == [False, False]
    basis_attention(drawn(1, 1, 20, 16), key, drawn(1, 1, 9, 16), backend=BACKEND)
    assert compared == [False, False, True]
    basis_attention(query, key, key, backend=BACKEND)
    assert len(compared) == 3


@in_extension
def test_tracing_and_modes_see_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    compared = counted(monkeypatch)
    query, key = drawn(1, 1, 20, 16), drawn(1, 1, 9, 16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (query, key)]
        basis_attention(fake[0], fake[1], fake[1], backend="cuda")
    with FlopCounterMode(display=False) as counter:
        basis_attention(query, key, key, backend="cuda")
    assert counter.get_total_flops() == 0  # the extension's own operators are not counted
    torch.compile(lambda q, k: basis_attention(q, k, k, backend="cuda"), backend="eager")(
        query, key
    )
    assert compared == []
    basis_attention(query, key, key, backend="cuda")
    assert compared == [True]


@in_extension
def test_a_captured_graph_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_kernels import verification

    query = drawn(1, 1, 20, 16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert verification._comparable({"query": query})

    class OnGPU(torch.Tensor):
        is_cuda = True

    # a tensor of a subclass is not looked into either
    assert not verification._comparable({"query": query.as_subclass(OnGPU)})


@in_extension
def test_the_table_and_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stem_kernels import info, selfcheck
    from stem_kernels.selfcheck.cases import CASES

    few = {name: CASES[name] for name in ("nearest_token", "partial_attention")}
    monkeypatch.setattr(selfcheck, "CASES", few)
    assert info.main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "14 rows, 0 wrong"
    operator = torch.ops.stem_kernels_ext.nearest_token
    monkeypatch.setattr(
        torch.ops.stem_kernels_ext, "nearest_token", lambda *given: operator(*given) * 0
    )
    monkeypatch.setattr(torch.ops.stem_kernels_ext, "partial_attention", raising)
    assert info.main(["--check"]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "14 rows, 6 wrong"
    assert "WRONG" in text
    assert "FAILS: RuntimeError: no kernel image is available" in text
    assert info.main(["--chekc"]) == 2
    assert "--chekc: the only option is --check" in capsys.readouterr().err


def raising(*arguments: object) -> None:
    raise RuntimeError("no kernel image is available")
