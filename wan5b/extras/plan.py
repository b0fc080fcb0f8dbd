"""What a run of sample.py comes to, and everything that can be wrong with it, before anything is
loaded: options -> weights -> recipe -> first frames -> chunks -> clips.
"""

import math
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras import fp8_attention
from wan5b.extras.adapters import note_base, said_by
from wan5b.extras.chunking import (
    FRAMES,
    blended,
    chunk_plan,
    memory,
    scene_cuts,
    scene_texts,
    spread,
    switches,
)
from wan5b.extras.clips import REPORTS, Clip, claim, inputs_of, name_clips
from wan5b.extras.files import fitting_size, parse_size, read_prompts
from wan5b.extras.formats import locate, open_dit, read_metadata
from wan5b.extras.fp8 import check_options
from wan5b.extras.framing import fit
from wan5b.extras.lora import parse_lora
from wan5b.extras.media import FPS, latent_frames
from wan5b.extras.pictures import read_image, read_video
from wan5b.extras.recipes import (
    MADE_FOR,
    SAMPLING,
    Found,
    Recipe,
    in_mode,
    known,
    load,
    looks_like,
    recognise,
    sampled_part,
)
from wan5b.extras.resume import State, check_place, read_state
from wan5b.extras.sampling import MODES
from wan5b.vae22 import VAEConfig
from wan5b.weights import about

UNUSED = (None, False, [])  # values of options that were not given
PREFIX = 9  # pixel frames that are taken from the end of --video, without --prefix


class Job(NamedTuple):
    """What `plan` has found out: all that sample.py needs to load networks and make clips."""

    cfg: DiTConfig
    options: dict  # keyword arguments of load_dit: loras, part
    dtype: torch.dtype  # of the networks
    pixels: np.ndarray  # the first frames, uint8 [T, H, W, 3] as in their file; T may be 0
    size: tuple[int, int]  # height and width of the clips in pixels
    frames: int  # pixel frames of a clip, the first ones included
    fps: int
    sampler: dict  # arguments of `generate` that all clips share
    clips: list[Clip]
    found: dict  # what goes into each clip's record, beside its options
    state_every: float  # seconds between states of a clip; 0: none, it can't go on elsewhere
    state: State | None  # of the one clip, if it does


class Weights(NamedTuple):
    """What is known of the DiT before it is loaded."""

    cfg: DiTConfig
    options: dict  # keyword arguments of load_dit: loras, part
    trained: dict  # what an export or a checkpoint says of its training; else empty
    found: Found | None  # the recipe that the file itself calls for, if any


def check(right, wrong: str) -> None:
    """ValueError, saying what is wrong, unless right."""
    if not right:
        raise ValueError(wrong)


def note(text: str) -> None:
    """A line for the user about something that is not what it may seem."""
    print(f"note: {text}", file=sys.stderr)


def plan(args: Namespace) -> Job:
    """What the options come to. Makes the folder of the outputs and prints what it has found.

    Whatever can be wrong with the options or with the files that they name is found here, before
    anything is loaded: ValueError, which names the record that options may come from.
    """
    record = args.resume or args.settings
    with about(record) if record else nullcontext():
        return _plan(args)


def _plan(args: Namespace) -> Job:
    # Which network, and which way to sample it.
    dtype = check_numbers(args)
    weights = look_at_weights(args)
    found = choose(args, weights)
    recipe = found.recipe
    fp8_attention.check(args, recipe.causal, weights.cfg.head_dim, dtype)

    # What clips start with, and their size.
    text_only = f"{found.name} is for text only: leave --image and --video out"
    check(recipe.image != "none" or not (args.image or args.video), text_only)
    pixels = first_frames(args.image, args.video, args.prefix or PREFIX, recipe.fps)
    size = parse_size(args.size) if args.size else fitting_size(*pixels.shape[1:3])
    if len(pixels):
        with about(args.image or args.video):
            fit(pixels[:1], *size)  # which says if too little of it would be left

    # In which chunks they are made, with which texts, and where they go.
    prefix = latent_frames(len(pixels)) if len(pixels) else 0
    sampler = how_sampled(args, recipe, prefix)
    state = read_state(args.resume) if args.resume else None
    clips = make_clips(args, recipe, prefix, sampler)
    if state:
        check_place(args, state)
    frames = 4 * (prefix + sum(sampler["chunks"])) - 3

    # For the user.
    note_ignored(args, recipe)
    note_weights(args, weights, found)
    clips_made = f"{len(clips)} x {frames} frames, {size[0]}x{size[1]}"
    print(f"{clips_made}; {describe_chunks(prefix, sampler)}")
    print(f"{found.name} ({found.why}): {describe(recipe, sampler)}")
    record = for_record(found, weights, size, sampler) | {"inputs": inputs_of(args)}
    about_clips = (pixels, size, frames, recipe.fps, sampler, clips, record)
    # With scenes, with latents that are all kept or decoded late, a state would not be small.
    keeps = recipe.causal and not (sampler["cuts"] or args.low_memory or args.latents)
    every = args.state_every if keeps else 0
    return Job(weights.cfg, weights.options, dtype, *about_clips, every, state)


def for_record(found: Found, weights: Weights, size: tuple[int, int], sampler: dict) -> dict:
    """What there is to know of a run beside its options, as JSON values."""
    recipe = {"name": found.name, "from": found.why}
    recipe |= {name: value for name, value in asdict(found.recipe).items() if name in SAMPLING}
    record = {"size": size, "sampler": sampler, "trained": weights.trained, "recipe": recipe}
    return record | {"chunks": sampler["chunks"], "sigmas": sampler["sigmas"]}


# ------------------------------------------------------------------------------------------ options


def check_numbers(args: Namespace) -> torch.dtype:
    """The dtype of the networks.

    ValueError for numbers that no mode can work with, and for names that are empty, as those are
    that a shell makes of an unset variable.
    """
    names = ("release", "weights", "recipe", "prompts", "image", "video", "size", "settings")
    for name in (*names, "resume", "out"):
        check(getattr(args, name) != "", f"--{name} is empty: name something, or leave it out")
    for name in ("prefix", "chunk", "window", "steps", "shift", "interpolate"):
        value = getattr(args, name)
        fits = value is None or 0 < value < math.inf  # NaN is not
        check(fits, f"--{name} {value}: must be above 0, and finite")
    check(args.shift is None or args.shift >= 1e-6, f"--shift {args.shift}: must be at least 1e-6")
    fits = args.guidance is None or math.isfinite(args.guidance)
    check(fits, f"--guidance {args.guidance}: must be a finite number")
    check((args.sink or 0) >= 0, f"--sink {args.sink}: must be 0 or more")
    for name in ("state_every", "at"):
        value = getattr(args, name)
        fits = all(0 <= number < math.inf for number in np.atleast_1d(value))
        check(fits, f"--{name.replace('_', '-')} {value}: must be seconds, 0 or more")
    for seed in args.seed:
        # torch's generators use 32 bits: seeds beyond would be the same as others.
        check(0 <= seed < 2**32, f"--seed {seed}: must be from 0 to {2**32 - 1}")

    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    check_options(args, dtype)
    return dtype


def first_frames(image: str | None, video: str | None, last: int, fps: int = FPS) -> np.ndarray:
    """What clips start with, uint8 [T, H, W, 3]: an image, a video's last frames, or none.

    last: how many pixel frames of the video, which is read at so many fps. Where there are none, H
    and W are still those of a clip by default. ValueError for both at once and for damaged files.
    """
    check(not (image and video), "give --image or --video, not both")
    if image:
        return read_image(image)
    if video:
        return read_video(video, last=last, fps=fps)
    return np.empty((0, 704, 1280, 3), np.uint8)


# ------------------------------------------------------------------------------------------- recipe


def look_at_weights(args: Namespace) -> Weights:
    """What the files say of the DiT: names, shapes and metadata are read, no weights yet.

    ValueError for whatever is wrong with it or its LoRAs, and if no DiT is named.
    """
    wrong = "name the release folder with --release, or try --random-weights --preset tiny"
    check(args.release or args.random_weights, wrong)
    if args.random_weights:
        return Weights(PRESETS[args.preset], {}, {}, None)
    source = args.weights or args.release
    options = {"loras": [parse_lora(text) for text in args.lora]}
    cfg, _ = open_dit(source, channels=VAEConfig.z_dim, **options)
    trained = read_metadata(source)
    for path, _ in options["loras"]:
        trained = said_by(path) or trained  # of a run with lora: the file beside the base's
        note_base(path, source)
    return Weights(cfg, options, trained, recognise(args.release, args.weights, trained))


def choose(args: Namespace, weights: Weights) -> Found:
    """How clips are made: as the weights say, unless the command line says another thing.

    Puts the part of the file that the recipe samples, if any, into weights.options.
    """
    # --recipe, or what the file says; without --mode, its name is better than nothing.
    found = weights.found
    if args.recipe:
        found = Found(Path(args.recipe).stem, "--recipe", load(args.recipe))
    if not (found or args.mode or args.random_weights):
        found = by_name(Path(args.weights or args.release))

    # --mode changes it, or stands alone.
    if found is None:
        mode = args.mode or "few"
        found = Found(mode, "--mode" if args.mode else "the default", Recipe())
        found = found._replace(recipe=in_mode(found.recipe, MODES[mode]))
    elif args.mode:
        recipe = in_mode(found.recipe, MODES[args.mode])
        found = Found(found.name, f"{found.why}, --mode {args.mode}", recipe)

    # Trainers' files may hold several networks. The sampled one is checked like the first.
    source = args.weights or args.release
    part = "" if args.random_weights else sampled_part(found.recipe, source)
    if part:
        weights.options["part"] = part
        open_dit(source, channels=VAEConfig.z_dim, **weights.options)

    return found._replace(recipe=overridden(found.recipe, args))


def by_name(source: Path) -> Found | None:
    """The recipe that the name of a file or folder suggests, if any."""
    name = looks_like(source) or looks_like(locate(source, "dit"))
    return Found(name, "by its name alone", load(name)) if name else None


def overridden(recipe: Recipe, args: Namespace) -> Recipe:
    """The recipe with the options that were given, as far as it has a use for them.

    The others are named by `note_ignored`.
    """
    names = ["shift"]
    if recipe.causal:
        names += ["chunk", "window", "sink", "sink_rope"]
    if recipe.solver != "renoise":
        names += ["steps", "solver", "guidance", "negative"]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "steps" in changes:
        changes |= {"image_steps": 0, "levels": ()}
    return replace(recipe, **changes)


def describe(recipe: Recipe, sampler: dict) -> str:
    """How clips are made, in half a line. sampler: as of `how_sampled`."""
    words = ["chunk by chunk" if recipe.causal else "the whole clip at once"]
    words.append(f"{len(sampler['sigmas']) - 1} steps of {recipe.solver}")
    if "sigmas_after" in sampler:
        words[-1] += f" in the first chunk, {len(sampler['sigmas_after']) - 1} after"
    if not recipe.clean_pass:
        words.append("no clean pass")
    words += [f"shift {recipe.shift:g}", f"guidance {recipe.guidance:g}"]
    if recipe.causal:
        words.append(f"chunks of {recipe.chunk}")
        words.append(f"window {recipe.window}" if recipe.window else "no window")
        words.append(f"sink {recipe.sink}" + " that follows" * (recipe.sink_rope == "relative"))
    return ", ".join(words)


def describe_chunks(prefix: int, sampler: dict) -> str:
    """What the latent frames of a clip are, like "22 latent frames (1 given, 7 chunks of 3)"."""
    chunks = sampler["chunks"]
    parts = [f"{prefix} given"] if prefix else []
    if sampler["causal"]:
        for size, same in groupby(chunks):
            count = len(list(same))
            parts.append(f"{count} {'chunk' if count == 1 else 'chunks'} of {size}")
    elif prefix:
        parts.append(f"{sum(chunks)} made")
    shown = f"{prefix + sum(chunks)} latent frames"
    if parts:
        shown += f" ({', '.join(parts)})"
    cuts = len(sampler.get("cuts") or {})
    if cuts:
        shown += f"; {cuts} scene {'cut' if cuts == 1 else 'cuts'}"
    return shown


def note_ignored(args: Namespace, recipe: Recipe) -> None:
    """Options that were given and do nothing here."""
    ignored = []
    if recipe.solver == "renoise":
        ignored += ["steps", "solver", "guidance"]
    if recipe.guidance == 1:
        ignored.append("negative")
    if not recipe.causal:
        ignored += ["chunk", "window", "sink", "sink_rope"]
    if not (args.at or args.shots):
        ignored += ["interpolate", "recache"]
    if not args.video:
        ignored.append("prefix")
    if args.random_weights:
        ignored += ["weights", "release", "lora"]
    given = [name.replace("_", "-") for name in ignored if getattr(args, name) not in UNUSED]
    given = [f"--{name}" for name in given]
    if given:
        note(f"{', '.join(given)} has no effect here")


def note_weights(args: Namespace, weights: Weights, found: Found) -> None:
    """Weights that are sampled in a way that they may not be made for."""
    if args.random_weights:
        return
    source = Path(args.weights or args.release)
    stage = weights.trained.get("stage")
    own = MADE_FOR.get(stage, "few")
    says_causal = weights.found is not None and weights.found.recipe.causal

    # Nothing but the file's name to go by; or another way than the file's own.
    if not (weights.found or args.recipe or args.mode):
        taken = f"by its name for {found.name}" if found.name in known() else "for --mode few"
        text = f"{source} does not say how it is sampled: taken {taken}, which may be wrong"
        note(f"{text}; say it with --recipe: {', '.join(known())}")
    elif stage is not None:
        few_steps = found.recipe.solver == "renoise"
        own_few_steps = MODES[own].solver == "renoise"
        if found.recipe.causal != MODES[own].causal or few_steps != own_few_steps:
            note(f"these weights are of stage {stage}, made for --mode {own}")
    elif found.recipe.causal and not (says_causal or args.recipe):
        note("no record of causal training in these weights: expect noise")
    elif weights.found and args.recipe in known() and args.recipe != weights.found.name:
        # A LoRA may have made them what the recipe is for.
        said = f"{weights.found.name} ({weights.found.why})"
        if not args.lora:
            note(f"these weights call for {said}; --recipe {found.name} may give noise with them")

    # What names alone tell: LongLive's two-step folders, and LoRAs that call for another recipe.
    if found.name == "longlive2" and source.parent.name.endswith("-S2") and not args.steps:
        note("by its folder's name this one is for two steps: --steps 2")
    for path, _ in weights.options["loras"]:
        name = looks_like(path)
        if name not in ("", "wan22", found.name) and not args.recipe:
            note(f"by its name {path} makes these weights {name}: then give --recipe {name}")


# ---------------------------------------------------------------------------------- chunks, clips


def how_sampled(args: Namespace, recipe: Recipe, prefix: int) -> dict:
    """Arguments of `generate`, behind a prefix of so many latent frames.

    args: of these only `frames` and `image` are looked at; the recipe has the others already.
    """
    sampler = {"causal": recipe.causal, "solver": recipe.solver, "guidance": recipe.guidance}
    sampler["sigmas"] = recipe.sigmas(bool(prefix))
    sampler |= recipe.chunk_options()
    frames = recipe.frames or FRAMES
    if not recipe.causal:
        chunks = chunk_plan(args.frames, prefix, 1, 0, default=frames)
        return sampler | {"chunks": [sum(chunks)]}

    # A video's last frames are committed in front, even where an image goes inside the first chunk.
    inside = recipe.image == "inside" and bool(args.image)
    how = {"inside": inside, "default": frames}
    chunks = chunk_plan(args.frames, prefix, recipe.chunk, recipe.prefix, **how)
    part = prefix if inside else 0  # of the first chunk
    largest = max(part + chunks[0], *chunks)
    sampler |= memory(recipe.window or None, recipe.sink, largest, recipe.sink_rope, prefix - part)
    return sampler | {"chunks": chunks, "prefix_inside": inside}


def make_clips(args: Namespace, recipe: Recipe, prefix: int, sampler: dict) -> list[Clip]:
    """The clips, with the text that each chunk is shown. `sampler` gets what else happens where
    the text changes: scene cuts, and whether the window is run again.

    ValueError without prompts, for scenes that don't fit, and if a file is in a clip's way.
    """
    # One clip for all prompts with --shots or --at, else one for each.
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    check(prompts, "no prompt: give --prompt TEXT, or --prompts FILE with one a line")
    chunks = sampler["chunks"]
    sampler |= {"cuts": {}, "recache": args.recache}
    begins = [0]
    if args.shots:
        check(not args.at, "--shots are of equal lengths: leave --at out, or --shots")
        sampler["cuts"] = scene_cuts(len(prompts), prefix, chunks, recipe)
    elif args.at:
        counted = f"{len(prompts)} prompts, of which the first begins, and {len(args.at)} times"
        check(len(prompts) == len(args.at) + 1, f"--at: {counted}; give one fewer than prompts")
        check(recipe.causal, "--at needs chunks: here the whole clip is made at once; leave it out")
        begins = switches(args.at, prefix, chunks, recipe.fps)
    joined = args.shots or args.at
    check_changes(args, sampler["cuts"])
    clips = name_clips(
        [prompts] if joined else [[prompt] for prompt in prompts], args.seed, args.out
    )

    # The names that they get must be free, and are never those of what is read.
    read = [args.image, args.video, args.prompts, args.weights, args.recipe]
    read += [parse_lora(text)[0] for text in args.lora]
    suffixes = {".png": args.sheet, ".safetensors": args.latents}
    suffixes |= dict.fromkeys(REPORTS, args.report)
    asked = [suffix for suffix, wanted in suffixes.items() if wanted]
    claim(
        clips, list(filter(None, read)), asked, overwrite=args.overwrite, resume=bool(args.resume)
    )

    # What each chunk is shown.
    filled = []
    for clip in clips:
        if args.at:
            texts = spread(clip.prompts, begins, len(chunks))
        else:
            texts = scene_texts(clip.prompts, len(chunks), recipe)
        blends = blended(texts, args.interpolate or 1)
        filled.append(clip._replace(texts=texts, blends=blends))
    blend = filled[0].blends.get(len(chunks) - 1)
    if blend:
        note(f"--interpolate {args.interpolate}: the clip ends {blend[1]:.0%} of the way there")
    return filled


def check_changes(args: Namespace, cuts: dict) -> None:
    """ValueError for ways of changing the prompt that contradict each other."""
    softened = args.interpolate or args.recache
    wrong = "scene cuts need neither --interpolate nor --recache: leave them out"
    check(not (cuts and softened), wrong)
