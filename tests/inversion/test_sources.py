"""What a model is loaded from: texts of files with scales and words, and their kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stem.sources import ModelError, ModelSource, embedding_of, lora_of


def test_scales_and_words_behind_files() -> None:
    assert lora_of("a/style.safetensors") == (Path("a/style.safetensors"), 1.0)
    assert lora_of("a:b.safetensors:-0.7") == (Path("a:b.safetensors"), -0.7)
    assert embedding_of("cat.safetensors") == (Path("cat.safetensors"), None)
    assert embedding_of("cat.safetensors:<a:b>") == (Path("cat.safetensors"), "<a:b>")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("style.safetensors:", "its scale '' is no number; write FILE:SCALE"),
        ("style.safetensors:strong", "its scale 'strong' is no number"),
        ("style.safetensors:0.7:1", "its scale '0.7:1' is no number"),
        ("style.safetensors:inf", "its scale 'inf' is no number"),
        ("style.safetensors:nan", "its scale 'nan' is no number"),
        ("style.pt:0.7", r"is 'style.pt:0.7'; it takes a .safetensors file, or FILE.*:SCALE"),
        ("style", "it takes a .safetensors file"),
    ],
)
def test_loras_that_are_written_wrong(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSource("embedded", loras=(text,)).check()


def test_words_that_are_written_wrong() -> None:
    for text, token in {"cat.safetensors:": "", "cat.safetensors:two words": "two words"}.items():
        with pytest.raises(ModelError, match=f"its token '{token}' is no single word"):
            embedding_of(text)
    with pytest.raises(ModelError, match=r"FILE.safetensors:TOKEN. Other files .* pickles"):
        embedding_of("cat.pt")


def test_files_of_another_kind_than_their_option_takes(tmp_path: Path) -> None:
    names = {
        "whole": {
            "model.diffusion_model.input_blocks.0.0.weight": (3, 4, 3, 3),
            "cond_stage_model.transformer.text_model.final_layer_norm.bias": (3,),
        },
        "unet of a whole": {"model.diffusion_model.input_blocks.0.0.weight": (3, 4, 3, 3)},
        "inpainting": {"model.diffusion_model.input_blocks.0.0.weight": (3, 9, 3, 3)},
        "flux": {"model.diffusion_model.double_blocks.0.img_mod.lin.weight": (3, 4)},
        "lora": {"unet.down_blocks.0.attn1.to_q.lora_A.weight": (2, 3)},
        "vae": {"first_stage_model.decoder.conv_in.weight": (3, 4, 3, 3)},
        "word": {"<cat>": (2, 16)},
        "unet": {"down_blocks.0.resnets.0.conv1.weight": (3, 3, 3, 3)},
        "empty": {},
    }
    paths = {}
    for name, shapes in names.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, paths[name])
    lora, word = (paths["lora"],), (paths["word"],)
    for source in (
        ModelSource(paths["whole"], vae=paths["vae"], loras=lora, textual_inversions=word),
        ModelSource("embedded", vae="some/hub-id"),
    ):
        source.check()
    wrong = {
        ModelSource(paths["whole"]): "whole.safetensors' holds no VAE; name the one",
        ModelSource(paths["unet of a whole"]): r"holds no text encoder \(no cond_stage_model",
        ModelSource(paths["inpainting"]): "takes 9 channels: it is made for inpainting",
        ModelSource(paths["flux"]): "holds no UNet of Stable Diffusion",
        ModelSource(
            paths["lora"]
        ): r"is a LoRA, and --model .* takes a whole model; pass it with --l",
        ModelSource(paths["vae"]): r"is a VAE, and --model .*; pass it with --vae \(vae\)",
        ModelSource(paths["unet"]): r"is of another kind \(its first tensor is 'down_blocks.0.res",
        ModelSource(paths["empty"]): "is empty, and --model",
        ModelSource("embedded", vae=paths["word"]): "is a textual inversion, and --vae",
        ModelSource("embedded", loras=word): "is a textual inversion, and --lora",
        ModelSource("embedded", textual_inversions=lora): "is a LoRA, and --textual-inversion",
        ModelSource(
            "embedded", loras=("gone.safetensors:2",)
        ): "no file 'gone.safetensors' for --l",
        ModelSource("embedded", vae="gone.safetensors"): "no file 'gone.safetensors' for --vae",
        ModelSource("embedded", variant="fp16"): "the model 'embedded' has no variants",
        ModelSource("embedded", config="a/b"): "the model 'embedded' has its own: --model-config",
    }
    for source, message in wrong.items():
        with pytest.raises(ModelError, match=message):
            source.check()
    for cut in (b"", b"no weights at all", Path(paths["lora"]).read_bytes()[:-1]):
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(ModelError, match=r"cut.safetensors' is damaged.* for --lora"):
            ModelSource("embedded", loras=(f"{tmp_path}/cut.safetensors",)).check()


def test_records_are_sources_again() -> None:
    plain = ModelSource("some/hub-id")
    assert plain.record() == "some/hub-id"
    full = ModelSource("a.safetensors", config="b", loras=("c.safetensors:2",))
    record = {"name": "a.safetensors", "config": "b", "loras": ["c.safetensors:2"]}
    assert full.record() == record
    for source in (plain, full):
        assert ModelSource.of(source.record()) == source
    assert str(full) == "'a.safetensors' with config b, loras c.safetensors:2"
    for wrong in (3, {"loras": []}, {"name": "a", "lora": ["b"]}):
        with pytest.raises(TypeError, match="it must be a name, or a mapping of a name and"):
            ModelSource.of(wrong)  # type: ignore[arg-type]
