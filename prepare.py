"""Inputs of training, made once: text embeddings, latents of videos, ODE trajectories.

    python prepare.py text --release Wan2.2-TI2V-5B --prompts prompts.txt --out data/text
    python prepare.py latents --release Wan2.2-TI2V-5B --videos clips/ --out data/latents
    python prepare.py text --release Wan2.2-TI2V-5B --prompts data/latents --out data/captions   # a store's captions
    python prepare.py trajectories --release Wan2.2-TI2V-5B --text data/text --out data/ode
    python prepare.py trajectories --release Wan2.2-TI2V-5B --weights ar.safetensors --causal --text data/text --out ode
    python prepare.py trajectories ... --latents data/latents --text data/captions --frames 85   # image to video
    torchrun --nproc_per_node=8 prepare.py ...   # the same on 8 GPUs: each process makes every 8th shard

Stop it at will: the same command goes on, and what is lost is the shard at work. A folder takes one kind of shards,
made with one set of options. Videos are files with the caption beside (fox.mp4, fox.txt), folders of images likewise
(fox/, fox.txt), or lines {"video": path, "caption": text} of a .jsonl file; --clips takes several clips of each, one
behind the other. wan5b/data.py says what a shard holds.
With --latents, a trajectory goes on from the first frame of each clip there, by its caption: image to video, for stages
with prefix = 1 (chunks of 1, 3, 3, ... latent frames: --frames 85 in place of 81).
Trajectories of 81 frames of 704x1280 take 14 GB of GPU memory for every prompt of --batch, beside the model's 10.
"""

import argparse
import json
import os
from collections.abc import Callable
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.data import (
    Store,
    TextStore,
    difference,
    open_shard,
    write_shard,
)
from wan5b.distill import guided, rollout
from wan5b.extras.files import parse_size, read_prompts
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae, read_metadata
from wan5b.extras.pictures import read_clips
from wan5b.flow import FEW_STEPS, few_step_sigmas, shift_sigma
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.media import fit, latent_frames
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import rng, script
from wan5b.vae22 import VAEConfig

RANK, WORLD_SIZE = (
    int(os.environ.get("RANK", 0)),
    int(os.environ.get("WORLD_SIZE", 1)),
)  # as torchrun sets them
FACTS = (
    "size",
    "frames",
    "fps",
    "clips",
    "dtype",
    "latents",
    "guidance",
    "steps",
    "shift",
    "seed",
    "causal",
)
DEVICE = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable, about: str, per_shard: int, batch: int, dtype: str | None = None
    ) -> Callable:
        sub = commands.add_parser(
            run.__name__, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=torch.no_grad()(run))
        add = sub.add_argument
        add("--release", required=True, metavar="DIR", help="folder of Wan2.2-TI2V-5B")
        add("--out", required=True, metavar="DIR", help="folder of the shards")
        add(
            "--per-shard",
            type=int,
            default=per_shard,
            metavar="N",
            help="prompts or videos to a shard",
        )
        add("--batch", type=int, default=batch, metavar="N", help="prompts or videos at a time")
        if dtype:
            add("--size", default="704x1280", metavar="HxW", help="height and width in pixels")
            add("--frames", type=int, default=81, help="pixel frames of a clip (4k + 1)")
            add("--dtype", default=dtype, choices=["bfloat16", "float32"], help="to store")
        return add

    add = command(text, "prompts -> embeddings", 1024, 16)
    add(
        "--prompts",
        required=True,
        metavar="FILE_OR_STORE",
        help="UTF-8, one a line; or a store's captions",
    )
    add("--negative", default=NEGATIVE_PROMPT, metavar="TEXT", help="the negative prompt")

    add = command(latents, "videos with captions -> latents", 32, 1, "bfloat16")
    add(
        "--videos",
        required=True,
        metavar="FILE_OR_DIR",
        help="a .jsonl file, or a folder of videos and captions",
    )
    add(
        "--fps",
        type=float,
        default=24,
        help="of the clips; folders of images are taken as they are",
    )
    add(
        "--clips",
        type=int,
        default=1,
        help="at most, of each video: one behind the other, with the same caption",
    )

    add = command(trajectories, "teacher or causal model -> ODE trajectories", 8, 1, "float32")
    add(
        "--weights",
        metavar="PATH",
        help="the DiT to use in place of the release's: an export or a checkpoint",
    )
    add(
        "--text",
        required=True,
        metavar="STORE",
        help="embeddings: a trajectory for each but the negative and empty",
    )
    add(
        "--latents",
        metavar="STORE",
        help="image to video: behind the first frames of these clips, by their captions",
    )
    add("--guidance", type=float, default=6.0, help="CFG scale: uncond + g (cond - uncond)")
    add(
        "--steps",
        type=int,
        default=48,
        help=f"Euler steps; x is kept at {len(FEW_STEPS)} of them and at the end",
    )
    add(
        "--shift",
        type=float,
        default=argparse.SUPPRESS,
        help="timestep shift (default: the export's, or 5)",
    )
    add("--seed", type=int, default=0, help="of the noise")
    add("--repeats", type=int, default=1, help="trajectories of each prompt")
    add(
        "--causal",
        action="store_true",
        help="chunk by chunk over the KV cache, as an AR model runs",
    )
    add(
        "--chunk",
        type=int,
        default=argparse.SUPPRESS,
        help="of --causal, in frames (default: the export's, or 3)",
    )
    args = parser.parse_args(argv)
    for name in ("per_shard", "batch", "clips", "fps", "repeats", "shift", "chunk"):
        if not vars(args).get(name, 1) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {vars(args)[name]}: must be above 0")
    return args


def latent_size(args: argparse.Namespace) -> tuple[int, ...]:
    """Latent frames, height and width of a clip."""
    return latent_frames(args.frames), *(side // 16 for side in parse_size(args.size))


def pending(
    args: argparse.Namespace, inputs: list, source: str, **more
) -> list[tuple[Path, list, dict]]:
    """(path, inputs, header) of the shards that are left for this process to make.

    header: made_from, a digest of the inputs, and the facts: the options that the items depend on, where the weights
    are from (source), and more. ValueError if args.out holds a shard of other inputs or facts.
    """
    facts = (
        more
        | {name: vars(args)[name] for name in FACTS if name in args}
        | {"model": Path(source).resolve().name}
    )
    shards = {}
    for i, start in enumerate(range(0, len(inputs), args.per_shard)):
        part, path = inputs[start : start + args.per_shard], Path(args.out) / f"{i:05}.safetensors"
        shards[path] = (
            path,
            part,
            facts | {"made_from": blake2b(repr(part).encode(), digest_size=8).hexdigest()},
        )
    for path in sorted(Path(args.out).glob("*.safetensors")):
        _, header = open_shard(path)
        changed = difference(header["facts"], facts)
        if changed or path not in shards or header["made_from"] != shards[path][2]["made_from"]:
            raise ValueError(
                f"{path} is of another run: {changed or 'inputs, --per-shard'}; delete it or change --out"
            )
    return [shard for shard in list(shards.values())[RANK::WORLD_SIZE] if not shard[0].exists()]


def fill(args: argparse.Namespace, todo: list, make: Callable) -> None:
    """Write the pending shards. make(some inputs) yields tensors as `write_shard` takes them, prompts of the items."""
    for i, (path, inputs, header) in enumerate(todo):
        bar = tqdm(
            range(0, len(inputs), args.batch), f"shard {i + 1} of {len(todo)}", disable=RANK > 0
        )
        made = [items for start in bar for items in make(inputs[start : start + args.batch])]
        tensors = {name: torch.cat([tensors[name] for tensors, _ in made]) for name in made[0][0]}
        write_shard(path, tensors, [prompt for _, prompts in made for prompt in prompts], **header)


def text(args: argparse.Namespace) -> None:
    given = (
        Store(args.prompts).prompts if Path(args.prompts).is_dir() else read_prompts(args.prompts)
    )
    prompts = list(
        dict.fromkeys([args.negative, "", *given])
    )  # in this order: a list that grows keeps its shards
    todo = pending(args, prompts, args.release, negative=args.negative)
    tokenizer = load_tokenizer(args.release)
    encoder = load_t5(args.release, DEVICE, torch.bfloat16)

    def embed(prompts: list[str]):
        ids, mask = tokenizer(prompts)
        rows = encoder(ids.to(DEVICE), mask.to(DEVICE)).cpu()[mask != 0]
        yield {"rows": rows, "lengths": mask.sum(1)}, prompts

    fill(args, todo, embed)


def list_videos(where: Path) -> list[tuple[str, str]]:
    """(path, caption) of each video. ValueError for what is missing or malformed."""
    if where.is_dir():
        paths = [path for path in sorted(where.glob("[!.]*")) if path.suffix != ".txt"]
        return [(str(path), " ".join(read_prompts(path.with_suffix(".txt")))) for path in paths]
    try:
        lines = [json.loads(line) for line in read_prompts(where)]
        return [(str(where.parent / line["video"]), line["caption"].strip()) for line in lines]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'every line of {where} must be {{"video": path, "caption": text}}: {error!r}'
        ) from error


def latents(args: argparse.Namespace) -> None:
    frames, height, width = latent_size(args)
    videos = list_videos(Path(args.videos))
    missing = [path for path, _ in videos if not Path(path).exists()]
    if missing or not videos:
        raise ValueError(
            f"{args.videos} names {len(videos)} videos, {len(missing)} of them missing: {missing[:3]}"
        )
    todo = pending(args, videos, args.release)
    vae = load_vae(args.release, DEVICE, torch.float32)  # bfloat16 spoils what is encoded
    dtype, skipped = getattr(torch, args.dtype), []

    def encode(videos: list[tuple[str, str]]):
        yield (
            {"latent": torch.empty(0, vae.cfg.z_dim, frames, height, width, dtype=dtype)},
            [],
        )  # if there is no clip
        for path, caption in videos:
            try:
                for clip in islice(read_clips(path, args.frames, args.fps), args.clips):
                    pixels = fit(clip, 16 * height, 16 * width)
                    yield (
                        {"latent": vae.encode(pixels[None].to(DEVICE)).to("cpu", dtype)},
                        [caption],
                    )
            except ValueError as error:  # one bad file should not end the work of hours
                skipped.append(f"{path}: {error}")

    fill(args, todo, encode)
    print(
        f"skipped {len(skipped)} videos (or their rest), too short or unreadable",
        *skipped[:10],
        sep="\n  ",
    )


def integrate(
    model: Callable,
    clean: Tensor,
    x: Tensor,
    context,
    sigmas,
    kept: list[float],
    chunks,
    cache,
    causal,
):
    """The states of the Euler solution at the levels kept, of which the last is 0: [B, len(kept), C, T, H, W].

    clean [B, C, T', H, W]: given frames (T' may be 0), in front of all states; x: noise of the chunks behind them; the
    other arguments are `rollout`'s. A causal model finds the given frames in the cache. A bidirectional one, for which
    the rest is one chunk, is shown them at level 0 beside it at every step, as Wan2.2-TI2V is trained.
    """
    states = {sigma: [] for sigma in kept[:-1]}
    first, shown = (clean, clean[:, :, :0]) if causal else (None, clean)

    def recorded(x: Tensor, sigma: float, context: Tensor, **cached) -> Tensor:
        if sigma in states:
            states[sigma].append(x)
        x = torch.cat([shown, x], 2)
        level = torch.full(x.shape[:3:2], sigma, dtype=torch.float64, device=x.device)  # [B, T]
        level[:, : shown.shape[2]] = 0
        return model(x, level, context, **cached)[:, :, shown.shape[2] :]

    # no more than len(chunks) are asked for: the last chunk needs no commit
    ends = list(
        islice(
            rollout(recorded, x, context, sigmas, chunks, cache, prefix=first, solver="euler"),
            len(chunks),
        )
    )
    return torch.stack([torch.cat([clean, *x], 2) for x in [*states.values(), ends]], 1)


def trajectories(args: argparse.Namespace) -> None:
    frames, *size = latent_size(args)
    if args.steps < 1 or args.steps % len(FEW_STEPS):
        raise ValueError(
            f"--steps {args.steps} must be a multiple of {len(FEW_STEPS)}, to meet the levels exactly"
        )
    store, clips = TextStore(args.text), Store(args.latents) if args.latents else None
    negative, source, first = (
        store.facts["negative"],
        args.weights or args.release,
        int(clips is not None),
    )
    trained = read_metadata(source)
    if "stage" in trained and args.causal == (trained["stage"] == "teacher"):
        raise ValueError(
            f"{source} is of stage {trained['stage']}: {'no' if args.causal else 'give'} --causal"
        )
    # Recorded with the other options.
    vars(args).update(
        {"chunk": trained.get("chunk", 3), "shift": trained.get("shift", 5.0)} | vars(args)
    )
    shape = (
        VAEConfig.z_dim,
        frames - first,
        *size,
    )  # of the noise, behind the first frame if that is given
    held = clips.shapes.get("latent", ()) if first else shape
    if held[:1] + held[2:] != shape[:1] + shape[2:] or not shape[1]:
        raise ValueError(
            f"{args.latents} has latents {held}; {args.size} takes {shape[0], 'any', *size}, --frames > 1"
        )
    chunks = chunk_sizes(frames, args.chunk if args.causal else frames - first, first)
    prompts = (
        clips.prompts
        if first
        else [prompt for prompt in store.prompts if prompt not in ("", negative)]
    )
    store.check(prompts)
    sigmas = [shift_sigma(1 - i / args.steps, args.shift) for i in range(args.steps + 1)]
    kept = few_step_sigmas(FEW_STEPS, args.shift)
    facts = {
        "trained": trained,
        "negative": negative,
        "sigmas": kept,
        "chunks": chunks,
        "prefix": first,
    }
    todo = pending(args, list(enumerate(prompts * args.repeats)), source, **facts)
    dtype = torch.bfloat16 if DEVICE != "cpu" else torch.float32
    model = load_dit(source, DEVICE, dtype, channels=VAEConfig.z_dim)

    def generate(numbered: list[tuple[int, str]]):
        prompts = [prompt for _, prompt in numbered]
        context = store.batch(prompts + [negative] * len(prompts), model.cfg.text_len, dtype).to(
            DEVICE
        )
        noise = torch.stack(
            [
                torch.randn(shape, generator=rng("cpu", args.seed, "trajectory", i))
                for i, _ in numbered
            ]
        )
        clean = (
            torch.stack([clips[i % len(clips)]["latent"][:, :1] for i, _ in numbered])
            if first
            else noise[:, :, :0]
        )
        given = clean.to(DEVICE, torch.float32), noise, context
        cache = KVCache(
            model.cfg,
            len(context),
            frames,
            model.cfg.tokens_per_frame(*size),
            device=DEVICE,
            dtype=dtype,
        )
        x = integrate(
            guided(model, args.guidance), *given, sigmas, kept, chunks[first:], cache, args.causal
        )
        yield {"x": x.to("cpu", getattr(torch, args.dtype))}, prompts

    fill(args, todo, generate)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.run(args)


if __name__ == "__main__":
    script(main)
