"""Models in one file with LoRAs, a VAE and words, from the command line: recorded, found again."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from checkpoints import vae_tensors, write_checkpoint, write_embedding, write_lora
from commands import run
from packaging.version import Version
from pipelines import make_pipeline
from safetensors.torch import save_file

from stem import cli
from stem.inversion import InversionFolder

pytestmark = [
    pytest.mark.usefixtures("here"),
    pytest.mark.skipif(
        Version(diffusers.__version__) < Version("0.39"),
        reason="one-file models need diffusers 0.39",
    ),
]
MODEL = ("--model", "one.safetensors", "--model-config", "base", "--vae", "vae.safetensors")
LORA = ("--lora", "style.safetensors:0.7")
ADDED = (*MODEL, *LORA, "--textual-inversion", "cat.safetensors")
SHORT = ("--steps", "2", "--size", "16x16", "--prompt", "a <cat>")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    write_checkpoint(folder / "one.safetensors", pipeline)
    write_lora(folder / "style.safetensors")
    write_lora(folder / "other.safetensors", seed=1)
    write_lora(folder / "xl.safetensors", "sdxl")
    write_embedding(folder / "cat.safetensors")
    vae = {key: 1.01 * value.contiguous() for key, value in vae_tensors(pipeline.vae).items()}
    save_file(vae, folder / "vae.safetensors")
    return folder


def inverted(video: str, *arguments: str, out: str = "out") -> InversionFolder:
    assert run("invert", video, *arguments, *SHORT, "--out", out) == 0
    (folder,) = Path(out, "inversions").iterdir()
    return InversionFolder.open(folder)


def test_an_inversion_finds_its_model_again(video: str, here: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    inversion = inverted(video, *ADDED)
    recorded = inversion.settings["model"]
    assert {key: value for key, value in recorded.items() if not key.endswith("_sha256")} == {
        "name": "one.safetensors",
        "config": "base",
        "vae": "vae.safetensors",
        "loras": ["style.safetensors:0.7"],
        "textual_inversions": ["cat.safetensors"],
    }
    assert run("reconstruct", str(inversion.path)) == 0
    edit = ("edit", str(inversion.path), "--prompt", "a red <cat>", "--method", "sdedit")
    assert run(*edit, "--out", "edits") == 0
    (document,) = here.glob("edits/*/edit.json")
    assert json.loads(document.read_text())["inversion_settings"]["model"] == recorded
    capfd.readouterr()

    for other in ("style.safetensors:0.8", "other.safetensors:0.7"):
        for command in (("reconstruct", str(inversion.path)), (*edit, "--method", "pnp")):
            assert run(*command, "--lora", other) == 2
            printed = " ".join(capfd.readouterr().err.split())
            assert "was made with the model 'one.safetensors' with config base" in printed
            assert (
                "loras style.safetensors:0.7, textual inversions cat.safetensors, whose" in printed
            )
            assert "differ from this pipeline's" in printed

    Path("style.safetensors").rename("moved.safetensors")
    assert run("reconstruct", str(inversion.path)) == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert "and there is no file 'style.safetensors' for --lora (loras)" in printed
    Path("one.safetensors").rename("two.safetensors")
    found = ("--model", "two.safetensors", "--lora", "moved.safetensors:0.7")
    assert run("reconstruct", str(inversion.path), *found) == 0
    # The folder that the file was made of is the same model.
    found = ("--model", "base", "--lora", "moved.safetensors:0.7")
    assert run("reconstruct", str(inversion.path), *found) == 0


def test_an_interrupted_inversion_goes_on_with_the_same_lora_only(video: str) -> None:
    whole = inverted(video, *ADDED)
    part = inverted(video, *ADDED, out="part")
    (last,) = part.path.glob("steps/001-*.safetensors")
    expected = whole.latents(1)
    last.unlink()
    assert InversionFolder.open(part.path).steps_done == 1
    assert run("invert", video, *MODEL, "--lora", "other.safetensors", *SHORT, "--out", "part") == 0
    assert InversionFolder.open(part.path).steps_done == 1
    assert len(list(part.path.parent.iterdir())) == 2
    assert run("invert", video, *ADDED, *SHORT, "--out", "part") == 0
    assert torch.equal(InversionFolder.open(part.path).latents(1), expected)


def test_comparisons_and_pages_say_what_the_model_is_made_of(video: str, here: Path) -> None:
    arguments = ("--methods", "ddim", "--steps", "2", "--size", "16x16", "--out", "out")
    assert run("compare", video, *ADDED, *arguments) == 0
    (document,) = here.glob("out/*/compare.json")
    assert json.loads(document.read_text())["model"]["loras"] == ["style.safetensors:0.7"]
    assert run("report", str(document.parent)) == 0
    (page,) = document.parent.glob("*.html")
    assert "style.safetensors:0.7" in page.read_text()


def test_a_config_file_has_these_options_too(video: str, here: Path) -> None:
    Path("run.yaml").write_text(
        "model: one.safetensors\nmodel-config: base\nlora: [style.safetensors:0.7]\n"
    )
    inversion = inverted(video, "--config", "run.yaml")
    assert inversion.settings["model"]["loras"] == ["style.safetensors:0.7"]


def test_every_command_that_loads_a_model_has_the_options() -> None:
    from typer.main import get_command

    options = ("model", "variant", "model_config", "vae", "lora", "textual_inversion")
    with_model = set()
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        names = {parameter.name for parameter in command.params}
        if "model" in names and name != "app":  # which hands its models to these commands
            with_model.add(name)
            assert names.issuperset(options), name
    assert with_model == {
        *("ablate", "analyse", "compare", "demo", "edit", "evaluate", "invert", "reconstruct")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*MODEL, "--lora", "style.safetensors:much"), "its scale 'much' is no number"),
        ((*MODEL, "--lora", "gone.safetensors"), "there is no file 'gone.safetensors' for --lora"),
        ((*MODEL, "--lora", "cat.safetensors"), "is a textual inversion, and --lora"),
        (("--vae", "gone.safetensors"), "there is no file 'gone.safetensors' for --vae"),
        (
            ("--textual-inversion", "gone.safetensors"),
            "there is no file 'gone.safetensors' for --t",
        ),
        (("--model", "gone.safetensors"), "there is no file 'gone.safetensors' for --model"),
        (
            ("--model", "gone.ckpt"),
            "there is no file 'gone.ckpt' here; --model takes a .safetensors",
        ),
        (("--variant", "fp16"), "the model 'embedded' has no variants"),
    ],
)
def test_mistakes_are_found_before_the_video_is_read(  # type: ignore[no-untyped-def]
    arguments: tuple[str, ...], message: str, loads: list[str], capfd
) -> None:
    for command in ("invert", "compare"):
        assert run(command, "absent.mp4", *arguments) == 2
        printed = capfd.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert loads == []


def test_a_lora_for_another_model_is_one_line(video: str, here: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    capfd.readouterr()
    assert run("invert", video, *MODEL, "--lora", "xl.safetensors", *SHORT) == 2
    printed = capfd.readouterr().err
    assert "'xl.safetensors' is no LoRA for this model" in printed
    assert printed.count("\n") == 1
    assert not list(here.glob("out/inversions/*"))
