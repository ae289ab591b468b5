"""Attention by a window and bases in video transformers: exact in the limit, and off to the bit."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from pipelines import make_unet
from transformers_of_video import (
    FRAMES,
    HEADS,
    PIXELS,
    SIDE,
    TRANSFORMERS,
    arguments_of,
    call,
    make_transformer,
)

import stem
from stem import StemConfig, VideoConfig
from stem.attention import Hooks

TOKENS = FRAMES * SIDE * SIDE
FEW = VideoConfig(tokens_per_base=8)
EXACT = VideoConfig(tokens_per_base=1)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach(), exact.detach()
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module", params=TRANSFORMERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return make_transformer(name)


@pytest.mark.parametrize(
    "config",
    [
        EXACT,
        VideoConfig(window=2 * SIDE, tokens_per_base=8),
        VideoConfig(window=0, tokens_per_base=16, dense_heads=99),
    ],
    ids=str,
)
def test_all_tokens_or_all_places_are_the_model_s_own(
    model: Any, name: str, config: VideoConfig
) -> None:
    own = call(model, name, videos=2)
    with stem.enabled(model, config) as handle:
        assert handle.active
        assert off(call(model, name, videos=2), own) < 1e-5


def test_it_is_on_and_then_off_to_the_bit(model: Any, name: str) -> None:
    own, processors = call(model, name), dict(model.attn_processors)
    handle = stem.enable(model, FEW)
    found = call(model, name)
    assert 1e-3 < off(found, own) < 0.1
    assert torch.equal(call(model, name), found)
    replaced = [key for key, value in model.attn_processors.items() if processors[key] is not value]
    assert len(replaced) == TRANSFORMERS[name].layers
    with stem.enabled(model, EXACT):
        assert off(call(model, name), own) < 1e-5
    assert handle.active
    assert torch.equal(call(model, name), found)
    handle.disable()
    assert not handle.active
    assert all(model.attn_processors[key] is value for key, value in processors.items())
    assert torch.equal(call(model, name), own)


def test_videos_of_a_batch_have_bases_of_their_own(model: Any, name: str) -> None:
    both = arguments_of(name, videos=2)
    with stem.enabled(model, FEW):
        found = model(**both).sample
        for video in range(2):
            alone = {
                key: value[video : video + 1]
                if isinstance(value, torch.Tensor) and value.shape[0] == 2
                else value
                for key, value in both.items()
            }
            assert off(model(**alone).sample, found[video : video + 1]) < 1e-5


def test_each_layer_says_what_it_does(model: Any, name: str) -> None:
    own = call(model, name)
    with stem.enabled(
        model, VideoConfig(window=1, tokens_per_base=8, dense_blocks=(-1,))
    ) as handle:
        assert [line.partition(": ")[2] for line in handle.report()] == ["no call yet"] * 2
        assert off(call(model, name), own) > 1e-4
        first, last = handle.report()
    assert first.endswith(
        f"window of 9 places in {FRAMES} frames of {SIDE}x{SIDE}, 6 bases for {TOKENS} tokens, "
        "correction moments"
    )
    assert last.endswith("dense: block 1 is one of dense_blocks")
    with stem.enabled(model, VideoConfig(dense_below=TOKENS)) as handle:
        assert torch.equal(call(model, name), own)
    assert f"{TOKENS} tokens are no more than dense_below={TOKENS}" in handle.state.described(0)


def test_masked_text_is_not_seen() -> None:
    model = make_transformer("hunyuan")
    arguments = arguments_of("hunyuan", videos=2)
    with stem.enabled(model, FEW):
        found = model(**arguments).sample
        arguments["encoder_hidden_states"][1, 4:] = 7.0
        assert torch.equal(model(**arguments).sample[1], found[1])
        arguments["encoder_hidden_states"][1, :4] = 7.0
        assert not torch.equal(model(**arguments).sample[1], found[1])


def test_noise_levels_at_which_it_is_on() -> None:
    model = make_transformer("wan")
    timesteps = {level: torch.tensor([1000.0 * level]) for level in (0.95, 0.5, 0.1)}
    own = {level: call(model, "wan", timestep=timestep) for level, timestep in timesteps.items()}
    with stem.enabled(model, VideoConfig(tokens_per_base=8, start=0.9, end=0.2)) as handle:
        found, said = {}, {}
        for level, timestep in timesteps.items():
            found[level] = call(model, "wan", timestep=timestep)
            said[level] = handle.report()[0]
    assert [torch.equal(found[level], own[level]) for level in timesteps] == [True, False, True]
    assert said[0.95].endswith("dense: noise level 0.950 is above start=0.9")
    assert said[0.1].endswith("dense: noise level 0.100 is below end=0.2")


@pytest.mark.parametrize(
    "kind",
    ["wan", *(pytest.param(name, marks=pytest.mark.long) for name in list(TRANSFORMERS)[1:])],
)
def test_it_compiles_to_one_graph(kind: str) -> None:
    model = make_transformer(kind)
    with stem.enabled(model, dataclasses.replace(FEW, dense_heads=1)):
        expected = call(model, kind)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert off(call(compiled, kind), expected) < 1e-5
        assert stem.enable(compiled, FEW).transformer is model


def test_loras_and_gradients_pass_through() -> None:
    model = make_transformer("wan")
    own = call(model, "wan")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for number, weight in enumerate(weights):
        torch.nn.init.normal_(weight.data, std=0.2, generator=torch.Generator().manual_seed(number))
    expected = call(model, "wan")
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    assert off(expected, own) > 1e-2
    with stem.enabled(model, EXACT):
        found = call(model, "wan")
        assert off(found, expected) < 1e-5
        ours = torch.autograd.grad(found.square().sum(), weights)
    assert max(map(off, ours, gradients)) < 1e-4


def test_fused_projections_are_served_or_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = make_transformer("wan")
    handle = stem.enable(model, FEW)
    found = call(model, "wan")
    model.fuse_qkv_projections()
    assert handle.active
    assert off(call(model, "wan"), found) < 1e-5
    handle.disable()
    other = make_transformer("cogvideox")
    own, processors = call(other, "cogvideox"), dict(other.attn_processors)
    handle = stem.enable(other, FEW)
    other.fuse_qkv_projections()
    assert not handle.active
    assert off(call(other, "cogvideox"), own) < 1e-5
    took = "FusedCogVideoXAttnProcessor2_0"
    assert f"VideoConfig is off in 2 of 2 self-attentions: {took} took over" in caplog.text
    assert handle.report()[0].endswith(f"off: {took} is in its place")
    handle.disable()
    other.unfuse_qkv_projections()
    assert all(other.attn_processors[key] is value for key, value in processors.items())


def test_another_processor_is_noticed_and_stays() -> None:
    model = make_transformer("wan")
    handle = stem.enable(model, FEW)
    model.set_attn_processor(WanAttnProcessor())
    assert not handle.active
    handle.disable()
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_a_backend_of_diffusers_reaches_dense_layers() -> None:
    model = make_transformer("wan")
    own = model.blocks[0].attn1.processor
    with stem.enabled(model, FEW):
        model.blocks[0].attn1.set_attention_backend("native")
    assert own._attention_backend.value == "native"
    other = make_transformer("cogvideox")
    with stem.enabled(other, FEW):
        assert not hasattr(other.transformer_blocks[0].attn1.processor, "_attention_backend")


def test_a_pipeline_samples_through_it() -> None:
    transformer = WanTransformer3DModel(
        **HEADS,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = WanPipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def sampled() -> torch.Tensor:
        return pipeline(
            prompt_embeds=torch.ones(1, 5, 16),
            negative_prompt_embeds=torch.zeros(1, 5, 16),
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=2,
            latents=latents,
            output_type="latent",
        ).frames

    own = sampled()
    with stem.enabled(pipeline, EXACT):
        assert off(sampled(), own) < 1e-5
    with stem.enabled(pipeline, FEW) as handle:
        assert not torch.equal(sampled(), own)
    assert "6 bases for 48 tokens" in handle.state.described(0)
    assert torch.equal(sampled(), own)


def test_group_offloading_is_served() -> None:
    expected = None
    for way in ("", "leaf_level", "block_level"):
        model = make_transformer("wan")
        stem.enable(model, FEW)
        if way:
            blocks = {"num_blocks_per_group": 1} if way == "block_level" else {}
            cpu = torch.device("cpu")
            model.enable_group_offload(cpu, cpu, offload_type=way, **blocks)
        found = call(model, "wan")
        expected = found if expected is None else expected
        assert torch.equal(found, expected)


def test_a_copy_is_on_by_itself() -> None:
    model = make_transformer("wan")
    own = call(model, "wan")
    with stem.enabled(model, FEW):
        found = call(model, "wan")
        copied = copy.deepcopy(model)
    assert torch.equal(call(model, "wan"), own)
    assert torch.equal(call(copied, "wan"), found)
    stem.disable(copied)
    assert torch.equal(call(copied, "wan"), own)


def test_half_precision_and_autocast() -> None:
    model = make_transformer("wan")
    own = call(model, "wan")
    with stem.enabled(model, EXACT), torch.autocast("cpu", torch.bfloat16):
        assert off(call(model, "wan").float(), own) < 0.03
    model = model.to(torch.bfloat16)
    halves = {
        key: value.bfloat16()
        for key, value in arguments_of("wan").items()
        if key.endswith("hidden_states")
    }
    with stem.enabled(model, EXACT):
        found = call(model, "wan", **halves)
    assert found.dtype == torch.bfloat16
    assert off(found.float(), own) < 0.03


def test_what_cannot_be_served_is_an_error() -> None:
    model = make_transformer("wan")
    with stem.enabled(model, FEW):
        model._parallel_config = object()
        with pytest.raises(ValueError, match="runs in parallel"):
            call(model, "wan")
        model._parallel_config = None
        with pytest.raises(ValueError, match="called by itself; call the model"):
            model.blocks[0].attn1(torch.zeros(1, TOKENS, 24))
        call(model, "wan")
        mask = torch.ones(1, TOKENS)
        with pytest.raises(ValueError, match=r"attention_mask of shape \[1, 48\]"):
            model.blocks[0].attn1(torch.zeros(1, TOKENS, 24), attention_mask=mask)
        with pytest.raises(ValueError, match="got 49 tokens and the model's call was for 48"):
            model.blocks[0].attn1(torch.zeros(1, TOKENS + 1, 24))
    model.enable_gradient_checkpointing()
    with (
        stem.enabled(model, VideoConfig(start=0.9)),
        torch.enable_grad(),
        pytest.raises(ValueError, match="leave start and end away"),
    ):
        call(model, "wan")
    other = make_transformer("ltx")
    with stem.enabled(other, FEW), pytest.raises(ValueError, match="'num_frames': None"):
        call(other, "ltx", num_frames=None, video_coords=torch.zeros(1, 3, TOKENS))


def test_a_class_of_one_s_own_is_known_by_its_base() -> None:
    class Own(WanTransformer3DModel):
        """A user's class."""

    model = Own(**PIXELS, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
    own = call(model.eval(), "wan")
    with stem.enabled(model, EXACT) as handle:
        assert handle.transformer is model
        assert off(call(model, "wan"), own) < 1e-5


def test_what_it_goes_into() -> None:
    model = make_transformer("wan")
    handle = stem.enable(SimpleNamespace(transformer=model, transformer_2=None), FEW)
    assert handle.transformer is model
    stem.disable(model)
    assert not handle.active
    with pytest.raises(ValueError, match="has two transformers"):
        stem.enable(SimpleNamespace(transformer=model, transformer_2=model), FEW)
    with pytest.raises(TypeError, match="the model a WanTransformer3DModel; pass a VideoConfig"):
        stem.enable(model, StemConfig())
    with pytest.raises(TypeError, match="the model a UNet2DConditionModel; pass a StemConfig"):
        stem.enable(make_unet(), FEW)
    with pytest.raises(ValueError, match="takes no group and no hooks"):
        stem.enable(model, FEW, hooks=Hooks())  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"dense_blocks holds \[2\]; the 2 blocks"):
        stem.enable(model, VideoConfig(dense_blocks=(2,)))
    image = SD3Transformer2DModel(num_layers=1, attention_head_dim=4, num_attention_heads=1)
    with pytest.raises(TypeError, match="is a SD3Transformer2DModel, which no attention"):
        stem.enable(SimpleNamespace(transformer=image), FEW)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": -1}, "window is -1"),
        ({"tokens_per_base": 0}, "tokens_per_base is 0"),
        ({"dense_heads": -1}, "dense_heads is -1"),
        ({"correction": "joint"}, "correction is 'joint'"),
        ({"num_iters": 1.5}, "num_iters is 1.5"),
        ({"sample_per_base": 0}, "sample_per_base is 0"),
        ({"dense_below": -1}, "dense_below is -1"),
        ({"dense_blocks": 3}, "dense_blocks is 3"),
        ({"start": 0.2, "end": 0.2}, "start is 0.2 and end 0.2"),
        ({"start": 1.5}, "start is 1.5"),
        ({"backend": "cpu"}, "backend is 'cpu'"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoConfig(**values)
