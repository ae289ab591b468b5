"""`python examples/pipeline.py`: pictures of one prompt whose self-attentions share their bases."""

import argparse

import torch

import stem

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="embedded", help="hub id, local folder, or 'embedded'")
parser.add_argument("--prompt", default="a red ball rests on a checked blue background")
parser.add_argument("--size", type=int, default=64, help="pixels; 512 for Stable Diffusion 1.5")
parser.add_argument("--frames", type=int, default=4)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--out", default="out/pipeline.mp4")
arguments = parser.parse_args()

pipeline = stem.load_pipeline(arguments.model)


def pictures() -> torch.Tensor:
    """uint8 [N, H, W, 3], the same for every call but for the attention."""
    found = pipeline(
        [arguments.prompt] * arguments.frames,
        height=arguments.size,
        width=arguments.size,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return (found.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


before = pictures()
with stem.enabled(pipeline, stem.StemConfig(num_frames=arguments.frames)):
    shared = pictures()
print("with bases of all frames other pictures:", not torch.equal(before, shared))
print("afterwards the very same as before:", torch.equal(before, pictures()))
stem.write_video(arguments.out, shared, fps=4)
print(arguments.out)
