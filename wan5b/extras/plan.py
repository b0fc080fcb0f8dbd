"""What a run of sample.py comes to, and everything that can be wrong with it, before anything is loaded."""

import sys
from argparse import Namespace
from typing import NamedTuple

import numpy as np
import torch

from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras.clips import Clip, claim, name_clips
from wan5b.extras.files import fitting_size, parse_size, read_image, read_prompts, read_video
from wan5b.extras.formats import open_dit, read_metadata
from wan5b.extras.sampling import MODES
from wan5b.flow import FEW_STEPS, few_step_sigmas, sampling_sigmas
from wan5b.kvcache import chunk_sizes
from wan5b.media import latent_frames
from wan5b.util import nearest
from wan5b.vae22 import VAEConfig


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


def plan(args: Namespace) -> Job:
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
        pixels = read_image(args.image)
    if args.video:
        pixels = read_video(args.video, last=args.prefix)
    prefix = latent_frames(len(pixels)) if len(pixels) else 0
    size = parse_size(args.size) if args.size else fitting_size(*pixels.shape[1:3])

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
    total = least + (start - least) % size if frames is None else latent_frames(frames)
    if total <= prefix or (total - start) % size:
        valid = nearest(frames, 4 * size, 4 * (lead or start + size) - 3)
        plan = f"{start} latent frames and chunks of {size}"
        raise ValueError(f"--frames {frames} is not {plan}; nearest: {valid}")
    return chunk_sizes(total - prefix, size, lead)
