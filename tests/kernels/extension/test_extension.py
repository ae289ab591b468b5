"""The compiled extension: how it is built and loaded, what is said where it is not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from stem_kernels import cuda

ROOT = Path(__file__).parents[3]

LISTED = "compute_75\ncompute_80\ncompute_86\ncompute_89\ncompute_90\n"
"""What an nvcc lists."""

built = pytest.mark.skipif(
    cuda.load_error("cpu") is not None, reason=f"no extension: {cuda.load_error('cpu')}"
)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """csrc/extension.py, which no variable but those of a test tells what to build."""
    for variable in ("STEM_SKIP_EXT", "STEM_REQUIRE_EXT", "STEM_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("extension", ROOT / "csrc" / "extension.py")
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
    extension: ModuleType,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.setattr(extension, "find_torch", lambda: extension.Torch("2.13.0", None, ""))
    monkeypatch.setenv(variable, value)
    extension.build_extension(package)
    assert f"not built: {reason}" in capsys.readouterr().out.splitlines()[-1]
    said = f"the C++ extension's cpu part is not built: {reason} (to build it, in the source tree"
    assert str(cuda.load("cpu", package)).startswith(said)
    monkeypatch.setenv("STEM_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="STEM_REQUIRE_EXT=1, but"):
        extension.build_extension(package)


def test_an_old_torch_is_a_reason(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old = extension.Torch("2.9.1+cu128", "12.8", "")
    monkeypatch.setattr(extension, "find_torch", lambda: old)
    with pytest.raises(extension.NotBuiltError, match=r"torch was 2\.9\.1\+cu128; it needs"):
        extension.tools()


def test_no_torch_is_a_reason(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(extension.NotBuiltError, match="torch could not be imported where the pack"):
        extension.tools()


# What pip sets up around the build of a package: the interpreter is the same, but a module that it
# runs at its start hides all that is installed.
ISOLATED = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
"""
ASK = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
sys.path.insert(0, "csrc")
from extension import find_torch
print(*find_torch(), sep="\\n")
"""


def test_an_isolated_build_finds_the_installed_torch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ISOLATED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [torch.__version__, str(torch.version.cuda), str(Path(torch.__file__).parent)]
    assert done.stdout.splitlines() == expected


@pytest.fixture
def cpu_torch(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without CUDA; a CPU part that takes no time."""
    found = extension.Torch("2.13.0+cpu", None, "")
    monkeypatch.setattr(extension, "tools", lambda: (found, ["c++"]))
    monkeypatch.setattr(extension, "cpu_part", lambda target, scratch: extension.Part([], [], {}))


@pytest.mark.usefixtures("cpu_torch")
def test_the_cuda_part_is_for_a_torch_with_cuda(
    extension: ModuleType,
    package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extension.build_extension(package)
    said = "cpu built; cuda not built: torch was 2.13.0+cpu, without CUDA; STEM_CUDA=1 builds it"
    assert said in capsys.readouterr().out
    monkeypatch.setenv("STEM_CUDA", "1")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(SystemExit, match="STEM_CUDA=1, but nvcc is not found"):
        extension.build_extension(package)
    monkeypatch.setenv("STEM_SKIP_EXT", "1")
    extension.build_extension(package)


@pytest.mark.usefixtures("cpu_torch")
def test_a_cuda_part_that_fails_is_an_error_where_it_is_asked_for(
    extension: ModuleType, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = extension.Part([["false"]], [], {})
    monkeypatch.setattr(extension, "cuda_part", lambda target, scratch: broken)
    extension.build_extension(package)
    for variable in ("STEM_CUDA", "STEM_REQUIRE_EXT"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            with pytest.raises(SystemExit, match=f"^{variable}=1, but false failed with exit stat"):
                extension.build_extension(package)


@pytest.mark.usefixtures("cpu_torch")
def test_sources_compile_at_once(
    extension: ModuleType, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands that wait for each other."""
    wait = "touch {mine}; for i in $(seq 100); do test -e {other} && exit; sleep 0.1; done; exit 1"
    one, other = tmp_path / "one", tmp_path / "other"
    commands = [
        ["sh", "-c", wait.format(mine=mine, other=awaited)]
        for mine, awaited in ((one, other), (other, one))
    ]
    both = extension.Part(commands, [], {"compiler": "sh"})
    monkeypatch.setattr(extension, "cuda_part", lambda target, scratch: both)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    extension.build_extension(package)
    assert cuda.build_info(package)["cuda"] == {"compiler": "sh"}


def test_architectures(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def flags() -> list[str]:
        return extension.gencode(extension.architectures(LISTED))[1::2]

    own = flags()
    assert own[0] == "arch=compute_80,code=sm_80"
    assert own[-3:] == [
        "arch=compute_90,code=sm_90",
        "arch=compute_80,code=compute_80",
        "arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 10.0+PTX")
    assert flags() == [
        "arch=compute_80,code=sm_80",
        "arch=compute_100,code=sm_100",
        "arch=compute_100,code=compute_100",
    ]
    for empty in ("", " ", ";"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", empty)
        assert flags() == own


@pytest.mark.parametrize(
    ("asked", "built", "left_out"),
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0 8.6 9.0 10.0 12.0+PTX", "7.5"),
        ("6.0;7.0+PTX;8.0", "8.0", "6.0, 7.0+PTX"),
        ("Ampere;Hopper", "8.0 8.6+PTX 9.0+PTX", ""),
        ("Turing;ada", "8.9+PTX", "7.5+PTX"),
        ("9.0a+PTX,10.0f", "9.0+PTX 10.0", ""),
        ("9.0+PTX;9.0", "9.0+PTX", ""),
        ("90", "9.0", ""),
    ],
)
def test_architectures_as_they_are_asked_for(
    extension: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    built: str,
    left_out: str,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    found = extension.architectures(LISTED)
    assert " ".join(extension.capability(*each) for each in found.items()) == built
    said = capsys.readouterr().out
    whole = f"stem_kernels: {left_out} of TORCH_CUDA_ARCH_LIST left out: the kernels need 8.0"
    assert said.startswith(whole) if left_out else said == ""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("Amper", "has 'Amper'; its entries are such as 8.0, 9.0\\+PTX, or Kepler"),
        ("8.0;sm_90", "has 'sm_90'; its entries are"),
        ("7.0 7.5+PTX", "is '7.0 7.5\\+PTX'; the kernels need 8.0 or newer"),
    ],
)
def test_architectures_that_are_none(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, message: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(extension.NotBuiltError, match=f"TORCH_CUDA_ARCH_LIST {message}"):
        extension.architectures(LISTED)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolkit of CUDA 13.0 whose nvcc compiles nothing."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    release = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler"
    said = f'--version) echo "{release}";; *) echo "{LISTED}";;'
    nvcc.write_text(f"#!/bin/sh\ncase $1 in {said} esac")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


@pytest.mark.usefixtures("toolkit")
def test_the_toolkit_is_of_torchs_cuda(
    extension: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(cuda: str | None) -> Any:
        found = extension.Torch("2.12.0", cuda, str(tmp_path))
        monkeypatch.setattr(extension, "tools", lambda: (found, ["c++"]))
        return extension.cuda_part(tmp_path / "out.so", tmp_path)

    with pytest.raises(
        extension.NotBuiltError,
        match=r"nvcc is of CUDA 13 and torch 2\.12\.0 of CUDA 12\.8; install the toolkit of CUDA",
    ):
        part("12.8")
    monkeypatch.setenv("STEM_CUDA", "1")
    for own in ("13.2", None):
        assert part(own).report["architectures"] == "8.0+PTX 8.6 8.9 9.0+PTX"


@pytest.mark.usefixtures("toolkit")
def test_nvcc_takes_the_compiler_and_not_what_launches_it(
    extension: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ccache", "sccache", "g++-9"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = extension.Torch("2.12.0", "13.0", str(tmp_path))
    for command, flags in (
        (["g++-9"], ["-ccbin", "g++-9"]),
        (["ccache", "g++-9"], ["-ccbin", "g++-9"]),
        (["ccache", "sccache", "g++-9", "-m64"], ["-ccbin", "g++-9", "-Xcompiler", "-m64"]),
    ):
        monkeypatch.setattr(extension, "tools", lambda command=command: (found, command))
        part = extension.cuda_part(tmp_path / "out.so", tmp_path)
        for line in (*part.compilations, part.links[-1]):
            place = line.index("-ccbin")
            assert line[place : place + len(flags)] == flags
            assert "ccache" not in line


def test_without_a_report(package: Path) -> None:
    text = str(cuda.load("cpu", package))
    assert "setup.py has not run (to build it, in the source tree: pip install --no-deps .)" in text


REPORT = '{"cpu": {"torch": "2.99.0"}, "cuda": {"reason": "nvcc is not found"}}'


def test_a_corrupt_object(package: Path) -> None:
    (package / "_build_info.json").write_text(REPORT)
    (package / "_ext_cpu.so").write_bytes(b"not an object")
    text = info(package)
    assert "_ext_cpu.so: file too short" in text
    assert f"(built with torch 2.99.0, this is {torch.__version__}); build it again" in text


def test_an_object_for_another_torch(package: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler to make one with")
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int torch_of_tomorrow(); int x = torch_of_tomorrow();')
    subprocess.run(
        [compiler, "-shared", "-fPIC", source, "-o", package / "_ext_cpu.so"], check=True
    )
    (package / "_build_info.json").write_text(REPORT)
    text = str(cuda.load("cpu", package))
    assert "_ext_cpu.so cannot be loaded: " in text
    assert "undefined symbol: torch_of_tomorrow (built with torch 2.99.0, this is" in text


@built
def test_an_object_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "OPERATORS", (*cuda.OPERATORS, "one_of_tomorrow"))
    reason = cuda.load("cpu")
    assert reason is not None
    assert "lacks one_of_tomorrow: it was built from older sources; build it again" in reason


def test_the_gpu_part_needs_a_torch_with_cuda(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "_build_info.json").write_text('{"cuda": {"torch": "2.13.0"}}')
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA, which the C++ extension's cuda part needs" in str(
        cuda.load("cuda", package)
    )
