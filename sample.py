"""Prompt (and image, or video) -> mp4, chunk by chunk.

    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "A red fox in deep snow"
    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "It runs" --image fox.jpg
    python sample.py --release Wan2.2-TI2V-5B --mode bidirectional --prompt "A red fox in deep snow"   # the teacher
    python sample.py --random-weights --preset tiny --size 64x96 --frames 33 --prompt "noise"          # no weights, CPU

Modes: few (causal, few steps; the default), many (causal, many steps, CFG), bidirectional (whole clip, CFG).
Only distilled or causally trained weights give a picture in the causal modes; the released ones give noise there.
"""

import argparse
import functools
import json
import os
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from wan5b.fp8 import quantize_blocks

from wan5b import fuse, media
from wan5b.data import read_prompts
from wan5b.distill import guided, rollout
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras.formats import (
    load_dit,
    load_t5,
    load_tokenizer,
    load_vae,
    open_dit,
    read_metadata,
)
from wan5b.extras.fp8 import quantize_blocks
from wan5b.flow import FEW_STEPS, few_step_sigmas, sampling_sigmas, solve
from wan5b.kvcache import KVCache
from wan5b.t5 import NEGATIVE_PROMPT, encode_prompts
from wan5b.util import nearest, rng, script, write_tensors
from wan5b.vae22 import VAE22, VAEConfig

DEVICES = [
    *["cuda"] * torch.cuda.is_available(),
    "cpu",
    *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--release", help="folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder")
    add(
        "--weights",
        help="the DiT to use in place of the release's: an export, or a checkpoint (runs/x/step-0000100)",
    )
    add(
        "--random-weights",
        action="store_true",
        help="random networks and text embeddings, for measurements",
    )
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"], help="of random weights")
    add(
        "--prompt",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="one clip for each (and for each seed)",
    )
    add("--prompts", metavar="FILE", help="more prompts: UTF-8, one a line")
    add(
        "--negative",
        default=NEGATIVE_PROMPT,
        metavar="TEXT",
        help="negative prompt of the modes with CFG",
    )
    add("--image", metavar="FILE", help="the first frame")
    add(
        "--video",
        metavar="FILE",
        help="a video to go on from: the clip starts with its last frames",
    )
    add("--prefix", type=int, default=9, help="how many last frames of --video are given (4k + 1)")
    add("--mode", default="few", choices=["few", "many", "bidirectional"])
    add(
        "--size",
        help="HEIGHTxWIDTH in pixels, multiples of 32 (default 704x1280, or that area in the image's shape)",
    )
    add(
        "--frames",
        type=int,
        help="pixel frames, given ones included (4k + 1; default 81, or what chunks fill next)",
    )
    add("--seed", type=int, nargs="+", default=[0])
    add("--chunk", type=int, help="latent frames a chunk (default: the checkpoint's, or 3)")
    add(
        "--window", type=int, help="latent frames that a chunk sees, itself included (default: all)"
    )
    add("--sink", type=int, default=0, help="first latent frames that stay in the window")
    add("--steps", type=int, help="steps of the modes with CFG (default 50; 40 with an image)")
    add("--shift", type=float, help="timestep shift (default: the checkpoint's, or 5)")
    add("--guidance", type=float, default=5.0, help="CFG scale: uncond + g (cond - uncond)")
    add("--solver", default="unipc", choices=["unipc", "euler"], help="of the modes with CFG")
    add(
        "--out",
        default="out/sample.mp4",
        help="or a FOLDER/; with several clips, prompt and seed number are added",
    )
    add("--sheet", action="store_true", help="also a PNG of 16 frames")
    add("--latents", action="store_true", help="also the latents (safetensors)")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--device", default=DEVICES[0], choices=DEVICES)
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="default bfloat16 on a GPU, float32 on the CPU",
    )
    add(
        "--compile",
        action="store_true",
        help="fuse small operations: a minute at the start, 1.3x faster after",
    )
    add(
        "--fp8",
        action="store_true",
        help="linear layers of the DiT in float8 (Hopper or newer): faster, less exact",
    )
    add(
        "--low-memory",
        action="store_true",
        help="for 24 GB: text on the CPU, decoding when the DiT is gone",
    )
    add(
        "--settings",
        metavar="JSON",
        help="repeat the run that wrote this file; other options still override",
    )
    args = parser.parse_args(argv)
    if args.settings:
        try:
            settings = json.loads(Path(args.settings).read_text(encoding="utf-8"))["settings"]
            args = argparse.Namespace(**{name: settings[name] for name in vars(args)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{args.settings} is not a JSON that this sample.py wrote: {error!r}"
            ) from error
        parser.parse_args(argv, args)
    return args


def chunk_plan(args: argparse.Namespace, given: int, size: int, first: int | None) -> list[int]:
    """Latent frames of each generated chunk, behind `given` latent frames. first: a chunk of its own, if none given."""
    if args.mode == "bidirectional":
        size, first = 1, None
    start, first = (given, None) if given else (first or 0, first)
    least = max(21, given + 1)  # of the default length
    total = (
        least + (start - least) % size if args.frames is None else media.latent_frames(args.frames)
    )
    if total <= given or (total - start) % size:
        valid = nearest(args.frames, 4 * size, 4 * (first or given + size) - 3)
        raise ValueError(
            f"--frames {args.frames} is not {start} latent frames and chunks of {size}; nearest: {valid}"
        )
    return (
        [total - given] if args.mode == "bidirectional" else chunk_sizes(total - given, size, first)
    )


def random_context(prompts: list[str], length: int, dim: int) -> torch.Tensor:
    """Embeddings [B, length, dim] for networks without a text encoder: random, drawn from the prompt."""
    return torch.stack(
        [torch.randn(length, dim, generator=rng("cpu", prompt)) for prompt in prompts]
    )


def random_networks(preset: str, device: torch.device, dtype: torch.dtype) -> tuple[WanDiT, VAE22]:
    """The networks of a preset with seeded random weights."""
    with torch.device("meta"):
        model = WanDiT(PRESETS[preset]).to(dtype)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE22(VAEConfig(dim=8, dec_dim=8) if preset == "tiny" else VAEConfig())
    return model.to_empty(device=device).init_weights(torch.Generator(device).manual_seed(0)), vae


def generate(args, model, noise, context, sigmas, chunks, clean, seed, new_cache=KVCache):
    """Latents of the clip, piece by piece: the given frames first, then every finished chunk.

    new_cache: called as KVCache is, may return one that has been used; CUDA graphs stay with a cache.
    """
    start = [] if clean is None else [clean]
    yield from start
    given = 0 if clean is None else clean.shape[2]
    field, solver = (
        (model, None) if args.mode == "few" else (guided(model, args.guidance), args.solver)
    )
    if args.mode == "bidirectional":

        def denoise(x, sigma):
            level = torch.tensor(
                [[0.0] * given + [sigma] * x.shape[2]] * len(x), dtype=torch.float64
            )
            return field(torch.cat([*start, x], 2), level, context)[:, :, given:]

        yield solve(denoise, noise.to(context.device), sigmas, solver)
        return
    total = given + sum(chunks)
    sizes = (
        len(context),
        min(args.window or total, total),
        model.cfg.tokens_per_frame(*noise.shape[3:]),
    )
    cache = new_cache(model.cfg, *sizes, args.window, args.sink, context.device, context.dtype)
    cache.reset()
    draws = rng(context.device, seed, "renoise")

    def renoise(chunk, step, like):
        return torch.randn(like.shape, generator=draws, device=like.device)

    finished = rollout(
        field, noise, context, sigmas, chunks, cache, renoise=renoise, prefix=clean, solver=solver
    )
    yield from islice(
        finished, len(chunks)
    )  # asking for no more: nothing needs the last chunk in the cache


def write(
    vae,
    latents,
    path: Path,
    record: dict | None = None,
    frames=None,
    sheet=False,
    save_latents=False,
) -> None:
    """Decode a clip into an mp4 while its latents are made; beside it a sheet, the latents, and the record as JSON.

    frames: how many there will be. Whatever ends it, Ctrl-C included, leaves the frames that were finished, playable.
    """
    writer = media.VideoWriter(path, keep=pictures.sheet_indices(frames) if sheet else set())
    state, kept = vae.stream(), []
    try:
        with tqdm(total=frames, unit="frame", desc=path.name) as bar, closing(writer):
            for chunk in latents:
                pixels = vae.decode_chunk(chunk, state)
                writer.add(media.to_frames(pixels[0]))
                kept += [chunk] if save_latents else []
                bar.update(pixels.shape[2])
    finally:
        if writer.kept:
            pictures.write_sheet(path.with_suffix(".png"), writer.kept)
        if kept:
            write_tensors(
                path.with_suffix(".safetensors"), {"latents": torch.cat(kept, 2).float().cpu()}
            )
        if record and writer.count:
            text = json.dumps(
                record | {"frames_written": writer.count}, indent=2, ensure_ascii=False
            )
            path.with_suffix(".json").write_text(text + "\n", "utf-8", "backslashreplace")


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if not args.release and not args.random_weights:
        raise ValueError(
            "name the release folder with --release, or try --random-weights --preset tiny"
        )
    source = args.weights or args.release
    text_len = open_dit(source, channels=VAEConfig.z_dim)[0].text_len if source else None
    if args.fp8 and (device.type != "cuda" or dtype != torch.bfloat16):
        raise ValueError(
            f"--fp8 needs bfloat16 on a GPU (Hopper or newer), not {dtype} on {device}"
        )
    for name in ("prefix", "chunk", "window", "steps", "shift"):
        if vars(args)[name] is not None and not vars(args)[name] > 0:  # NaN is not, either
            raise ValueError(f"--{name} {vars(args)[name]}: must be above 0")
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one a line")

    # What the weights were trained for is in their metadata; the command line overrides it.
    trained = read_metadata(source) if source else {}
    if args.image and args.video:
        raise ValueError("give --image or --video, not both")
    pixels = (
        pictures.read_image(args.image) if args.image else None
    )  # the clip's first frames, uint8 [T, H, W, 3]
    if args.video:
        pixels = pictures.read_video(args.video, last=args.prefix)
    given = 0 if pixels is None else media.latent_frames(len(pixels))
    picture = (704, 1280) if pixels is None else pixels.shape[1:3]
    height, width = media.parse_size(args.size) if args.size else media.fitting_size(*picture)
    chunks = chunk_plan(args, given, args.chunk or trained.get("chunk", 3), trained.get("prefix"))
    args.frames = 4 * (given + sum(chunks)) - 3
    room = (args.window or 0) - max(chunks)
    if args.mode != "bidirectional" and (args.window or args.sink) and not 0 <= args.sink <= room:
        raise ValueError(
            f"--window {args.window}: no room for --sink {args.sink} and a chunk of {max(chunks)} frames"
        )
    shift = args.shift or trained.get("shift", 5.0)
    sigmas = sampling_sigmas(args.steps or (50 if pixels is None else 40), shift)
    if args.mode == "few":
        sigmas = few_step_sigmas(trained.get("levels", FEW_STEPS), shift)

    clips = [(i, seed) for i in range(len(prompts)) for seed in dict.fromkeys(args.seed)]
    out = Path((args.out + "sample" * args.out.endswith("/")).removesuffix(".mp4") + ".mp4")
    paths = [
        out.with_stem(f"{out.stem}-{i:03d}-{seed}") if len(clips) > 1 else out for i, seed in clips
    ]
    suffixes = [".mp4", ".json"] + [".png"] * args.sheet + [".safetensors"] * args.latents
    existing = [file for path in paths for s in suffixes if (file := path.with_suffix(s)).exists()]
    if existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists; choose another --out, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"cannot write to the folder {out.parent}; choose another --out")
    # a release says nothing of itself
    if (
        args.mode != "bidirectional"
        and trained.get("stage", "teacher") == "teacher"
        and not args.random_weights
    ):
        print(
            "note: no record of causal training in these weights: expect noise in the causal modes",
            file=sys.stderr,
        )

    # Text first: the encoder is gone before the DiT comes. The VAE encodes in float32: bfloat16 spoils an image.
    if args.random_weights:
        model, vae = random_networks(args.preset, device, dtype)
        context = random_context([*prompts, args.negative], model.cfg.text_len, model.cfg.text_dim)
    else:
        tokenizer = load_tokenizer(args.release, text_len)
        encoder = load_t5(args.release, "cpu" if args.low_memory else device, torch.bfloat16)
        # One by one: memory does not grow, and no prompt's bits depend on its company.
        context = torch.cat(
            [encode_prompts(encoder, tokenizer, [text]).cpu() for text in [*prompts, args.negative]]
        )
        del encoder
        torch.cuda.empty_cache()
        vae = load_vae(args.release, device, torch.float32)
    clean = (
        None if pixels is None else vae.encode(media.fit(pixels, height, width)[None].to(device))
    )
    vae = vae.to(dtype)
    if not args.random_weights:
        model = load_dit(source, device, dtype)
    if args.fp8:
        quantize_blocks(model)
    fuse.enable(args.compile)
    shape = (1, model.cfg.in_dim, sum(chunks), height // 16, width // 16)
    print(
        f"{len(clips)} x {args.frames} frames of {height}x{width}; latent frames {given} given, chunks {chunks}"
    )

    new_cache = functools.cache(KVCache)  # one for all clips

    def clip(i: int, seed: int, path: Path):
        """The latents of one clip, made as they are asked for; its path; what is to be recorded of it."""
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        text = context[[i] if args.mode == "few" else [i, -1]].to(device, dtype)
        settings = vars(args) | {
            "prompt": [prompts[i]],
            "prompts": None,
            "seed": [seed],
            "settings": None,
        }
        settings |= {
            "out": str(path),
            "overwrite": False,
        }  # a repetition replaces this file only if it is told to
        record = {
            "settings": settings,
            "size": [height, width],
            "chunks": chunks,
            "sigmas": sigmas,
            "trained": trained,
        }
        return (
            generate(args, model, noise, text, sigmas, chunks, clean, seed, new_cache),
            path,
            record,
        )

    made = (clip(i, seed, path) for (i, seed), path in zip(clips, paths, strict=True))
    if args.low_memory:
        made = [
            ([chunk.cpu() for chunk in tqdm(latents, "chunks")], path, record)
            for latents, path, record in made
        ]
        del model, new_cache
        torch.cuda.empty_cache()
    for latents, path, record in made:
        write(
            vae,
            (chunk.to(device) for chunk in latents),
            path,
            record,
            args.frames,
            args.sheet,
            args.latents,
        )


if __name__ == "__main__":
    script(lambda: main(parse()))
