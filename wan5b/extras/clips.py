"""What clips leave on disk: names where nothing is in the way, an mp4 that grows, a record that
repeats it.
"""

import json
import os
import platform
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterable, Set
from contextlib import closing, nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.extras.cards import carried, decode_frames, place_of
from wan5b.extras.digest import digest, digest_of_all
from wan5b.extras.disk import check_room
from wan5b.extras.files import sheet_indices, write_sheet
from wan5b.extras.formats import candidates
from wan5b.extras.media import FPS
from wan5b.extras.mp4 import VideoWriter
from wan5b.extras.resume import STATE, Progress, note_unknown
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import FULL, not_written, origin, read_json, write_json, write_tensors

LEAST = 2**16  # bytes that a clip takes, its record among them, however short it is
NAME_BYTES = 255  # of a file's name, at most, where files usually lie
REPORTS = (".report.json", ".report.png")  # what --report leaves beside a clip, by suffix


class Clip(NamedTuple):
    """One video to make."""

    prompts: list[str]  # one, or one for each of its scenes
    seed: int
    path: Path  # of the mp4; what else is written has its name and another suffix
    texts: list[str] = ()  # what each chunk is shown; `plan` fills it in
    # Where that is a mixture: chunk -> (the text before, the share of its own).
    blends: dict[int, tuple[str, float]] = {}  # noqa: RUF012


def name_clips(prompts: list[list[str]], seeds: list[int], out: str) -> list[Clip]:
    """A clip for each entry of prompts, which holds the prompts of its scenes, and each seed.

    out: the mp4, the suffix of which may be left out, or a folder, in which it is sample.mp4: one
    that is there, or FOLDER/.
    Several clips have the prompt's number and the seed in their names.
    """
    out = os.path.expanduser(out)  # ~nobody is a name
    if out.rpartition("/")[2] in ("", ".", "..") or os.path.isdir(out):
        out += "/sample"
    path = Path(out.removesuffix(".mp4") + ".mp4")
    seeds = list(dict.fromkeys(seeds))  # one given twice makes one clip
    if len(prompts) * len(seeds) == 1:
        return [Clip(prompts[0], seeds[0], path)]

    clips = []
    for i, prompt in enumerate(prompts):
        for seed in seeds:
            clips.append(Clip(prompt, seed, path.with_stem(f"{path.stem}-{i:03d}-{seed}")))
    return clips


def claim(
    clips: list[Clip], read: list[str], asked: list[str], *, overwrite: bool, resume: bool
) -> None:
    """Make the folder of the clips. ValueError if it can't be written to, if a file lies where one
    of theirs will, or if a name is too long for the files beside it, which would only show half a
    clip later; OSError if the disk is full.

    A clip's files are a state, an mp4, a record, and what else is `asked` for, by suffix. read: the
    files that the run reads, which it never replaces. resume: a clip is gone on with, so its files
    may be there.
    """
    for clip in clips:
        name = clip.path.with_suffix(f"{STATE}.{platform.node()}-{2**22}.partial.folder").name
        spare = NAME_BYTES - len(os.fsencode(name))
        if spare < 0:
            wrong = f"{clip.path.name} is a name {-spare} bytes too long for the files beside it"
            raise ValueError(f"{wrong}; choose another --out")
    # The state comes first: where there is one, the way out is to go on with it.
    suffixes = [] if resume else [STATE, ".mp4", ".json", *asked]
    for clip, suffix in product(clips, suffixes):
        file = clip.path.with_suffix(suffix)
        if file.exists() and not overwrite:
            go_on = f"; go on with it (--resume {file})" if suffix == STATE else ""
            raise ValueError(f"{file} exists{go_on}; choose another --out, or --overwrite")
        if file.exists() and any(Path(path).exists() and file.samefile(path) for path in read):
            raise ValueError(f"{file} is what this run reads; choose another --out")

    check_room(clips[0].path, LEAST * len(clips))
    folder = clips[0].path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = f"{error.strerror}: {error.filename}"
        wrong = f"cannot make the folder {folder} ({cause})"
        raise ValueError(f"{wrong}; choose another --out") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to the folder {folder}; choose another --out")


def inputs_of(args: Namespace) -> dict[str, str]:
    """Digests of the files that clips are made from, as far as a record does not hold what is in
    them: image or video; vae and t5, the networks of the release. Of the DiT, LoRAs among it, a
    record has the fingerprint; of prompts the texts; of a recipe what it comes to.

    What is missing has none: whoever opens it says so.
    """
    inputs = {}
    for name in ("image", "video"):
        path = getattr(args, name)
        if path and Path(path).is_file():
            inputs[name] = digest_of_all(path)
    for kind in () if args.random_weights else ("vae", "t5"):
        for file in candidates(Path(args.release), kind)[:1]:
            # An index only names the files of a folder.
            inputs[kind] = digest(file.parent if file.suffix == ".json" else file)
    return inputs


def make_record(options: dict, clip: Clip, frames: int, found: dict) -> dict:
    """What goes beside a clip as JSON: `read_settings` of it gives the options that repeat it.

    options: of the whole run. found: what else there is to know.
    """
    own = {"prompt": clip.prompts, "seed": [clip.seed], "frames": frames, "out": str(clip.path)}
    # All prompts are in "prompt"; and a repetition replaces the clip only if it is told to.
    own |= {"prompts": None, "settings": None, "resume": None, "overwrite": False}
    return {"settings": options | own} | found


# An option of the command line -> those of a record that make no sense beside it.
REPLACED = {
    "prompts": ("prompt",),
    "image": ("video", "prefix"),
    "video": ("image",),
    "release": ("random_weights",),
    "weights": ("random_weights",),
    "random_weights": ("release", "weights", "lora"),
}


# Options that came later than records, and what a record that lacks one was made with. Options that
# came before --fp8-vae (--at, --sink-rope, ...) are not here: versions without them drew other
# noise, so this one would make another clip of their records.
ADDED = {
    "fp8_attention": False,
    "fp8_vae": False,
    "vae_device": None,
}


def read_settings(
    path: str, parser: ArgumentParser, given: Namespace, record: dict | None = None
) -> dict:
    """The options in a record, each of which could stand on the parser's command line.

    given: the options that do stand there. What is REPLACED by them has its default again. record:
    what is in the file, if that is no JSON. ValueError if the file is no record, if it has options
    that are unknown here or lacks some that are not in ADDED, or if one is of another type or out
    of range.
    """
    try:
        read = record or json.loads(Path(path).read_text(encoding="utf-8-sig"))
        settings = ADDED | read["settings"]
        # Versions that did not note the recipe's negative prompt took upstream's for all weights.
        recipe = read.get("recipe")
        guided = isinstance(recipe, dict) and recipe.get("guidance", 1) != 1
        if guided and "negative" not in recipe and settings.get("negative") is None:
            settings["negative"] = NEGATIVE_PROMPT
        # A GPU that is not here is no reason to stop if another is named.
        if given.vae_device:
            settings["vae_device"] = given.vae_device
        known = {action.dest: action for action in options(parser)}
        check_version(settings.keys(), known.keys(), resumes=record is not None)
        recorded = {name: _option(action, settings[name]) for name, action in known.items()}
    except OSError as error:
        raise ValueError(f"cannot read --settings {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        kind = "JSON" if record is None else "state"
        raise ValueError(f"{path} is not a {kind} that this sample.py wrote: {error}") from error

    for name, others in REPLACED.items():
        if getattr(given, name):
            recorded |= {other: parser.get_default(other) for other in others}
    return recorded


def options(parser: ArgumentParser) -> list[Action]:
    """All that the command line takes, but for --help."""
    return [action for action in parser._actions if action.dest != "help"]


def check_version(there: Set[str], known: Set[str], resumes: bool) -> None:
    """ValueError if these are not the options of this sample.py, with the way out: a record of
    another version may be of another clip than this one would make.

    there: names in a record. known: those of the command line. resumes: the record is a state's.
    """
    faults = []
    if known - there:
        faults.append(f"it lacks {', '.join(sorted(known - there))}")
    if there - known:
        faults.append(f"{', '.join(sorted(there - known))} in it is no option here")
    if faults:
        way_out = "begin the clip anew" if resumes else "give options in place of --settings"
        raise ValueError(f"{'; '.join(faults)}; take the version that wrote it, or {way_out}")


def _option(action: Action, value):
    """A recorded value, if the command line could give it."""
    if value is None and action.default is None:
        return None

    # A list is to be one, which may be empty where that is the default. For a float a whole number
    # will do.
    kind = bool if action.nargs == 0 else action.type or str
    kinds = (float, int) if kind is float else (kind,)
    items = value if action.nargs == "+" else [value]
    fits = isinstance(items, list) and all(type(item) in kinds for item in items)
    if not fits or (action.default and not items):
        raise ValueError(f"{action.dest} is {value!r}, not {kind.__name__}")
    if action.choices and value not in action.choices:
        raise ValueError(f"{action.dest} is {value!r}, not one of {', '.join(action.choices)}")
    return value


def note_changes(settings: str | None, known_by: str, found: dict) -> None:
    """A line for the user if a record that is to be repeated was of other weights, of files that
    hold something else by now, or was sampled in another way: by a recipe that has been edited
    since, say.

    settings: the record's path, if any. known_by: the weights' fingerprint now. found: what a
    record of now has beside its options.
    """
    if not settings:
        return
    recorded = read_json(Path(settings))
    found = json.loads(json.dumps(found))
    others = [] if recorded.get("weights") in (None, known_by) else ["weights"]
    if "inputs" not in recorded:
        note_unknown(settings, found["inputs"])
    for part in ("inputs", "sampler"):
        before, now = recorded.get(part), found[part]
        if isinstance(before, dict):
            follow = {"chunks", "cuts"}  # from --frames
            names = sorted((before.keys() | now.keys()) - follow)
            others += [name for name in names if before.get(name) != now.get(name)]
    # Of a recipe also what is no argument of `generate`.
    before = recorded.get("recipe")
    if isinstance(before, dict):
        names = {"fps", "cut_prefix", "negative"} & before.keys()
        others += sorted(name for name in names if before[name] != found["recipe"][name])
    if others:
        text = f"{settings} was made with other {', '.join(others)}: this clip will differ"
        print(f"note: {text}", file=sys.stderr)


def check_finite(flag: Tensor, path: Path) -> None:
    """ValueError unless `flag`, which says whether all of a chunk's pixels are finite, is true."""
    if not flag:
        raise ValueError(
            f"{path}: a chunk is not finite (damaged weights, or float16?); no picture"
        )


def rows_of(texts: list[str], context: Tensor, guidance: float) -> dict[str, Tensor]:
    """text -> its context [1, L, D], or, with guidance, [2, L, D], the last text's behind it.

    context [B, L, D]: of the texts; with guidance the last of them is the negative one.
    """
    if guidance == 1:
        return {text: context[[index]] for index, text in enumerate(texts)}
    return {text: context[[index, -1]] for index, text in enumerate(texts)}


def contexts(clip: Clip, rows: dict[str, Tensor]) -> list[Tensor]:
    """What each chunk is shown. Of one text one tensor, by which a cache knows it again.

    rows: as of `rows_of`.
    """
    shown = [rows[text] for text in clip.texts]
    for chunk, (before, share) in clip.blends.items():
        shown[chunk] = torch.lerp(rows[before], shown[chunk], share)
    return shown


def write(
    vae,
    latents: Iterable[Tensor],
    path: Path,
    *,
    frames: int | None = None,
    fps: int = FPS,
    record: dict | None = None,
    sheet: bool = False,
    save_latents: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Decode a clip into an mp4 while its latents [1, C, T, H, W] are made, piece by piece.

    If the vae is on another GPU than the latents, both work at once. Beside the mp4 the record as
    JSON, a sheet (PNG), the latents (safetensors), and what `progress` keeps. frames: how many
    pixel frames there will be; a sheet needs it. Whatever ends it, Ctrl-C included, leaves what is
    finished, playable.

    ValueError for pixels that are not finite, in front of which the clip ends. FileExistsError if
    another has written the mp4 meanwhile, unless `overwrite`: then all is beside the *.partial.mp4.
    OSError if the disk is full.
    """
    # What the writer is to know: the frames of the sheet, and the files that go with the mp4.
    keep = sheet_indices(frames) if sheet else set()
    progress = progress or Progress()
    # A report is made only of a whole clip: an older one must not lie beside a part of this one.
    beside = {".json": record, ".png": sheet, ".safetensors": save_latents}
    written = tuple(suffix for suffix, asked in beside.items() if asked) + REPORTS

    state = progress.decoder(vae)
    writer = VideoWriter(path, fps, keep, overwrite, written, progress.video)
    kept = []
    ended = False
    try:
        done = progress.pictures
        with tqdm(total=frames, initial=done, unit="frame", desc=path.name) as bar, closing(writer):
            for chunk in carried(latents, place_of(vae)):
                # Whether they are finite is looked at when they are on the host.
                pictures, finite = decode_frames(vae, chunk, state)
                check = partial(check_finite, finite, path)
                writer.add(pictures, progress.mark(writer.partial), check)
                progress.add(chunk, len(pictures))
                if save_latents:
                    kept.append(chunk)
                bar.update(len(pictures))
        ended = True
    except OSError as error:
        if getattr(origin(error), "errno", None) not in FULL:
            raise
        said = not_written(path, error) if error.errno else str(error)  # of a state's file, say
        if writer.count:
            said += f"; {writer.where.name} is what is finished"
        if path.with_suffix(STATE).exists():
            said += f"; --resume {path.with_suffix(STATE)} goes on"
        raise OSError(said) from error
    finally:
        clip = writer.where
        # What has ended the clip, a full disk say, is told, not what it does to these.
        of_files = isinstance(sys.exception(), OSError)
        with suppress(OSError) if of_files else nullcontext():
            if record and writer.count:
                record = record | {"frames_written": writer.count}
                write_json(clip.with_suffix(".json"), record)
            if writer.kept:
                write_sheet(clip.with_suffix(".png"), writer.kept)
            if kept:
                whole = torch.cat(kept, 2).float().cpu()
                write_tensors(clip.with_suffix(".safetensors"), {"latents": whole})
        # Not what a full disk has cut short: the state before is better.
        if writer.on_disk == writer.count == progress.pictures:
            progress.stop(clip, ended)
