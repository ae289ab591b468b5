"""AMD's GPUs, none of which is here: which are served, by which table, and within their means."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import INTERPRETED

from stem_kernels import triton
from stem_kernels.backends import BACKENDS, BackendError, select

if INTERPRETED:
    pytest.skip("the interpreter takes every device", allow_module_level=True)

GPU = torch.device("cuda", 0)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A torch for AMD's GPUs, and one of them."""
    name: str = request.param
    properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(triton, "_import_errors", [None])
    return name


@pytest.mark.parametrize("amd", triton.AMD_ARCHITECTURES, indirect=True)
def test_a_gpu_that_all_kernels_compile_for_has_a_table(amd: str) -> None:
    from stem_kernels.triton import tuning

    assert triton.device_reasons(GPU) == []
    for op, row in tuning.table(amd).items():
        wanted = {**row, "programs": 304 * row["programs"]} if "programs" in row else row
        assert tuning.tiles(op, GPU) == wanted
    assert tuning.tiles("resident_attention 48", GPU) == {}  # a row for sm_94 there is not


@pytest.mark.parametrize("amd", ["gfx908", "gfx1030", "gfx950"], indirect=True)
def test_another_one_is_refused_by_name(amd: str) -> None:
    (reason,) = triton.device_reasons(GPU)
    assert reason.startswith(
        f"cuda:0 is {amd}; of AMD's GPUs it serves gfx90a, gfx942, gfx1100, gfx1201,"
    )


@pytest.mark.parametrize("amd", ["gfx942", "gfx1100"], indirect=True)
@pytest.mark.usefixtures("amd")
def test_auto_passes_over_what_none_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        device, dtype, shape, requires_grad, is_cuda = GPU, torch.float16, (8, 40), False, True

    monkeypatch.setattr("stem_kernels.cuda.load_error", lambda part: "it is not built")
    tensors: dict[str, torch.Tensor | None] = {"query": OnGPU()}  # type: ignore[dict-item]
    assert select("basis_attention", "auto", tensors, 16) == "torch"
    (reason,) = BACKENDS["triton"].auto(GPU)
    assert reason.startswith("no GPU of AMD's has run its kernels yet")
    assert select("basis_attention", "triton", tensors, 16) == "triton"
    monkeypatch.setenv("STEM_KERNELS_BACKEND", "triton")
    assert select("basis_attention", "auto", tensors, 16) == "triton"


@pytest.mark.parametrize("amd", ["gfx1030"], indirect=True)
@pytest.mark.usefixtures("amd")
def test_a_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(
        device=GPU, dtype=torch.float16, shape=(8, 40), requires_grad=False, is_cuda=True
    )
    tensors: dict[str, torch.Tensor | None] = {"query": on_gpu}  # type: ignore[dict-item]
    with pytest.raises(BackendError, match="triton: cuda:0 is gfx1030; of AMD's GPUs it serves"):
        select("basis_attention", "triton", tensors, 16)


@pytest.mark.parametrize("amd", ["gfx942", "gfx1201"], indirect=True)
@pytest.mark.usefixtures("amd")
def test_float32_is_not_multiplied_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_kernels.triton.precision import dot_options

    asked = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cuda, "matmul", asked)
    assert dot_options(torch.float32)["PRECISION"] == "ieee"
    monkeypatch.setattr(torch.version, "hip", None)
    assert dot_options(torch.float32)["PRECISION"] == "tf32"


def test_the_committed_table_is_of_these_sources_and_within_its_means() -> None:
    pytest.importorskip("triton")
    from benchmarks.counting import amd_resources

    table = amd_resources.committed()
    if not table:
        pytest.skip(f"{amd_resources.OUT.name} was written with another triton")
    launched = {digest: (launch, form) for digest, launch, form, _ in amd_resources.wanted()}
    again = f"run `python -m benchmarks.counting.amd_resources`: {amd_resources.OUT.name}"
    assert launched.keys() == table.keys(), again
    assert {row.arch for row in table.values()} == set(triton.AMD_ARCHITECTURES)
    assert not {row for row in table.values() if row.faults()}
    assert amd_resources.OUT.with_suffix(".md").read_text() == amd_resources.text(table)
    # One of them is compiled anew.
    digest = next(key for key, row in table.items() if row.form == "em key d=64" and row.matrix)
    launch, form = launched[digest]
    assert amd_resources.measure(launch, form, table[digest].dtype) == table[digest]


def test_only_explained_spills_are_within_the_means() -> None:
    pytest.importorskip("triton")
    from benchmarks.counting.amd_resources import Resources

    def faults(kernel: str, dtype: str, arch: str, spilled: int, matrix: int = 1) -> list[str]:
        return Resources(kernel, "", dtype, arch, 256, spilled, 0, matrix).faults()

    assert not faults("moments", "float16", "gfx1100", 96)
    assert faults("moments", "float16", "gfx1100", 97)
    assert faults("moments", "float16", "gfx1201", 1)
    assert faults("products", "float16", "gfx1100", 1)
    assert not faults("basis_attention", "float32", "gfx1100", 100, matrix=0)
    assert faults("basis_attention", "float32", "gfx90a", 1)
    assert faults("basis_attention", "float16", "gfx1100", 0, matrix=0)
