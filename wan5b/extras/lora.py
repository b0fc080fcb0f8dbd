"""LoRA files of every scheme in use -> changes of a model's parameters; merging them.

W + strength * (alpha / rank) * up @ down, in float32; without an alpha anywhere alpha is the rank.
Read are PEFT's folders, LongLive's .pt, diffusers', ComfyUI's and kohya's, diffusion-pipe's and
ai-toolkit's, musubi's and Wan-Fun's files, with their differences of whole tensors (.diff, .diff_b,
.diff_m), and what train.py makes: PEFT's folders, and checkpoints of a run with lora. Every key of
a file is used, or refused by name.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from wan5b.extras import untrusted
from wan5b.extras.checkpoints import check_checkpoint, is_checkpoint, read_facts, read_weights
from wan5b.extras.layouts import names
from wan5b.extras.scaled import Made, float_rows
from wan5b.util import finite, read_json, reading
from wan5b.weights import clean, locate, open_tensors, read_pickle, state_dict

FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
FILES = (*FILES, "*.safetensors", "*.pt")
LONGLIVE = "generator_lora"
HEADER = "lora_adapter_metadata"  # diffusers keeps PEFT's config there

CONFIG = {
    "lora_alpha": untrusted.NUMBER,
    "alpha_pattern": untrusted.NAMED,
}

# How a key ends -> what its tensor is. PEFT writes an adapter's name, as .default, in between.
ROLES = {
    r"\.lora_A(\.\w+)?\.weight|\.lora_down\.weight|\.lora\.down\.weight": "down",
    r"\.lora_B(\.\w+)?\.weight|\.lora_up\.weight|\.lora\.up\.weight": "up",
    r"\.lora_B(\.\w+)?\.bias": "up_bias",
    r"\.alpha": "alpha",
    r"\.diff": "diff",
    r"\.diff_b": "diff_b",
    r"\.diff_m": "diff_m",
}
KEY = re.compile("(?P<module>.*?)(" + "|".join(f"(?:{role})" for role in ROLES) + ")")
# Words in front, beside those of `weights.clean`.
FRONT = {"base_model", "transformer", "unet", "generator", "pipe", "dit"}
FOREIGN = re.compile(
    r".*\.(attn[12]|ffn\.net)\..*|condition_embedder\..*|proj_out|.*scale_shift_table"
)
UNDERSCORES = re.compile("lora_(unet|transformer)__?")  # musubi, kohya; Wan-Fun

REFUSED = {
    r"lycoris_.*|.*[._](hada|lokr|oft|boft|glora)_.*|.*\.w_norm|.*\.lora_mid\..*": (
        "a LyCORIS adapter, not supported; merge it where it was made, or train a plain LoRA"
    ),
    r".*\.dora_scale|.*\.lora_magnitude_vector.*": "a DoRA, not supported; train it as plain LoRA",
    r"lora_te\d?_.*|text_encoder\..*": "a LoRA of the text encoder too; train one of the DiT alone",
    r"transformer_2\..*": "a LoRA of the 14B's pair of networks; take one for the 5B",
    r".*[._](norm_)?[kv]_img[._].*|.*[._]add_[kv]_proj[._].*|.*img_emb[._].*": (
        "a LoRA of Wan2.1 I2V, whose image inputs the 5B hasn't; take one for the 5B"
    ),
}
MODELS = {1536: "the 1.3B", 3072: "the 5B", 5120: "the 14B"}  # by width


class Delta(NamedTuple):
    """A change of a parameter: scale * up @ down, or scale * up if there is no down."""

    scale: float
    up: Tensor  # [out, rank, ...], or the parameter's shape
    down: Tensor | None = None  # [rank, in, ...]
    source: str = ""  # file and key, for errors

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of it before scaling, float32; [rows, in] if it has factors."""
        change = self.up[start:stop].float()
        if self.down is not None:
            change = change.flatten(1) @ self.down.float().flatten(1)
        if not finite(change):
            raise ValueError(f"{self.source}: NaN or infinity in the LoRA; download it again")
        return change

    @property
    def shape(self) -> list[int]:
        if self.down is None:
            return list(self.up.shape)
        return [self.up.shape[0], *self.down.shape[1:]]


Deltas = dict[str, list[Delta]]  # by upstream's name of the parameter


@dataclass
class Module:
    """What a file holds for one module, by `ROLES`."""

    name: str  # as in the file
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- read


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH, as command lines have it -> path and strength.

    ValueError for a strength that is no number.
    """
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return os.path.expanduser(text), 1.0
    try:
        value = float(strength)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--lora {text}: {strength!r} is no strength; give FILE:0.8, say")
    return os.path.expanduser(path), value


def read_lora(path: str | Path, shapes: Mapping[str, Sequence[int]]) -> Deltas:
    """The changes that a LoRA makes to a model. Tensors are mapped, not read.

    path: a file, or the folder that PEFT, diffusers or train.py wrote. shapes: of the model's
    parameters, by upstream's names. ValueError for another model's LoRA (both widths are named),
    for kinds of adapters that aren't supported, and for any key without a place.
    """
    file, tensors, config = _open(Path(path))
    for pattern, what in REFUSED.items():
        found = next((key for key in tensors if re.fullmatch(pattern, key)), None)
        if found:
            raise ValueError(f"{file} is {what} (it holds {found})")
    _check_config(file, config)

    modules = _modules(file, tensors)
    find = _Finder(modules, shapes)
    deltas = {}
    unknown = []
    for module in modules.values():
        scale = _scale(module, config)
        if not math.isfinite(scale):
            raise ValueError(f"{file}: {module.name} has the scale {scale}; download it again")
        for parameter, delta, key in _deltas_of(file, module, scale, find):
            if parameter is None:
                unknown.append(key)
            else:
                _check_shape(file, parameter, delta, shapes)
                delta = delta._replace(source=f"{file}: {key}")
                deltas.setdefault(parameter, []).append(delta)
    if unknown:
        which = f"{len(unknown)} keys without a place in this model ({', '.join(unknown[:3])})"
        raise ValueError(f"{file} has {which}: made for another one? take a LoRA of this model")
    return deltas


def _open(path: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """The file, its tensors by its own names, and PEFT's config, {} if there is none."""
    if is_checkpoint(path):
        return _open_checkpoint(path)
    file = locate(path, *FILES)
    if file.suffix != ".safetensors":
        untrusted.check_zip(file)
        held = read_pickle(file)
        tensors = state_dict(file, held.get(LONGLIVE) or held)
        config = {}
    else:
        tensors = open_tensors(file).tensors
        with safe_open(file, "pt") as f:
            header = f.metadata() or {}
        with reading(file, f"no LoRA with JSON as {HEADER}"):
            said = json.loads(header.get(HEADER, "{}")).items()
        config = {key.removeprefix("transformer."): value for key, value in said}
    beside = file.with_name("adapter_config.json")
    if file.stem == "adapter_model" and beside.exists():
        config = read_json(beside)
    if not tensors:
        raise ValueError(f"{file} holds no tensors (complete?); download it again")
    untrusted.check_tensors(file, tensors, file.stat().st_size)
    return file, tensors, untrusted.checked(file, config, CONFIG)


def _open_checkpoint(path: Path) -> tuple[Path, dict[str, Tensor], dict]:
    """The generator's adapter in a checkpoint of train.py, its average, if kept; read already."""
    check_checkpoint(path, "generator.")
    said = untrusted.metadata(path, read_facts(path)).get("training", {})
    untrusted.checked(path, said, dict.fromkeys(("lora", "lora_alpha"), untrusted.NUMBER))
    config = {}
    if said.get("lora"):
        config["lora_alpha"] = said.get("lora_alpha") or said["lora"]
    return path, read_weights(path), config


def _check_config(file: Path, config: Mapping) -> None:
    """ValueError for what PEFT can do beyond a plain LoRA."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{file} is a {kind} adapter of PEFT; only LORA is supported")
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication"):
        if config.get(key):
            raise ValueError(f"{file} is a LoRA with {key}, not supported; train it without")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{file}: {pattern!r} in alpha_pattern is no pattern") from error
        untrusted.checked(file, {pattern: value}, {pattern: untrusted.NUMBER})


def _modules(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Module]:
    """The file's tensors, by module and role. ValueError for keys of no role."""
    modules = {}
    strange = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        name = _without_front(match["module"])
        ending = key[len(match["module"]) :]
        role = next(role for pattern, role in ROLES.items() if re.fullmatch(pattern, ending))
        module = modules.setdefault(name, Module(name))
        if role in module.tensors:
            raise ValueError(f"{file} has two keys for one: {module.keys[role]} and {key}")
        factor = role in ("up", "down")
        if (factor and tensor.ndim < 2) or (role == "alpha" and tensor.numel() > 1):
            raise ValueError(f"{file}: {key} of shape {list(tensor.shape)} belongs to no LoRA")
        module.tensors[role] = tensor
        module.keys[role] = key
    if strange:
        which = f"{len(strange)} keys that belong to no LoRA ({', '.join(strange[:3])})"
        raise ValueError(f"{file} has {which}; a model's weights? give those as weights")
    return modules


def _without_front(name: str) -> str:
    words = clean(name).split(".")
    while words[0] in FRONT:
        words = words[1:]
    return ".".join(words)


class _Finder:
    """From a file's names of modules to upstream's names of parameters: find(module, ending)."""

    def __init__(self, modules: Mapping[str, Module], shapes: Mapping[str, Sequence[int]]):
        self.shapes = shapes
        self.rename = names("dit")
        # Where underscores stand for dots, the model's own names say which ones do.
        self.dotted = {}
        rename_back = names("dit", back=True)
        for parameter in shapes:
            for name in (parameter, rename_back(parameter)):
                if name is not None:
                    module = name.removesuffix(".weight")
                    self.dotted[module.replace(".", "_")] = module
                    owner = module.removesuffix(".modulation")  # of a .diff_m
                    self.dotted[owner.replace(".", "_")] = owner
        # One name that only diffusers has decides for all: blocks.0.norm2 is another norm there.
        self.foreign = any(FOREIGN.fullmatch(self._dots(name)) for name in modules)

    def _dots(self, name: str) -> str:
        match = UNDERSCORES.match(name)
        if match is None:
            return name
        flat = name[match.end() :]
        return self.dotted.get(flat, name)

    def __call__(self, module: str, ending: str) -> str | None:
        """ending: .weight, .bias, .modulation, or nothing for a modulation itself."""
        name = self._dots(module) + ending
        if self.foreign:
            name = self.rename(name)
        return name if name in self.shapes else None


def _scale(module: Module, config: Mapping) -> float:
    """alpha / rank of a module: the file's own alpha, else the config's, else 1."""
    down = module.tensors.get("down")
    if down is None:
        return 1.0
    rank = down.shape[0]
    if "alpha" in module.tensors:
        return float(module.tensors["alpha"]) / rank
    alpha = config.get("lora_alpha", rank)
    # As in PEFT: the first pattern that the end of the module's name fits.
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module.name):
            alpha = value
            break
    if config.get("use_rslora"):
        return alpha / rank**0.5
    return alpha / rank


def _deltas_of(file: Path, module: Module, scale: float, find: _Finder):
    """(parameter or None, its delta, a key of the file for errors) for each change by a module."""
    tensors = module.tensors
    keys = module.keys
    if ("up" in tensors) != ("down" in tensors):
        lone = keys.get("up") or keys["down"]
        raise ValueError(f"{file} has {lone} without its partner (incomplete?); download it again")
    if "up" not in tensors and ("alpha" in tensors or "up_bias" in tensors):
        lone = keys.get("alpha") or keys["up_bias"]
        raise ValueError(f"{file} has {lone} without a LoRA (incomplete?); download it again")

    if "up" in tensors:
        up = tensors["up"]
        down = tensors["down"]
        if up.shape[1] != down.shape[0]:
            ranks = f"{keys['up']} of rank {up.shape[1]}, {keys['down']} of rank {down.shape[0]}"
            raise ValueError(f"{file} has {ranks}: they don't belong together; download it again")
        yield find(module.name, ".weight"), Delta(scale, up, down), keys["up"]
    if "up_bias" in tensors:
        yield find(module.name, ".bias"), Delta(scale, tensors["up_bias"]), keys["up_bias"]
    if "diff" in tensors:
        parameter = find(module.name, ".weight") or find(module.name, "")
        yield parameter, Delta(1.0, tensors["diff"]), keys["diff"]
    if "diff_b" in tensors:
        yield find(module.name, ".bias"), Delta(1.0, tensors["diff_b"]), keys["diff_b"]
    if "diff_m" in tensors:
        parameter = find(module.name, "") or find(module.name, ".modulation")
        yield parameter, Delta(1.0, tensors["diff_m"]), keys["diff_m"]


def _check_shape(
    file: Path, parameter: str, delta: Delta, shapes: Mapping[str, Sequence[int]]
) -> None:
    """ValueError, with both models' widths, if a delta is for a parameter of other sizes."""
    needed = list(shapes[parameter])
    if delta.shape == needed:
        return
    apart = f"{parameter} {delta.shape}, not {needed}"
    own = shapes["head.modulation"][-1]
    width = own
    # Where this model's parameter has its width, the other model's has the other width.
    for found, size in zip(delta.shape, needed, strict=False):
        if size == own != found:
            width = found
    if width == own:
        raise ValueError(f"{file} is for a model of other sizes ({apart}); take one of this model")
    theirs = f"{MODELS.get(width, 'a model')} of width {width}"
    ours = f"{MODELS.get(own, 'one')} of width {own}"
    raise ValueError(f"{file} is for {theirs}, not {ours} ({apart}); take a LoRA of this model")


# -------------------------------------------------------------------------------------------- merge


def merge(tensor: Tensor | Made, deltas: Sequence[Delta], strength: float = 1.0) -> Made:
    """tensor + strength * deltas, in float32, as it is copied: see `scaled.Made`."""
    row = list(tensor.shape[1:])

    def rows(start: int, stop: int) -> Tensor:
        found = float_rows(tensor, start, stop)
        for delta in deltas:
            change = delta.rows(start, stop).reshape(-1, *row)
            found.add_(change, alpha=strength * delta.scale)
        return found

    return Made(tensor.shape, rows, tensor)


def merged(
    tensors: Mapping[str, Tensor | Made], loras: Sequence[tuple[str | Path, float]]
) -> dict[str, Tensor | Made]:
    """A DiT's tensors by upstream's names with LoRAs (path, strength) merged, as they are copied.

    Errors: see `read_lora`.
    """
    found = dict(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for path, strength in loras:
        for name, deltas in read_lora(path, shapes).items():
            found[name] = merge(found[name], deltas, strength)
    return found
