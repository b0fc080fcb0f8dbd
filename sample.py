"""Prompt (and image, or video) -> mp4, chunk by chunk.

    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "A red fox"
        ... --prompt "It runs" --image fox.jpg
        ... --prompt "It rests" --video fox.mp4 --frames 105
    python sample.py --release Wan2.2-TI2V-5B --mode bidirectional --prompt "A red fox"  # teacher
    python sample.py --random-weights --preset tiny --size 64x96 --frames 33 --prompt noise  # CPU

--release DIR        folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder
--weights PATH       the DiT to use in place of the release's: an export, or a checkpoint
                     (runs/x/step-0000100)
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

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wan5b import fuse, media, weights
from wan5b.data import read_prompts, rng
from wan5b.distill import guided, rollout
from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras import graphs, random_weights
from wan5b.extras.outputs import Clip, claim, make_record, name_clips, read_settings
from wan5b.flow import FEW_STEPS, few_step_sigmas, sampling_sigmas, solve
from wan5b.fp8 import quantize_blocks
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.t5 import NEGATIVE_PROMPT, Tokenizer, encode_prompts
from wan5b.vae22 import VAEConfig
from wan5b.weights import load_dit, load_t5, load_vae, open_dit, read_metadata, tokenizer_path


class Mode(NamedTuple):
    causal: bool  # chunk by chunk over a cache, each seeing those before; else the clip at once
    guided: bool  # classifier-free guidance (CFG): two forwards a step
    solver: str  # of flow.solve; "renoise" goes down the few levels that weights are distilled for


MODES = {
    "few": Mode(True, False, "renoise"),
    "many": Mode(True, True, "unipc"),
    "bidirectional": Mode(False, True, "unipc"),
    "few-bidirectional": Mode(False, False, "renoise"),
}
GPUS = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
DEVICES = ["cuda", "cpu", *GPUS] if torch.cuda.is_available() else ["cpu"]

# --------------------------------------------------------- generating and writing, for train.py too


def generate(
    model: Callable,
    noise: Tensor,
    context: Tensor,
    sigmas: list[float],
    chunks: list[int],
    *,
    causal: bool,
    solver: str,
    guidance: float | None = None,
    prefix: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    seed: int = 0,
    new_cache: Callable = KVCache,
) -> Iterator[Tensor]:
    """Latents of clips, piece by piece: the prefix first, then every finished chunk.

    - noise [B, C, T, H, W] covers the chunks (latent frames of each); it may lie on the CPU.
    - prefix [B, C, T', H, W]: clean frames in front of them.
    - context [B, L, D]: of the prompts; with guidance (the scale of CFG) [2B, L, D], the
      unconditional rows behind.
    - sigmas: the levels, falling, the last one 0. solver: one of flow.SOLVERS.
    - causal: chunk by chunk over window and sink, in latent frames; else all chunks at once.
    - seed: of what "renoise" adds. new_cache: called as KVCache is; may return a used one.
    """
    single = guidance in (None, 1)  # at 1 CFG is its conditional branch alone: half the work
    field = model if single else guided(model, guidance)
    context = context[: len(noise)] if single else context
    start = [] if prefix is None else [prefix]
    yield from start
    given = sum(frames.shape[2] for frames in start)
    total = given + noise.shape[2]
    draws = rng(context.device, seed, "renoise")

    def fresh(chunk, step, like):
        return torch.randn(like.shape, generator=draws, device=like.device)

    if not causal:

        def velocity(x, sigma):
            levels = torch.full((len(x), total), sigma, dtype=torch.float64)
            levels[:, :given] = 0  # the network sees the prefix clean at every step
            return field(torch.cat([*start, x], 2), levels, context)[:, :, given:]

        yield solve(velocity, noise.to(context.device), sigmas, solver, functools.partial(fresh, 0))
        return

    tokens = model.cfg.tokens_per_frame(*noise.shape[3:])
    size = (len(context), min(window or total, total), tokens)
    cache = new_cache(model.cfg, *size, window, sink, context.device, context.dtype)
    cache.reset()
    how = {"renoise": fresh, "prefix": prefix, "solver": solver}
    finished = rollout(field, noise, context, sigmas, chunks, cache, **how)
    yield from islice(finished, len(chunks))  # no more: nothing needs the last one in the cache


def write(
    vae, latents: Iterable, path: Path, *, frames=None, record=None, sheet=False, save_latents=False
) -> None:
    """Decode a clip into an mp4 while its latents [1, C, T, H, W] are made, piece by piece.

    Beside it a sheet (PNG; frames: how many there will be), the latents (safetensors), and the
    record, a dict, as JSON. Whatever ends it, Ctrl-C included, leaves what is finished, playable.
    """
    writer = media.VideoWriter(path, keep=media.sheet_indices(frames) if sheet else set())
    state = vae.stream()
    kept = []
    try:
        with tqdm(total=frames, unit="frame", desc=path.name) as bar, closing(writer):
            for chunk in latents:
                pixels = vae.decode_chunk(chunk, state)
                writer.add(media.to_frames(pixels[0]))
                if save_latents:
                    kept.append(chunk)
                bar.update(pixels.shape[2])
    finally:
        if writer.kept:
            media.write_sheet(path.with_suffix(".png"), writer.kept)
        if kept:
            whole = torch.cat(kept, 2).float().cpu()
            weights.write_tensors(path.with_suffix(".safetensors"), {"latents": whole})
        if record and writer.count:
            record = record | {"frames_written": writer.count}
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            path.with_suffix(".json").write_text(text, "utf-8", "backslashreplace")


# --------------------------------------------------------------------------------- options and plan


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; with --settings, those that it lacks are the record's."""
    parser = argparse.ArgumentParser()
    parser.format_help = lambda: __doc__  # which explains all of these
    add = parser.add_argument
    for name in ("release", "weights", "prompts", "image", "video", "size", "settings"):
        add(f"--{name}")
    for name in ("random-weights", "sheet", "latents", "overwrite", "compile", "fp8", "low-memory"):
        add(f"--{name}", action="store_true")
    for name in ("frames", "chunk", "window", "steps"):
        add(f"--{name}", type=int)
    add("--shift", type=float)
    add("--guidance", type=float, default=5.0)
    add("--prefix", type=int, default=9)
    add("--sink", type=int, default=0)
    add("--seed", type=int, default=[0], nargs="+")
    add("--prompt", default=[], nargs="+")
    add("--negative", default=NEGATIVE_PROMPT)
    add("--out", default="out/sample.mp4")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--mode", default="few", choices=list(MODES))
    add("--solver", choices=["unipc", "euler"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--dtype", choices=["bfloat16", "float32"])

    args = parser.parse_args(argv)
    if args.settings:
        recorded = read_settings(args.settings, list(vars(args)))
        args = parser.parse_args(argv, argparse.Namespace(**recorded))
    return args


class Job(NamedTuple):
    """What `plan` has found out."""

    cfg: DiTConfig
    dtype: torch.dtype
    pixels: np.ndarray  # the first frames, uint8 [T, H, W, 3] as in their file; T may be 0
    size: tuple[int, int]  # height and width of the clips in pixels
    frames: int  # of a clip, in pixels
    sampler: dict  # arguments of `generate` that all clips share
    clips: list[Clip]
    found: dict  # for the record


def check(right, wrong: str) -> None:
    """ValueError, saying what is wrong, unless right."""
    if not right:
        raise ValueError(wrong)


def plan(args: argparse.Namespace) -> Job:
    """Whatever can be wrong with the options is found here, before anything is loaded."""
    for name in ("prefix", "chunk", "window", "steps", "shift"):
        value = getattr(args, name)
        check(value is None or value > 0, f"--{name} {value}: must be above 0")  # NaN is not
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    wrong = f"--fp8 needs bfloat16 on a GPU (Hopper or newer), not {dtype} on {args.device}"
    check(not args.fp8 or (dtype == torch.bfloat16 and args.device != "cpu"), wrong)

    # The networks. What they were trained for is in their metadata; the command line overrides it.
    wrong = "name the release folder with --release, or try --random-weights --preset tiny"
    check(args.release or args.random_weights, wrong)
    source = args.weights or args.release
    trained = read_metadata(source) if source else {}
    if source:
        cfg, _ = open_dit(source, channels=VAEConfig.z_dim)
    if args.random_weights:
        cfg = PRESETS[args.preset]

    # What the clips start with, and their size.
    check(not (args.image and args.video), "give --image or --video, not both")
    pixels = np.empty((0, 704, 1280, 3), np.uint8)
    if args.image:
        pixels = media.read_image(args.image)
    if args.video:
        pixels = media.read_video(args.video, last=args.prefix)
    prefix = media.latent_frames(len(pixels)) if len(pixels) else 0
    size = media.parse_size(args.size) if args.size else media.fitting_size(*pixels.shape[1:3])

    # In which chunks they are made; over which levels.
    mode = MODES[args.mode]
    chunk = args.chunk or trained.get("chunk", 3)
    chunks = chunk_plan(args.frames, prefix, chunk if mode.causal else 1, trained.get("prefix"))
    if not mode.causal:
        chunks = [sum(chunks)]
    elif args.window or args.sink:
        room = (args.window or 0) - max(chunks)
        wrong = f"no room for --sink {args.sink} and a chunk of {max(chunks)} frames"
        check(0 <= args.sink <= room, f"--window {args.window}: {wrong}")
    shift = args.shift or trained.get("shift", 5.0)
    if mode.solver == "renoise":
        sigmas = few_step_sigmas(trained.get("levels", FEW_STEPS), shift)
    else:
        sigmas = sampling_sigmas(args.steps or (40 if prefix else 50), shift)
        mode = mode._replace(solver=args.solver or mode.solver)
    sampler = {"sigmas": sigmas, "chunks": chunks, "causal": mode.causal, "solver": mode.solver}
    sampler["guidance"] = args.guidance if mode.guided else None
    sampler |= {"window": args.window, "sink": args.sink}

    # What is written.
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    check(prompts, "no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    clips = name_clips(prompts, args.seed, args.out)
    claim(clips, sheet=args.sheet, latents=args.latents, overwrite=args.overwrite)
    found = {"size": size, "chunks": chunks, "sigmas": sigmas, "trained": trained}
    frames = 4 * (prefix + sum(chunks)) - 3
    if mode.causal and trained.get("stage", "teacher") == "teacher" and not args.random_weights:
        print("note: no record of causal training in these weights: expect noise", file=sys.stderr)
    print(f"{len(clips)} x {frames} frames, {size[0]}x{size[1]}; prefix {prefix}, chunks {chunks}")
    return Job(cfg, dtype, pixels, size, frames, sampler, clips, found)


def chunk_plan(frames: int | None, prefix: int, size: int, first: int | None) -> list[int]:
    """Latent frames of each chunk that is generated behind a prefix of so many.

    frames: pixel frames of the clip (None: 81, or what chunks fill next). first: size of the first
    chunk, in whose place a prefix stands, if it is not that of all.
    """
    lead = 0 if prefix else first or 0
    start = prefix + lead
    least = max(21, prefix + 1)
    total = least + (start - least) % size if frames is None else media.latent_frames(frames)
    if total <= prefix or (total - start) % size:
        valid = media.nearest(frames, 4 * size, 4 * (lead or start + size) - 3)
        plan = f"{start} latent frames and chunks of {size}"
        raise ValueError(f"--frames {frames} is not {plan}; nearest: {valid}")
    return chunk_sizes(total - prefix, size, lead)


# ---------------------------------------------------------------------------------- the work itself


def embed(texts: list[str], release: str, length: int, device: str) -> Tensor:
    """Context of the texts, [B, length, D] on the CPU. The encoder is gone afterwards."""
    tokenizer = Tokenizer(tokenizer_path(release), length)
    encoder = load_t5(release, device, torch.bfloat16)
    # One by one: memory does not grow, and no text's bits depend on its company.
    return torch.cat([encode_prompts(encoder, tokenizer, [text]).cpu() for text in texts])


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    job = plan(args)

    # Text first: the encoder is gone before the DiT comes.
    texts = [*dict.fromkeys(clip.prompt for clip in job.clips), args.negative]
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
        model = load_dit(args.weights or args.release, args.device, job.dtype)
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
        write(vae, (x.to(args.device) for x in chunks), clip.path, frames=job.frames, **files)


if __name__ == "__main__":
    media.script(lambda: main(parse()))
