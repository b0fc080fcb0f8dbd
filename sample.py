"""Prompt (and image, or video) -> mp4, chunk by chunk.

    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "A red fox"
        ... --prompt "It runs" --image fox.jpg
        ... --prompt "It rests" --video fox.mp4 --frames 105
    python sample.py --release Wan2.2-TI2V-5B --mode bidirectional --prompt "A red fox"  # teacher
    python sample.py --random-weights --preset tiny --size 64x96 --frames 33 --prompt noise  # CPU

--release DIR        folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder
--weights PATH       the DiT to use in place of the release's: an export, or a checkpoint
                     (runs/x/step-0000100)
--lora FILE ...        LoRAs to merge into it, of any layout; FILE:0.8 for another strength
--random-weights     random networks and text embeddings, for measurements
--preset NAME        of random weights: ti2v-5B (the default) or tiny

--prompt TEXT ...    one clip for each (and for each seed)
--prompts FILE       more prompts: UTF-8, one a line
--image FILE         the first frame
--video FILE         a video to go on from: the clip starts with its last frames
--prefix N           how many last frames of --video (4k + 1; default 9)
--size HxW           height and width in pixels, multiples of 32 (default 704x1280, or that area in
                     the image's shape)
--frames N           pixel frames, prefix included (4k + 1; default 81, or what chunks fill next)
--seed N ...         of the noise (default 0)

--mode NAME          few (the default)    chunk by chunk, few steps
                     many                 chunk by chunk, many steps with guidance (CFG)
                     bidirectional        the whole clip at once, many steps with guidance
                     few-bidirectional    the whole clip at once, few steps
                     The released weights are for bidirectional. Chunk by chunk only causally
                     trained ones give a picture, and in few steps only distilled ones.
--chunk N            latent frames a chunk (default: the checkpoint's, or 3)
--window N           latent frames that a chunk sees, itself included (default: all)
--sink N             first latent frames that stay in the window (default 0)
--shift S            timestep shift (default: the checkpoint's, or 5)
--steps N            of modes with guidance (default 50; 40 with an image)
--solver NAME        of modes with guidance: unipc (the default) or euler
--guidance G         scale of CFG, uncond + g (cond - uncond) (default 5; 1 is half the work)
--negative TEXT      negative prompt (default: the one that the release was tuned with)

--out PATH           default out/sample.mp4; or a FOLDER/; with several clips, prompt and seed
                     number are added
--sheet              also a PNG of 16 frames
--latents            also the latents (safetensors)
--overwrite          replace existing files
--settings JSON      repeat the run that wrote this file; other options still override

--device NAME        cuda, cuda:1, ... or cpu
--dtype NAME         bfloat16 (default on a GPU) or float32 (default on the CPU)
--compile            fuse small operations: a minute at the start, 1.3x faster after
--fp8                linear layers of the DiT in float8 (Hopper or newer): faster, less exact
--low-memory         for 24 GB: text on the CPU, decoding when the DiT is gone
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import argparse
import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b import fuse, media
from wan5b.extras import graphs, random_weights
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.clips import Clip, make_record, read_settings, write
from wan5b.extras.files import note_cut
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae
from wan5b.extras.fp8 import quantize_blocks
from wan5b.extras.plan import plan
from wan5b.extras.sampling import MODES, generate
from wan5b.kvcache import KVCache
from wan5b.t5 import NEGATIVE_PROMPT, encode_prompts


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is a ValueError, like everything that a user got wrong."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; with --settings, those that it lacks are the record's."""
    parser = Parser()
    parser.format_help = lambda: __doc__  # which explains all of these
    add = parser.add_argument
    for name in ("release", "weights", "prompts", "image", "video", "size", "settings"):
        add(f"--{name}")
    for name in ("random-weights", "sheet", "latents", "overwrite", "compile", "fp8", "low-memory"):
        add(f"--{name}", action="store_true")
    for name in ("frames", "chunk", "window", "sink", "prefix", "steps"):
        add(f"--{name}", type=int)
    for name in ("shift", "guidance"):
        add(f"--{name}", type=float)
    add("--seed", type=int, default=[0], nargs="+")
    add("--prompt", default=[], nargs="+")
    add("--negative")
    add("--lora", default=[], nargs="+")
    add("--out", default="out/sample.mp4")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--mode", choices=list(MODES))
    add("--solver", choices=["unipc", "euler"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--dtype", choices=["bfloat16", "float32"])

    args = parser.parse_args(argv)
    for name in ("release", "weights", "prompts", "image", "video", "settings"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if args.settings:
        recorded = read_settings(args.settings, parser)
        args = parser.parse_args(argv, argparse.Namespace(**recorded))
    return args


# ---------------------------------------------------------------------------------- the work itself


def embed(texts: list[str], release: str, length: int, device: str) -> Tensor:
    """Context of the texts, [B, length, D] on the CPU. The encoder is gone afterwards."""
    tokenizer = load_tokenizer(release, length)
    note_cut(tokenizer, texts)
    encoder = load_t5(release, device, torch.bfloat16)
    # One by one: memory does not grow, and no text's bits depend on its company.
    return torch.cat([encode_prompts(encoder, tokenizer, [text]).cpu() for text in texts])


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    job = plan(args)

    # Text first: the encoder is gone before the DiT comes.
    negative = NEGATIVE_PROMPT if args.negative is None else args.negative
    texts = [*dict.fromkeys(clip.prompt for clip in job.clips), negative]
    if args.random_weights:
        context = random_weights.random_context(texts, job.cfg.text_len, job.cfg.text_dim)
        vae = random_weights.random_vae(args.preset, args.device)
    else:
        place = "cpu" if args.low_memory else args.device
        context = embed(texts, args.release, job.cfg.text_len, place)
        torch.cuda.empty_cache()
        vae = load_vae(args.release, args.device, torch.float32)

    # The VAE encodes the prefix in float32, since bfloat16 spoils an image, and decodes in dtype.
    prefix = None
    if len(job.pixels):
        prefix = vae.encode(media.fit(job.pixels, *job.size)[None].to(args.device))
    vae = vae.to(job.dtype)

    # The DiT, made faster if asked for.
    if args.random_weights:
        model = random_weights.random_dit(args.preset, args.device, job.dtype)
    else:
        source = args.weights or args.release
        model = load_dit(source, args.device, job.dtype, loras=job.loras)
    if args.fp8:
        quantize_blocks(model)
    fuse.enable(args.compile)
    if args.compile and args.device != "cpu":
        graphs.record(model)

    # The clips. All share one cache, and with it its CUDA graphs.
    shape = (1, job.cfg.in_dim, sum(job.sampler["chunks"]), job.size[0] // 16, job.size[1] // 16)
    new_cache = functools.cache(KVCache)

    def latents(clip: Clip) -> Iterator[Tensor]:
        """Piece by piece, made as they are asked for."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(clip.seed))
        text = context[[texts.index(clip.prompt), -1]].to(args.device, job.dtype)
        own = {"prefix": prefix, "seed": clip.seed, "new_cache": new_cache}
        return generate(model, noise, text, **job.sampler, **own)

    made = map(latents, job.clips)
    if args.low_memory:
        # First the latents of all clips; then the DiT goes; then they are decoded.
        made = [[chunk.cpu() for chunk in tqdm(chunks, "chunks")] for chunks in made]
        model.to("meta")  # its CUDA graphs still refer to it
        del model, new_cache
        torch.cuda.empty_cache()
    for clip, chunks in zip(job.clips, made, strict=True):
        record = make_record(vars(args), clip, job.frames, job.found)
        files = {"record": record, "sheet": args.sheet, "save_latents": args.latents}
        files["overwrite"] = args.overwrite
        write(vae, (x.to(args.device) for x in chunks), clip.path, frames=job.frames, **files)


if __name__ == "__main__":
    script(lambda: main(parse()))
