"""Prompt (and image, or video) -> mp4, block by block.

    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "A red fox in deep snow"
    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "It runs" --image fox.jpg
    python sample.py --release Wan2.2-TI2V-5B --mode bidirectional --prompt "A red fox in deep snow"   # the teacher
    python sample.py --random-weights --preset tiny --size 64x96 --frames 33 --prompt "noise"          # no weights, CPU

Modes: few (causal, few steps; the default), many (causal, many steps, CFG), bidirectional (whole clip, CFG).
Only distilled or causally trained weights give a picture in the causal modes; the released ones give noise there.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from wan5b import fuse, media
from wan5b.distill import guided, rollout
from wan5b.dit import PRESETS, WanDiT
from wan5b.flow import FEW_STEPS, few_step_sigmas, sampling_sigmas, solve
from wan5b.fp8 import quantize_blocks
from wan5b.kvcache import KVCache, block_sizes
from wan5b.t5 import NEGATIVE_PROMPT, Tokenizer, encode_prompts
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import load_dit, load_t5, load_vae, read_metadata, tokenizer_path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--release", help="folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder")
    add("--weights", help="the DiT to use in place of the release's: an export or a training checkpoint")
    add("--random-weights", action="store_true", help="random networks and text embeddings, for measurements")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"], help="of random weights")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="one clip for each (and for each seed)")
    add("--prompts", metavar="FILE", help="more prompts: UTF-8, one a line")
    add("--negative", default=NEGATIVE_PROMPT, metavar="TEXT", help="negative prompt of the modes with CFG")
    add("--image", metavar="FILE", help="the first frame")
    add("--video", metavar="FILE", help="a video to go on from: the clip starts with its last frames")
    add("--context", type=int, default=9, help="how many last frames of --video are given (4k + 1)")
    add("--mode", default="few", choices=["few", "many", "bidirectional"])
    add("--size", help="HEIGHTxWIDTH in pixels, multiples of 32 (default 704x1280, or that area in the image's shape)")
    add("--frames", type=int, help="pixel frames, given ones included (4k + 1; default 81, or what blocks fill next)")
    add("--seed", type=int, nargs="+", default=[0])
    add("--block", type=int, help="latent frames a block (default: the checkpoint's, or 3)")
    add("--window", type=int, help="latent frames that a block sees, itself included (default: all)")
    add("--sink", type=int, default=0, help="first latent frames that stay in the window")
    add("--steps", type=int, help="steps of the modes with CFG (default 50; 40 with an image)")
    add("--shift", type=float, help="timestep shift (default: the checkpoint's, or 5)")
    add("--guidance", type=float, default=5.0, help="CFG scale: uncond + g (cond - uncond)")
    add("--solver", default="unipc", choices=["unipc", "euler"], help="of the modes with CFG")
    add("--fps", type=int, default=24)
    add("--out", default="out/sample.mp4", help="with several clips, prompt number and seed are added to the name")
    add("--sheet", action="store_true", help="also a PNG of 16 frames")
    add("--latents", action="store_true", help="also the latents (safetensors), their SHA-256 in the JSON")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["bfloat16", "float32"], help="default bfloat16 on a GPU, float32 on the CPU")
    add("--compile", action="store_true", help="fuse small operations: a minute at the start, 1.25x faster after")
    add("--fp8", action="store_true", help="linear layers of the DiT in float8 (Hopper or newer): faster, less exact")
    add("--low-memory", action="store_true", help="for 24 GB: text on the CPU, decoding when the DiT is gone")
    add("--settings", metavar="JSON", help="repeat the run that wrote this file; other options still override")
    args = parser.parse_args(argv)
    if args.settings:
        text = read_text(args.settings)
        try:
            settings = dict(json.loads(text)["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{args.settings} is not a JSON that sample.py wrote: {error!r}") from error
        if unknown := sorted(settings.keys() - vars(args).keys()):
            raise ValueError(f"{args.settings} has unknown settings: {', '.join(unknown)}")
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
    return args


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def nearest(value: int, step: int, offset: int) -> str:
    low = max((value - offset) // step, 0) * step + offset
    return " or ".join(str(v) for v in (low, low + step) if v > 0)


def given_frames(args: argparse.Namespace):
    """The clean frames the clip starts with, uint8 [T, H, W, 3], or None."""
    if args.image and args.video:
        raise ValueError("give --image or --video, not both")
    if args.context % 4 != 1 or args.context < 1:
        raise ValueError(f"--context {args.context} is not 4k + 1; nearest valid: {nearest(args.context, 4, 1)}")
    if args.image:
        return media.read_image(args.image)
    return media.read_video(args.video, last=args.context) if args.video else None


def picture_size(args: argparse.Namespace, given) -> tuple[int, int]:
    """(height, width) in pixels."""
    if not args.size:
        return media.fitting_size(*given.shape[1:3]) if given is not None else (704, 1280)
    sides = args.size.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--size takes HEIGHTxWIDTH, as in 704x1280, got {args.size!r}")
    height, width = map(int, sides)
    if height % 32 or width % 32 or not height * width:
        choice = f"{nearest(height, 32, 0)} high, {nearest(width, 32, 0)} wide"
        raise ValueError(f"--size {args.size}: both sides must be multiples of 32; nearest valid: {choice}")
    return height, width


def block_plan(args: argparse.Namespace, given: int, size: int, first: int | None) -> list[int]:
    """Latent frames of each generated block, behind `given` latent frames. first: a block of its own, if none given."""
    if args.mode == "bidirectional":
        size, first = 1, None
    start = given or first or 0
    total = 81 + 4 * ((start - 21) % size) if args.frames is None else args.frames
    if total % 4 != 1 or total < 1:
        raise ValueError(f"--frames {total} is not 4k + 1; nearest valid: {nearest(total, 4, 1)}")
    frames = (total + 3) // 4 - given
    if frames < 1:
        raise ValueError(f"--frames {total} counts the {4 * given - 3} given frames: it must be larger")
    if (frames + given - start) % size:
        valid = nearest(total, 4 * size, 4 * (start + size * (given > 0)) - 3)
        raise ValueError(f"--frames {total} is not {start} latent frames and blocks of {size}; nearest valid: {valid}")
    return [frames] if args.mode == "bidirectional" else block_sizes(frames, size, None if given else first)


def random_context(prompts: list[str], length: int, dim: int) -> torch.Tensor:
    """Embeddings for networks without a text encoder: random rows, one a word, drawn from the prompt; zero behind."""
    context = torch.zeros(len(prompts), length, dim)
    for row, prompt in zip(context, prompts, strict=True):
        words = min(len(prompt.split()) + 1, length)
        row[:words] = torch.randn(words, dim, generator=torch.Generator().manual_seed(zlib.crc32(prompt.encode())))
    return context


def random_networks(preset: str, device: torch.device, dtype: torch.dtype) -> tuple[WanDiT, VAE22]:
    """The networks of a preset with seeded random weights."""
    with torch.device("meta"):
        model = WanDiT(PRESETS[preset])
    model = model.to(dtype).to_empty(device=device)
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE22(VAEConfig(dim=8, dec_dim=8) if preset == "tiny" else VAEConfig())
    return model.init_weights(torch.Generator(device).manual_seed(0)), vae


def generate(args, model, noise, context, sigmas, blocks, clean, seed):
    """Latents of the clip, piece by piece: the given frames first, then every finished block."""
    if clean is not None:
        yield clean
    given = 0 if clean is None else clean.shape[2]
    field = model if args.mode == "few" else guided(model, args.guidance)
    if args.mode == "bidirectional":

        def denoise(x, sigma):
            if not given:
                return field(x, sigma, context)
            level = torch.full((1, x.shape[2]), sigma)
            level[:, :given] = 0  # the given frames are clean at every step, whatever the solver made of them
            return field(torch.cat([clean, x[:, :, given:]], 2), level, context)

        x = noise.to(context.device)
        x = x if clean is None else torch.cat([clean, x], 2)
        yield solve(denoise, x, sigmas, args.solver)[:, :, given:]
        return
    height, width = noise.shape[3:]
    total = given + sum(blocks)
    frames = min(args.window or total, total)
    tokens = model.cfg.tokens_per_frame(height, width)
    cache = KVCache(model.cfg, len(context), frames, tokens, args.window, args.sink, context.device, context.dtype)
    rng = torch.Generator(context.device).manual_seed(seed ^ 0x5EED)  # on the CPU, `seed` would repeat the noise

    def renoise(block, step, like):
        return torch.randn(like.shape, generator=rng, device=like.device)

    solver = None if args.mode == "few" else args.solver
    finished = rollout(field, noise, context, sigmas, blocks, cache, renoise=renoise, first=clean, solver=solver)
    for _, x0 in zip(blocks, finished, strict=False):  # in this order: nothing asks for the last block's commit
        yield x0


def write(args, vae, latents, path: Path, record: dict) -> bool:
    """Decode and write a clip while it is generated, then what goes beside it. True if Ctrl-C ended it early."""
    shown = media.sheet_indices(args.frames) if args.sheet else set()
    writer, state, kept, stopped, start = media.VideoWriter(path, args.fps, shown), vae.stream(), [], False, time.time()
    with tqdm(total=args.frames, unit="frame", desc=path.name) as bar:
        try:
            for chunk in latents:
                pixels = vae.decode_chunk(chunk, state)
                writer.add(media.to_frames(pixels[0]))
                kept += [chunk] if args.latents else []
                bar.update(pixels.shape[2])
        except KeyboardInterrupt:
            stopped = True
        except Exception:
            writer.close(failed=True)
            raise
    writer.close()
    if not writer.count:
        return stopped
    if args.sheet and writer.kept:
        media.write_sheet(path.with_suffix(".png"), writer.kept)
    if kept:
        whole = torch.cat(kept, 2).float().cpu().contiguous()
        record["latents_sha256"] = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
        save_file({"latents": whole}, path.with_suffix(".safetensors"))
    record |= {"frames_written": writer.count, "seconds": round(time.time() - start, 3)}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"{path}: {writer.count} frames in {record['seconds']} s" + (", stopped early" if stopped else ""))
    return stopped


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device here; give --device cpu")
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if not args.release and not args.random_weights:
        raise ValueError("name the release folder with --release, or try --random-weights --preset tiny")
    for path in filter(None, (args.release, args.weights)):
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file or folder")
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if args.fp8 and not (capable and dtype == torch.bfloat16):
        raise ValueError(f"--fp8 needs bfloat16 on a GPU of compute capability 8.9 or newer, not {dtype} on {device}")
    for name in ("block", "window", "steps", "shift", "fps"):
        if vars(args)[name] is not None and vars(args)[name] <= 0:
            raise ValueError(f"--{name} {vars(args)[name]}: must be above 0")
    lines = read_text(args.prompts).splitlines() if args.prompts else []
    prompts = [*args.prompt, *filter(str.strip, lines)]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, or --prompts FILE with one a line")

    # What the weights were trained for is in their metadata; the command line overrides it.
    source = args.weights or args.release
    trained = read_metadata(source) if source else {}
    pixels = given_frames(args)
    given = 0 if pixels is None else (len(pixels) + 3) // 4
    height, width = picture_size(args, pixels)
    blocks = block_plan(args, given, args.block or trained.get("block", 3), trained.get("first"))
    args.frames = 4 * (given + sum(blocks)) - 3
    room = (args.window or 0) - max(blocks)
    if args.mode != "bidirectional" and (args.window or args.sink) and not 0 <= args.sink <= room:
        raise ValueError(f"--window {args.window}: no room for --sink {args.sink} and a block of {max(blocks)} frames")
    shift = args.shift or trained.get("shift", 5.0)
    if args.mode == "few":
        sigmas = few_step_sigmas(trained.get("levels", FEW_STEPS), shift)
    else:
        sigmas = sampling_sigmas(args.steps or (50 if pixels is None else 40), shift)

    clips = [(i, seed) for i in range(len(prompts)) for seed in dict.fromkeys(args.seed)]
    out = Path(args.out if args.out.endswith(".mp4") else args.out + ".mp4")
    paths = [out.with_stem(f"{out.stem}-{i:03d}-{seed}") if len(clips) > 1 else out for i, seed in clips]
    suffixes = [".mp4", ".json"] + [".png"] * args.sheet + [".safetensors"] * args.latents
    existing = [file for path in paths for s in suffixes if (file := path.with_suffix(s)).exists()]
    if existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists; choose another --out, or --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise ValueError(f"cannot write to the folder {out.parent}: {error}") from error
    if args.mode != "bidirectional" and not trained and not args.random_weights:
        print("note: no record of causal training in these weights: expect noise in the causal modes", file=sys.stderr)

    # Text first: the encoder is gone before the DiT comes. The VAE encodes in float32: bfloat16 spoils an image.
    if args.random_weights:
        model, vae = random_networks(args.preset, device, dtype)
        context = random_context([*prompts, args.negative], model.cfg.text_len, model.cfg.text_dim)
    else:
        encoder = load_t5(args.release, "cpu" if args.low_memory else device, torch.bfloat16)
        tokenizer = Tokenizer(tokenizer_path(args.release))
        # One by one: memory does not grow, and no prompt's bits depend on its company.
        context = torch.cat([encode_prompts(encoder, tokenizer, [text]).cpu() for text in [*prompts, args.negative]])
        del encoder
        torch.cuda.empty_cache()
        vae = load_vae(args.release, device, torch.float32)
    clean = None if pixels is None else vae.encode(media.fit(pixels, height, width)[None].to(device))
    vae = vae.to("cpu" if args.low_memory else device, dtype)
    if not args.random_weights:
        model = load_dit(source, device, dtype, channels=vae.cfg.z_dim)
    if args.fp8:
        quantize_blocks(model)
    fuse.enable(args.compile)
    shape = (1, model.cfg.in_dim, sum(blocks), height // 16, width // 16)
    print(f"{len(clips)} x {args.frames} frames of {height}x{width}; latent frames {given} given, blocks {blocks}")

    held = []
    for (i, seed), path in zip(clips, paths, strict=True):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        text = context[[i] if args.mode == "few" else [i, -1]].to(device, dtype)
        latents = generate(args, model, noise, text, sigmas, blocks, clean, seed)
        settings = vars(args) | {"prompt": [prompts[i]], "prompts": None, "seed": [seed], "settings": None}
        settings |= {"out": str(path), "overwrite": False}  # a repetition replaces this file only if it is told to
        record = {"settings": settings, "size": [height, width], "blocks": blocks, "sigmas": sigmas, "trained": trained}
        if args.low_memory:
            held.append(([chunk.cpu() for chunk in tqdm(latents, desc="blocks")], path, record))
        elif write(args, vae, latents, path, record):
            return 130
    if held:
        del model, latents
        torch.cuda.empty_cache()
        vae = vae.to(device)
    for latents, path, record in held:
        if write(args, vae, (chunk.to(device) for chunk in latents), path, record):
            return 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse()))
    except ValueError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # where there is no clip yet to finish
        sys.exit(130)
