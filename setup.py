"""Builds the compiled extension; all else is declared in pyproject.toml.

The CPU part is built where a C++ compiler and torch >= 2.10 are, the CUDA part where nvcc is too
(no GPU is needed). What cannot be built is left out, as is all with STEM_SKIP_EXT=1, and
`python -m stem_kernels.info` says why; STEM_REQUIRE_EXT=1 makes an error of a missing CPU part,
and of a CUDA part that fails.
CXX, CUDA_HOME and TORCH_CUDA_ARCH_LIST (as "8.0;9.0a+PTX") mean what they mean elsewhere.

The objects hold torch operators and no Python module, so they serve every Python; they use only
torch's stable ABI, so they serve every torch from 2.10 on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

CSRC = Path(__file__).parent.resolve() / "csrc"
OLDEST_TORCH = (2, 10)
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CPU_FLAGS = [*FLAGS, "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
# Name of the kernels: floats in a register, and what the compiler needs for them.
INSTRUCTIONS: dict[str, tuple[int, list[str]]] = {"baseline": (4, [])}
if platform.machine() == "x86_64":
    wide = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")]
    INSTRUCTIONS |= {"avx2": (8, ["-mavx2", "-mfma"]), "avx512": (16, ["-mavx2", "-mfma", *wide])}
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


class NotBuiltError(Exception):
    """Why a part of the extension is not built: something is missing."""


class FailedError(NotBuiltError):
    """All was there, and yet it failed."""


def tools() -> tuple[Path, list[str]]:
    """The folder of the torch that the extension is built with; the C++ compiler's command."""
    if os.environ.get("STEM_SKIP_EXT") == "1":
        raise NotBuiltError("it was left out (STEM_SKIP_EXT=1)")
    try:
        import torch
    except ImportError as error:
        raise NotBuiltError(
            f"torch cannot be imported where the package is built ({error}); "
            "install torch first, then: pip install --no-build-isolation ."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise NotBuiltError(f"torch is {torch.__version__}; the extension needs 2.10 or newer")
    asked = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for command in map(shlex.split, asked):
        if command and shutil.which(command[0]):
            return Path(torch.__file__).parent, command
    raise NotBuiltError(f"there is no C++ compiler ({', '.join(asked)}); install g++, or set CXX")


def run(*command: object) -> str:
    """The command's output; its errors are a reason."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise FailedError(
            f"{Path(str(command[0])).name} failed with exit status {done.returncode}: "
            f"{errors[0].strip()[:500] or 'it printed nothing'}"
        )
    return done.stdout


def build_cpu(target: Path, scratch: Path) -> dict[str, str]:
    home, cxx = tools()
    includes = ["-I", CSRC / "include", "-isystem", home / "include"]
    jobs: dict[str, tuple[str, list[str]]] = {"bindings": ("bindings.cpp", [])}
    jobs |= {name: (f"cpu/{name}.cpp", []) for name in ("dispatch", "tensors", "em", "attention")}
    for name, (lanes, flags) in INSTRUCTIONS.items():
        jobs[name] = ("cpu/kernels.cpp", [f"-DSTEM_ISA={name}", f"-DSTEM_LANES={lanes}", *flags])
    objects = [scratch / f"{name}.o" for name in jobs]
    for (source, flags), to in zip(jobs.values(), objects, strict=True):
        run(*cxx, *CPU_FLAGS, *flags, *includes, "-c", CSRC / source, "-o", to)
    run(*cxx, "-shared", *objects, f"-L{home / 'lib'}", "-ltorch_cpu", "-o", target)
    return {"compiler": run(*cxx, "--version").splitlines()[0], "flags": shlex.join(CPU_FLAGS)}


def build_cuda(target: Path, scratch: Path) -> dict[str, str]:
    home, cxx = tools()
    includes = ["-I", CSRC / "include", "-isystem", home / "include"]
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{toolkit}/bin{os.pathsep}{os.environ['PATH']}")
    if nvcc is None:
        raise NotBuiltError("nvcc is not found; install the CUDA toolkit, or set CUDA_HOME")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    flags = [*FLAGS, "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
    flags += ["-ccbin", cxx[0], *gencode(run(nvcc, "--list-gpu-arch"))]
    objects = [scratch / f"{source.stem}.cu.o" for source in sources]
    for source, to in zip(sources, objects, strict=True):
        run(nvcc, *flags, *includes, "-c", source, "-o", to)
    if not (home / "lib" / "libtorch_cuda.so").exists():
        # A torch without CUDA lacks the library whose name the object must ask for.
        library = scratch / "libtorch_cuda.so"
        run(*cxx, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{library.name}", "-o", library)
    libraries = ["-L", home / "lib", "-L", scratch, "-Xlinker", "--no-as-needed", "-ltorch_cpu"]
    run(nvcc, "-shared", *flags, *objects, *libraries, "-ltorch_cuda", "-o", target)
    return {"compiler": run(nvcc, "--version").splitlines()[-2], "flags": shlex.join(flags)}


def gencode(listed: str) -> list[str]:
    """Flags for the architectures asked for, or for those that this nvcc knows."""
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = [arch for arch in ARCHITECTURES if arch.rstrip("a") in known]
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(wanted) + "+PTX")
    flags = []
    for entry in re.split(r"[;\s]+", asked.strip()):
        arch = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    return flags


def build_extension(package: Path) -> None:
    """Put the objects, and the report on them, into the folder of the package."""
    built: dict[str, dict[str, str]] = {}
    fatal = []
    for part, build in (("cpu", build_cpu), ("cuda", build_cuda)):
        target = package / f"_ext_{part}.so"
        target.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                built[part] = {**build(target, Path(scratch)), "torch": metadata.version("torch")}
                print(f"stem_kernels: the extension's {part} part is built: {built[part]}")
            except NotBuiltError as error:
                built[part] = {"reason": str(error)}
                print(f"stem_kernels: the extension's {part} part is not built: {error}")
                fatal += [str(error)] if part == "cpu" or isinstance(error, FailedError) else []
    (package / "_build_info.json").write_text(json.dumps(built, indent=2) + "\n")
    if fatal and os.environ.get("STEM_REQUIRE_EXT") == "1":
        raise SystemExit(f"STEM_REQUIRE_EXT=1, but {'; '.join(fatal)}")


class BuildWithExtension(build_py):
    def run(self) -> None:
        super().run()
        build_extension(Path("" if self.editable_mode else self.build_lib, "stem_kernels"))


class WithObjects(Distribution):
    """A wheel with objects is for one platform, one without for all."""

    def has_ext_modules(self) -> bool:
        try:
            return bool(tools())
        except NotBuiltError:
            return False


if __name__ == "__main__":
    setup(
        distclass=WithObjects,
        cmdclass={"build_py": BuildWithExtension},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
