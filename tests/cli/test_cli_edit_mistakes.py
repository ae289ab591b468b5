"""What `stem edit` refuses before it loads a model, and what it says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run


@pytest.fixture
def loads(inversion: str, loads: list[str]) -> list[str]:
    """Those of conftest, once there is the inversion, which loads one and is made by whichever
    test comes first."""
    return loads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--prompt'"),
        (["--prompt", " "], "a prompt is ' '; describe the whole edited video"),
        (["--prompt", "a", "--prompt", "a"], "prompts holds 'a' twice"),
        (["--prompt", "\udcff"], r"'\udcff' is not UTF-8"),
        (["--prompt", "a", "--method", "stem"], "'stem'; take one or more of pnp, "),
        (["--prompt", "a", "--guidance", "-1"], "guidance is -1.0; it must be a finite number"),
        (["--prompt", "a", "--seed", f"{2**63}"], "it must be a whole number of 64 bits"),
        (["--prompt", "a", "--option", "fusion.bases=3"], "fusion has no option 'bases'"),
        (["--prompt", "a", "--option", "pnp.blend=3"], "with a method of fusion"),
        (["--prompt", "a", "--option", "fusion.preset={"], "its value is not YAML"),
        (["--prompt", "a", "--method", "pnp", "--preset", "shape"], "is no preset of pnp: "),
        (
            ["--prompt", "a", "--preset", "shape", "--option", "fusion.preset=colour"],
            "'shape', and --option says fusion.preset=colour; give one of them",
        ),
        (["--prompt", "a", "--zoom", "--method", "pnp"], "the mask of fusion; pnp has none"),
        (["--prompt", "a", "--zoom", "--preset", "style"], "which these options turn off"),
        (["--prompt", "a", "--zoom", "--edit-control", "b"], "a window has no control"),
        (["--prompt", "a", "--zoom-source", "b"], "it describes the window of --zoom"),
        (["--prompt", "a", "--zoom-prompt", "b"], "it describes the window of --zoom"),
        (
            ["--prompt", "a", "--prompt", "b", "--zoom", "--zoom-prompt", "c"],
            "zoom_prompts are 1 and prompts 2; give one for each",
        ),
        (
            ["--prompt", "a", "--zoom", "--zoom-prompt", " "],
            "a zoom_prompt is ' '; describe the edited video as its window",
        ),
        (["--prompt", "a", "--device", "abacus"], "device is 'abacus'; write cpu, cuda"),
        (["--prompt", "a", "--out", "FILE/below"], "is a file, not a folder"),
    ],
)
@pytest.mark.parametrize("source", ["video", "inversion"])
def test_mistakes_are_found_before_a_model_is_loaded(
    source: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    loads: list[str],
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    path = request.getfixturevalue(source)
    file = tmp_path / "FILE"
    file.touch()
    loads.clear()
    arguments = [text.replace("FILE", str(file)) for text in arguments]
    assert run("edit", path, "--out", str(tmp_path / "out"), *arguments) == 2
    printed = capfd.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert loads == []
    assert run("edit", path, "--out", str(tmp_path / "out"), "--prompt", "a blue ball") == 2
    assert loads == ["embedded"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--frames", "2"),
        ("--size", "32"),
        ("--steps", "2"),
        ("--chunk", "1"),
        ("--inversion", "ddim"),
        ("--source-prompt", "a"),
    ],
)
def test_what_an_inversion_has_settled_is_refused(
    inversion: str,
    tmp_path: Path,
    arguments: tuple[str, str],
    loads: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    loads.clear()
    command = ["edit", inversion, "--prompt", "a", "--out", str(tmp_path)]
    assert run(*command, *arguments) == 2
    assert f"{arguments[0]}: it belongs to an inversion" in capfd.readouterr().err
    config = tmp_path / "edit.yaml"
    config.write_text(f"{arguments[0][2:]}: {arguments[1]}\n")
    assert run(*command, "--config", str(config)) == 2
    assert f"{arguments[0]}: it belongs to an inversion" in capfd.readouterr().err
    assert loads == []


def test_mistakes_of_places_and_processes(
    video: str,
    inversion: str,
    tmp_path: Path,
    loads: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loads.clear()
    prompt = ("--prompt", "a blue ball", "--out", str(tmp_path / "out"))
    assert run("edit", str(tmp_path / "absent.mp4"), *prompt) == 2
    assert "absent.mp4: no such file" in capfd.readouterr().err
    assert run("edit", str(tmp_path), *prompt) == 2
    assert "holds no settings.json" in capfd.readouterr().err
    assert run("edit", inversion, *prompt, "--option", "ddim.x=1") == 2
    assert "with a method of fusion" in capfd.readouterr().err
    assert run("edit", video, *prompt, "--option", "stem.bases=3") == 2
    assert "stem has no option 'bases'" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_239))
        assert run("edit", inversion, *prompt) == 2
    assert "needs 10,240 bytes, and 10,239 are free" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("evaluate", str(tmp_path), str(tmp_path)) == 2
    said = capfd.readouterr().err
    assert "stem evaluate BENCHMARK runs in one process, and WORLD_SIZE is 2" in said
    assert loads == []
