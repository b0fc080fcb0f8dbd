"""Weights in every layout that the scripts take -> models, by functions named as in weights.py.

`open_layout` recognises a layout by the file that it finds, and brings its tensors under upstream's
names and its sizes under "config". From there all go the same strict way through weights.py.
Known beside upstream's own files:

a checkpoint folder of train.py (runs/x/step-0000100): the generator's average, if kept, else its
    masters, read in float32 where others are mapped, and what facts.json says of the run
a trainer's .pt: of its entries the one meant for use, behind the prefixes of wrappers
a LinearCodec's file, which holds a `basis`, in the VAE's place
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan5b import fsdp, weights
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import untrusted
from wan5b.extras.codec import LinearCodec
from wan5b.fsdp import read_facts, read_weights
from wan5b.t5 import T5Encoder, Tokenizer
from wan5b.util import read_json
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import Device, Source, build, clean, read_pickle, state_dict

CHECKPOINT = ".metadata"  # the index that torch.distributed.checkpoint writes into its folder
# Where trainers keep the weights that they mean to be used, the most wanted first.
PARTS = (
    *("generator_ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema"),
    *("generator", "state_dict", "model_state_dict", "model", "module", "net", "params"),
)


def open_layout(path: str | Path, *patterns: str, part: str = "") -> Source:
    """Tensors of any layout by upstream's names. Arguments, errors: see `weights.open_tensors`.

    part: the entry of a trainer's .pt to take (default: the first of PARTS, or the only one).
    """
    path = Path(path)
    if is_checkpoint(path):
        facts = read_facts(path)
        check_checkpoint(path)
        return Source(path / CHECKPOINT, read_weights(path), facts)
    file = weights.locate(path, *patterns)
    files = [file]
    if file.suffix == ".json":
        files = sorted(set(weights.shards(file).values()))
    for each in files:
        if each.suffix != ".safetensors":
            untrusted.check_zip(each)
    if file.suffix in (".json", ".safetensors"):
        source = weights.open_tensors(file)
    else:
        source = Source(file, _read_part(file, part), {})
    untrusted.check_tensors(file, source.tensors, sum(each.stat().st_size for each in files))

    cleaned = {clean(key): tensor for key, tensor in source.tensors.items()}
    if len(cleaned) < len(source.tensors):
        raise ValueError(f"{file} has keys that differ only by a wrapper's prefix; save one model")
    return source._replace(tensors=cleaned)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint folder of train.py, perhaps a link to one, or a copy."""
    named = re.match("step-[0-9]+", path.resolve().name)
    return named is not None and (path / CHECKPOINT).is_file()


def check_checkpoint(path: Path) -> None:
    """ValueError if the index of a checkpoint cannot be true."""
    with fsdp.opening(path):
        untrusted.check_index(path, fsdp.Reader(path).read_metadata())


def _read_part(path: Path, part: str) -> dict[str, Tensor]:
    """A plain state dict, or one part of a training checkpoint: by default the generator."""
    held = read_pickle(path)
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
    path: str | Path, *, channels: int = 0, part: str = ""
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """`weights.open_dit`, of any layout."""
    source = open_layout(path, *weights.DIT_FILES, part=part)

    # The sizes that a file names, or a config.json beside it.
    where = source.file
    named = source.metadata.get("config")
    if not named and where.with_name("config.json").exists():
        where = where.with_name("config.json")
        named = read_json(where)
    named = untrusted.checked(where, named or {}, untrusted.CONFIG)
    source = source._replace(metadata={"config": named})
    return weights.check_dit(source, channels), source.tensors


def load_dit(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32, **options
) -> WanDiT:
    """The DiT of `open_dit`, in dtype on the device. options: channels and part, as there."""
    cfg, tensors = open_dit(path, **options)
    return build(WanDiT, cfg, Source(Path(path), tensors, {}), device, dtype)


def load_vae(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> VAE22 | LinearCodec:
    """`weights.load_vae`, of any layout."""
    source = open_layout(path, *weights.VAE_FILES)
    if "basis" in source.tensors:
        return build(LinearCodec, VAEConfig(), source, device, dtype)
    return build(VAE22, weights.vae_config(source), source, device, dtype)


def load_t5(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> T5Encoder:
    """`weights.load_t5`, of any layout."""
    source = open_layout(path, *weights.T5_FILES)
    cfg = weights.t5_config(source)
    if cfg.dim_attn % cfg.num_heads or cfg.num_buckets % 4:
        raise ValueError(f"{source.file} has no whole heads or buckets: {cfg}")
    return build(T5Encoder, cfg, source, device, dtype)


def load_tokenizer(path: str | Path, length: int = 512) -> Tokenizer:
    """The tokenizer of a release folder, for texts of at most `length` tokens."""
    return Tokenizer(weights.tokenizer_path(path), length)


def read_metadata(path: str | Path) -> dict:
    """What `save_dit` was given as metadata, or a checkpoint of train.py says of itself; else {}.

    ValueError for values of other types.
    """
    path = Path(path)
    known = read_facts(path) if is_checkpoint(path) else weights.read_metadata(path)
    said = {key: value for key, value in known.items() if value is not None}
    untrusted.checked(path, said, untrusted.METADATA)
    return {key: value for key, value in known.items() if key not in ("config", "optimizer_steps")}
