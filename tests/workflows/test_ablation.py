"""Ablations: each option's values, measured once, and gone on with after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commands import run
from inversions import clip
from PIL import Image
from pipelines import make_pipeline

import stem
from stem import StemConfig
from stem.diffusion.pipeline import decode_latents, encode_frames
from stem.inversion import round_trip
from stem.metrics import psnr, ssim
from stem.report.documents import ReportError
from stem.report.pages.contents import read_report
from stem.workflows import ablation
from stem.workflows.ablation_plan import FORMS, OPTIONS, base_config, variants_of
from stem.world import render, sample_scene

PLAIN: dict[str, Any] = {"options": {"num_bases": 8, "calibration": "none"}}


def ablated(out: Path, *only: str, **settings: Any) -> ablation.Ablation:
    settings = {"num_steps": 2, "progress": False, "options": {"num_bases": 8}, **settings}
    return stem.ablate(make_pipeline(), clip(), "a duck", out, only, **settings)


def test_every_option_of_the_specification_is_changed_alone() -> None:
    base = StemConfig(num_frames=3)
    assert list(OPTIONS["K"]) == ["16", "32", "64", "128", "256", "512"]
    assert list(OPTIONS["R"]) == ["1", "2", "3", "5", "8"]
    fields = {
        **{"K": "num_bases", "R": "num_iters", "sample": "sample_per_base"},
        **{"space": "space", "init": "init"},
        **{"empty": "empty", "proportional": "proportional", "calibration": "calibration"},
    }
    found = variants_of(base, list(OPTIONS))
    for option, field in fields.items():
        configs = [config for (name, _), config in found.items() if name == option]
        assert len({getattr(config, field) for config in configs}) == len(OPTIONS[option])
        for config in configs:
            assert dataclasses.replace(config, **{field: getattr(base, field)}) == base
        assert base in configs
    for form, make in FORMS.items():
        assert found["form", form] == make(num_frames=3)
    paper = base_config("paper", {"num_bases": 32}, 3)
    assert paper == StemConfig.paper(num_bases=32, num_frames=3)


def test_the_figures_are_those_of_the_round_trip(tmp_path: Path) -> None:
    found = ablated(tmp_path, "space")
    latents = encode_frames(make_pipeline(), clip().frames)
    for row in found.rows:
        config = StemConfig(num_bases=8, space=row.value, num_frames=3)
        back = round_trip(make_pipeline(), latents, "a duck", 2, config)
        decoded = decode_latents(make_pipeline(), back)
        assert row.psnr == pytest.approx(psnr(decoded, clip().frames))
        assert row.ssim == pytest.approx(ssim(decoded, clip().frames))
        assert row.latent_error == pytest.approx(float((back - latents).norm() / latents.norm()))
        assert row.seconds > 0
        assert row.is_base == (row.value == "feature")
        assert row.config["space"] == row.value
        assert row.config["num_bases"] == 8


def test_an_interrupted_ablation_goes_on_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[StemConfig] = []
    forms = ["none", "moments", "linear", "joint"]
    measure = ablation.measure_config

    def counting(
        pipeline: Any, video: Any, latents: Any, prompt: str, config: Any, *rest: Any
    ) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(config)
        return measure(pipeline, video, latents, prompt, config, *rest)

    monkeypatch.setattr(ablation, "measure_config", counting)
    with pytest.raises(KeyboardInterrupt):
        ablated(tmp_path, "calibration", **PLAIN)
    (file,) = tmp_path.glob("*/ablation.json")
    assert [row["value"] for row in json.loads(file.read_text())["rows"]] == forms[:3]
    with pytest.raises(ReportError, match=r"but not ablation\.png; run the command again"):
        read_report(file)
    measured.clear()
    found = ablated(tmp_path, "calibration", "proportional", **PLAIN)
    # "on" is what "none" is, and "moments" and "linear" are there already.
    assert [config.calibration for config in measured] == ["none", "joint"]
    assert [config.proportional for config in measured] == [False, True]
    assert [row.value for row in found.rows] == ["on", "off", *forms]
    by_value = {row.value: row for row in found.rows}
    assert by_value["on"].seconds == by_value["none"].seconds
    assert found.json == file
    before = file.read_bytes()
    measured[:] = [StemConfig()] * 3  # any other is an interruption
    assert ablated(tmp_path, "calibration", **PLAIN).rows == found.rows[2:]
    assert file.read_bytes() == before
    assert Image.open(found.plot).size[0] > 1000
    with pytest.raises(KeyboardInterrupt):
        ablated(tmp_path, "space", **PLAIN)
    with pytest.raises(ReportError, match="are not those that it was written with"):
        read_report(file)  # the plot lacks "feature", which is what "none" is
    with pytest.raises(KeyboardInterrupt):
        ablated(tmp_path, "calibration", num_steps=4, **PLAIN)  # not those of two steps
    file.write_text("{")
    with pytest.raises(ValueError, match=r"ablation\.json is damaged .*; remove it"):
        ablated(tmp_path, "calibration", **PLAIN)


def test_what_cannot_be_ablated_is_said_before_any_work(tmp_path: Path) -> None:
    for only, settings, reason in (
        (("depth",), {}, "options to change: depth; take one or more of K, R"),
        ((), {}, "options to change: none"),
        (("K",), {"form": "mine"}, "form is 'mine'; it must be one of defaults"),
        (("K",), {"options": {"num_iters": 0}}, "num_iters is 0"),
        (("K",), {"num_steps": 3}, "do not divide"),
        (("K",), {"chunk": "some"}, "chunk is 'some'"),
    ):
        with pytest.raises(ValueError, match=reason):
            ablated(tmp_path, *only, **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table_and_writes_figures_and_plot(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "clip.mp4"
    stem.write_video(video, render(sample_scene(1), 2, 32).frames, 8)
    arguments = [
        *("ablate", str(video), "--steps", "2", "--only", "init,proportional"),
        *("--form", "paper", "--option", "stem.num_bases=8", "--out", str(tmp_path / "out")),
    ]
    assert run(*arguments) == 0
    (folder,) = (tmp_path / "out").iterdir()
    printed = capfd.readouterr().out
    for part in ("gaussian *", "tokens", "on", "off *", "PSNR dB", f"{folder}/ablation.png\n"):
        assert part in printed
    document = json.loads((folder / "ablation.json").read_text())
    assert document["base"]["init"] == "gaussian"
    assert document["base"]["num_bases"] == 8
    assert document["model"] == "embedded"
    assert {row["option"] for row in document["rows"]} == {"init", "proportional"}
    assert run("report", str(folder)) == 0
    assert 'src="data:image/png;base64,' in (folder / "report.html").read_text()
    report = read_report(folder)
    (section,) = report.sections
    assert (report.kind, report.facts[0]) == ("Ablation", "2 frames, 32×32")
    assert section.pictures[0].png == (folder / "ablation.png").read_bytes()
    names, psnr, *_ = zip(*section.tables[0].rows, strict=True)
    assert names == (
        "init = gaussian *",
        "init = tokens",
        "proportional = on",
        "proportional = off *",
    )
    assert list(psnr) == [f"{row['psnr']:.2f}" for row in document["rows"]]
    assert ("num bases", "8") in section.details["Settings"]["What the options are changes of"]
    assert run(*arguments, "--only", "init,depth") == 2
    assert "options to change: depth" in capfd.readouterr().err
