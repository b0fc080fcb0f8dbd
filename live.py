"""A page that shows a model at work: write a prompt, watch the video as it is made, change it.

    python live.py --release Wan2.2-TI2V-5B --weights distilled.safetensors --compile
    python live.py --release Wan2.2-TI2V-5B --weights model_bf16.pt  # LongLive 2
    python live.py --random-weights --preset tiny --size 64x96  # CPU: noise, but everything runs

Open the address that it prints. One video is made at a time, without an end; several windows may
watch, and the one that started it directs it. Ctrl-C ends it. Nothing is kept but what you save.

--release DIR        folder of Wan2.2-TI2V-5B: DiT, VAE, text encoder
--weights PATH       the DiT to use in place of the release's: an export, or a checkpoint
--lora FILE ...      LoRAs to merge into it; FILE:0.8 for another strength
--recipe NAME        how videos are made: as for sample.py; chunk by chunk only
--mode NAME          few or many, chunk by chunk; see sample.py
--random-weights     random networks and text embeddings, for measurements
--preset NAME        of random weights: ti2v-5B (the default) or tiny

--size HxW           height and width in pixels, multiples of 32 (default 704x1280)
--chunk N            latent frames a chunk (default: the recipe's, or 3)
--window N           latent frames that a chunk sees, itself included (default: the recipe's, or 21)
--sink N             first latent frames that stay in the window (default: the recipe's, or 0)
--sink-rope NAME     absolute, or relative, which keeps long videos from jumping back: see sample.py
--shift S            timestep shift (default: the recipe's, or 5)
--steps N, --solver NAME, --guidance G, --negative TEXT
                     of modes with guidance, as for sample.py
--interpolate N      a new prompt takes the old one's place over N chunks (default: at once)
--recache            at a new prompt the window is run again under it: a firmer change, one pass
                     over the window later

--anew               a new prompt begins a new video (with the same image, if any), which knows
                     nothing of the one before: for models that can't follow a change

--example TEXT       of a prompt, shown where none is written yet

--host ADDRESS       where to listen (default 127.0.0.1: this machine alone). 0.0.0.0 is for every
                     machine that reaches this one: whoever does may use it, nothing is encrypted
--port N             default 8000; 0: any that is free

--device NAME        cuda, cuda:1, ... or cpu
--dtype NAME         bfloat16 (default on a GPU) or float32 (default on the CPU)
--compile            fuse small operations and record CUDA graphs: minutes at the start, then faster
--fp8                linear layers of the DiT in float8 (Ada, Hopper or newer): faster, less exact
--fp8-vae            convolutions of the VAE's decoder likewise (Hopper alone)
--fp8-attention      self-attention and its memory likewise (Hopper alone)
--vae-device NAME    where the VAE works, if not on --device: on a second GPU it decodes a chunk
                     while the next one is made: faster, but a new prompt is seen a chunk later
--low-memory         the text encoder stays on the CPU: a new prompt takes seconds longer
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import argparse
import functools
import os
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from wan5b.extras import compiler, fp8_attention, graphs, options, random_weights
from wan5b.extras.cards import place_of_vae
from wan5b.extras.cli import DEVICES, Gathered, script
from wan5b.extras.codec import split_vae
from wan5b.extras.endless import Contexts, Endless, Job, plan
from wan5b.extras.files import note_cut
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae
from wan5b.extras.fp8 import quantize_blocks
from wan5b.extras.fp8_vae import quantize_decoder
from wan5b.extras.options import Parser
from wan5b.extras.plan import note
from wan5b.extras.sampling import MODES
from wan5b.extras.server import Server
from wan5b.extras.studio import Studio
from wan5b.extras.texts import encode_prompts


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; they are explained above. ValueError for what is wrong."""
    parser = Parser()
    parser.format_help = lambda: __doc__
    # What sample.py has besides, as far as the plan looks at it, is as if it had not been given.
    parser.set_defaults(**vars(options.parse([], __doc__)))
    add = parser.add_argument
    for name in ("release", "weights", "recipe", "negative"):
        add(f"--{name}")
    for name in ("random-weights", "recache", "anew", "compile", "low-memory"):
        add(f"--{name}", action="store_true")
    for name in ("fp8", "fp8-vae", "fp8-attention"):
        add(f"--{name}", action="store_true")
    for name in ("chunk", "window", "sink", "steps", "interpolate", "port"):
        add(f"--{name}", type=int)
    for name in ("shift", "guidance"):
        add(f"--{name}", type=float)
    add("--size", default="704x1280")
    add("--lora", default=[], nargs="+", action=Gathered)
    add("--preset", choices=["ti2v-5B", "tiny"])
    add("--mode", choices=[name for name, mode in MODES.items() if mode.causal])
    add("--sink-rope", choices=["absolute", "relative"])
    add("--solver", choices=["unipc", "euler"])
    add("--host", default="127.0.0.1")
    add("--example", default="A red fox in deep snow, morning light")
    add("--device", choices=DEVICES)
    add("--vae-device", choices=DEVICES)
    add("--dtype", choices=["bfloat16", "float32"])
    parser.set_defaults(port=8000)

    args = parser.parse_args(argv)
    for name in ("release", "weights", "recipe"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if args.anew and (args.recache or args.interpolate):
        raise ValueError("--anew keeps nothing of the old prompt: no --recache, no --interpolate")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: must be from 0 to 65535")
    return args


def text_encoder(args: argparse.Namespace, job: Job) -> Callable[[str], Tensor]:
    """encode(text) -> the context of a text [1, L, D] on the device, or, where guidance needs it,
    with the negative prompt's behind, [2, L, D].
    """
    extra = [] if job.recipe.guidance == 1 else [job.recipe.negative]
    length = job.cfg.text_len
    if args.random_weights:

        def encode(texts: list[str]) -> Tensor:
            return random_weights.random_context(texts, length, job.cfg.text_dim)
    else:
        place = "cpu" if args.low_memory else args.device
        tokenizer = load_tokenizer(args.release, length)
        encoder = load_t5(args.release, place, torch.bfloat16)

        def encode(texts: list[str]) -> Tensor:
            note_cut(tokenizer, texts[:1])
            return torch.cat([encode_prompts(encoder, tokenizer, [text]) for text in texts])

    @torch.no_grad()
    def context(text: str) -> Tensor:
        return encode([text, *extra]).to(args.device, job.dtype)

    return context


def memory(devices: set[str]) -> dict[str, int]:
    """Bytes that this process holds, by where: of these devices, all GPUs together."""
    held = {}
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            held["host"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    cards = {torch.device(name).index or 0 for name in devices if name != "cpu"}
    if cards:
        held["gpu"] = sum(map(torch.cuda.memory_reserved, cards))
    return held


def bind(args: argparse.Namespace) -> Server:
    """The server, which has its address and no studio yet. ValueError if that can't be had."""
    try:
        server = Server(args.host, args.port)
    except (OSError, OverflowError) as error:
        wrong = f"cannot listen on {args.host}, port {args.port}: {error}"
        raise ValueError(f"{wrong}; give another --port (0: any), or --host") from error
    if not server.is_local():
        port = server.server_port
        note(
            f"listens on {args.host}: whoever reaches this machine there may watch and use the "
            "page; nothing asks for a password or is encrypted. For yourself alone leave --host "
            f"out and forward the port: ssh -L {port}:127.0.0.1:{port} this-machine"
        )
    return server


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    job = plan(args)
    server = bind(args)

    # The networks, all of which stay.
    contexts = Contexts(text_encoder(args, job))
    place = place_of_vae(args)
    if args.random_weights:
        vae = random_weights.random_vae(args.preset, place)
        model = random_weights.random_dit(args.preset, args.device, job.dtype)
    else:
        vae = load_vae(args.release, place, torch.float32)
        source = args.weights or args.release
        model = load_dit(source, args.device, job.dtype, **job.options)
    if args.fp8:
        quantize_blocks(model)
    encoder, decoder = split_vae(vae, job.dtype)
    if args.fp8_vae:
        quantize_decoder(decoder)
    compiler.enable(args.compile)
    if args.compile and args.device != "cpu":
        graphs.record(model)

    # Videos. All share one cache, and with it its CUDA graphs.
    new_cache = functools.cache(fp8_attention.kind_of_cache(args))
    changes = {"interpolate": args.interpolate or 1, "anew": args.anew}
    make = Endless(job, model, (encoder, decoder), contexts, new_cache, **changes)
    print("warming up ...", flush=True)
    seconds = make.warm_up()

    held = functools.partial(memory, {args.device, place})
    about = {"seconds": seconds, "memory": held, "heard": contexts.begin}
    about |= {"example": args.example, "is_ahead": make.is_ahead}
    studio = Studio(make, job.size, job.recipe.fps, **about)
    with closing(contexts), studio, server:
        server.studio = studio
        print(f"{server.address()} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    script(lambda: main(parse()))
