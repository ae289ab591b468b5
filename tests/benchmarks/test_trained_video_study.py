"""The study of forms of attention on trained weights: the forms, and what it measures."""

from __future__ import annotations

import statistics
from functools import partial

import pytest
import torch

import stem
from benchmarks import records
from benchmarks.studies.video_transformers import forms, trained
from benchmarks.studies.video_transformers.trained_table import mean_error, table
from stem.flow import EmbeddedVideoModel
from stem.flow.loading import EMBEDDED_VIDEO_FOLDER

GRID = (3, 4, 5)


def layer() -> forms.Layer:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 60, 8, generator=generator)
    return forms.Layer(query, key, value, GRID)


WHOLE = {
    "window": partial(forms.windowed, window=5),
    "window alone": partial(forms.window_alone, window=5),
    "bases": partial(forms.bases_alone, per_base=1),
    "radial": partial(forms.radial, width=100.0),
    "clusters": partial(forms.best_clusters, share=1.0, rest=False, per_base=4),
    "clusters by error": partial(
        forms.best_clusters, share=1.0, rest=True, by_error=True, per_base=4
    ),
    "clusters and means": partial(forms.best_clusters, share=1.0, rest=True, per_base=4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_forms_that_leave_nothing_out_are_exact(name: str) -> None:
    whole, taken = layer(), layer()
    out = WHOLE[name](taken)
    assert torch.allclose(out, forms.exact(whole), atol=1e-5)
    assert taken.flops >= whole.flops == 1.0


def test_the_rest_of_the_clusters_counts_by_its_means() -> None:
    tokens = layer()
    wanted = forms.exact(tokens)

    def off(rest: bool) -> float:
        return float((forms.best_clusters(tokens, 0.3, rest=rest, per_base=4) - wanted).norm())

    assert off(True) < 0.7 * off(False)


def test_radial_reaches_half_as_far_at_twice_the_distance() -> None:
    query, key, value = torch.randn(3, 1, 1, 32, 8)
    tokens = forms.Layer(query, key, value, (8, 2, 2))
    forms.radial(tokens, sink=False)
    # Of two frames of 4 tokens 16 pairs at distances 0 and 1, 10 at 2 and 3, 4 beyond.
    seen = 8 * 16 + 2 * (7 * 16 + (6 + 5) * 10 + (4 + 3 + 2 + 1) * 4)
    assert tokens.flops == pytest.approx(seen / 32**2)


def test_it_measures_with_the_shipped_form(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: forms.FORMS[name] for name in trained.SAMPLED[1:]}
    monkeypatch.setattr(trained, "FORMS", few)
    parts = EmbeddedVideoModel(EMBEDDED_VIDEO_FOLDER)
    size = trained.Size(
        (1,),
        clips=1,
        samples=1,
        sampling_steps=1,
        taken_apart=1,
        inverted=1,
        inversion_steps=1,
    )
    results = trained.measure(parts, size)
    row = results["velocity, 1 frames"][forms.DEFAULTS]
    latents = torch.randn(1, 12, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    call = (
        latents,
        torch.tensor([600.0]),
        parts.conditions("a red ball rests")["encoder_hidden_states"],
    )
    with torch.no_grad(), trained.with_form(parts.transformer, forms.windowed):
        ours = parts.transformer(*call).sample
    with torch.no_grad(), stem.enabled(parts.transformer, stem.VideoConfig()):
        shipped = parts.transformer(*call).sample
    assert torch.equal(ours, shipped)
    assert 0 < row["errors"][0][1] < 0.5
    assert [len(block["heads"]) for block in results["blocks"]] == [4] * 4
    assert all(0 < part <= 1 for block in results["blocks"] for part in block["keys"])
    assert set(results["inversions"]) == {
        f"{form}, {solver}" for form in trained.INVERTED for solver in trained.SOLVERS
    }
    text = table(results)
    assert text.count(f"| {forms.DEFAULTS} |") == 2


def test_the_committed_figures_are_what_was_asked_for() -> None:
    results = records.read(trained.OUT)
    of_velocity = results["velocity, 16 frames"]
    ours = of_velocity[forms.DEFAULTS]
    assert ours["flops"] <= 0.12
    assert mean_error(ours) <= 0.04
    for name in ("no moments", "window alone", "bases alone", "best clusters, rest by means"):
        assert mean_error(ours) < mean_error(of_velocity[name]) / 1.3
    decibels = {
        name: statistics.fmean(row["psnr"] for row in rows)
        for name, rows in results["samples"].items()
    }
    *ours, rival = (decibels[name] for name in trained.SAMPLED[1:])
    assert min(ours) >= max(32, rival + 3)
    exact, defaults, _ = (
        statistics.fmean(results["inversions"][f"{form}, midpoint"]["latents"])
        for form in trained.INVERTED
    )
    assert exact - defaults <= 1.5
