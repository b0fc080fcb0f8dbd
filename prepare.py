"""Inputs of training, made once: text embeddings, latents of videos, ODE trajectories.

    python prepare.py text --release Wan2.2-TI2V-5B --prompts prompts.txt --out data/text
    python prepare.py latents --release Wan2.2-TI2V-5B --videos clips/ --out data/latents
    python prepare.py trajectories --release Wan2.2-TI2V-5B --text data/text --out data/ode

    # the captions of a store of latents as prompts
    python prepare.py text --release Wan2.2-TI2V-5B --prompts data/latents --out data/captions
    # trajectories of a causal model, an export of train.py
    python prepare.py trajectories --weights ar.safetensors --causal ...
    # image to video
    python prepare.py trajectories --latents data/latents --text data/captions --frames 85 ...
    # the same on 8 GPUs: each process makes every 8th shard
    torchrun --nproc_per_node=8 prepare.py ...

Stop it at will: the same command goes on, and what is lost is the shard at work. A folder takes one
kind of shards, made with one set of options; wan5b/data.py says what a shard holds.

Videos are files with the caption beside (fox.mp4, fox.txt), folders of images likewise (fox/,
fox.txt), or lines {"video": path, "caption": text} of a .jsonl file; --clips takes several clips of
each, one behind the other.

With --latents, a trajectory goes on from the first frame of each clip there, by its caption: image
to video, for stages with prefix = 1 (chunks of 1, 3, 3, ... latent frames: --frames 85 in place of
81). Trajectories of 81 frames of 704x1280 take 4 GB of GPU memory for every prompt of --batch, with
--causal 14, beside the model's 10.
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.data import Store, TextStore, difference, open_shard
from wan5b.distill import guided, rollout
from wan5b.extras.chunking import chunk_plan
from wan5b.extras.cli import script
from wan5b.extras.digest import digest, sizes
from wan5b.extras.disk import check_folder
from wan5b.extras.files import caption_file, note_cut, parse_size, read_prompts
from wan5b.extras.formats import (
    load_dit,
    load_t5,
    load_tokenizer,
    load_vae,
    locate,
    read_metadata,
)
from wan5b.extras.framing import fit
from wan5b.extras.media import latent_frames
from wan5b.extras.pictures import read_clips
from wan5b.extras.shards import check_texts, write_shard
from wan5b.flow import FEW_STEPS, few_step_sigmas, shift_sigma, solve
from wan5b.kvcache import KVCache
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import raise_interrupted, rng
from wan5b.vae22 import VAEConfig

# As torchrun sets them.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

# ----------------------------------------------------------------------------------------- options

POSITIVE = ("per_shard", "batch", "clips", "fps", "repeats", "shift", "chunk")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of one command, and the command itself as `run`. ValueError for wrong values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_text(commands)
    add_latents(commands)
    add_trajectories(commands)
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        if name not in POSITIVE or value is None:
            continue
        if not 0 < value < math.inf:  # nor NaN
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0, and finite")
    return args


def add_command(commands, run: Callable, name: str, about: str, per_shard: int, batch: int):
    """A command with the options that all have -> its parser."""
    parser = commands.add_parser(
        name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--release", required=True, metavar="DIR", help="folder of Wan2.2-TI2V-5B")
    add("--out", required=True, metavar="DIR", help="folder of the shards")
    items = {"type": int, "metavar": "N"}
    add("--per-shard", default=per_shard, help="prompts or videos to a shard", **items)
    add("--batch", default=batch, help="prompts or videos at a time", **items)
    return parser


def add_clip_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """How large a clip is, and how it is stored."""
    add = parser.add_argument
    add("--size", default="704x1280", metavar="HxW", help="height and width in pixels")
    add("--frames", type=int, default=81, help="pixel frames of a clip (4k + 1)")
    add("--dtype", default=dtype, choices=["bfloat16", "float32"], help="to store")


def add_text(commands) -> None:
    parser = add_command(commands, make_text, "text", "prompts -> embeddings", 1024, 16)
    add = parser.add_argument
    prompts = "UTF-8, one a line; or a store's captions"
    add("--prompts", required=True, metavar="FILE_OR_STORE", help=prompts)
    add("--negative", default=NEGATIVE_PROMPT, metavar="TEXT", help="the negative prompt")


def add_latents(commands) -> None:
    about = "videos with captions -> latents"
    parser = add_command(commands, make_latents, "latents", about, 32, 1)
    add_clip_options(parser, "bfloat16")
    add = parser.add_argument
    videos = "a .jsonl file, or a folder of videos and captions"
    add("--videos", required=True, metavar="FILE_OR_DIR", help=videos)
    fps = "of the clips; folders of images are taken as they are"
    add("--fps", type=float, default=24, help=fps)
    clips = "at most, of each video: one behind the other, with the same caption"
    add("--clips", type=int, default=1, help=clips)


def add_trajectories(commands) -> None:
    about = "teacher or causal model -> ODE trajectories"
    parser = add_command(commands, make_trajectories, "trajectories", about, 8, 1)
    add_clip_options(parser, "float32")
    add = parser.add_argument
    weights = "the DiT to use in place of the release's: an export or a checkpoint"
    add("--weights", metavar="PATH", help=weights)
    text = "embeddings: a trajectory for each but the negative and empty"
    add("--text", required=True, metavar="STORE", help=text)
    latents = "image to video: behind the first frames of these clips, by their captions"
    add("--latents", metavar="STORE", help=latents)
    add("--guidance", type=float, default=6.0, help="CFG scale: uncond + g (cond - uncond)")
    steps = f"Euler steps; x is kept at {len(FEW_STEPS)} of them and at the end"
    add("--steps", type=int, default=48, help=steps)
    add("--shift", type=float, help="timestep shift; None: the export's, or 5")
    add("--seed", type=int, default=0, help="of the noise")
    add("--repeats", type=int, default=1, help="trajectories of each prompt")
    causal = "chunk by chunk over the KV cache, as an AR model runs"
    add("--causal", action="store_true", help=causal)
    add("--chunk", type=int, help="of --causal, in frames; None: the export's, or 3")


# ------------------------------------------------------------------------------------------ shards

Items = tuple[dict[str, Tensor], list[str]]  # tensors and prompts, as `write_shard` takes them


class Shard(NamedTuple):
    """A file to write."""

    path: Path
    inputs: list  # what its items are made of: prompts, videos
    made_from: str  # a digest of the inputs


def nothing(item) -> tuple:
    """What an input holds, if it is all in the input itself."""
    return ()


def pending(
    out: str,
    inputs: list,
    per_shard: int,
    facts: dict,
    held: str,
    holds: Callable = nothing,
    earlier: Callable | None = None,
) -> list[Shard]:
    """The shards that this process has to make: every WORLD_SIZE-th, but for those that exist.

    facts: whatever the items depend on beside their inputs, as the header of a shard holds it.
    held: a digest of the weights; holds: what an input's files hold, in short. By these the inputs
    are known again when others lie under their names. earlier: what earlier versions noted in
    place of `holds`: their shards count, with a line about it.
    ValueError if the folder `out` holds a shard of other inputs or facts, or can't be written to.
    """
    folder = Path(out)

    def known_by(part: list, short: Callable) -> str:
        known = repr([held, *((item, short(item)) for item in part)])
        return blake2b(known.encode(), digest_size=8).hexdigest()

    shards = {}
    for i, start in enumerate(range(0, len(inputs), per_shard)):
        path = folder / f"{i:05}.safetensors"
        part = inputs[start : start + per_shard]
        shards[path] = Shard(path, part, known_by(part, holds))

    # What the folder holds already must be what this run would have made.
    unknown = []
    for path in sorted(folder.glob("*.safetensors")):
        _, header = open_shard(path)
        apart = difference(header["facts"], facts)
        shard = shards.get(path)
        made_from = header["made_from"]
        is_same = shard and made_from == shard.made_from
        was_same = shard and earlier and made_from == known_by(shard.inputs, earlier)
        if was_same and not (apart or is_same):
            unknown.append(path.name)
        elif not (apart or is_same):
            apart = "what videos, stores or weights hold, inputs, --per-shard"
        if apart:
            raise ValueError(f"{path} is of another run: {apart}; delete it or change --out")
    if unknown and RANK == 0:
        some = f"{out} has {len(unknown)} shards of an earlier version, {unknown[0]} the first"
        print(f"note: {some}: that their texts and clips were these is not known", file=sys.stderr)

    own = list(shards.values())[RANK::WORLD_SIZE]
    to_make = [shard for shard in own if not shard.path.exists()]
    if to_make:
        check_folder(folder, "--out")
    return to_make


def fill(shards: list[Shard], facts: dict, batch: int, make: Callable[[list], Items]) -> None:
    """Make the items of shards, from `batch` inputs at a time, and write them."""
    for i, shard in enumerate(shards):
        title = f"shard {i + 1} of {len(shards)}"
        parts = []
        prompts = []
        for start in tqdm(range(0, len(shard.inputs), batch), title, disable=RANK > 0):
            tensors, named = make(shard.inputs[start : start + batch])
            parts.append(tensors)
            prompts += named
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for name, tensor in whole.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{shard.path}: {name} is not finite; are the weights damaged?")
        write_shard(shard.path, whole, prompts, shard.made_from, **facts)


def options(args: argparse.Namespace, *names: str) -> dict:
    """Some of the options by name, for the facts of a store."""
    return {name: getattr(args, name) for name in names}


def model_name(source: str) -> str:
    """What the facts call a release folder or a file of weights."""
    return os.path.basename(os.path.realpath(source))


def latent_size(frames: int, size: str) -> tuple[int, int, int]:
    """Latent frames, height and width of a clip of pixels."""
    height, width = parse_size(size)
    return latent_frames(frames), height // 16, width // 16


# -------------------------------------------------------------------------------------------- text


def make_text(args: argparse.Namespace) -> None:
    """The command `text`: an embedding of every prompt, of the empty and of the negative one."""
    if Path(args.prompts).is_dir():
        listed = Store(args.prompts).prompts
    else:
        listed = read_prompts(args.prompts)
    # Each prompt once, in this order: when the list grows, the shards that exist stay valid.
    prompts = list(dict.fromkeys([args.negative, "", *listed]))
    facts = {"negative": args.negative, "model": model_name(args.release)}
    tokenizer = load_tokenizer(args.release)
    held = digest(locate(Path(args.release), "t5"))
    shards = pending(args.out, prompts, args.per_shard, facts, held)

    note_cut(tokenizer, prompts)
    encoder = load_t5(args.release, DEVICE, torch.bfloat16)

    def embed(prompts: list[str]) -> Items:
        ids, mask = tokenizer(prompts)
        hidden = encoder(ids.to(DEVICE), mask.to(DEVICE)).cpu()  # [B, L, D]
        return {"rows": hidden[mask != 0], "lengths": mask.sum(1)}, prompts

    fill(shards, facts, args.batch, embed)


# ----------------------------------------------------------------------------------------- latents


def make_latents(args: argparse.Namespace) -> None:
    """The command `latents`: what the VAE makes of clips."""
    frames, height, width = latent_size(args.frames, args.size)
    videos = list_videos(Path(args.videos))
    missing = [path for path, _ in videos if not Path(path).exists()]
    if missing or not videos:
        found = f"{len(videos)} videos, {len(missing)} of them missing: {missing[:3]}"
        raise ValueError(f"{args.videos} names {found}")
    facts = options(args, "size", "frames", "fps", "clips", "dtype")
    facts["model"] = model_name(args.release)
    held = digest(locate(Path(args.release), "vae"))
    shards = pending(args.out, videos, args.per_shard, facts, held, lambda item: sizes(item[0]))

    vae = load_vae(args.release, DEVICE, torch.float32)  # bfloat16 spoils what is encoded
    dtype = getattr(torch, args.dtype)
    skipped = []

    def encode(videos: list[tuple[str, str]]) -> Items:
        latents = [torch.empty(0, vae.cfg.z_dim, frames, height, width, dtype=dtype)]
        captions = []
        for path, caption in videos:
            # One bad file should not end the work of hours.
            try:
                for clip in islice(read_clips(path, args.frames, args.fps), args.clips):
                    pixels = fit(clip, 16 * height, 16 * width)[None].to(DEVICE)
                    latents.append(vae.encode(pixels).to("cpu", dtype))
                    captions.append(caption)
            except ValueError as error:
                raise_interrupted(error)
                skipped.append(f"{path}: {error}")
        return {"latent": torch.cat(latents)}, captions

    fill(shards, facts, args.batch, encode)
    print(f"skipped {len(skipped)} videos (or their rest), too short or unreadable")
    for line in skipped[:10]:
        print(f"  {line}")


def list_videos(where: Path) -> list[tuple[str, str]]:
    """(path, caption) of each video. ValueError for captions or lines that are missing or wrong."""
    if where.is_dir():
        paths = [path for path in sorted(where.glob("[!.]*")) if path.suffix != ".txt"]
        return [(str(path), " ".join(read_prompts(caption_file(path)))) for path in paths]

    if not where.is_file():
        raise ValueError(
            f"--videos {where}: no such file or folder; name a folder or a .jsonl file"
        )
    videos = []
    lines = read_prompts(where)
    try:
        for line in map(json.loads, lines):
            caption = line["caption"].strip()
            caption.encode()  # half an emoji can't be stored
            if not line["video"].strip("./ "):  # the folder of the list itself, or above
                raise KeyError("video")
            videos.append((str(where.parent / line["video"]), caption))
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        expected = '{"video": path, "caption": text}'
        raise ValueError(f"every line of {where} must be {expected}: {error!r}") from error
    return videos


# ------------------------------------------------------------------------------------ trajectories


def make_trajectories(args: argparse.Namespace) -> None:
    """The command `trajectories`: the few-step model's levels on the way from noise to a clip."""
    frames, height, width = latent_size(args.frames, args.size)
    text = TextStore(args.text)
    clips = Store(args.latents) if args.latents else None
    source = args.weights or args.release
    trained = read_trained(source, args.causal)
    # What stands for no text is as in the weights' training, whatever else the store holds.
    negative = trained.get("training", {}).get("negative", text.facts["negative"])

    # A clip for every prompt, or what follows the first latent frame of every clip in a store.
    prefix = 0 if clips is None else 1
    shape = (VAEConfig.z_dim, frames - prefix, height, width)  # of the noise
    if clips is None:
        apart = ("", negative, text.facts["negative"])
        prompts = [prompt for prompt in text.prompts if prompt not in apart]
    else:
        check_clips(clips, shape, args.size)
        prompts = clips.prompts
    text.check(prompts)

    if args.causal and clips is None and trained.get("prefix") and RANK == 0:
        lacks = f"{source} was trained behind given first frames, and makes its own here"
        print(f"note: {lacks}; --latents gives it those of clips", file=sys.stderr)

    # What the options leave open is as the model was trained.
    shift = args.shift or trained.get("shift", 5.0)
    sigmas, kept = levels(args.steps, shift)
    size = frames - prefix
    if args.causal:
        size = args.chunk or trained.get("chunk", 3)
        window = trained.get("window") or size
        if size > window:
            wrong = f"--chunk {size} does not fit in the window of {window} frames"
            way_out = f"give --chunk {window} or less"
            raise ValueError(f"{wrong} that {source} was trained with; {way_out}")
    chunks = [1] * prefix + chunk_plan(args.frames, prefix, size, 0)  # the prefix is a chunk, too

    facts = {
        "trained": trained,
        "negative": negative,
        "sigmas": kept,
        "chunks": chunks,
        "prefix": prefix,
        **options(args, "size", "frames", "dtype", "latents", "guidance", "steps"),
        "shift": shift,
        **options(args, "seed", "causal"),
        "model": model_name(source),
    }
    # The number of an item decides on its noise, and which clip it goes on from.
    inputs = list(enumerate(prompts * args.repeats))
    holds = held_by_stores(text, clips)
    shards = pending(args.out, inputs, args.per_shard, facts, digest(source), holds, nothing)

    dtype = torch.bfloat16 if DEVICE != "cpu" else torch.float32
    model = load_dit(source, DEVICE, dtype, channels=VAEConfig.z_dim)
    check_texts(text, [*prompts, negative], model.cfg.text_dim, model.cfg.text_len)
    field = guided(model, args.guidance)
    tokens = model.cfg.tokens_per_frame(height, width)

    def generate(numbered: list[tuple[int, str]]) -> Items:
        prompts = [prompt for _, prompt in numbered]
        both = prompts + [negative] * len(prompts)
        context = text.batch(both, model.cfg.text_len, dtype).to(DEVICE)
        clean, noise = beginnings([i for i, _ in numbered], shape, args.seed, clips)
        cache = None
        if args.causal:
            # What the model was not trained to see, it is not shown here either.
            sizes = (len(both), frames, tokens, trained.get("window"))
            cache = KVCache(model.cfg, *sizes, device=DEVICE, dtype=dtype)
        x = integrate(field, clean.to(DEVICE), noise, context, sigmas, kept, chunks[prefix:], cache)
        return {"x": x.to("cpu", getattr(torch, args.dtype))}, prompts

    fill(shards, facts, args.batch, generate)


def held_by_stores(text: TextStore, clips: Store | None) -> Callable:
    """The `holds` of `pending` for a prompt and its number: its embedding, its clip's first
    frame.
    """

    def short(tensor: Tensor) -> str:
        content = tensor.contiguous().view(torch.uint8).numpy()
        return blake2b(content, digest_size=8).hexdigest()

    @cache
    def embedding(prompt: str) -> str:
        return short(text[prompt])

    def holds(numbered: tuple[int, str]) -> list[str]:
        i, prompt = numbered
        if clips is None:
            return [embedding(prompt)]
        return [embedding(prompt), short(first_frame(clips, i))]

    return holds


def first_frame(clips: Store, i: int) -> Tensor:
    """Of the clip of an item, [C, 1, H, W]; items beyond the last clip as in `beginnings`."""
    file, row = clips.places[i % len(clips)]
    return file.get_slice("latent")[row : row + 1, :, :1][0]


def read_trained(source: str, causal: bool) -> dict:
    """What weights say of their training. ValueError if they need the other setting of --causal.

    A line for the user where they say nothing, as a release does, which is not causal.
    """
    trained = read_metadata(source)
    if "stage" in trained and causal == (trained["stage"] == "teacher"):
        way_out = "no --causal" if causal else "give --causal"
        raise ValueError(f"{source} is of stage {trained['stage']}: {way_out}")
    if causal and "stage" not in trained and RANK == 0:
        text = f"no record of causal training in {source}: expect noise"
        print(f"note: {text}, unless another trainer made it causal", file=sys.stderr)
    return trained


def check_clips(clips: Store, shape: tuple[int, ...], size: str) -> None:
    """ValueError unless noise of this shape [C, T, H, W] can follow a frame of the clips."""
    channels, frames, height, width = shape
    held = clips.shapes.get("latent", ())
    if held[:1] + held[2:] != (channels, height, width) or frames == 0:
        needs = f"{size} takes {channels, 'any', height, width}, --frames > 1"
        raise ValueError(f"{clips.folder} has latents {held}; {needs}")


def levels(steps: int, shift: float) -> tuple[list[float], list[float]]:
    """The levels of Euler steps, and those of the few-step model, which must be among them."""
    if steps < 1 or steps % len(FEW_STEPS):
        rule = f"must be a multiple of {len(FEW_STEPS)}, to meet the levels exactly"
        raise ValueError(f"--steps {steps} {rule}")
    sigmas = [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]
    return sigmas, few_step_sigmas(FEW_STEPS, shift)


def beginnings(
    numbers: list[int], shape: tuple[int, ...], seed: int, clips: Store | None
) -> tuple[Tensor, Tensor]:
    """Clean prefix and noise of items by their numbers: [B, C, T, H, W] each, float32 on the CPU.

    shape: of one item's noise. The prefix is the first latent frame of a clip; without clips it has
    no frames. Items beyond the last clip start with the first one again.
    """
    noise = []
    for i in numbers:
        noise.append(torch.randn(shape, generator=rng("cpu", seed, "trajectory", i)))
    noise = torch.stack(noise)
    if clips is None:
        return noise[:, :, :0], noise
    frames = [clips[i % len(clips)]["latent"][:, :1] for i in numbers]
    return torch.stack(frames).float(), noise


def integrate(
    model: Callable,
    prefix: Tensor,
    noise: Tensor,
    context: Tensor,
    sigmas: list[float],
    kept: list[float],
    chunks: list[int],
    cache: KVCache | None,
) -> Tensor:
    """Euler solutions from noise to clips, as the states at some levels: [B, S, C, T, H, W].

    - prefix [B, C, T', H, W]: clean frames (T' may be 0) that stand in front of every state
    - noise [B, C, T - T', H, W] of the frames behind them
    - sigmas: all levels, falling, the last one 0; kept: the S levels to keep, the last one 0
    - chunks, cache: of a causal model, as `rollout` takes them; without a cache the frames are made
      together, behind a prefix at level 0, as Wan2.2-TI2V is trained
    """
    # A causal model finds the prefix in its cache; a bidirectional one is shown it at every step.
    shown = prefix if cache is None else prefix[:, :, :0]
    clean = shown.shape[2]
    states = {sigma: [] for sigma in kept[:-1]}  # level -> x there, chunk by chunk

    def field(x: Tensor, sigma: float, context: Tensor, **cached) -> Tensor:
        if sigma in states:
            states[sigma].append(x)
        whole = torch.cat([shown, x], 2)
        level = torch.full((len(x), whole.shape[2]), sigma, dtype=torch.float64, device=x.device)
        level[:, :clean] = 0
        return model(whole, level, context, **cached)[:, :, clean:]

    if cache is None:
        noise = noise.to(context.device)
        ends = [solve(partial(field, context=context), noise, sigmas, "euler")]
    else:
        finished = rollout(
            field, noise, context, sigmas, chunks, cache, prefix=prefix, solver="euler"
        )
        ends = list(islice(finished, len(chunks)))  # no more: the last need not be in the cache

    # Chunks one behind the other, levels along a new axis.
    return torch.stack([torch.cat([prefix, *parts], 2) for parts in [*states.values(), ends]], 1)


# -------------------------------------------------------------------------------------------- main


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    script(main)
