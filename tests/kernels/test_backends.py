"""Which backend is taken, and what is said where it cannot be."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stem_kernels import BackendError, backends, cuda, em_statistics, triton
from stem_kernels.info import describe

X = torch.randn(1, 20, 4)
M = torch.randn(1, 3, 4)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the C++ extension's cpu part is not built: there is no C++ compiler"
    monkeypatch.setattr(cuda, "load_error", lambda part: reason)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"features": X, "bases": M}
    monkeypatch.setattr(cuda, "load_error", lambda part: None)
    monkeypatch.setattr(cuda, "instructions", lambda: "avx2")
    assert backends.select("op", "auto", tensors, 3) == "cuda"
    # "auto" takes what is measured to be faster; by name it can be had all the same.
    monkeypatch.setattr(cuda, "instructions", lambda: "baseline")
    assert backends.select("op", "auto", tensors, 3) == "torch"
    assert backends.select("op", "cuda", tensors, 3) == "cuda"
    monkeypatch.setattr(cuda, "load_error", lambda part: "not built")
    assert backends.select("op", "auto", tensors, 3) == "torch"
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    assert backends.select("op", "auto", tensors, 3) == "triton"
    # each of these is a reason against triton
    assert backends.select("op", "auto", {"x": X.double()}, 3) == "torch"
    assert backends.select("op", "auto", tensors, 2000) == "torch"
    assert backends.select("op", "auto", {"x": X.clone().requires_grad_()}, 3) == "torch"
    with torch.no_grad():
        assert backends.select("op", "auto", {"x": X.clone().requires_grad_()}, 3) == "triton"


@pytest.mark.usefixtures("without_extension")
def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cuda")
    assert backends.select("op", "torch", {"x": X}, 3) == "torch"
    with pytest.raises(BackendError, match='op cannot run with backend="cuda"'):
        backends.select("op", "auto", {"x": X}, 3)
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "tirton")
    with pytest.raises(ValueError, match='variable STEM_KERNELS_BACKEND is "tirton"; it must be'):
        backends.select("op", "auto", {"x": X}, 3)


@pytest.mark.usefixtures("without_extension")
def test_a_refusal_prints_shapes_dtypes_and_every_reason() -> None:
    with pytest.raises(BackendError) as caught:
        em_statistics(X, M, backend="cuda")
    message = str(caught.value)
    for part in (
        'em_statistics cannot run with backend="cuda"',
        "features: [1, 20, 4] float32 on cpu",
        "bases: [1, 3, 4] float32 on cpu",
        "cuda: the C++ extension's cpu part is not built: there is no C++ compiler",
        "triton: tensors are on cpu; it needs a CUDA GPU",
        "torch: can run this call",
    ):
        assert part in message


def test_every_reason_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(triton, "import_error", lambda: None)
    reasons = backends.BACKENDS["triton"].reasons({"x": X.double().requires_grad_()}, 5000)
    text = "; ".join(reasons)
    assert len(reasons) == 4
    for part in ("needs a CUDA GPU", "x is float64", "5000 bases", "x require(s) grad"):
        assert part in text
    wide = backends.BACKENDS["triton"].reasons({"query": torch.zeros(1, 1, 1, 520)}, 3)
    assert "query has 520 channels a head; it takes 512" in wide


def test_an_old_triton_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "_import_errors", [])
    monkeypatch.setattr(module, "__version__", "3.5.1")
    old = "triton is 3.5.1; it needs 3.6 or newer, which newer torch brings"
    assert triton.machine_reasons() == [old]


def test_the_extension_states_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load_error", lambda part: None)
    extension = backends.BACKENDS["cuda"]
    assert extension.reasons({"features": torch.zeros(1, 9, 2000)}, 1024) == []
    assert extension.reasons({"x": X}, 1025) == ["1025 bases; it takes at most 1024"]
    needing = extension.reasons({"x": X.clone().requires_grad_()}, 3)
    assert len(needing) == 1
    assert "x require(s) grad and it has no backward pass" in needing[0]
    assert dict(cuda.max_widths(torch.device("cuda")))["features"] == 1280
    other = extension.reasons({"x": X.to("meta")}, 3)
    assert other == ["tensors are on meta; it takes CPU and CUDA tensors"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = ["cuda:0 has compute capability 7.5; it needs 8.0 or newer"]
    assert cuda.device_reasons(torch.device("cuda", 0)) == old
    missing = {"cpu": None, "cuda": "_ext_cuda.so cannot be loaded"}
    monkeypatch.setattr(cuda, "load_error", missing.get)
    assert cuda.device_reasons(torch.device("cuda", 0)) == [missing["cuda"]]
    assert cuda.device_reasons(torch.device("cpu")) == []


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "device_capability", lambda device: (7, 5))
    reasons = triton.device_reasons(torch.device("cuda", 0))
    assert reasons == ["cuda:0 has compute capability 7.5; it needs 8.0 or newer"]
    monkeypatch.setattr(triton, "device_capability", lambda device: (9, 0))
    assert triton.device_reasons(torch.device("cuda", 0)) == []


@pytest.mark.usefixtures("without_extension")
def test_auto_says_once_that_it_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_fallback_once.cache_clear()
    with caplog.at_level(logging.INFO, "stem_kernels"):
        for _ in range(3):
            em_statistics(X, M)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert len(messages) == 1
    assert "em_statistics runs on backend torch (triton: tensors are on cpu" in messages[0]


@pytest.mark.usefixtures("without_extension")
def test_a_missing_extension_is_warned_of_once_where_it_would_serve(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends._warn_once.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    backends.select("op", "auto", {"x": X}, 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    backends.select("op", "torch", {"x": X}, 3)
    for other in (X.double(), X.clone().requires_grad_()):
        backends.select("op", "auto", {"x": other}, 3)
    assert not caplog.records
    for op in ("op", "another"):
        backends.select(op, "auto", {"x": X}, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "the operators run in torch, about half as fast as they could: "
        "the C++ extension's cpu part is not built: there is no C++ compiler"
    ]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
import stem_kernels
x, m = torch.randn(1, 20, 4), torch.randn(1, 3, 4)
assert stem_kernels.em_statistics(x, m).mass.sum() > 19
try:
    stem_kernels.em_statistics(x, m, backend="triton")
except stem_kernels.BackendError as error:
    print(error)
"""


def test_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True
    )
    assert "triton: triton cannot be imported" in done.stdout
    assert "pip install triton" in done.stdout


COMPILED_FIRST = """
import sys
sys.modules["triton"] = None
import torch
from stem_kernels import basis_attention
x, m = torch.randn(1, 2, 20, 4), torch.randn(1, 2, 3, 4)
compiled = torch.compile(lambda x: basis_attention(x, m, m), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), basis_attention(x, m, m))
"""


def test_the_first_call_of_a_process_may_be_compiled_without_triton() -> None:
    subprocess.run([sys.executable, "-c", COMPILED_FIRST], check=True)


def test_triton_needs_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton, "import_error", lambda: None)
    monkeypatch.setattr(triton, "interpreted", lambda: False)

    def reasons() -> list[str]:
        monkeypatch.setattr(triton, "_compiler_errors", [])
        return triton.machine_reasons()

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    none = "triton finds no C compiler (gcc, clang); install gcc, or set CC to one"
    assert reasons() == [none]
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    assert reasons() == []
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    for name in ("clang", "other"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert reasons() == []
    monkeypatch.setenv("CC", str(tmp_path / "other"))
    assert reasons() == []
    monkeypatch.setenv("CC", "/nonexistent/cc")
    assert reasons() == [none.replace("gcc, clang", "/nonexistent/cc")]


def test_imports_run_one_way() -> None:
    rooms = Path(backends.__file__).parent
    inner = ("reference", "triton", "cuda")
    for room in (*inner, "shared"):
        others = "|".join({*inner, "ops", "backends"} - {room})
        for file in (rooms / room).rglob("*.py"):
            found = re.findall(rf"from \.{{2,}}(?:{others})\b.*", file.read_text())
            # Moments of a video's groups have no kernel of Triton.
            allowed = room == "triton" and file.parent.name == "video"
            moments = ["from ...reference.video_bases import group_moments"]
            assert found in ([], moments if allowed else []), file


def test_importing_neither_loads_triton_nor_starts_cuda() -> None:
    code = (
        "import sys, torch, stem_kernels; "
        "assert not torch.cuda.is_initialized(); "
        "assert not any(name.split('.')[0] in ('triton', 'diffusers') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info_names_every_backend_and_its_reason() -> None:
    text = describe()
    for part in ("torch ", "usable", "triton ", "cuda ", "C++ extension"):
        assert part in text
