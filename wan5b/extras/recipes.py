"""How a checkpoint is sampled: recipes, and which of them a file calls for.

A published checkpoint has its recipe in a TOML of configs/sample (`load`); an export of train.py
has it in its metadata (`from_metadata`). Which of them a file calls for, `recognise` finds in what
the file says of itself; its name is good for a suggestion only (`looks_like`).

To add a field: put it into `Recipe` with the values that it may have, say in `check_whole` what it
does not go with and in `in_mode` what becomes of it in another mode, and hand it to `generate` in
plan.how_sampled. TOMLs, an export's metadata and a clip's record then have it by the same name.
"""

import re
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from wan5b.data import open_shard
from wan5b.dit import DiTConfig
from wan5b.extras import untrusted
from wan5b.extras.adapters import said_by
from wan5b.extras.config import Options, at_least, made, one_of, types, within
from wan5b.extras.formats import is_checkpoint, locate
from wan5b.extras.media import FPS, latent_frames
from wan5b.extras.refusals import refuse_file
from wan5b.extras.sampling import MODES, Mode
from wan5b.flow import FEW_STEPS, SOLVERS, few_step_sigmas, sampling_sigmas
from wan5b.stages import DISTILLATIONS
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import read_json, reading
from wan5b.weights import about, read_pickle

FOLDER = Path(__file__).parents[2] / "configs" / "sample"
GUIDANCE = 5.0  # of the modes with guidance
# The mode that a stage of training makes its weights for; "few", for all that are not here.
MADE_FOR = {"teacher": "bidirectional", "ar": "many"}

# What files say of themselves -> the recipe: the entry "checkpoint_format" of a trainer's .pt, ...
FORMATS = {
    "longlive_generator_merged_lora": "longlive2",
    "longlive_generator_merged_bf16": "longlive2",
}
# ... and the "_class_name" in the model_index.json of a diffusers pipeline.
PIPELINES = {"WanPipeline": "wan22", "WanDMDPipeline": "fastwan"}

# Patterns in the names that such files tend to have -> the recipe; the first that fits counts. They
# are tried on names in lower case, of which letters and digits alone are left.
LOOKS = {
    "longlive.*stage1": "longlive2-stage1",
    "longlive": "longlive2",
    "turbo": "turbo",
    "fastwan": "fastwan",
    "ti2v5b": "wan22",
}


@dataclass(frozen=True)
class Recipe(Options):
    """How clips are made. 0, or an empty text or list, leaves a thing out."""

    # for people
    title: str = ""
    about: str = ""
    source: str = ""
    licence: str = ""

    causal: bool = False  # chunk by chunk over a cache; else the whole clip at once
    solver: str = one_of(SOLVERS, "unipc")
    steps: int = within(0, 1001, 0)
    image_steps: int = within(0, 1001, 0)  # behind an image or a video, in place of steps
    levels: tuple[float, ...] = ()  # in place of steps: within 1000 .. 0, not shifted yet
    levels_after: tuple[float, ...] = ()  # of all chunks but the first, where they have others
    clean_pass: bool = True  # False: the keys of a chunk's last step are kept as its context
    shift: float = within(1e-6, 1e6, 5.0)
    guidance: float = within(-1e6, 1e6, 1.0)  # scale of CFG; at 1 there is none
    negative: str = NEGATIVE_PROMPT  # what CFG leads away from; empty: the empty prompt

    # Where causal, in latent frames.
    chunk: int = at_least(0, 0)
    prefix: int = at_least(0, 0)  # of the first chunk, if it has not `chunk`; images take its place
    window: int = at_least(0, 0)  # that a chunk sees, itself included; 0: all
    sink: int = at_least(0, 0)  # first ones, that stay in the window
    sink_rope: str = one_of(("absolute", "relative"), "absolute")  # as in KVCache

    # An image is clean throughout: in front of what is generated, or inside the first chunk.
    image: str = one_of(("front", "inside", "none"), "front")
    cut_prefix: str = ""  # what a cut's prompt begins with, in its first chunk
    cut_gap: int = at_least(0, 0)  # RoPE positions that a scene cut leaves out
    part: str = ""  # the entry of a trainer's .pt that is sampled, where there is one
    frames: int = at_least(0, 0)  # pixel frames of a clip, where --frames is not given
    fps: int = within(1, 241, FPS)

    def sigmas(self, prefix: bool) -> list[float]:
        """The noise levels of a clip, sigma in [0, 1], the last one 0.

        prefix: whether the clip starts with given frames.
        """
        if self.levels:
            return few_step_sigmas(self.levels, self.shift)
        steps = self.image_steps if prefix and self.image_steps else self.steps
        return sampling_sigmas(steps, self.shift)

    def chunk_options(self) -> dict:
        """Arguments of `generate` for what chunks may have of their own; empty for most recipes."""
        options = {}
        if self.levels_after:
            options["sigmas_after"] = few_step_sigmas(self.levels_after, self.shift)
        if not self.clean_pass:
            options["clean_pass"] = False
        return options


class Found(NamedTuple):
    """The recipe that was chosen, and why this one."""

    name: str  # in configs/sample, or a mode or a stage of training
    why: str  # for the user: "its metadata", "--recipe" ...
    recipe: Recipe


# The fields that say how to sample; an export's metadata may have them, by the same names.
SAMPLING = types(Recipe).keys() - {"title", "about", "source", "licence", "part"}


def known() -> list[str]:
    """The names of the recipes in configs/sample."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Recipe:
    """A recipe of configs/sample by its name, or any other TOML by its path.

    ValueError, naming file and field, for unknown fields, wrong types, what is out of range, and
    what does not go together.
    """
    path = Path(name)
    if name in known():
        path = FOLDER / f"{name}.toml"
    elif path.suffix != ".toml":
        names = ", ".join(known())
        raise ValueError(f"--recipe {name}: not one of {names}, and no path to a .toml")
    elif not path.exists():
        raise ValueError(f"--recipe {name}: no such file; by name there are {', '.join(known())}")
    with reading(path, "not TOML"):
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    with about(path):
        recipe = made(Recipe, values)
        check_whole(recipe)
    return recipe


def check_whole(recipe: Recipe) -> None:
    """ValueError if fields contradict each other, or one is missing that the others need."""
    given = {name for name, value in asdict(recipe).items() if value}
    of_chunks = given & {"chunk", "prefix", "window", "sink", "cut_gap", "cut_prefix"}
    renoises = recipe.solver == "renoise"
    inside = recipe.image == "inside"
    few_causal = recipe.causal and renoises
    room = recipe.window - max(recipe.chunk, recipe.prefix)  # as chunking.memory has it for a run
    cramped = (recipe.window or recipe.sink) and recipe.sink > room

    faults = {
        "renoise goes down levels: give them in place of steps": renoises and not recipe.levels,
        "give either steps or levels": bool(recipe.steps) == bool(recipe.levels),
        "guidance must be 1 with renoise": renoises and recipe.guidance != 1,
        "image_steps needs steps": recipe.image_steps and not recipe.steps,
        "causal needs chunk": recipe.causal and not recipe.chunk,
        "levels_after needs causal and renoise": recipe.levels_after and not few_causal,
        "clean_pass = false needs causal and renoise": not (recipe.clean_pass or few_causal),
        f"{', '.join(sorted(of_chunks))} needs causal": of_chunks and not recipe.causal,
        "sink_rope needs a sink": recipe.sink_rope != "absolute" and not recipe.sink,
        'image "inside" needs chunks of 2 or more': inside and recipe.chunk < 2,
        "cut_prefix needs cut_gap": recipe.cut_prefix and not recipe.cut_gap,
        f"window {recipe.window} has no room for sink {recipe.sink} and a chunk": cramped,
    }
    for fault, there in faults.items():
        if there:
            raise ValueError(fault)

    # These two say themselves what is wrong with their arguments.
    if recipe.levels:
        with about("levels"):
            few_step_sigmas(recipe.levels)
    if recipe.levels_after:
        with about("levels_after"):
            few_step_sigmas(recipe.levels_after)
    if recipe.frames:
        with about("frames"):
            latent_frames(recipe.frames)


def in_mode(recipe: Recipe, mode: Mode) -> Recipe:
    """The recipe, made to work as a mode does. What the mode needs and the recipe lacks (levels,
    steps, guidance, chunk) gets the default; what the mode has no use for goes.
    """
    # How noise becomes a picture: down a few levels, or in many steps with guidance.
    if mode.solver == "renoise":
        levels = recipe.levels or tuple(map(float, FEW_STEPS))
        changes = {"solver": "renoise", "levels": levels, "guidance": 1.0}
        changes |= {"steps": 0, "image_steps": 0}
    elif recipe.solver == "renoise" or recipe.guidance == 1:
        changes = {"solver": mode.solver, "levels": (), "guidance": GUIDANCE}
        changes |= {"steps": 50, "image_steps": 40}
    else:
        changes = {}  # it has many steps and guidance already

    # How much at once: a chunk, or the whole clip, which knows no image inside a first chunk.
    changes["causal"] = mode.causal
    if mode.causal:
        changes["chunk"] = recipe.chunk or 3
    else:
        changes |= dict.fromkeys(("chunk", "prefix", "window", "sink", "cut_gap"), 0)
        changes["cut_prefix"] = ""
        changes["sink_rope"] = "absolute"
        changes["image"] = recipe.image.replace("inside", "front")
    # What chunks of few levels may have of their own.
    if not (mode.causal and mode.solver == "renoise"):
        changes |= {"levels_after": (), "clean_pass": True}
    return replace(recipe, **changes)


def frame_rate(cfg) -> int:
    """Frames a second of the clips that a run learns from: as its latents say, else its networks.

    FPS, if none of them says it, or a rate that no recipe has. cfg: train.py's Config.
    """
    said = []
    shards = sorted(Path(cfg.latents).glob("*.safetensors")) if cfg.latents else []
    if shards:
        _, header = open_shard(shards[0])
        said.append(header["facts"])
    for path in (cfg.lora_weights, cfg.weights, cfg.teacher):
        if path and Path(path).exists():
            said.append(said_by(path))
    rates = [each["fps"] for each in said if isinstance(each.get("fps"), int | float)]
    return round(rates[0]) if rates and 1 <= rates[0] <= 240 else FPS


def facts(cfg, sizes: DiTConfig, step: int, data: dict[str, str], fps: int = FPS) -> dict:
    """What a checkpoint or export of train.py says of itself; `from_metadata` goes by it.

    cfg: train.py's Config. data: digests of what the run read. fps: of its clips. What is not used
    is not there.
    """
    said = {
        "stage": cfg.stage,
        "step": step,
        "levels": cfg.levels,
        "shift": cfg.shift,
        "chunk": cfg.chunk,
        "prefix": cfg.prefix or None,
        "window": cfg.window or None,
    }
    if cfg.stage in DISTILLATIONS and cfg.sink:
        said |= {"sink": cfg.sink, "sink_rope": cfg.sink_rope}
    if cfg.stage not in MADE_FOR and cfg.levels_after:
        said["levels_after"] = cfg.levels_after
    if cfg.stage not in MADE_FOR and not cfg.clean_pass:
        said["clean_pass"] = False
    if fps != FPS:
        said["fps"] = fps
    return said | {"config": asdict(sizes), "training": asdict(cfg), "data": data}


def from_metadata(said: dict) -> Recipe | None:
    """What our own exports and checkpoints say of themselves; None if that is nothing.

    said: stage, levels, shift, chunk, prefix, window, training, and any other field of a Recipe
    that is for sampling. ValueError for values that a Recipe cannot have.
    """
    stage = said.get("stage")
    # The negative prompt stands among their training's settings, and the window may do so.
    training = said.get("training", {})
    said = {name: training[name] for name in ("window", "negative") if name in training} | said
    values = {name: said[name] for name in SAMPLING if said.get(name) is not None}
    if stage is None and not values:
        return None

    # JSON has no integers of its own: 3.0 is one.
    kinds = types(Recipe)
    for name, value in values.items():
        if kinds[name] is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)

    # What does not concern this one: training writes a teacher's chunks too, and levels even where
    # only later stages go down them.
    mode = MODES[MADE_FOR.get(stage, "few")]
    causal = values.get("causal", mode.causal)
    solver = values.get("solver", mode.solver)
    if not causal:
        for name in ("chunk", "prefix", "window", "sink", "sink_rope"):
            values.pop(name, None)
    if not causal or solver != "renoise":
        values.pop("levels_after", None)
        values.pop("clean_pass", None)
    if solver == "renoise":
        values["steps"] = values["image_steps"] = 0
    elif values.get("steps") or "solver" not in values:
        values["levels"] = []

    # The rest is as the stage's mode has it. `made` takes lists, as they come from files.
    usual = asdict(in_mode(Recipe(), mode))
    for name in ("levels", "levels_after"):
        usual[name] = list(usual[name])
    if not causal:
        usual["chunk"] = 0
    return made(Recipe, usual | values)


# -------------------------------------------------------------------------------- what a file says


def recognise(release: str | None, weights: str | None, metadata: dict) -> Found | None:
    """The recipe that the weights (None: the release's) call for, if they say so; else None.

    metadata: of the weights, if an export, a checkpoint of train.py or written by tools/convert.py;
    else empty. ValueError for damaged files.
    """
    # An export, or a checkpoint folder.
    source = Path(weights or release)
    if metadata.get("recipe") in known():
        return _published(metadata["recipe"], "its metadata")
    with about(source):
        own = from_metadata(metadata)
    if own:
        return Found(metadata.get("stage") or "an export", "its metadata", own)
    # What LoRAs have made of the weights nothing else in the file says.
    if is_checkpoint(source) or "loras" in metadata:
        return None

    # A trainer's .pt.
    file = locate(source, "dit")
    form = str(entries(file).get("checkpoint_format"))
    if form in FORMATS:
        return _published(FORMATS[form], "checkpoint_format")

    # The DiT of a diffusers pipeline.
    folder = file.absolute().parent
    index = folder.parent / "model_index.json"
    if folder.name == "transformer" and index.is_file():
        pipeline = str(read_json(index).get("_class_name"))
        if pipeline in PIPELINES:
            return _published(PIPELINES[pipeline], "model_index.json")
        return None

    # The original release, unless its files are named as --weights: then they may be anyone's.
    config = file.with_name("config.json")
    original = file.name.startswith("diffusion_pytorch_model") and config.is_file()
    if not weights and original and "dim" in read_json(config):
        return _published("wan22", "the release itself")
    return None


def _published(name: str, why: str) -> Found:
    return Found(name, why, load(name))


def entries(file: Path) -> dict[str, Any]:
    """What a trainer's .pt holds, by name, its tensors mapped; of other files nothing."""
    if file.suffix in (".json", ".safetensors"):
        return {}
    refuse_file(file)
    untrusted.check_zip(file)
    return read_pickle(file)


def sampled_part(recipe: Recipe, source: str) -> str:
    """The recipe's part, if the weights are a .pt that holds one of this name; else "".

    A .pt with parts of other names alone is noted: which of them is sampled is a guess then.
    """
    if not recipe.part or is_checkpoint(Path(source)):
        return ""
    held = entries(locate(Path(source), "dit"))
    if recipe.part in held:
        return recipe.part
    parts = [str(name) for name, entry in held.items() if isinstance(entry, dict)]
    if parts:
        lacks = f"{source} has no part {recipe.part}, which the recipe samples"
        print(f"note: {lacks}; it has {', '.join(parts)[:200]}", file=sys.stderr)
    return ""


def looks_like(path: str | Path) -> str:
    """The recipe for files with such a name, or in a folder with such a name; "" if none."""
    path = Path(path)
    for text in (path.name, path.parent.name):
        plain = re.sub(r"[^a-z0-9]", "", text.lower())
        for pattern, name in LOOKS.items():
            if re.search(pattern, plain):
                return name
    return ""
