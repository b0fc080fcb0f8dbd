"""Release folders, single files and training checkpoints -> models; models -> safetensors.

Every way in is the same three steps: `open_tensors` maps the files, the sizes are read off the tensors' shapes, and
`fill` copies tensor by tensor into a model built on the meta device, casting and moving on the way. Mapped pages belong
to the page cache, so the process itself holds no more than the model. Loading is strict: every key has one place, and
every shape fits before anything is copied. Whatever a user may get wrong is a ValueError with the way out.
"""

import json
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.t5 import T5Config, T5Encoder
from wan5b.vae22 import VAE22, VAEConfig

# What wrappers and trainers put into keys; upstream's own names contain none of these words.
WRAPPERS = {"model", "diffusion_model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LFS_POINTER = b"version https://git-lfs"
HEAD_DIM = 128  # of every released Wan; the tensors' shapes don't tell it
DIT_AXES = {  # sizes by the axes of the tensors that show them
    "patch_embedding.weight": ("dim", "in_dim"),
    "text_embedding.0.weight": ("dim", "text_dim"),
    "time_embedding.0.weight": ("dim", "freq_dim"),
    "blocks.0.ffn.0.weight": ("ffn_dim", "dim"),
    "head.head.weight": ("out_dim", "dim"),
}
EXPORT_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

# ------------------------------------------------------------------------------------------------------- files


def _locate(path: str | Path, *patterns: str) -> Path:
    """path itself if it is a file; in a folder the one file of the first pattern that occurs."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a release folder or a weights file")
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} of {pattern}: name one, or download the index of the shards")
        if found:
            return found[0]
    raise ValueError(f"{path} holds no weights ({', '.join(patterns)}); download them, in the original layout")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the release has it; download it too")
    with path.open("rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def _read_json(path: Path) -> dict:
    _check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # bad JSON or bad UTF-8
        raise ValueError(f"{path} is not JSON ({e}); download it again") from e


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that map the file, and the metadata of its header."""
    _check_file(path)
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file ({e}); download it again") from e


def _open_shards(index: Path) -> dict[str, Tensor]:
    """Each key from the shard that the index names. A key that it doesn't name is kept, to be found unexpected."""
    shard_of = _read_json(index)["weight_map"]
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        found, _ = _open_safetensors(index.parent / shard)
        tensors |= {key: tensor for key, tensor in found.items() if shard_of.get(key, shard) == shard}
    return tensors


def _open_pickle(path: Path, part: str | None) -> dict[str, Tensor]:
    """A plain state dict or a part of a training checkpoint: the one named, else generator_ema, else generator."""
    _check_file(path)
    save = "save a plain state dict with torch.save where it was made"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path} is a pickle that needs code execution, which is refused; {save}") from e
    except (RuntimeError, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is truncated, corrupt or no torch.save zip file; download it again, or {save}") from e
    if part and part not in loaded:
        raise ValueError(f"{path} has no part {part!r}; it holds {', '.join(map(str, loaded))[:200]}")
    parts = [name for name in (part, "generator_ema", "generator") if loaded.get(name)]
    tensors = loaded[parts[0]] if parts else loaded
    other = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{path} holds more than tensors ({', '.join(map(str, other[:3]))}); name its part to load")
    return tensors


def _clean(key: str) -> str:
    return ".".join(word for word in key.split(".") if word not in WRAPPERS)


def open_tensors(path: Path, part: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Upstream's key -> tensor mapped from its file (nothing is read yet), and a safetensors file's metadata.

    path: .safetensors, .safetensors.index.json, or a pickle, of which part names the entry to take.
    """
    metadata = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _open_safetensors(path)
    elif path.suffix == ".json":
        tensors = _open_shards(path)
    else:
        tensors = _open_pickle(path, part)
    cleaned = {_clean(key): tensor for key, tensor in tensors.items()}
    if len(cleaned) < len(tensors):
        raise ValueError(f"{path} holds keys that differ by a wrapper's prefix only; save one model per state dict")
    return cleaned, metadata


# ------------------------------------------------------------------------------------------------------- sizes


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many different keys' beginnings match the pattern."""
    return len({match[0] for match in map(re.compile(pattern).match, tensors) if match})


def _check_channels(path: Path, found: int, needed: int) -> None:
    if found != needed:
        raise ValueError(
            f"{path} is for {found} latent channels where {needed} are needed: 16 is the 4x8x8 space of the Wan2.1 VAE "
            "(the 1.3B and 14B), 48 the 4x16x16 space of the Wan2.2 VAE (the 5B), and they can't be mixed; "
            "take all parts from one release"
        )


def dit_config(tensors: dict[str, Tensor], named: dict) -> DiTConfig:
    """What a config.json names, else what the shapes say, else what the preset of these sizes has.

    Shapes that contradict the config, and absent keys, are left to `check_keys`, which then names them.
    """
    shapes = [(axes, tensors[key].shape) for key, axes in DIT_AXES.items() if key in tensors]
    sizes = {axis: size for axes, shape in shapes for axis, size in zip(axes, shape, strict=False)}
    sizes["num_layers"] = _count(tensors, r"blocks\.\d+\.")
    if "out_dim" in sizes:
        sizes["out_dim"] //= 4  # the pixels of a patch
    named = {field.name: named[field.name] for field in fields(DiTConfig) if field.name in named}
    presets = [asdict(preset) for preset in PRESETS.values() if sizes.items() <= asdict(preset).items()]
    base = presets[0] if presets else asdict(DiTConfig())
    if not presets and "num_heads" not in named and "dim" in sizes:
        base["num_heads"], rest = divmod(sizes["dim"], HEAD_DIM)
        if rest:
            raise ValueError(f"no released model has dim {sizes['dim']}: name num_heads in a config.json beside it")
    return DiTConfig(**base | sizes | named)


def vae_config(tensors: dict[str, Tensor], path: Path) -> VAEConfig:
    """Sizes from the shapes; the first stage of the released VAE has its base width. The default if keys are absent."""
    if "conv2.weight" in tensors:
        _check_channels(path, len(tensors["conv2.weight"]), VAEConfig.z_dim)
    stage = "encoder.downsamples.{}.downsamples.{}".format
    stages = range(_count(tensors, r"encoder\.downsamples\.\d+\."))
    blocks = _count(tensors, stage(0, r"\d+\.residual\."))
    names = ["encoder.conv1.weight", "decoder.head.0.gamma", *(stage(i, "0.residual.2.weight") for i in stages)]
    if not tensors.keys() >= set(names):
        return VAEConfig()
    dim, dec_dim, *widths = (len(tensors[name]) for name in names)
    temporal = [f"{stage(i, blocks)}.time_conv.weight" in tensors for i in stages[:-1]]
    return VAEConfig(dim, dec_dim, VAEConfig.z_dim, [width // dim for width in widths], blocks, temporal)


def t5_config(tensors: dict[str, Tensor]) -> T5Config:
    """Sizes from the shapes. The default if keys are absent."""
    names = ["token_embedding.weight"]
    names += [f"blocks.0.{name}.weight" for name in ("attn.q", "ffn.fc1", "pos_embedding.embedding")]
    if not tensors.keys() >= set(names):
        return T5Config()
    (vocab, dim), (dim_attn, _), (dim_ffn, _), (buckets, heads) = (tensors[name].shape for name in names)
    return T5Config(vocab, dim, dim_attn, dim_ffn, heads, _count(tensors, r"blocks\.\d+\."), buckets)


# ------------------------------------------------------------------------------------------------------ models


def check_keys(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """ValueError, with the first few of each kind, unless the tensors are exactly the model's."""
    expected, given = ({k: list(v.shape) for k, v in held.items()} for held in (model.state_dict(), tensors))
    kinds = {
        "missing": [k for k in expected if k not in given],
        "unexpected": [k for k in given if k not in expected],
        "misshapen": [f"{k} {given[k]}, not {v}" for k, v in expected.items() if given.get(k, v) != v],
    }
    texts = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in kinds.items() if keys]
    if texts:
        hint = f"is the file complete, and its config.json right? Expected {model.cfg}"
        raise ValueError(f"{path}: keys don't fit, {'; '.join(texts)}; {hint}")


def fill(model: nn.Module, tensors: dict[str, Tensor], copy: Callable[[Tensor, Tensor], None] = Tensor.copy_) -> None:
    """copy(parameter, tensor) for every name: cast and move on the way; fsdp.copy_part takes the shard that is ours."""

    @torch.no_grad()  # which holds for the thread that enters it
    def one(name: str, parameter: nn.Parameter) -> None:
        copy(parameter, tensors[name])

    # Page faults limit a copy; torch's own threads, which share one tensor, wait for each other in them.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(one, *zip(*model.named_parameters(), strict=True)))  # the list raises what a copy raised


def _build(build: type, cfg, tensors: dict[str, Tensor], path: Path, device, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = build(cfg).to(dtype)
    check_keys(model, tensors, path)
    model.to_empty(device=device)
    fill(model, tensors)
    assert not any(value.is_meta for value in model.state_dict().values())
    return model.eval()


def open_dit(
    path: str | Path, *, channels: int | None = None, part: str | None = None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The sizes and mapped tensors of the DiT in a release folder, its index, a .safetensors file or a .pt checkpoint.

    channels: the latent channels needed, if the caller knows. part: entry of a training checkpoint; default
    generator_ema, else generator. Sizes come from the export's metadata or else a config.json beside the file, and from
    the tensors themselves. ValueError for whatever is missing, damaged, of other sizes or in another layout.
    """
    name = "diffusion_pytorch_model"
    file = _locate(path, f"{name}*.safetensors.index.json", f"{name}*.safetensors")
    tensors, metadata = open_tensors(file, part)
    if any("condition_embedder." in key or "attn1.to_q" in key for key in tensors):
        raise ValueError(f"{file} has the diffusers layout, not supported yet; take the original Wan-AI/Wan2.2-TI2V-5B")
    config = file.with_name("config.json")
    if "config" in metadata:
        cfg = dit_config(tensors, json.loads(metadata["config"]))
    else:
        cfg = dit_config(tensors, _read_json(config) if config.exists() else {})
    if channels is not None:
        _check_channels(file, cfg.in_dim, channels)
    with torch.device("meta"):
        check_keys(WanDiT(cfg), tensors, file)
    return cfg, tensors


def load_dit(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    channels: int | None = None,
    part: str | None = None,
) -> WanDiT:
    """The DiT that `open_dit` finds, in dtype on the device."""
    cfg, tensors = open_dit(path, channels=channels, part=part)
    return _build(WanDiT, cfg, tensors, Path(path), device, dtype)


def load_vae(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VAE22:
    """The Wan2.2 VAE of a release folder, or of the .pth or .safetensors file itself. Errors as in `load_dit`."""
    file = _locate(path, "*VAE.pth", "*VAE.safetensors")
    tensors, _ = open_tensors(file)
    return _build(VAE22, vae_config(tensors, file), tensors, file, device, dtype)


def load_t5(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16) -> T5Encoder:
    """The umt5 encoder of a release folder, or of the .pth or .safetensors file itself. Errors as in `load_dit`."""
    file = _locate(path, "models_t5*.pth", "models_t5*.safetensors")
    tensors, _ = open_tensors(file)
    return _build(T5Encoder, t5_config(tensors), tensors, file, device, dtype)


def tokenizer_path(folder: str | Path) -> Path:
    """The spiece.model of a release folder. ValueError if it is not there."""
    path = Path(folder) / "google" / "umt5-xxl" / "spiece.model"
    _check_file(path)
    return path


# ------------------------------------------------------------------------------------------------------ export


def save_dit(
    model: WanDiT,
    path: str | Path,
    metadata: dict,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Write model as safetensors under upstream's names, in dtype (float32 or bfloat16; default: the model's own).

    metadata: JSON values (levels, shift, block layout, stage, step); the config is added to it. Written beside path,
    then renamed: path is the old file or the whole new one, and a failure leaves nothing behind. One tensor at a time
    is copied to the host, from value(name) if given (gathered shards, an average). ValueError if path exists, unless
    overwrite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of an export must end in .safetensors")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass overwrite=True")
    dtype = dtype or model.patch_embedding.weight.dtype
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"can't export as {dtype}; choose from {', '.join(map(str, EXPORT_DTYPES))}")
    assert "config" not in metadata
    entries = {"config": asdict(model.cfg)} | metadata

    header, end = {"__metadata__": {key: json.dumps(value) for key, value in entries.items()}}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[_clean(name)] = {"dtype": EXPORT_DTYPES[dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the data must be aligned
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for name, tensor in model.state_dict().items():
                tensor = value(name) if value else tensor
                f.write(tensor.to("cpu", dtype).contiguous().view(torch.uint8).numpy())
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict:
    """What `save_dit` was given as metadata; empty for whatever it did not write."""
    path = Path(path)
    metadata = _open_safetensors(path)[1] if path.suffix == ".safetensors" else {}
    ours = "config" in metadata
    return {key: json.loads(value) for key, value in metadata.items() if ours and key != "config"}
