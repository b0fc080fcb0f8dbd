"""The command line of sample.py, which explains it: that is its docstring."""

import argparse
import os
from pathlib import Path

from wan5b.extras.cli import DEVICES, Gathered
from wan5b.extras.clips import options, read_settings
from wan5b.extras.resume import clip_of, read_about
from wan5b.extras.sampling import MODES

# Options that name files and folders to read.
PATHS = ("release", "weights", "prompts", "image", "video", "settings", "resume", "recipe")
# What may stand beside --resume.
MAY_MOVE = ("resume", "release", "weights", "lora", "recipe", "image", "video")
MAY_MOVE += ("state_every", "overwrite", "vae_device")  # GPUs of one kind make the same pixels


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is a ValueError, like everything that a user got wrong."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see --help")


def parse(argv: list[str] | None, usage: str) -> argparse.Namespace:
    """The options of a command line; with --settings, those that it lacks are the record's.

    usage: what --help prints. ValueError for whatever is wrong.
    """
    parser = Parser()
    parser.format_help = lambda: usage
    add = parser.add_argument
    for name in (*PATHS, "size"):
        add(f"--{name}")
    for name in ("random-weights", "shots", "recache", "sheet", "latents", "report", "overwrite"):
        add(f"--{name}", action="store_true")
    for name in ("compile", "fp8", "fp8-vae", "fp8-attention", "low-memory"):
        add(f"--{name}", action="store_true")
    for name in ("frames", "chunk", "window", "sink", "prefix", "steps", "interpolate"):
        add(f"--{name}", type=int)
    for name in ("shift", "guidance"):
        add(f"--{name}", type=float)
    add("--state-every", type=float, default=60.0)
    add("--at", type=float, default=[], nargs="+", action=Gathered)
    add("--sink-rope", choices=["absolute", "relative"])
    add("--seed", type=int, default=[0], nargs="+", action=Gathered)
    add("--prompt", default=[], nargs="+", action=Gathered)
    add("--negative")
    add("--lora", default=[], nargs="+", action=Gathered)
    add("--out", default="out/sample.mp4")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--mode", choices=list(MODES))
    add("--solver", choices=["unipc", "euler"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--vae-device", choices=DEVICES)
    add("--dtype", choices=["bfloat16", "float32"])

    args = at_home(parser.parse_args(argv))
    if args.resume:
        return resumed(args, parser, argv)
    if args.settings:
        recorded = read_settings(args.settings, parser, args)
        args = at_home(parser.parse_args(argv, argparse.Namespace(**recorded)))
    return args


def at_home(args: argparse.Namespace) -> argparse.Namespace:
    """The options, in whose PATHS ~ is the home folder: shells leave that in --image=~/fox.jpg."""
    for name in PATHS:
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    return args


def resumed(args: argparse.Namespace, parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The options of an interrupted clip, from its state, and where its files lie by now.

    ValueError for options that would make another clip of it.
    """
    unset = object()
    everything = {action.dest: unset for action in options(parser)}
    given = vars(parser.parse_args(argv, argparse.Namespace(**everything)))
    given = {name: getattr(args, name) for name, value in given.items() if value is not unset}
    others = [f"--{name.replace('_', '-')}" for name in given if name not in MAY_MOVE]
    if others:
        raise ValueError(
            f"--resume goes on with the clip as it was begun: leave out {', '.join(others)}"
        )
    recorded = read_settings(args.resume, parser, args, read_about(args.resume))
    recorded["out"] = str(clip_of(Path(args.resume)))
    return argparse.Namespace(**(recorded | given))
