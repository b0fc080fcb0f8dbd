"""Prompt (and image, or video) -> mp4, chunk by chunk.

    python sample.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --prompt "A red fox"
        ... --prompt "It runs" --image fox.jpg
        ... --prompt "It rests" --video fox.mp4 --frames 105
    python sample.py --release Wan2.2-TI2V-5B --prompt "A red fox"  # the released model: 50 steps
    python sample.py --release Wan2.2-TI2V-5B --weights model_bf16.pt --frames 189
        --prompt "A red fox in deep snow" "It drinks at a brook" --shots  # LongLive 2, two scenes
    python sample.py --random-weights --preset tiny --size 64x96 --frames 33 --prompt noise  # CPU

--release DIR        folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder
--weights PATH       the DiT to use in place of the release's: an export, or a checkpoint
                     (runs/x/step-0000100)
--lora FILE ...        LoRAs to merge into it, of any layout; FILE:0.8 for another strength. One of
                     train.py (runs/x/dmd-lora, or a checkpoint) says how clips are made
--recipe NAME        how clips are made: wan22, longlive2, longlive2-stage1, fastwan, turbo (each
                     a file in configs/sample), or a TOML of your own. By default as the weights
                     say: the release, diffusers' folders, LongLive's .pt and exports of train.py
                     do; others are taken by their files' names, or else for --mode few.
                     The options from --mode to --guidance, and --frames, change it where given
--random-weights     random networks and text embeddings, for measurements
--preset NAME        of random weights: ti2v-5B (the default) or tiny

--prompt TEXT ...    one clip for each (and for each seed)
--prompts FILE       more prompts: UTF-8, one a line
--shots              the prompts are scenes of one clip (per seed), each for an equal share of its
                     chunks, the first ones for what is left over; if the recipe has scene cuts,
                     one between any two, else the text alone changes. Chunk by chunk only
--image FILE         the first frame
--video FILE         a video to go on from: the clip starts with its last frames
--prefix N           how many last frames of --video (4k + 1; default 9)
--size HxW           height and width in pixels, multiples of 32 (default 704x1280, or that area in
                     the image's shape)
--frames N           pixel frames, prefix included (4k + 1; default: the recipe's, or 81, or what
                     chunks fill next)
--seed N ...         of the noise (default 0)
--at SECONDS ...     the prompts are one clip's, and change at these times (with the next chunk):
                     one time fewer than prompts. Chunk by chunk only
--interpolate N      with --at or --shots: over so many chunks from one prompt to the next
--recache            with --at or --shots: run the window again under the new prompt, which the
                     video then follows sooner

--mode NAME          few                  chunk by chunk, few steps
                     many                 chunk by chunk, many steps with guidance (CFG)
                     bidirectional        the whole clip at once, many steps with guidance
                     few-bidirectional    the whole clip at once, few steps
                     The released weights are for bidirectional. Chunk by chunk only causally
                     trained ones give a picture, and in few steps only distilled ones.
--chunk N            latent frames a chunk (default: the recipe's, or 3)
--window N           latent frames that a chunk sees, itself included (default: the recipe's, or
                     all)
--sink N             first latent frames that stay in the window (default: the recipe's, or 0)
--sink-rope NAME     their place in time: absolute, where they were, or relative, in front of the
                     window, which keeps long videos from jumping back (default: the recipe's)
--shift S            timestep shift (default: the recipe's, or 5)
--steps N            how many, unless they re-noise (default: the recipe's; of modes with guidance
                     50, or 40 with an image)
--solver NAME        likewise: unipc or euler (default: the recipe's, or unipc)
--guidance G         likewise: scale of CFG, uncond + g (cond - uncond) (default: the recipe's, or
                     5; 1 is half the work)
--negative TEXT      negative prompt (default: an export's, else what the release was tuned with)

--out PATH           default out/sample.mp4; or a FOLDER/; with several clips, prompt and seed
                     number are added
--sheet              also a PNG of 16 frames
--latents            also the latents (safetensors), which are held in memory until then
--report             also what the pixels say of drift, pulse, cuts and motion (JSON, plot)
--overwrite          replace existing files
--settings JSON      repeat the run that wrote this file; other options still override
--resume FILE        go on with an interrupted clip, from the .state.safetensors beside it
--state-every S      seconds of work between states (default 60; 0: none). Chunk by chunk only, and
                     not with scene cuts, --latents or --low-memory

--device NAME        cuda, cuda:1, ... or cpu
--dtype NAME         bfloat16 (default on a GPU) or float32 (default on the CPU)
--compile            fuse small operations: a minute at the start, 1.3x faster after
--fp8                linear layers of the DiT in float8 (Ada, Hopper or newer): faster, less exact
--fp8-vae            convolutions of the VAE's decoder likewise (Hopper alone)
--fp8-attention      self-attention and its memory likewise (Hopper alone, chunk by chunk only)
--vae-device NAME    where the VAE works, if not on --device: on a second GPU it decodes a chunk
                     while the next one is made
--low-memory         for 24 GB: text on the CPU, decoding when the DiT is gone
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.extras import compiler, fp8_attention, graphs, options, random_weights
from wan5b.extras.cards import place_of_vae
from wan5b.extras.cli import script
from wan5b.extras.clips import Clip, contexts, make_record, note_changes, rows_of, write
from wan5b.extras.formats import load_dit, load_vae
from wan5b.extras.fp8 import quantize_blocks
from wan5b.extras.fp8_vae import quantize_decoder
from wan5b.extras.framing import fit
from wan5b.extras.plan import plan
from wan5b.extras.report_plot import leave_beside
from wan5b.extras.resume import Progress, begin, fingerprint
from wan5b.extras.sampling import draw_noise, generate
from wan5b.extras.texts import embed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; they are explained above. ValueError for what is wrong."""
    return options.parse(argv, usage=__doc__)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    job = plan(args)

    # Text first: the encoder is gone before the DiT comes.
    texts = [*dict.fromkeys(text for clip in job.clips for text in clip.texts)]
    if job.sampler["guidance"] != 1:
        texts.append(job.found["recipe"]["negative"])
    decoder = place_of_vae(args)
    if args.random_weights:
        context = random_weights.random_context(texts, job.cfg.text_len, job.cfg.text_dim)
        vae = random_weights.random_vae(args.preset, decoder)
    else:
        place = "cpu" if args.low_memory else args.device
        context = embed(texts, args.release, job.cfg.text_len, place)
        torch.cuda.empty_cache()
        vae = load_vae(args.release, decoder, torch.float32)

    # The VAE encodes the prefix in float32, since bfloat16 spoils an image, and decodes in dtype.
    prefix = None
    if len(job.pixels):
        prefix = vae.encode(fit(job.pixels, *job.size)[None].to(decoder)).to(args.device)
    vae = vae.to(job.dtype)
    if args.fp8_vae:
        quantize_decoder(vae)

    # The DiT, made faster if asked for.
    if args.random_weights:
        model = random_weights.random_dit(args.preset, args.device, job.dtype)
    else:
        source = args.weights or args.release
        model = load_dit(source, args.device, job.dtype, **job.options)
    known_by = fingerprint(model)
    note_changes(args.settings, known_by, job.found)
    if args.fp8:
        quantize_blocks(model)
    compiler.enable(args.compile)
    if args.compile and args.device != "cpu":
        graphs.record(model)

    # The clips. All share one cache, and with it its CUDA graphs.
    new_cache = functools.cache(fp8_attention.kind_of_cache(args))
    size = (job.cfg.in_dim, job.size[0] // 16, job.size[1] // 16)
    rows = rows_of(texts, context.to(args.device, job.dtype), job.sampler["guidance"])

    def start(clip: Clip) -> Progress:
        """How far a clip is: nowhere, but for --resume."""
        record = make_record(vars(args), clip, job.frames, job.found) | {"weights": known_by}
        about = (record, contexts(clip, rows), job.cfg.num_layers, job.sampler)
        return begin(clip.path, *about, job.state_every, job.state, size)

    def latents(clip: Clip, progress: Progress) -> Iterator[Tensor]:
        """Piece by piece, made as they are asked for."""
        done = progress.past.chunks
        left = job.sampler["chunks"][done:]
        noise = draw_noise(clip.seed, left, size, done)
        own = {"chunks": left, "prefix": None if done else prefix, "new_cache": new_cache}
        own |= {"past": progress.past, "draws": progress.draws}
        return generate(model, noise, progress.contexts[done:], **(job.sampler | own))

    held = []
    if args.low_memory:
        # First the latents of all clips; then the DiT goes; then they are decoded.
        made = map(latents, job.clips, map(start, job.clips))
        held = [[chunk.cpu() for chunk in tqdm(chunks, "chunks")] for chunks in made]
        model.to("meta")  # its CUDA graphs still refer to it
        del model, new_cache
        torch.cuda.empty_cache()
    for index, clip in enumerate(job.clips):
        progress = start(clip)
        chunks = held[index] if held else latents(clip, progress)
        files = {"record": progress.record, "sheet": args.sheet, "save_latents": args.latents}
        files |= {"overwrite": args.overwrite, "fps": job.fps, "progress": progress}
        write(vae, chunks, clip.path, frames=job.frames, **files)
        if args.report:
            leave_beside(clip.path)


if __name__ == "__main__":
    script(lambda: main(parse()))
