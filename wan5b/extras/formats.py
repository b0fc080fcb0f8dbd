"""Weights in every layout that the scripts take -> models, by functions named as in weights.py.

`open_layout` finds the file, recognises its layout, and brings its tensors under upstream's names
and its sizes under "config". From there all go the same strict way through weights.py. Known are:

- the original release, its files alone, ComfyUI's files, a diffusers pipeline, its parts
  (layouts.py); float8 with scales (scaled.py); LoRAs merged on the way (lora.py)
- a checkpoint folder of train.py (runs/x/step-0000100): the generator's average, if kept, else its
  masters, read in float32 where others are mapped, and what facts.json says of the run
- a trainer's .pt: of its entries the one meant for use, behind the prefixes of wrappers
- a LinearCodec's file, which holds a `basis`, in the VAE's place

What can't be run is refused by its name (refusals.py).
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan5b import weights
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import checkpoints, layouts, lora, untrusted
from wan5b.extras.checkpoints import INDEX, check_checkpoint, is_checkpoint
from wan5b.extras.codec import LinearCodec
from wan5b.extras.exports import export_diffusers as export_diffusers  # one of the public names
from wan5b.extras.layouts import Kind
from wan5b.extras.refusals import refuse, refuse_file, refuse_held, refuse_sizes
from wan5b.t5 import T5Config, T5Encoder, Tokenizer
from wan5b.util import read_json
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import Device, Source, build, read_pickle, state_dict

Loras = Sequence[tuple[str | Path, float]]

# The part of a diffusers pipeline that holds each model, and what only its config.json has.
PIPELINE = {"dit": "transformer", "vae": "vae", "t5": "text_encoder"}
CONFIGS = {"dit": "num_attention_heads", "vae": "base_dim", "t5": "d_model"}


def _saved(stem: str, *endings: str) -> tuple[str, ...]:
    """How diffusers and transformers name weights: whole before in shards without their index, and
    plain ones before a variant's, as model.fp16.safetensors and model.safetensors.index.fp16.json.
    """
    names = []
    for ending in endings:
        names += [f"{stem}.{ending}.index.json", f"{stem}.{ending}"]
        names += [f"{stem}*.{ending}.index*.json", f"{stem}*.{ending}"]
    return tuple(names)


SAVED = {
    "dit": _saved("diffusion_pytorch_model", "safetensors", "bin"),
    "vae": _saved("diffusion_pytorch_model", "safetensors", "bin"),
    "t5": (*_saved("model", "safetensors"), *_saved("pytorch_model", "bin")),
}
# Names in a release folder, in any case: others' behind upstream's.
FILES = {
    "dit": (*SAVED["dit"], "*ti2v*5b*.safetensors"),
    "vae": ("wan2.2_vae.pth", "*vae.pth", "*vae.safetensors", "*vae*.safetensors"),
    "t5": ("models_t5*.pth", "models_t5*.safetensors", "*umt5*.safetensors", "*umt5*.pth"),
}
STAGE = re.compile(
    r"encoder\.downsamples\.(?P<stage>\d+)\.downsamples\.(?P<block>\d+)\."
    r"(?P<layer>residual\.2|time_conv)\.weight"
)
# Where trainers keep the weights that they mean to be used, the most wanted first.
PARTS = (
    *("generator_ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema"),
    *("generator", "state_dict", "model_state_dict", "model", "module", "net", "params"),
)


def open_layout(path: str | Path, kind: Kind, *, part: str = "") -> Source:
    """Tensors of any layout by upstream's names, mapped; its sizes, if it names them, as "config".

    part: the entry of a trainer's .pt to take (default: the first of PARTS, or the only one).
    Errors: see `weights.open_tensors`.
    """
    path = Path(path)
    if is_checkpoint(path):
        facts = untrusted.metadata(path, checkpoints.read_facts(path))
        check_checkpoint(path, "generator.")
        config = {}
        if kind == "dit":
            config = untrusted.checked(path, facts.get("config", {}), untrusted.CONFIG)
        held = _of(path, checkpoints.read_weights(path))
        refuse(path, held)  # one of adapters alone
        return Source(path / INDEX, held, facts | {"config": config})
    source, header = _open_files(locate(path, kind), part)
    if "basis" in source.tensors:
        return source
    tensors = layouts.upstream(source.file, kind, source.tensors, header)
    named = untrusted.checked(source.file, source.metadata.get("config") or {}, untrusted.CONFIG)
    named = named or _config_beside(source.file, kind)
    return Source(source.file, tensors, source.metadata | {"config": named})


def locate(path: Path, kind: Kind) -> Path:
    """The file that holds a model of this kind: the path itself, or in a folder or a pipeline.

    ValueError if there is none, or it is not clear which.
    """
    if not path.is_dir():
        return weights.locate(path)
    inside = path / PIPELINE[kind]
    folder = inside if inside.is_dir() else path
    files = candidates(path, kind)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        way_out = "name one, leave one there or add their index"
        raise ValueError(f"{folder} holds {len(files)} that it could be ({names}): {way_out}")
    if not files:
        names = ", ".join(name for name in FILES[kind] if "*" in name and "index" not in name)
        way_out = "download them, or name their file"
        steps = sorted(step.name for step in path.glob("step-*[0-9]"))  # no .partial
        if steps:
            exports = sorted(file.name for file in path.glob("*.safetensors"))
            way_out = f"of a run name its export or a checkpoint: {', '.join(exports + steps[-1:])}"
        raise ValueError(f"{folder} holds no weights ({names}); {way_out}")
    return files[0]


def candidates(path: Path, kind: Kind) -> list[Path]:
    """The files in a folder that a model of this kind could be in: one, if that is clear."""
    inside = path / PIPELINE[kind]
    folder = inside if inside.is_dir() else path
    names = FILES[kind]
    if inside.is_dir() or path.name == PIPELINE[kind] or _has_config(path, kind):
        names = (*SAVED[kind], *names)
    # What begins with a dot is not meant: macOS puts a ._x beside an x.
    files = sorted(file for file in folder.glob("[!.]*") if file.is_file())
    for name in names:
        found = [file for file in files if fnmatch(file.name.lower(), name)]
        models = [file for file in found if "lora" not in file.name.lower()]
        if found:
            return models or found
    return []


def _has_config(folder: Path, kind: Kind) -> bool:
    """Whether a folder of any name holds a part of a pipeline of this kind."""
    config = folder / "config.json"
    return config.is_file() and CONFIGS[kind] in read_json(config)


def _open_files(file: Path, part: str) -> tuple[Source, dict[str, str]]:
    """The tensors by the file's own names, and the header of a safetensors file."""
    refuse_file(file)
    files = [file]
    file_of = {}
    if file.suffix == ".json":
        file_of = weights.shards(file)
        files = sorted(set(file_of.values()))
        if not files:
            raise ValueError(f"{file} is no index of shards; name the folder or the weights in it")
    for each in files:
        if each.suffix != ".safetensors":
            untrusted.check_zip(each)
    if file.suffix in (".json", ".safetensors"):
        source = weights.open_tensors(file)
        if file.suffix == ".json":
            source = source._replace(metadata=weights.open_tensors(files[0]).metadata)
    else:
        source = Source(file, _read_part(file, part), {})
    untrusted.check_tensors(file, source.tensors, sum(each.stat().st_size for each in files))
    _of(file, source.tensors, file_of)

    header = {}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    return source, header


def _of(
    file: Path, tensors: dict[str, Tensor], file_of: Mapping[str, Path] | None = None
) -> dict[str, Tensor]:
    """The tensors, each with the `file` that errors name: its shard, if they come from several."""
    for name, tensor in tensors.items():
        tensor.file = (file_of or {}).get(name, file)
    return tensors


def _config_beside(file: Path, kind: Kind) -> dict:
    """The sizes in a config.json beside the weights. Of a release's it is the DiT's."""
    beside = file.with_name("config.json")
    if not beside.exists():
        return {}
    named = read_json(beside)
    if layouts.is_foreign_config(named):
        kinds = dict.fromkeys(("attention_head_dim", "d_kv"), untrusted.SIZE)
        for ours, theirs in layouts.FIELDS[kind].items():
            kinds[theirs] = untrusted.CONFIG[ours]
        named = {key: value for key, value in named.items() if value is not None}
        untrusted.checked(beside, named, kinds)
        whole = {key: untrusted.as_whole(named[key]) for key in kinds if key in named}
        return layouts.config_fields(beside, kind, named | whole)
    if kind != "dit":
        return {}
    return untrusted.checked(beside, named, untrusted.CONFIG)


def _read_part(path: Path, part: str) -> dict[str, Tensor]:
    """A plain state dict, or one part of a training checkpoint: by default the generator."""
    held = read_pickle(path)
    refuse_held(path, held)
    if part and part not in held:
        raise ValueError(f"{path} has no part {part!r}; it holds {', '.join(map(str, held))[:200]}")
    found = held[part] if part else _find_state(held)
    return state_dict(path, found or held)


def _find_state(held: Any, depth: int = 3) -> dict[str, Tensor] | None:
    """The state dict in what a trainer saved, if it is clear which one is meant."""
    if depth == 0 or not isinstance(held, dict):
        return None
    if _is_state(held):
        return held
    for name in PARTS:
        found = _find_state(held.get(name), depth - 1)
        if found:
            return found
    states = [entry for entry in held.values() if _is_state(entry)]
    return states[0] if len(states) == 1 else None


def _is_state(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry:
        return False
    return all(isinstance(value, Tensor) for value in entry.values())


def open_dit(
    path: str | Path, *, channels: int = 0, part: str = "", loras: Loras = ()
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """`weights.open_dit`, of any layout. loras: (path, strength) of each, merged on the way."""
    source = open_layout(path, "dit", part=part)
    refuse_sizes(source.file, source.tensors, channels)
    cfg = weights.check_dit(source, channels)
    return cfg, lora.merged(source.tensors, loras)


def load_dit(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32, **options
) -> WanDiT:
    """The DiT of `open_dit`, in dtype on the device. options: channels, part, loras, as there."""
    cfg, tensors = open_dit(path, **options)
    return build(WanDiT, cfg, Source(Path(path), tensors, {}), device, dtype)


def load_vae(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> VAE22 | LinearCodec:
    """`weights.load_vae`, of any layout."""
    source = open_layout(path, "vae")
    if "basis" in source.tensors:
        return build(LinearCodec, VAEConfig(), source, device, dtype)
    return build(VAE22, vae_config(source), source, device, dtype)


def vae_config(source: Source) -> VAEConfig:
    """Sizes of a VAE that `open_layout` opened. ValueError for another VAE than Wan2.2's."""
    cfg = weights.vae_config(source)
    cfg = replace(cfg, **_stages(source.tensors, cfg.dim) | source.metadata["config"])
    usual = cfg.strides == VAEConfig().strides and len(cfg.temperal_downsample) == 3
    if not usual or cfg.temperal_downsample[0]:
        stages = f"stages of {cfg.dim_mult}, {cfg.temperal_downsample} in time"
        raise ValueError(f"{source.file} is no VAE of Wan2.2 (4x16x16): {stages}")
    return cfg


def _stages(tensors: dict[str, Tensor], dim: int) -> dict:
    """What the stages of a VAE's encoder show of its config, if they are as stages should be."""
    widths = {}
    blocks = set()
    temporal = set()
    for name, tensor in tensors.items():
        match = STAGE.fullmatch(name)
        if match and match["layer"] == "time_conv":
            temporal.add(int(match["stage"]))
        elif match:
            widths[int(match["stage"])] = len(tensor)
            blocks.add(int(match["block"]))
    stages = range(len(widths))
    if not dim or widths.keys() != set(stages) or len(stages) < 2:
        return {}
    return {
        "dim_mult": tuple(widths[i] // dim for i in stages),
        "num_res_blocks": len(blocks),
        "temperal_downsample": tuple(i in temporal for i in stages[:-1]),
    }


def load_t5(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> T5Encoder:
    """`weights.load_t5`, of any layout."""
    source = open_layout(path, "t5")
    return build(T5Encoder, t5_config(source), source, device, dtype)


def t5_config(source: Source) -> T5Config:
    """Sizes of a text encoder that `open_layout` opened. ValueError for what can't be one."""
    cfg = weights.t5_config(source)
    if cfg.dim_attn % cfg.num_heads or cfg.num_buckets % 4:
        raise ValueError(f"{source.file} has no whole heads or buckets: {cfg}")
    return cfg


def load_tokenizer(path: str | Path, length: int = 512) -> Tokenizer:
    """The tokenizer of a release or pipeline folder, or the one in ComfyUI's text encoder.

    path: such a folder, that of the tokenizer itself, or a file.
    """
    path = Path(path)
    usual = path / "google" / "umt5-xxl" / "spiece.model"
    pipeline = path / "tokenizer"
    if path.name == "spiece.model" or (path / "spiece.model").exists():
        return Tokenizer(path / "spiece.model" if path.is_dir() else path, length)
    if usual.exists():
        return Tokenizer(usual, length)
    if (pipeline / "spiece.model").exists():
        return Tokenizer(pipeline / "spiece.model", length)
    if (pipeline / "tokenizer.json").exists():
        way_out = "copy google/umt5-xxl/spiece.model of the release into it"
        raise ValueError(f"{pipeline} has no spiece.model (transformers 5 saves none): {way_out}")
    if path.exists() and not pipeline.is_dir():
        with suppress(ValueError):
            source, _ = _open_files(locate(path, "t5"), "")
            model = layouts.tokenizer_bytes(source.tensors)
            if model is not None:
                return Tokenizer(model, length)
    return Tokenizer(usual, length)  # which says that it is not there


def read_metadata(path: str | Path) -> dict:
    """What `save_dit` was given as metadata, or a checkpoint of train.py says of itself; else {}.

    Of a folder, or of shards, what the first file of its DiT says. A null says nothing: it is left
    out. ValueError for values of other types.
    """
    path = Path(path)
    known = {}
    file = _headed(path)
    if is_checkpoint(path):
        known = checkpoints.read_facts(path)
    elif file.suffix == ".safetensors":
        known = weights.open_tensors(file).metadata
    said = untrusted.metadata(path, known)
    return {key: value for key, value in said.items() if key not in ("config", "optimizer_steps")}


def _headed(path: Path) -> Path:
    """The first file of a DiT, whose header speaks for it; the path itself if there is none."""
    if path.is_dir():
        try:
            path = locate(path, "dit")
        except ValueError:  # which opening it says, too
            return path
    if path.suffix == ".json":
        return min(set(weights.shards(path).values()), default=path)
    return path
