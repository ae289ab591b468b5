"""`stem list`, `verify` and `clean`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run
from inversions import inverted

from stem.storage import partial_name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One whole inversion, and one that was interrupted after two of five steps."""
    inverted(tmp_path / "inversions")
    unfinished = inverted(tmp_path / "inversions", method="ddim").path
    for file in sorted((unfinished / "steps").iterdir())[2:]:
        file.unlink()
    return tmp_path


def folders(root: Path) -> tuple[Path, Path]:
    (unfinished,), (whole,) = ((root / "inversions").glob(f"{name}-*") for name in ("ddim", "stem"))
    return whole, unfinished


def test_list(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, unfinished = folders(root)
    (root / ".editor").mkdir()
    (root / ".editor" / "settings.json").write_text("{}")
    assert run("list", str(root)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[::2][:2] == [str(unfinished), str(whole)]
    assert lines[1].startswith("  ddim, 2 of 5 steps, 3 frames of 24x16, ")
    assert lines[3].startswith("  stem, 5 of 5 steps, 3 frames of 24x16, ")
    assert lines[3].endswith(" KiB, prompt 'a duck'")
    assert lines[4].startswith("inversions: 2, ")
    (unfinished / "settings.json").write_text("{}")
    assert run("list", str(root)) == 0
    assert f"  damaged: {unfinished}/settings.json is damaged" in capfd.readouterr().out
    assert run("list", str(whole / "steps")) == 0
    assert capfd.readouterr().out == "inversions: 0, 0.0 KiB\n"
    assert run("list", str(root / "absent")) == 2
    assert f"{root}/absent is no folder; name an inversion's" in capfd.readouterr().err


def test_verify(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, unfinished = folders(root)
    assert run("verify", str(root)) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"unfinished: {unfinished} has 2 of 5 steps",
        f"whole: {whole}",
    ]
    flipped, absent = sorted((whole / "steps").iterdir())[1:3]
    content = bytearray(flipped.read_bytes())
    content[-40] ^= 1
    flipped.write_bytes(content)
    absent.unlink()
    assert run("verify", str(whole)) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(f"damaged: {flipped} is damaged")
    assert lines[1] == f"damaged: {absent} is missing"
    assert lines[-1].startswith("mend them: run the commands again")
    inverted(root / "inversions")
    assert run("verify", str(whole)) == 0


def test_verify_finds_what_lost_its_settings(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, unfinished = folders(root)
    (whole / "settings.json").unlink()
    settings = unfinished / "settings.json"
    settings.write_text(settings.read_text().replace("a duck", "a goose"))
    assert run("verify", str(root)) == 1
    printed = capfd.readouterr().out
    assert f"damaged: {whole} holds no settings.json" in printed
    assert f"damaged: {settings} was edited" in printed


def test_clean(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, unfinished = folders(root)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = whole / f".x0.safetensors.{ended.pid}.partial"
    stale.write_bytes(b"half")
    at_work = partial_name(whole / "x0.safetensors")
    at_work.write_bytes(b"half")
    assert run("clean", str(root)) == 0
    assert capfd.readouterr().out.splitlines() == [f"removed: {stale}, 4 bytes", "freed: 4 bytes"]
    assert at_work.exists()
    # a run may still be at it
    assert run("clean", str(root), "--incomplete") == 0
    assert f"stays, for a run may be at it: {unfinished}" in capfd.readouterr().out
    old = time.time() - 4000
    for path in (unfinished, *unfinished.rglob("*")):
        os.utime(path, (old, old))
    assert run("clean", str(root), "--incomplete") == 0
    assert f"removed: {unfinished}, " in capfd.readouterr().out
    assert not unfinished.exists()
    assert run("clean", str(whole), "--incomplete") == 0
    assert whole.is_dir()


def test_clean_by_name(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, unfinished = folders(root)
    assert run("clean", str(unfinished), "--incomplete") == 0
    assert not unfinished.exists()
    shutil.copytree(whole, root / "renamed")
    capfd.readouterr()
    assert run("clean", str(root), "--incomplete") == 0
    assert f"stays, for it is damaged: {root}/renamed/settings.json" in capfd.readouterr().out
    assert (root / "renamed").is_dir()
