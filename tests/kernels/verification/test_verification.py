"""A kernel's first launch is compared with torch: when, when not, and what happens then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import INTERPRETED
from verified import (
    BACKEND,
    CALLS,
    Outputs,
    attend,
    correct,
    counted,
    drawn,
    forget,
    found_wrong,
    in_extension,
    needs_kernels,
    updated,
)

from stem_kernels import basis_attention
from stem_kernels.shared.forms import MOST_TRIES
from stem_kernels.verification import VERIFY_VARIABLE

pytestmark = pytest.mark.usefixtures("nothing_known")


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


@pytest.mark.interpreter
@needs_kernels
def test_a_comparison_that_memory_lacks_for_is_not_tried_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stem_kernels.verification import attention

    tries = []

    def lacking(*arguments: object) -> None:
        tries.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(attention, "basis_attention", lacking)
        attend(BACKEND)
        assert len(tries) == 1
    compared = counted(monkeypatch)
    attend(BACKEND)
    assert compared == [True]
    forget()
    monkeypatch.setattr(attention, "basis_attention", lacking)
    for _ in range(20):
        attend(BACKEND)
    assert len(tries) == 1 + MOST_TRIES


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


def test_the_table_has_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_kernels import cuda, selfcheck
    from stem_kernels.selfcheck.cases import CASES

    assert set(cuda.OPERATORS) <= set(CASES)
    of_video = {name: CASES[name] for name in ("window_attention", "video_attention")}
    monkeypatch.setattr(selfcheck, "CASES", of_video)
    assert not [row for row in selfcheck.rows() if row.wrong]


def raising(*arguments: object) -> None:
    raise RuntimeError("no kernel image is available")
