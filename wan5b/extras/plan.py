"""What a run of sample.py comes to, and everything that can be wrong with it, before anything is
loaded.
"""

import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras.clips import Clip, claim, name_clips
from wan5b.extras.files import fitting_size, parse_size, read_prompts
from wan5b.extras.formats import open_dit, read_metadata
from wan5b.extras.pictures import read_image, read_video
from wan5b.extras.sampling import MODES, Mode
from wan5b.flow import FEW_STEPS, few_step_sigmas, sampling_sigmas
from wan5b.kvcache import chunk_sizes
from wan5b.media import FPS, fit, latent_frames
from wan5b.util import nearest
from wan5b.vae22 import VAEConfig
from wan5b.weights import about

# The modes that a stage's weights are made for; all others are few-step models.
MADE_FOR = {"teacher": "bidirectional", "ar": "many"}
GUIDANCE = 5.0  # of the modes with guidance, if not given
PREFIX = 9  # last frames of a video, if not given


class Job(NamedTuple):
    """What `plan` has found out."""

    cfg: DiTConfig
    loras: list[tuple[str, float]]  # path and strength of each
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


def note(text: str) -> None:
    """A line for the user about something that is not what it may seem."""
    print(f"note: {text}", file=sys.stderr)


def plan(args: Namespace) -> Job:
    """Whatever can be wrong with the options is found here, before anything is loaded."""
    check_numbers(args)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    wrong = f"--fp8 needs bfloat16 on a GPU (Hopper or newer), not {dtype} on {args.device}"
    check(not args.fp8 or (dtype == torch.bfloat16 and args.device != "cpu"), wrong)

    # The networks. What they were trained for is in their metadata; the command line overrides it.
    wrong = "name the release folder with --release, or try --random-weights --preset tiny"
    check(args.release or args.random_weights, wrong)
    if args.random_weights:
        cfg = PRESETS[args.preset]
        trained = {}
        loras = []
    else:
        source = args.weights or args.release
        loras = [parse_lora(text) for text in args.lora]
        cfg, _ = open_dit(source, channels=VAEConfig.z_dim, loras=loras)
        trained = read_metadata(source)
    stage = trained.get("stage")
    mode = MODES[args.mode or MADE_FOR.get(stage, "few")]

    # What the clips start with, and their size.
    pixels = first_frames(args.image, args.video, args.prefix or PREFIX)
    prefix = latent_frames(len(pixels)) if len(pixels) else 0
    size = parse_size(args.size) if args.size else fitting_size(*pixels.shape[1:3])

    if len(pixels):
        with about(args.image or args.video):
            fit(pixels[:1], *size)  # which says if too little of it would be left

    # In which chunks they are made; over which levels.
    chunk = args.chunk or trained.get("chunk", 3)
    chunks = chunk_plan(args.frames, prefix, chunk if mode.causal else 1, trained.get("prefix"))
    frames = 4 * (prefix + sum(chunks)) - 3
    sampler = {"causal": mode.causal, "solver": mode.solver, "guidance": None}
    if mode.causal:
        sampler |= memory(args.window or trained.get("window"), args.sink or 0, max(chunks))
    else:
        chunks = [sum(chunks)]
    sampler["chunks"] = chunks
    shift = args.shift or trained.get("shift", 5.0)
    if mode.solver == "renoise":
        sampler["sigmas"] = few_step_sigmas(trained.get("levels", FEW_STEPS), shift)
    else:
        sampler["sigmas"] = sampling_sigmas(args.steps or (40 if prefix else 50), shift)
        sampler["solver"] = args.solver or mode.solver
    if mode.guided:
        sampler["guidance"] = GUIDANCE if args.guidance is None else args.guidance

    # What is written.
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    check(prompts, "no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    clips = name_clips(prompts, args.seed, args.out)
    claim(clips, sheet=args.sheet, latents=args.latents, overwrite=args.overwrite)
    found = {"size": size, "sampler": sampler, "trained": trained}
    found |= {"chunks": chunks, "sigmas": sampler["sigmas"]}
    note_ignored(args, mode)
    note_stage(stage, mode, args.random_weights)
    print(f"{len(clips)} x {frames} frames, {size[0]}x{size[1]}; prefix {prefix}, chunks {chunks}")
    return Job(cfg, loras, dtype, pixels, size, frames, sampler, clips, found)


def check_numbers(args: Namespace) -> None:
    """Numbers that no mode can work with."""
    for name in ("prefix", "chunk", "window", "steps", "shift"):
        value = getattr(args, name)
        fits = value is None or 0 < value < math.inf  # NaN is not
        check(fits, f"--{name} {value}: must be above 0")
    fits = args.guidance is None or math.isfinite(args.guidance)
    check(fits, f"--guidance {args.guidance}: must be a finite number")
    check((args.sink or 0) >= 0, f"--sink {args.sink}: must be 0 or more")
    for seed in args.seed:
        # torch's generators use 32 bits: seeds beyond would be the same as others.
        check(0 <= seed < 2**32, f"--seed {seed}: must be from 0 to {2**32 - 1}")


def note_ignored(args: Namespace, mode: Mode) -> None:
    """Options that were given and do nothing here."""
    ignored = []
    if mode.solver == "renoise":
        ignored += ["steps", "solver"]
    if not mode.guided:
        ignored += ["guidance", "negative"]
    if not mode.causal:
        ignored += ["chunk", "window", "sink"]
    if not args.video:
        ignored.append("prefix")
    if args.random_weights:
        ignored += ["weights", "release", "lora"]
    given = [f"--{name}" for name in ignored if getattr(args, name) not in (None, [])]
    if given:
        note(f"{', '.join(given)} has no effect here")


def note_stage(stage: str | None, mode: Mode, random: bool) -> None:
    """Weights in a mode that they were not made for."""
    if random:
        return
    if stage is None:
        if mode.causal:
            note("no record of causal training in these weights: expect noise")
        return
    own = MODES[MADE_FOR.get(stage, "few")]
    if mode != own:
        note(f"these weights are of stage {stage}, made for --mode {MADE_FOR.get(stage, 'few')}")


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> path and strength. ValueError for a strength that is no number."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return os.path.expanduser(text), 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    check(math.isfinite(value), f"--lora {text}: {strength!r} is no strength; give FILE:0.8, say")
    return os.path.expanduser(path), value


def first_frames(image: str | None, video: str | None, last: int) -> np.ndarray:
    """What clips start with, uint8 [T, H, W, 3]: an image, a video's last frames, or none."""
    check(not (image and video), "give --image or --video, not both")
    if image:
        return read_image(image)
    if video:
        return read_video(video, last=last, fps=FPS)
    return np.empty((0, 704, 1280, 3), np.uint8)


def memory(window: int | None, sink: int, chunk: int) -> dict[str, int | None]:
    """Window and sink, if they have room for a chunk."""
    if window or sink:
        room = (window or 0) - chunk
        wrong = f"--window {window}: no room for --sink {sink} and a chunk of {chunk} frames"
        check(sink <= room, wrong)
    return {"window": window, "sink": sink}


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
