"""How a checkpoint is sampled: recipes, and which of them a file calls for.

A published checkpoint's is a TOML in configs/sample; our own exports say what they need in their
metadata. `recognise` goes by what a file says of itself. Its name is good for a suggestion only
(`looks_like`).
"""

import re
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from wan5b.extras import untrusted
from wan5b.extras.config import Options, at_least, made, one_of, types, within
from wan5b.extras.formats import is_checkpoint, locate
from wan5b.extras.refusals import refuse_file
from wan5b.extras.sampling import MODES, Mode
from wan5b.flow import FEW_STEPS, SOLVERS, few_step_sigmas, sampling_sigmas
from wan5b.media import FPS, latent_frames
from wan5b.util import read_json, reading
from wan5b.weights import about, read_pickle

FOLDER = Path(__file__).parents[2] / "configs" / "sample"
GUIDANCE = 5.0  # of the modes with guidance
# The modes that a stage's weights are made for; all others are few-step models.
MADE_FOR = {"teacher": "bidirectional", "ar": "many"}

# What files say of themselves -> the recipe.
FORMATS = {  # checkpoint_format in a .pt
    "longlive_generator_merged_lora": "longlive2",
    "longlive_generator_merged_bf16": "longlive2",
}
PIPELINES = {"WanPipeline": "wan22", "WanDMDPipeline": "fastwan"}  # in a model_index.json
# Names, without what separates their words, that files tend to have.
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
    shift: float = within(1e-6, 1e6, 5.0)
    guidance: float = within(-1e6, 1e6, 1.0)  # scale of CFG; at 1 there is none

    # where causal, in latent frames
    chunk: int = at_least(0, 0)
    prefix: int = at_least(0, 0)  # the first chunk, in whose place an image stands, if not `chunk`
    window: int = at_least(0, 0)
    sink: int = at_least(0, 0)

    # An image is clean throughout: in front of what is generated, or inside the first chunk.
    image: str = one_of(("front", "inside", "none"), "front")
    cut_prefix: str = ""  # what a cut's prompt begins with, in its first chunk
    cut_gap: int = at_least(0, 0)  # RoPE positions that a scene cut leaves out
    part: str = ""  # the entry of a trainer's .pt that is sampled, where there is one
    frames: int = at_least(0, 0)  # in pixels, unless --frames
    fps: int = within(1, 241, FPS)

    def sigmas(self, prefix: bool) -> list[float]:
        """The levels, the last one 0; prefix: whether the clip starts with given frames."""
        if self.levels:
            return few_step_sigmas(self.levels, self.shift)
        return sampling_sigmas(prefix and self.image_steps or self.steps, self.shift)


class Found(NamedTuple):
    """A recipe, and why this one."""

    name: str
    why: str
    recipe: Recipe


# The fields that an export's metadata may have, by the same names.
SAMPLING = types(Recipe).keys() - {"title", "about", "source", "licence", "part"}


def known() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Recipe:
    """A recipe of configs/sample by its name, or the TOML at a path.

    ValueError, naming file and field, for unknown fields, wrong types, what is out of range, and
    what does not go together.
    """
    path = Path(name)
    if name in known():
        path = FOLDER / f"{name}.toml"
    elif path.suffix != ".toml":
        names = ", ".join(known())
        raise ValueError(f"--recipe {name}: not one of {names}, and no path to a .toml")
    with reading(path, "not TOML"):
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    with about(path):
        recipe = made(Recipe, values)
        check_whole(recipe)
    return recipe


def check_whole(recipe: Recipe) -> None:
    """ValueError if fields contradict each other, or one is missing that the others need."""
    causal = {"chunk", "prefix", "window", "sink", "cut_gap", "cut_prefix"}
    given = {name for name, value in asdict(recipe).items() if value}
    renoises = recipe.solver == "renoise"
    faults = {
        "levels: renoise goes down levels, not steps": renoises and "levels" not in given,
        "steps or levels: one of them": ("steps" in given) == ("levels" in given),
        "guidance must be 1 with renoise": renoises and recipe.guidance != 1,
        "image_steps needs steps": "image_steps" in given and "steps" not in given,
        "chunk is missing, for causal": recipe.causal and not recipe.chunk,
        f"{', '.join(sorted(causal & given))} needs causal": not recipe.causal and causal & given,
        'image "inside" needs chunks of 2 or more': recipe.image == "inside" and recipe.chunk < 2,
        "cut_prefix needs cut_gap": recipe.cut_prefix and not recipe.cut_gap,
    }
    # The room that a window has is as `plan` would find it.
    room = recipe.window - max(recipe.chunk, recipe.prefix)
    faults[f"window {recipe.window} has no room for sink {recipe.sink} and a chunk"] = (
        "window" in given or "sink" in given
    ) and recipe.sink > room
    for fault, there in faults.items():
        if there:
            raise ValueError(fault)
    if recipe.levels:
        with about("levels"):
            few_step_sigmas(recipe.levels)
    if recipe.frames:
        with about("frames"):
            latent_frames(recipe.frames)


def in_mode(recipe: Recipe, mode: Mode) -> Recipe:
    """The recipe, made to work as a mode does; what it leaves open is as usual."""
    if mode.solver == "renoise":
        levels = recipe.levels or tuple(map(float, FEW_STEPS))
        changes = {"solver": "renoise", "levels": levels, "guidance": 1.0}
        changes |= {"steps": 0, "image_steps": 0}
    elif recipe.solver == "renoise" or recipe.guidance == 1:
        changes = {"solver": mode.solver, "levels": (), "guidance": GUIDANCE}
        changes |= {"steps": 50, "image_steps": 40}
    else:
        changes = {}  # it has guidance already
    changes["causal"] = mode.causal
    if mode.causal:
        changes["chunk"] = recipe.chunk or 3
    else:
        changes |= dict.fromkeys(("chunk", "prefix", "window", "sink", "cut_gap"), 0)
        changes["cut_prefix"] = ""
        changes["image"] = recipe.image.replace("inside", "front")
    return replace(recipe, **changes)


def from_metadata(said: dict) -> Recipe | None:
    """What our own exports and checkpoints say of themselves; None if that is nothing.

    said: stage, levels, shift, chunk, prefix, window, and any other field of a Recipe that is for
    sampling. ValueError for values that a Recipe cannot have.
    """
    stage = said.get("stage")
    if "window" not in said and "window" in said.get("training", {}):
        said = said | {"window": said["training"]["window"]}  # where earlier exports have it
    values = {name: said[name] for name in SAMPLING if said.get(name) is not None}
    if stage is None and not values:
        return None

    # JSON has no integers of its own: 3.0 is one.
    kinds = types(Recipe)
    for name, value in values.items():
        if kinds[name] is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
    mode = MODES[MADE_FOR.get(stage, "few")]
    recipe = in_mode(Recipe(), mode)
    causal = values.get("causal", mode.causal)
    solver = values.get("solver", mode.solver)
    if not causal:
        for name in ("chunk", "prefix", "window", "sink"):
            values.pop(name, None)  # of training, which has them for a teacher's data too
    if solver == "renoise":
        values["steps"] = values["image_steps"] = 0
    elif values.get("steps") or "solver" not in values:
        values["levels"] = []  # of the stages to come
    levels = {"levels": list(recipe.levels)}
    return made(Recipe, asdict(recipe) | levels | values)


# -------------------------------------------------------------------------------- what a file says


def recognise(release: str | None, weights: str | None, metadata: dict) -> Found | None:
    """What the weights (None: the release's) are, if they say so; else None.

    metadata: of the weights, if an export, a checkpoint of train.py or written by tools/convert.py;
    else empty. ValueError for damaged files.
    """
    source = Path(weights or release)
    if metadata.get("recipe") in known():
        return _published(metadata["recipe"], "its metadata")
    with about(source):
        own = from_metadata(metadata)
    if own:
        return Found(metadata.get("stage", "an export"), "its metadata", own)
    # What LoRAs have made of the weights nothing else in the file says.
    if is_checkpoint(source) or "loras" in metadata:
        return None

    file = locate(source, "dit")
    form = str(entries(file).get("checkpoint_format"))
    if form in FORMATS:
        return _published(FORMATS[form], "checkpoint_format")
    folder = file.absolute().parent
    index = folder.parent / "model_index.json"
    if folder.name == "transformer" and index.is_file():
        pipeline = str(read_json(index).get("_class_name"))
        if pipeline in PIPELINES:
            return _published(PIPELINES[pipeline], "model_index.json")
        return None
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


def part_of(recipe: Recipe, source: str) -> str:
    """The recipe's part, if the weights are a .pt that holds one of this name; else ""."""
    if not recipe.part or is_checkpoint(Path(source)):
        return ""
    return recipe.part if recipe.part in entries(locate(Path(source), "dit")) else ""


def looks_like(path: str | Path) -> str:
    """The recipe for files with such a name, or in a folder with such a name; "" if none."""
    path = Path(path)
    for text in (path.name, path.parent.name):
        plain = re.sub(r"[^a-z0-9]", "", text.lower())
        for pattern, name in LOOKS.items():
            if re.search(pattern, plain):
                return name
    return ""
