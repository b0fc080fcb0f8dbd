"""How far a clip is, on the disk: what takes longer than a minute to make can be taken up again in
another process, and goes on bit for bit on the same machine.

The state is small and does not grow: the last finished latents, as many as the memories of the
network and of the decoder reach back. From these both are made again.
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wan5b.extras import remux
from wan5b.extras.cards import place_of
from wan5b.extras.past import Commit, Past
from wan5b.util import finite, first_line, reading, rng, write_tensors
from wan5b.vae22 import Stream

STATE = ".state.safetensors"  # the suffix, in place of the clip's .mp4
KNOWN_BY = 48  # frames of a video, at most, by which a state knows it again


class State(NamedTuple):
    """What a state file holds."""

    # The clip's record, and: weights and vae (their fingerprints), video (the mp4's name), begins
    # (what it is known by), pictures in it, chunks, commits [[first frame, frames, chunk], ...],
    # tail (frames of each piece); without a clean pass levels (of each commit, float or [1, T]).
    about: dict
    latents: Tensor  # of all commits, [1, C, T, H, W]
    tail: Tensor  # of all pieces
    draws: Tensor  # of the generator of the noise that is added


class Moment(NamedTuple):
    """A State to be: what it takes to write one, if that should be wanted."""

    counts: dict
    commits: list[Commit]
    tail: list[Tensor]
    draws: Tensor


class Progress:
    """How far a clip is. This one is not kept, for clips that can't go on in another process.

    `write` of extras/clips.py tells it of every piece, and hands its marks to the mp4's writer.
    """

    def __init__(
        self,
        record: dict | None = None,
        contexts: list[Tensor] = (),
        past: Past | None = None,
        draws: torch.Generator | None = None,
    ):
        """record: what goes beside the clip. contexts: of its chunks. past, draws: of `generate`,
        which moves them on.
        """
        self.record = record
        self.contexts = contexts
        self.past = past
        self.draws = draws
        self.pictures = 0  # pixel frames so far
        self.video: tuple[Path, int] | None = None  # the mp4 to go on from, how much of it

    def decoder(self, vae) -> Stream:
        """The decoder's state at the clip's next piece."""
        return vae.stream()

    def mark(self, video: Path) -> Callable[[], None] | None:
        """What to call when all pictures so far are on the disk, in this video; None: nothing."""

    def add(self, latents: Tensor, pictures: int) -> None:
        """A piece of latents [1, C, T, H, W] that was decoded to so many pictures."""
        self.pictures += pictures

    def stop(self, video: Path, whole: bool) -> None:
        """The clip ends, in this video. whole: as it should."""


class KeptProgress(Progress):
    """It is on the disk, beside the clip: at most `every` seconds of work are lost to a kill."""

    def __init__(self, path: Path, every: float, *about):
        """path: of the clip. about: as of Progress."""
        super().__init__(*about)
        self.path = path.with_suffix(STATE)
        self.every = every
        self.tail: list[Tensor] = []  # the pieces that the decoder remembers, and more
        self.reach = 0  # how many frames it does
        self.last: Moment | None = None  # behind the last piece
        self.marked = time.monotonic()  # when a state was last asked for
        self.source = None  # the partial mp4 of the process before, while it is needed
        self.vae = None  # the fingerprint of the decoder, if it is known yet
        self.held = None  # its mp4, partial or not, which is for this process alone

    def decoder(self, vae) -> Stream:
        """ValueError if another VAE has decoded the clip so far."""
        known_by = fingerprint(vae)
        if self.vae not in (None, known_by):
            raise ValueError(f"{self.path}: another VAE decoded the clip so far; name its release")
        self.vae = known_by
        self.reach = decoder_reach(vae)
        stream = vae.stream()
        # All of them where those to come will be: a state joins them.
        self.tail = [piece.to(place_of(vae)) for piece in self.tail]
        for piece in self.tail:
            vae.decode_chunk(piece, stream)
        return stream

    def mark(self, video: Path) -> Callable[[], None] | None:
        if self.last is None or time.monotonic() - self.marked < self.every:
            return None
        self.marked = time.monotonic()
        return partial(self._save, self.last, video)

    def add(self, latents: Tensor, pictures: int) -> None:
        super().add(latents, pictures)
        self.tail.append(latents)
        while sum(piece.shape[2] for piece in self.tail[1:]) > self.reach:
            self.tail.pop(0)

        # A prefix alone is made again.
        if self.past.chunks:
            made = [*self.past.commits]
            counts = {"pictures": self.pictures, "chunks": self.past.chunks}
            self.last = Moment(counts, made, [*self.tail], self.draws.get_state())

    def stop(self, video: Path, whole: bool) -> None:
        if self.held:
            self.held.close()
        if whole:
            self.path.unlink(missing_ok=True)
            self._forget_source()
            return
        # A state behind the last chunk would leave nothing to go on with: the one before stays.
        unfinished = self.last and self.last.counts["chunks"] < len(self.contexts)
        wanted = self.path.exists() or time.monotonic() - self.marked >= self.every
        if unfinished and wanted:
            self._save(self.last, video)
        if self.path.exists():
            print(f"note: --resume {self.path} goes on with it", file=sys.stderr)

    def _save(self, moment: Moment, video: Path) -> None:
        commits = [[made.start, made.latents.shape[2], made.chunk] for made in moment.commits]
        tail = [piece.shape[2] for piece in moment.tail]
        about = self.record | moment.counts
        about |= {"video": video.name, "commits": commits, "tail": tail}
        levels = [torch.as_tensor(made.sigma, dtype=torch.float64) for made in moment.commits]
        if any(level.any() for level in levels):
            about["levels"] = [level.tolist() for level in levels]
        about["vae"] = self.vae
        about["begins"] = remux.known_by(video, min(moment.counts["pictures"], KNOWN_BY))

        latents = [made.latents for made in moment.commits]
        tensors = {"latents": torch.cat(latents, 2), "tail": torch.cat(moment.tail, 2)}
        tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
        tensors["draws"] = moment.draws
        write_state(self.path, about, tensors)
        self._forget_source()

    def _forget_source(self) -> None:
        if self.source:
            for file in (self.source, self.source.with_suffix(".json")):
                file.unlink(missing_ok=True)
            self.source = None

    # ------------------------------------------------------------------------------------ going on

    def take_up(self, state: State, size: tuple[int, int, int]) -> None:
        """Go on where another process left the clip. size: (C, H, W) of its latents.

        ValueError if its mp4 is not there or in use, if other weights or another recipe made it, or
        if it is of another clip.
        """
        self._check_same(state, size)

        # The network's memory, and the noise that goes on.
        about = state.about
        self.past.chunks = about["chunks"]
        place = self.contexts[0].device
        parts = state.latents.split(sizes(about["commits"]), 2)
        levels = about.get("levels") or [0.0] * len(parts)
        for commit, part, level in zip(about["commits"], parts, levels, strict=True):
            start, frames, chunk = commit
            sigma = level if isinstance(level, float) else torch.tensor(level, dtype=torch.float64)
            made = Commit(start, part.to(place), self.contexts[chunk], chunk, sigma)
            self.past.commits.append(made)
            self.past.frames = start + frames
        try:
            self.draws.set_state(state.draws)
        except (RuntimeError, TypeError) as error:
            cause = first_line(error)
            raise ValueError(
                f"{self.path}: it is damaged, or of another device ({cause})"
            ) from error

        # The decoder's, and the video so far.
        self.vae = about["vae"]
        self.tail = list(state.tail.split(about["tail"], 2))
        self.pictures = about["pictures"]
        video = find_video(self.path, about)
        self.held = remux.hold(video)
        self.video = (video, self.pictures)
        if video.name.endswith(".partial.mp4"):
            self.source = video

    def _check_same(self, state: State, size: tuple[int, int, int]) -> None:
        """ValueError for the state of another clip, or of other weights or another recipe."""
        about = state.about
        shapes = [(tensor.shape[:2], tensor.shape[3:]) for tensor in (state.latents, state.tail)]
        wanted = ((1, size[0]), size[1:])
        of_chunks = [about["chunks"], *(chunk for _, _, chunk in about["commits"])]
        if any(shape != wanted for shape in shapes) or max(of_chunks) >= len(self.contexts):
            raise ValueError(f"{self.path} is not of a clip of this length and size")
        if about["weights"] != self.record["weights"]:
            raise ValueError(f"{self.path}: other weights made the clip so far; name those")
        self._check_inputs(about.get("inputs"))
        for name in ("size", "sampler"):
            if json.loads(json.dumps(self.record[name])) != about[name]:
                raise ValueError(
                    f"{self.path}: the clip was begun with another {name}, {about[name]}; name the "
                    "recipe that it was begun with, as it was"
                )

    def _check_inputs(self, before: dict | None) -> None:
        """ValueError if a file that the clip was begun with holds something else by now.

        before: as of clips.inputs_of; None: of a version that did not note them. Then neither does
        the record of the clip that goes on: nobody knows that they are the same.
        """
        now = dict(self.record["inputs"])
        # By the decoder's fingerprint the VAE is known in any layout.
        now.pop("vae", None)
        if before is None:
            self.record = {name: self.record[name] for name in self.record if name != "inputs"}
            note_unknown(self.path, now)
            return
        others = [name for name, value in now.items() if before.get(name) != value]
        if others:
            raise ValueError(
                f"{self.path}: the clip was begun with another {', '.join(others)}; name the files "
                "that it was begun with, as they were"
            )


def begin(
    path: Path,
    record: dict,
    contexts: list[Tensor],
    layers: int,
    sampler: dict,
    every: float,
    state: State | None,
    size: tuple[int, int, int],
) -> Progress:
    """Where a clip is to begin: at its start, or where its state has left it.

    record: what goes beside it. contexts: of its chunks. layers: of the network. sampler: arguments
    of `generate`. every: seconds between states; 0: none is kept. size: (C, H, W) of its latents.
    ValueError for a state that is not of this clip.
    """
    (seed,) = record["settings"]["seed"]
    draws = rng(contexts[0].device, seed, "renoise")
    memory = (sampler.get("window"), sampler.get("sink", 0))
    if not (every or state):
        return Progress(record, contexts, Past(1, *memory), draws)
    # With --state-every 0 a clip that goes on has its state renewed where it is interrupted alone.
    about = (record, contexts, Past(layers, *memory), draws)
    progress = KeptProgress(path, every or math.inf, *about)
    if state:
        progress.take_up(state, size)
    return progress


def sizes(commits: list[list[int]]) -> list[int]:
    """How many frames each of a state's commits has."""
    return [frames for _, frames, _ in commits]


def clip_of(state: Path) -> Path:
    """The mp4 that a state's clip becomes: it lies beside it, wherever both were moved."""
    return state.with_name(state.name.removesuffix(STATE) + ".mp4")


def find_video(path: Path, about: dict) -> Path:
    """The mp4 of a state: the one it names, or the clip, which that became when the process ended.

    ValueError if it is not there, or another clip has its name by now.
    """
    clip = clip_of(path)
    named = path.with_name(Path(about["video"]).name)
    for video in (named, clip):
        if is_of(video, about):
            return video
    names = " nor as ".join(dict.fromkeys([named.name, clip.name]))
    raise ValueError(
        f"its video is not there, or is another's, as {names}; bring it back, or begin the clip "
        "anew"
    )


def is_of(video: Path, about: dict) -> bool:
    """Whether a video begins as the one that a state is of."""
    frames = min(about["pictures"], KNOWN_BY)
    return video.is_file() and remux.known_by(video, frames) == about["begins"]


def check_place(args: Namespace, state: State) -> None:
    """ValueError if the clip's video is not there, or if another has come to lie where it is to
    go, unless it may be replaced.
    """
    path = Path(args.resume)
    clip = clip_of(path)
    find_video(path, state.about)
    if clip.exists() and not (args.overwrite or is_of(clip, state.about)):
        raise ValueError(f"{clip} is another clip, not this state's; move it away, or --overwrite")


def write_state(path: Path, about: dict, tensors: dict[str, Tensor]) -> None:
    """tensors: latents, tail and draws, on the CPU."""
    text = json.dumps(about)
    write_tensors(path, tensors, {"state": text, "checksum": checksum(text, tensors)})


def checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a state holds: one bit in it that flips would be another video."""
    digest = blake2b(text.encode(), digest_size=16)
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_about(path: str | Path) -> dict:
    """What a state says of its clip, not checked against its checksum yet. ValueError, naming the
    file, if it can't be read or is none, or has no checksum.
    """
    path = Path(path)
    if not path.name.endswith(STATE):
        raise ValueError(f"--resume {path}: the state of a clip is named like clip{STATE}")
    if not path.exists():
        why = "a clip has one from --state-every seconds (60) on, until it is finished"
        raise ValueError(f"--resume {path}: no such file; {why}")
    with reading(path, "no state of a clip"), safe_open(path, "pt") as file:
        said = file.metadata() or {}
        about = json.loads(said["state"])
    if "checksum" not in said:
        raise ValueError(
            f"{path} has no checksum, which states of the first versions had not: whether it is "
            "whole can't be checked; go on with the version that wrote it, or begin the clip anew"
        )
    return about


def read_state(path: str | Path) -> State:
    """A state file. ValueError, naming it, if it is damaged or none."""
    path = Path(path)
    about = read_about(path)
    with reading(path, "no state of a clip"), safe_open(path, "pt") as file:
        said = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in ("latents", "tail", "draws")}
        if checksum(said["state"], tensors) != said["checksum"]:
            raise ValueError("not what was written: its checksum is another")
        state = State(about, **tensors)
        numbers = [about["pictures"], about["chunks"], *about["tail"], *sum(about["commits"], [])]
        fits = [
            all(type(number) is int and number >= 0 for number in numbers),
            sum(sizes(about["commits"])) == state.latents.shape[2],
            sum(about["tail"]) == state.tail.shape[2],
            about["chunks"] > 0 and isinstance(about["video"], str),
            about["pictures"] > 0 and isinstance(about["begins"], str) and about["begins"],
            all(name in about for name in ("size", "sampler", "weights", "vae")),
            isinstance(about.get("inputs", {}), dict),
            finite(state.latents) and finite(state.tail),
            all(map(is_level, about.get("levels", []), sizes(about["commits"]))),
            len(about.get("levels", about["commits"])) == len(about["commits"]),
        ]
        if not all(fits):
            raise ValueError("its parts contradict each other")
        return state


def is_level(level: object, frames: int) -> bool:
    """Whether this is a level for so many frames, as a state has it: a float, or [[float, ...]]."""
    numbers = [level]
    if isinstance(level, list):
        numbers = sum(level, []) if len(level) == 1 else []
        if len(numbers) != frames:
            return False
    return all(isinstance(number, float) and 0 <= number <= 1 for number in numbers)


def decoder_reach(vae) -> int:
    """How many latent frames of the past a decoder's picture depends on, at most.

    A causal convolution over 3 frames remembers 2. Where time has been upsampled these are less
    than 2 latent ones, so the sum is more than enough. The first frame is a case of its own.
    """
    decoder = getattr(vae, "decoder", vae)
    convolutions = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv3d)]
    return 1 + sum(layer.kernel_size[0] - 1 for layer in convolutions)


def note_unknown(path: str | Path, inputs: dict) -> None:
    """A line for the user about a record or a state of a version that did not note its inputs."""
    if inputs:
        names = ", ".join(inputs)
        text = f"{path} does not say what its {names} held: whether they do still can't be checked"
        print(f"note: {text}", file=sys.stderr)


def fingerprint(model: nn.Module) -> str:
    """By which weights are known again: a digest of some values of each tensor."""
    some = [weight.detach().flatten()[:64].float().cpu() for weight in model.parameters()]
    return blake2b(torch.cat(some).numpy().tobytes(), digest_size=8).hexdigest()
