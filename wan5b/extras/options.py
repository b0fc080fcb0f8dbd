"""The command line of sample.py, which explains it: that is its docstring."""

import argparse
import os

from wan5b.extras.cli import DEVICES, Gathered
from wan5b.extras.clips import read_settings
from wan5b.extras.sampling import MODES


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
    for name in ("release", "weights", "prompts", "image", "video", "size", "settings", "recipe"):
        add(f"--{name}")
    for name in ("random-weights", "shots", "sheet", "latents", "overwrite"):
        add(f"--{name}", action="store_true")
    for name in ("compile", "fp8", "low-memory"):
        add(f"--{name}", action="store_true")
    for name in ("frames", "chunk", "window", "sink", "prefix", "steps"):
        add(f"--{name}", type=int)
    for name in ("shift", "guidance"):
        add(f"--{name}", type=float)
    add("--seed", type=int, default=[0], nargs="+", action=Gathered)
    add("--prompt", default=[], nargs="+", action=Gathered)
    add("--negative")
    add("--lora", default=[], nargs="+", action=Gathered)
    add("--out", default="out/sample.mp4")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--mode", choices=list(MODES))
    add("--solver", choices=["unipc", "euler"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--dtype", choices=["bfloat16", "float32"])

    args = parser.parse_args(argv)
    for name in ("release", "weights", "prompts", "image", "video", "settings", "recipe"):
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))
    if args.settings:
        recorded = read_settings(args.settings, parser, args)
        args = parser.parse_args(argv, argparse.Namespace(**recorded))
    return args
