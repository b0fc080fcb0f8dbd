"""Weights in every layout that the scripts take -> models, by functions named as in weights.py.

`open_layout` recognises a layout by the file that it finds, and brings its tensors under upstream's
names and its sizes under "config". From there all go the same strict way through weights.py.
Known beside upstream's own files:

a checkpoint folder of train.py (runs/x/step-0000100): the generator's average, if kept, else its
    masters, read in float32 where others are mapped, and what facts.json says of the run
a trainer's .pt: the entry generator_ema or generator, behind the prefixes of wrappers
a LinearCodec's file, which holds a `basis`, in the VAE's place
"""

from pathlib import Path

import torch
from torch import Tensor

from wan5b import weights
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras.codec import LinearCodec
from wan5b.fsdp import read_weights
from wan5b.t5 import T5Encoder, Tokenizer
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import Device, Source, build, clean, read_json, read_pickle, state_dict

CHECKPOINT = ".metadata"  # the index that torch.distributed.checkpoint writes into its folder


def open_layout(path: str | Path, *patterns: str, part: str = "") -> Source:
    """Tensors of any layout by upstream's names. Arguments, errors: see `weights.open_tensors`.

    part: the entry of a trainer's .pt to take (default: generator_ema, else generator).
    """
    file = weights.locate(Path(path), CHECKPOINT, *patterns)
    if file.name == CHECKPOINT:
        facts = read_json(file.with_name("facts.json"))
        return Source(file, read_weights(file.parent), facts)
    if file.suffix in (".json", ".safetensors"):
        source = weights.open_tensors(file)
    else:
        source = Source(file, _read_part(file, part), {})

    cleaned = {clean(key): tensor for key, tensor in source.tensors.items()}
    if len(cleaned) < len(source.tensors):
        raise ValueError(f"{file} has keys that differ only by a wrapper's prefix; save one model")
    return source._replace(tensors=cleaned)


def _read_part(path: Path, part: str) -> dict[str, Tensor]:
    """A plain state dict, or one part of a training checkpoint: by default the generator."""
    held = read_pickle(path)
    if part and part not in held:
        raise ValueError(f"{path} has no part {part!r}; it holds {', '.join(map(str, held))[:200]}")
    names = [name for name in (part, "generator_ema", "generator") if held.get(name)]
    return state_dict(path, held[names[0]] if names else held)


def open_dit(
    path: str | Path, *, channels: int = 0, part: str = ""
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """`weights.open_dit`, of any layout."""
    source = open_layout(path, *weights.DIT_FILES, part=part)
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
    return build(T5Encoder, weights.t5_config(source), source, device, dtype)


def load_tokenizer(path: str | Path, length: int = 512) -> Tokenizer:
    """The tokenizer of a release folder, for texts of at most `length` tokens."""
    return Tokenizer(weights.tokenizer_path(path), length)


def read_metadata(path: str | Path) -> dict:
    """What `save_dit` was given as metadata, or a checkpoint of train.py says of itself; else {}."""
    facts = Path(path) / "facts.json"
    if not facts.exists():
        return weights.read_metadata(path)
    known = read_json(facts)
    return {key: value for key, value in known.items() if key not in ("config", "optimizer_steps")}
