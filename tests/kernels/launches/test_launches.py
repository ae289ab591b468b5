"""What the operators launch on a GPU, counted without one; that launches are repeated rightly."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import DEVICE, INTERPRETED

from stem.config import StemConfig
from stem_kernels import basis_attention, em_statistics, em_update, initial_bases, soft_em
from stem_kernels.ops.calibration import moments
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.soft_em import AttendedBases, attended_bases
from stem_kernels.testing import clustered_tokens, max_error

STEM = StemConfig(backend="triton", sample_per_base=None, calibration="none")


@pytest.fixture(scope="module")
def counts():  # type: ignore[no-untyped-def]
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("the interpreter launches nothing")
    from benchmarks.counting import launch_counts

    return launch_counts


@pytest.mark.parametrize(("num_iters", "frames", "kernels"), [(1, 32, 7), (2, 32, 12), (2, 8, 8)])
def test_kernels_of_a_layer(counts: Any, num_iters: int, frames: int, kernels: int) -> None:
    found = counts.kernels(replace(STEM, num_iters=num_iters), frames, 64, 320)
    projections = {name: found.pop(name) for name in counts.PROJECTIONS}
    assert projections == {"mm": 3, "addmm": 1}
    assert found["triton update"] == num_iters
    assert found["triton responsibilities"] == num_iters * (2 if frames == 32 else 1)
    assert all(name.startswith("triton") for name in found), found  # none of torch's
    assert found.total() == kernels


def test_what_chunks_share_takes_few_kernels(counts: Any) -> None:
    query, key = (
        torch.empty(1, 8, rows, 40, dtype=torch.float16, device="meta") for rows in (128, 4096)
    )
    sums, mass = (torch.empty(1, 256, *width, device="meta") for width in ((320,), ()))
    with counts.recorded(counts.ARCH) as launched, counts.TorchKernels() as of_torch:
        partial_attention(query, key, key, backend="triton")
        em_update(sums, mass, sums, num_tokens=9, backend="triton")
    assert [launch.name for launch in launched] == ["partial_attention", "merge", "update"]
    assert not of_torch.found


@pytest.mark.parametrize("with_heads", [False, True])
def test_moments_take_two_kernels(counts: Any, with_heads: bool) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    query, key, bases = (meta(1, 8, rows, 40) for rows in (256, 1024, 256))
    lead = (1, 8) if with_heads else (1,)
    features, of_features = meta(*lead, 1024, 320), meta(*lead, 256, 320, dtype=torch.float32)
    tensors = (query, features, key, key, of_features, bases, bases)
    with counts.recorded(counts.ARCH) as launched, counts.TorchKernels() as of_torch:
        found = moments(*tensors, temperature=1.0, backend="triton")
    assert [launch.name for launch in launched] == ["moments", "moments_sum"]
    assert not of_torch.found
    assert found.correction.shape == (1, 8, 41, 40)
    assert found.query_mean.shape == (1, 8, 40)


def test_moments_in_a_layer_are_projections_and_two_kernels(counts: Any) -> None:
    config = replace(STEM, sample_per_base=16)
    counts.kernels(replace(config, calibration="moments"), 32, 64, 320)  # makes the places once
    with_them, without = (
        counts.kernels(replace(config, calibration=form), 32, 64, 320)
        for form in ("moments", "none")
    )
    assert dict(with_them - without) == {
        "triton moments": 1, "triton moments_sum": 1, "index_select": 1, "mm": 3,
    }  # fmt: skip


def test_an_update_waits_for_memory_a_few_times(counts: Any) -> None:
    from benchmarks.counting.launches import launches

    features = torch.empty(1, 131072, 320, dtype=torch.float16)
    found = launches(counts.ARCH, lambda: soft_em(features, 256, num_iters=1, backend="triton"))
    (update,) = (launch.arguments for launch in found if launch.name == "update")
    # Parts are loaded so many at a time, and the next ones only then.
    assert update["MASS_PARTS"] <= 2 * update["BLOCK_T"]
    assert update["PARTS"] <= 4 * update["BLOCK_S"]


def test_the_committed_table_is_of_the_committed_figures(counts: Any) -> None:
    results = counts.records.read(counts.OUT)
    assert counts.OUT.with_suffix(".md").read_text() == counts.text(results)


def test_a_repeated_launch_gives_the_kernel_what_the_first_gave(
    counts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.counting.launches import absent_gpu

    launched: list[tuple[Any, ...]] = []

    class Driver(counts.SilentDriver):
        @staticmethod
        def launcher_cls(source: Any, metadata: Any) -> Any:
            # The grid, the stream, the kernel and how it is compiled, and, past what profilers are
            # told, the arguments.
            return lambda *given: launched.append((*given[:6], *given[9:]))

    query, key = torch.zeros(1, 1, 64, 16).half(), torch.zeros(1, 1, 16, 16).half()
    fewer = key[..., :8, :]
    with absent_gpu(counts.ARCH, Driver()):
        outs = [basis_attention(query, key, key, backend="triton") for _ in range(3)]
        basis_attention(query, fewer, fewer, backend="triton")
    first, second, third, other = (
        [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in each]
        for each in launched
    )
    place = first.index(outs[0].data_ptr())
    for later, out in ((second, outs[1]), (third, outs[2])):
        assert later == [*first[:place], out.data_ptr(), *first[place + 1 :]]
    assert other[place + 1 :] != first[place + 1 :]


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 100, 24), torch.float16), ((1, 2, 70, 40), torch.float32)]
)
def test_a_number_of_bases_is_as_many_tokens(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    features = clustered_tokens(shape).to(DEVICE, dtype)
    payload = features[..., :5]
    settings = {"num_iters": 2, "payload": payload, "temperature": 0.5, "backend": backend}
    start = initial_bases(features, 7)
    given = soft_em(features, start, **settings)  # type: ignore[arg-type]
    for empty, proportional in (("mask", True), ("mask", False), ("zero", False)):
        found = attended_bases(
            features,
            7,
            empty=empty,
            proportional=proportional,
            **settings,  # type: ignore[arg-type]
        )
        for one, other in zip(found.found, given, strict=True):
            assert torch.equal(one, other)
        expected = AttendedBases.of(given, dtype, empty=empty, proportional=proportional)
        assert torch.equal(found.bases, expected.bases)
        assert torch.equal(found.payload, expected.payload)
        assert (found.bias is None) == (expected.bias is None)
        if found.bias is not None and expected.bias is not None:
            assert max_error(found.bias, expected.bias) < 1e-6
    with pytest.raises(ValueError, match="bases is 0; it must be a whole number"):
        soft_em(features, 0, backend=backend)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("width", "num_bases"),
    [(16, 2), (176, 2), (16, 300)],
    ids=["one kernel", "two products", "any number of bases"],
)
def test_a_base_of_faint_tokens_has_their_mean(backend: str, width: int, num_bases: int) -> None:
    # Every token gives the last base exp(-20) = 2e-9, which float16 has no number for.
    features = torch.zeros(1, 512, width)
    features[..., 0] = 1.0
    bases = torch.zeros(1, num_bases, width)
    bases[:, 0, 0] = 20.0
    bases[:, 1:-1, 1] = 1.0
    bases[:, 1:-1, 0] = -20.0
    sums, mass, _ = em_statistics(
        features.to(DEVICE, torch.float16),
        bases.to(DEVICE),
        temperature=1.0,
        normalize=False,
        backend=backend,
    )
    assert float(mass[0, -1]) == pytest.approx(512 * 2.06e-9, rel=1e-2)
    assert float(sums[0, -1, 0] / mass[0, -1]) == pytest.approx(1.0, rel=1e-2)


def test_grids_are_for_the_multiprocessors_of_the_gpu(
    counts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.counting import launches

    features = torch.empty(8, 131072, 40, dtype=torch.float16)
    bases = torch.empty(8, 256, 40, dtype=torch.float16)
    query, key = features[None], bases[None]
    wide = torch.empty(1, 131072, 320, dtype=torch.float16)
    calls = {
        "fused_rows": lambda: em_statistics(features, bases, backend="triton"),
        "products": lambda: em_statistics(wide, wide[:, :256], backend="triton"),
        "resident": lambda: basis_attention(query, key, key, backend="triton"),
        "partial_attention": lambda: partial_attention(key, query, query, backend="triton"),
    }

    def programs(kernel: str, multiprocessors: int) -> float:
        monkeypatch.setattr(launches, "MULTIPROCESSORS", multiprocessors)
        found = launches.launches(counts.ARCH, calls[kernel])
        grids = [launch.grid for launch in found if launch.name == kernel]
        return math.prod(grids[0]) / multiprocessors

    # As sm90.json and default.json say, as far as whole tiles go.
    for kernel, each in (("fused_rows", 2), ("products", 1), ("resident", 3)):
        for multiprocessors in (66, 108, 132, 148):
            assert each * 0.8 <= programs(kernel, multiprocessors) <= each, kernel
    for multiprocessors in (66, 132):
        assert programs("partial_attention", multiprocessors) == pytest.approx(4, 0.1)


def test_products_and_sums_are_fused_whatever_tritons_default(counts: Any) -> None:
    from benchmarks.counting.launches import launches

    features = torch.empty(1, 1024, 320, dtype=torch.float16)
    found = launches(counts.ARCH, lambda: soft_em(features, 256, num_iters=2, backend="triton"))
    assert found
    assert all(launch.options["enable_fp_fusion"] is True for launch in found)


@pytest.mark.parametrize(("arch", "alike"), [(103, "sm100"), (121, "sm120"), (87, "default")])
def test_gpus_take_the_table_of_their_family(
    counts: Any, arch: int, alike: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stem_kernels.triton import tuning

    monkeypatch.setattr(tuning, "device_capability", lambda _: divmod(arch, 10))
    found = tuning.tiles("basis_attention", torch.device("cuda"))
    assert found == tuning.table(alike)["basis_attention"]


def test_video_attention_launches_what_its_counted_table_says(counts: Any) -> None:
    from benchmarks import records
    from benchmarks.counting import video, video_report

    for form, rows in records.read(video_report.OUT)["rows"].items():
        launched, of_torch = video.recorded_launches(form)
        committed = {row["kernel"]: row["launches"] for row in rows}
        # A sort has two results, and is not among torch's kernels that are counted one by one.
        assert sum(of_torch.values()) + ("sort" not in of_torch) == committed.pop("torch")
        assert Counter(launch.name for launch in launched) == committed
