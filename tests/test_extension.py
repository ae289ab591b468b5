"""The compiled extension: how it is built and loaded, what is said where it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stem_kernels import basis_attention, cuda, soft_em
from stem_kernels.testing import clustered_tokens

ROOT = Path(__file__).parent.parent

built = pytest.mark.skipif(
    cuda.load_error("cpu") is not None, reason=f"no extension: {cuda.load_error('cpu')}"
)


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of stem_kernels without its objects."""
    folder = tmp_path / "stem_kernels"
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "stem_kernels", folder, ignore=ignored)
    return folder


def info(package: Path) -> str:
    """What `python -m stem_kernels.info` prints of the copy, which also computes something."""
    code = (
        "import torch, stem_kernels; from stem_kernels.info import describe; "
        "x = torch.randn(1, 20, 4); assert stem_kernels.em_statistics(x, x[:, :3]).mass.sum() > 19;"
        "print(describe())"
    )
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torch  usable" in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("STEM_SKIP_EXT", "1", "it was left out (STEM_SKIP_EXT=1)"),
        ("CXX", "/nonexistent", "there is no C++ compiler (/nonexistent); install g++, or set CXX"),
        ("CXX", "false", "false failed with exit status 1: it printed nothing"),
    ],
)
def test_what_is_not_built_is_said(
    setup_py: ModuleType,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.delenv("STEM_REQUIRE_EXT", raising=False)
    monkeypatch.setenv(variable, value)
    setup_py.build_extension(package)
    assert f"the extension's cpu part is not built: {reason}" in capsys.readouterr().out
    assert f"cuda   the C++ extension's cpu part is not built: {reason}" in info(package)
    monkeypatch.setenv("STEM_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="STEM_REQUIRE_EXT=1, but"):
        setup_py.build_extension(package)


def test_an_old_torch_is_a_reason(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEM_SKIP_EXT", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(setup_py.NotBuiltError, match=r"torch is 2\.9\.1\+cu128; .* 2\.10 or newer"):
        setup_py.tools()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(setup_py.NotBuiltError, match="pip install --no-build-isolation"):
        setup_py.tools()


def test_architectures(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    listed = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\n"
    flags = setup_py.gencode(listed)[1::2]
    assert flags[0] == "arch=compute_80,code=sm_80"
    assert flags[-2:] == ["arch=compute_90a,code=sm_90a", "arch=compute_90a,code=compute_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 10.0+PTX")
    assert setup_py.gencode(listed)[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]


def test_without_a_report(package: Path) -> None:
    assert "setup.py has not run; install the package with: pip install ." in info(package)


REPORT = '{"cpu": {"torch": "2.99.0"}, "cuda": {"reason": "nvcc is not found"}}'


def test_a_corrupt_object(package: Path) -> None:
    (package / "_build_info.json").write_text(REPORT)
    (package / "_ext_cpu.so").write_bytes(b"not an object")
    text = info(package)
    assert "_ext_cpu.so: file too short" in text
    assert f"(built with torch 2.99.0, this is {torch.__version__}); build it again with" in text


def test_an_object_for_another_torch(package: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler to make one with")
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int torch_of_tomorrow(); int x = torch_of_tomorrow();')
    subprocess.run(
        [compiler, "-shared", "-fPIC", source, "-o", package / "_ext_cpu.so"], check=True
    )
    (package / "_build_info.json").write_text(REPORT)
    text = info(package)
    assert "_ext_cpu.so cannot be loaded: " in text
    assert "undefined symbol: torch_of_tomorrow (built with torch 2.99.0, this is" in text


def test_the_gpu_part_needs_a_torch_with_cuda(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "_build_info.json").write_text('{"cuda": {"torch": "2.13.0"}}')
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA, which the C++ extension's cuda part needs" in str(
        cuda.load("cuda", package)
    )


@built
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_other_instructions(capability: str) -> None:
    chosen = "cuda and (iterations or excluded or repeat or (attention and 255))"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, "tests/test_parity.py"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@built
def test_threads_do_not_change_a_bit() -> None:
    features = clustered_tokens((2, 3000, 40))
    bases, payload = features[:, ::50].clone(), clustered_tokens((2, 3000, 24))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found = soft_em(features, bases, payload=payload, backend="cuda")
        finally:
            torch.set_num_threads(threads)
        results.append(found)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.zeros(1, 1, 1, 1, dtype=dtype)
    value = every.view(1, 1, 1, -1)
    out = basis_attention(one, one, value, backend="cuda")[0, 0, 0]
    assert torch.equal(out.isnan(), every.isnan())
    numbers = ~every.isnan()
    assert torch.equal(out[numbers], every[numbers])
    # The mean of two neighbours that are not 0 or 1 apart has to be rounded.
    pair = torch.stack([every, every.roll(3)]).view(1, 1, 2, -1)
    key = torch.zeros(1, 1, 2, 1, dtype=dtype)
    out = basis_attention(one, key, pair, backend="cuda")[0, 0, 0]
    expected = ((every.float() + every.roll(3).float()) / 2).to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[numbers], expected[numbers])


@built
def test_the_operators_check_what_they_are_given() -> None:
    operators = torch.ops.stem_kernels_ext
    x, m = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 3, 4)
    for call, message in (
        (lambda: operators.em_statistics(x, m[..., :3], None, 1.0, True), r"must be \[1, 1, any"),
        (lambda: operators.em_statistics(x.double(), m, None, 1.0, True), "must be float32, float"),
        (lambda: operators.em_statistics(x, m.half(), None, 1.0, True), "contiguous and float32"),
        (lambda: operators.em_statistics(x.mT, x.mT, None, 1.0, True), "contiguous in its last"),
        (lambda: operators.em_statistics(x, m, x[:, :, 1:], 1.0, True), r"must be \[1, 1, 5, any"),
        (lambda: operators.basis_attention(x, m, m.half(), None, 1.0), "must have one dtype"),
        (lambda: operators.basis_attention(x, m, m, m[0], 1.0), r"bias must be \[B, h, K\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
