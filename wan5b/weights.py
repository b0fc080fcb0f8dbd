"""Release folders, single files and training checkpoints -> models; models -> safetensors.

Every way in is the same three steps: `open_tensors` maps the files, `sizes` reads the config off the tensors' shapes,
and `fill` copies tensor by tensor into a model built on the meta device, casting and moving on the way. Mapped pages
belong to the page cache, so the process itself holds no more than the model. Loading is strict: every key has one
place, and every shape fits before anything is copied. Whatever a user may get wrong is a ValueError with the way out.
"""

import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wan5b import fsdp
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras.codec import LinearCodec
from wan5b.media import first_line
from wan5b.t5 import T5Config, T5Encoder
from wan5b.vae22 import VAE22, VAEConfig

# What wrappers and trainers put into keys; upstream's own names contain none of these words.
WRAPPERS = {
    "model",
    "diffusion_model",
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
LFS_POINTER = b"version https://git-lfs"
Device = str | torch.device
HEAD_DIM = 128  # of every released Wan; the tensors' shapes don't tell it
# Config fields by the axes of the tensors that show them.
DIT_AXES = {
    "patch_embedding.weight": ("dim", "in_dim"),
    "text_embedding.0.weight": ("dim", "text_dim"),
    "time_embedding.0.weight": ("dim", "freq_dim"),
    "blocks.0.ffn.0.weight": ("ffn_dim", "dim"),
    "head.head.weight": ("out_dim", "dim"),
}
T5_AXES = {
    "token_embedding.weight": ("vocab", "dim"),
    "blocks.0.attn.q.weight": ("dim_attn", "dim"),
    "blocks.0.ffn.fc1.weight": ("dim_ffn", "dim"),
    "blocks.0.pos_embedding.embedding.weight": ("num_buckets", "num_heads"),
}
VAE_AXES = {
    "conv2.weight": ("z_dim",),
    "encoder.conv1.weight": ("dim",),
    "decoder.head.0.gamma": ("dec_dim",),
}

# ------------------------------------------------------------------------------------------------------- files


def _locate(path: Path, *patterns: str) -> Path:
    """path itself if it is a file; in a folder the one file of the first pattern that occurs."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a release folder or a weights file")
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"{path} holds {len(found)} of {pattern}: name one, or download the index of the shards"
            )
        if found:
            return found[0]
    raise ValueError(
        f"{path} holds no weights ({', '.join(patterns)}); download them, in the original layout"
    )


def _read(path: Path) -> tuple[dict, dict]:
    """What a .json, a .safetensors or a file of torch.save holds, tensors mapped; the metadata of an export."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but it belongs there; download or copy it too")
    with path.open("rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
            )
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text(encoding="utf-8"))), {}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                tensors, metadata = (
                    {name: f.get_tensor(name) for name in f.keys()},
                    f.metadata() or {},
                )
            return tensors, {
                key: json.loads(metadata[key]) for key in metadata if "config" in metadata
            }
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)), {}
    except pickle.UnpicklingError as e:
        way_out = "save a plain state dict with torch.save where it was made"
        raise ValueError(
            f"{path} is a pickle that needs code execution, which is refused; {way_out}"
        ) from e
    except (
        ValueError,
        TypeError,
        SafetensorError,
        RuntimeError,
        OSError,
    ) as e:  # the first two: bad JSON, no dict
        kind = {".json": "not JSON", ".safetensors": "no safetensors file"}.get(
            path.suffix, "no zip of a state dict"
        )
        raise ValueError(
            f"{path} is truncated, corrupt or {kind}; download it again or resave: {first_line(e)}"
        ) from e


def _clean(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in WRAPPERS)


def open_tensors(
    path: str | Path, *patterns: str, part: str = ""
) -> tuple[Path, dict[str, Tensor], dict]:
    """The file, upstream's key -> tensor mapped from it (nothing is read yet), and what an export says of itself.

    path: a .safetensors file, an index of shards (.json) or a pickle, of which part names the entry to take (default:
    generator_ema, else generator); or a folder that holds one, named by the first of the patterns that fits; or a
    checkpoint folder of train.py, whose shards can't be mapped: the generator is read from it.
    """
    file = _locate(Path(path), ".metadata", *patterns)
    if file.name == ".metadata":
        facts, _ = _read(file.with_name("facts.json"))
        return file, fsdp.read_weights(file.parent), facts
    tensors, metadata = _read(file)
    if (
        file.suffix == ".json"
    ):  # each key from the shard that the index names; others are kept, to be found unexpected
        shard_of, tensors = dict(tensors.get("weight_map") or {}), {}
        for shard in sorted(set(shard_of.values())):
            found, _ = _read(file.parent / shard)
            tensors |= {
                key: tensor for key, tensor in found.items() if shard_of.get(key, shard) == shard
            }
    elif file.suffix != ".safetensors":  # a plain state dict, or a training checkpoint with parts
        if part and part not in tensors:
            raise ValueError(
                f"{file} has no part {part!r}; it holds {', '.join(map(str, tensors))[:200]}"
            )
        tensors = next(
            (tensors[name] for name in (part, "generator_ema", "generator") if tensors.get(name)),
            tensors,
        )
        other = [
            str(k)
            for k, value in tensors.items()
            if not (isinstance(k, str) and isinstance(value, Tensor))
        ]
        if other:
            raise ValueError(
                f"{file} holds more than tensors ({', '.join(other[:3])}); name its part to load"
            )
    cleaned = {_clean(key): tensor for key, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        raise ValueError(
            f"{file} holds keys that differ by a wrapper's prefix only; save one model per state dict"
        )
    return file, cleaned, metadata


# ------------------------------------------------------------------------------------------------------- sizes


def sizes(tensors: dict[str, Tensor], axes: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Config fields that the tensors' shapes show; a config's defaults stand for those of absent tensors.

    Absent keys, and shapes that contradict each other, are left to `blank`, which then names them.
    """
    found = {
        axis: n
        for key in axes
        if key in tensors
        for axis, n in zip(axes[key], tensors[key].shape, strict=False)
    }
    if any(key.startswith("blocks.") for key in axes.keys() & tensors.keys()):
        found["num_layers"] = len(
            {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        )
    return found


def dit_config(tensors: dict[str, Tensor], named: dict) -> DiTConfig:
    """What a config.json names, else what the shapes say, else what the preset of these sizes has."""
    shown = sizes(tensors, DIT_AXES)
    if "out_dim" in shown:
        shown["out_dim"] //= 4  # the pixels of a patch
    presets = [
        asdict(preset) for preset in PRESETS.values() if shown.items() <= asdict(preset).items()
    ]
    heads, rest = divmod(shown.get("dim", DiTConfig.dim), HEAD_DIM)
    if rest and not presets and "num_heads" not in named:
        raise ValueError(
            f"no released model has dim {shown['dim']}: name num_heads in a config.json beside it"
        )
    base = presets[0] if presets else asdict(DiTConfig()) | {"num_heads": heads}
    return DiTConfig(**base | shown | {key: value for key, value in named.items() if key in base})


def _check_channels(path: Path, found: int, needed: int) -> None:
    if found != needed:
        spaces = "16: the 4x8x8 space of the Wan2.1 VAE (1.3B, 14B), 48: the 4x16x16 space of the Wan2.2 VAE (5B)"
        raise ValueError(
            f"{path} is for {found} latent channels where {needed} are needed ({spaces}); don't mix them"
        )


# ------------------------------------------------------------------------------------------------------ models


def blank(build: type[nn.Module], cfg, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The model on the meta device. ValueError, with the first few of each kind, unless the tensors are its own."""
    with torch.device("meta"):
        model = build(cfg)
    expected, given = (
        {k: list(v.shape) for k, v in held.items()} for held in (model.state_dict(), tensors)
    )
    kinds = {
        "missing": [k for k in expected if k not in given],
        "unexpected": [k for k in given if k not in expected],
        "misshapen": [
            f"{k} {given[k]}, not {v}" for k, v in expected.items() if given.get(k, v) != v
        ],
    }
    texts = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in kinds.items() if keys]
    if texts:
        raise ValueError(
            f"{path} (complete? config.json right?) has keys that don't fit {cfg}: {'; '.join(texts)}"
        )
    return model


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    copy: Callable[[Tensor, Tensor], None] = Tensor.copy_,
) -> None:
    """copy(parameter, tensor) for every name: cast and move on the way; fsdp.copy_part takes the shard that is ours."""
    targets = {name: p.detach() for name, p in model.named_parameters()}
    # Page faults limit a copy; torch's own threads, which share one tensor, wait for each other in them.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(
            pool.map(copy, targets.values(), [tensors[name] for name in targets])
        )  # a list raises what a copy raised


def _build(
    build: type[nn.Module],
    cfg,
    tensors: dict[str, Tensor],
    path: Path,
    device: Device,
    dtype: torch.dtype,
):
    model = blank(build, cfg, tensors, path).to(dtype).to_empty(device=device)
    fill(model, tensors)
    return model.eval()


def open_dit(
    path: str | Path, *, channels: int = 0, part: str = ""
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The sizes and tensors of the DiT in a release folder, its index, a .safetensors file or a training checkpoint.

    A checkpoint is a .pt file or a folder of train.py's (out/step-0000100), which is read, in float32, where others are
    mapped: the generator's average, if kept, else its masters. channels: the latent channels needed; 0: any. part: of
    a .pt the entry (default generator_ema, else generator). Sizes come from the metadata of an export, else a
    config.json beside the weights, and from the tensors themselves. ValueError for whatever is missing, damaged, of
    other sizes or in another layout.
    """
    name = "diffusion_pytorch_model*.safetensors"
    file, tensors, metadata = open_tensors(path, f"{name}.index.json", name, part=part)
    if any("condition_embedder." in key or "attn1.to_q" in key for key in tensors):
        raise ValueError(
            f"{file} has the diffusers layout, not supported yet; take the original Wan-AI/Wan2.2-TI2V-5B"
        )
    beside = file.with_name("config.json")
    cfg = dit_config(
        tensors, metadata.get("config") or (_read(beside)[0] if beside.exists() else {})
    )
    _check_channels(file, cfg.in_dim, channels or cfg.in_dim)
    blank(WanDiT, cfg, tensors, file)
    return cfg, tensors


def load_dit(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32, **options
) -> WanDiT:
    """The DiT that `open_dit` finds, in dtype on the device. options: channels and part, as there."""
    cfg, tensors = open_dit(path, **options)
    return _build(WanDiT, cfg, tensors, Path(path), device, dtype)


def load_vae(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> VAE22 | LinearCodec:
    """The Wan2.2 VAE of a release folder, or of the .pth or .safetensors file itself. Errors as in `load_dit`.

    A file that holds a `basis` is that of a LinearCodec, which stands in the VAE's place.
    """
    file, tensors, _ = open_tensors(path, "*VAE.pth", "*VAE.safetensors")
    cfg = VAEConfig(**sizes(tensors, VAE_AXES))
    _check_channels(file, cfg.z_dim, VAEConfig.z_dim)
    return _build(LinearCodec if "basis" in tensors else VAE22, cfg, tensors, file, device, dtype)


def load_t5(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> T5Encoder:
    """The umt5 encoder of a release folder, or of the .pth or .safetensors file itself. Errors as in `load_dit`."""
    file, tensors, _ = open_tensors(path, "models_t5*.pth", "models_t5*.safetensors")
    return _build(T5Encoder, T5Config(**sizes(tensors, T5_AXES)), tensors, file, device, dtype)


def tokenizer_path(folder: str | Path) -> Path:
    """Where a release folder has its spiece.model; the Tokenizer says so if it is not there."""
    return Path(folder) / "google" / "umt5-xxl" / "spiece.model"


# ------------------------------------------------------------------------------------------------------ export


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, written beside path, then renamed: path is the old file or the whole new one, and a failure
    leaves nothing behind. Makes its folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata
        )
        partial.chmod(0o644)  # save_file makes it private
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_dit(
    model: WanDiT, path: str | Path, metadata: dict, *, dtype=None, value=None, overwrite=False
) -> None:
    """Write model as safetensors under upstream's names, in dtype (float32 or bfloat16; default: the model's own).

    metadata: JSON values (levels, shift, block layout, stage, step); the config is added to it. path is the old file or
    the whole new one (`write_tensors`). The host holds one copy of the model, in dtype. value: name -> Tensor, called
    in the state dict's order, for what is not in the model (gathered shards, an average). ValueError if path exists,
    unless overwrite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of an export must end in .safetensors")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass overwrite=True")
    dtype = dtype or model.patch_embedding.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"can't export as {dtype}; choose from torch.float32 and torch.bfloat16")
    header = {
        key: json.dumps(entry) for key, entry in (metadata | {"config": asdict(model.cfg)}).items()
    }
    state = model.state_dict()
    write_tensors(
        path, {_clean(name): (value or state.get)(name).to("cpu", dtype) for name in state}, header
    )


def read_metadata(path: str | Path) -> dict:
    """What `save_dit` was given as metadata, or train.py's checkpoint says of itself; else empty."""
    path, facts = Path(path), Path(path) / "facts.json"
    known = (
        _read(facts)[0]
        if facts.exists()
        else _read(path)[1]
        if path.suffix == ".safetensors"
        else {}
    )
    return {key: value for key, value in known.items() if key not in ("config", "optimizer_steps")}
