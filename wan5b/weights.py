"""Files with upstream's names -> models; models -> safetensors. Other layouts: extras/formats.py.

Every way in is the same three steps. `open_tensors` maps the files, `sizes` reads the config off
the tensors' shapes, and `fill` copies tensor by tensor into a model built on the meta device,
casting and moving on the way. Mapped pages belong to the page cache, so the process itself holds no
more than the model. Loading is strict: every key has one place, and every shape fits before
anything is copied. Whatever a user may get wrong is a ValueError with the way out.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.t5 import T5Config, T5Encoder
from wan5b.util import finite, read_json, reading, write_tensors
from wan5b.vae22 import VAE22, VAEConfig

# Words that trainers and torch's wrappers put into keys; upstream's own names contain none of them.
TRAINERS = {"model", "diffusion_model", "module"}
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
Device = str | torch.device

# What a folder's files are called, in order of preference.
DIT_FILE = "diffusion_pytorch_model*.safetensors"
DIT_FILES = (f"{DIT_FILE}.index.json", DIT_FILE)
VAE_FILES = ("Wan2.2_VAE.pth", "*VAE.pth", "*VAE.safetensors")
T5_FILES = ("models_t5*.pth", "models_t5*.safetensors")

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
HEAD_DIM = 128  # of every released Wan; the shapes don't tell it
SPACES = "16: the 4x8x8 space of Wan2.1's VAE (1.3B, 14B), 48: the 4x16x16 space of Wan2.2's (5B)"


class Source(NamedTuple):
    """What a model is made from."""

    file: Path  # for errors
    tensors: dict[str, Tensor]  # by upstream's names
    metadata: dict  # what an export or a checkpoint says of itself, its sizes under "config"


# -------------------------------------------------------------------------------------------- files


def locate(path: Path, *patterns: str) -> Path:
    """path itself if it is a file; in a folder the one file of the first pattern that occurs."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give a release folder or a weights file")
    for pattern in patterns:
        # What begins with a dot is not meant: macOS puts a ._x beside an x.
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith("."))
        if len(found) > 1:
            way_out = "name one, leave one there or add their index"
            raise ValueError(f"{path} holds {len(found)} of {pattern}: {way_out}")
        if found:
            return found[0]
    names = ", ".join(patterns)
    raise ValueError(f"{path} holds no weights ({names}); download them, in the original layout")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Mapped tensors and, if `save_dit` wrote the file, its metadata."""
    with reading(path, "no safetensors file"), safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, _own(f.metadata() or {})


def _own(header: dict[str, str]) -> dict:
    """What `save_dit` put into a header. Of what others added, what is no JSON is left out."""
    entries = {}
    for key, text in sorted(header.items()):  # they come in any order
        with suppress(ValueError, RecursionError):
            entries[key] = json.loads(text)
    config = entries.get("config")
    return entries if isinstance(config, dict) and "dim" in config else {}


def read_pickle(path: Path) -> dict:
    """What torch.save wrote: plain containers, whose tensors are mapped."""
    with reading(path, "no zip of a state dict"):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def shards(index: Path) -> dict[str, Path]:
    """The file of every tensor, as an index of shards names it: all lie beside the index."""
    names = read_json(index).get("weight_map", {})
    with reading(index, "no index of shards"):
        if any(Path(name).name != name or not name.isprintable() for name in names.values()):
            raise ValueError("it names files that do not lie beside it")
        return {key: index.with_name(name) for key, name in names.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards, each key from the shard that the index names for it.

    Keys that the index lacks are kept, for the strict check to find them.
    """
    file_of = shards(index)
    tensors = {}
    for path in sorted(set(file_of.values())):
        found = _read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
        for key, tensor in found.items():
            if file_of.get(key, path) == path:
                tensors[key] = tensor
    return tensors


def state_dict(path: Path, held: dict) -> dict[str, Tensor]:
    """What a file holds, if that is tensors by name. Else ValueError."""
    other = [k for k, v in held.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if other:
        names = ", ".join(map(str, other[:3]))
        raise ValueError(f"{path} holds more than tensors ({names}); save those alone")
    return held


def clean(key: str) -> str:
    """A key without what trainers and wrappers put in front of upstream's name."""
    return ".".join(word for word in key.split(".") if word not in TRAINERS | WRAPPERS)


def open_tensors(path: str | Path, *patterns: str) -> Source:
    """Tensors by upstream's names, mapped: nothing is read yet.

    path: a .safetensors file, an index of shards (.json), or a state dict of torch.save; or a
    folder that holds one of these, named by the first of the patterns that fits.
    """
    file = locate(Path(path), *patterns)
    if file.suffix == ".json":
        return Source(file, _read_shards(file), {})
    if file.suffix == ".safetensors":
        return Source(file, *_read_safetensors(file))
    return Source(file, state_dict(file, read_pickle(file)), {})


# -------------------------------------------------------------------------------------------- sizes


def sizes(tensors: dict[str, Tensor], axes: dict[str, tuple[str, ...]]) -> dict[str, int]:
    """Config fields that the tensors' shapes show; a config's defaults stand for absent ones.

    Absent keys, and shapes that contradict each other, are left to `blank`, which names them.
    """
    present = [key for key in axes if key in tensors]
    found = {}
    for key in present:
        found.update(zip(axes[key], tensors[key].shape, strict=False))
    if any(key.startswith("blocks.") for key in present):
        layers = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
        found["num_layers"] = len(layers)
    return found


def dit_config(tensors: dict[str, Tensor], named: dict) -> DiTConfig:
    """What a config.json names, else what the shapes say, else what the preset of that shape has.

    Where there is no such preset, the number of heads follows from `HEAD_DIM`.
    """
    shown = sizes(tensors, DIT_AXES)
    if "out_dim" in shown:
        shown["out_dim"] //= 4  # the pixels of a patch

    presets = [asdict(preset) for preset in PRESETS.values()]
    base = next((preset for preset in presets if shown.items() <= preset.items()), None)
    if base is None:
        heads, rest = divmod(shown.get("dim", DiTConfig.dim), HEAD_DIM)
        if rest and "num_heads" not in named:
            raise ValueError(
                f"no released model has dim {shown['dim']}: add a config.json that names num_heads"
            )
        base = asdict(DiTConfig()) | {"num_heads": heads}

    named = {key: type(base[key])(value) for key, value in named.items() if key in base}
    return DiTConfig(**(base | shown | named))


def _check_channels(path: Path, found: int, needed: int) -> None:
    if found != needed:
        how = f"is for {found} latent channels where {needed} are needed"
        raise ValueError(f"{path} {how} ({SPACES}); don't mix them")


def check_dit(source: Source, channels: int = 0) -> DiTConfig:
    """The sizes of a DiT, none of whose tensors is missing or too many. Errors: see `open_dit`."""
    file, tensors, metadata = source
    named = metadata.get("config")
    beside = file.with_name("config.json")
    if not named and beside.exists():
        named = read_json(beside)
    with about(file):
        cfg = dit_config(tensors, named or {})
    _check_channels(file, cfg.in_dim, channels or cfg.in_dim)
    blank(WanDiT, cfg, source)
    return cfg


def vae_config(source: Source) -> VAEConfig:
    cfg = VAEConfig(**sizes(source.tensors, VAE_AXES))
    _check_channels(source.file, cfg.z_dim, VAEConfig.z_dim)
    return cfg


def t5_config(source: Source) -> T5Config:
    return T5Config(**sizes(source.tensors, T5_AXES))


# ------------------------------------------------------------------------------------------- models


def blank(kind: type[nn.Module], cfg, source: Source) -> nn.Module:
    """The model on the meta device. ValueError unless the source's tensors are exactly its own."""
    with torch.device("meta"):
        model = kind(cfg)
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    given = {key: list(value.shape) for key, value in source.tensors.items()}
    apart = [key for key in expected if given.get(key, expected[key]) != expected[key]]
    dtypes = {key: tensor.dtype for key, tensor in source.tensors.items()}
    wrong = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "misshapen": [f"{key} {given[key]}, not {expected[key]}" for key in apart],
        "quantised": [f"{key} {d}" for key, d in dtypes.items() if not d.is_floating_point],
    }

    # The first few of each kind are enough to see what happened.
    texts = [f"{len(keys)} {how} ({', '.join(keys[:3])})" for how, keys in wrong.items() if keys]
    if texts:
        where = f"{source.file} (complete? config.json right?)"
        raise ValueError(f"{where} has keys that don't fit {cfg}: {'; '.join(texts)}")
    return model


@contextmanager
def about(what: Path | str) -> Iterator[None]:
    """Put before a ValueError what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def put(target: Tensor, tensor: Tensor) -> None:
    """Copy, cast and move. ValueError for what is no weight: NaN, infinity, unscaled float8."""
    target.copy_(tensor)
    if not finite(target):
        raise ValueError("NaN or infinity among the weights; download or export them again")
    # Scales make the most of float8's range. Weights are far from it.
    if tensor.dtype.itemsize == 1 and target.abs().max() > torch.finfo(tensor.dtype).max / 2:
        raise ValueError(f"{tensor.dtype} whose scale is missing; take the original weights")


def fill(
    model: nn.Module, tensors: dict[str, Tensor], copy: Callable = put, file: str | Path = ""
) -> None:
    """copy(parameter, tensor) for every name, which casts and moves on the way.

    copy: `fsdp.copy_part`, say, which takes this process's shard of the tensor. file: for errors,
    unless a tensor has a `file` of its own.
    """
    targets = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def copy_named(name: str) -> None:
        with about(f"{getattr(tensors[name], 'file', file)}: {name}"):
            copy(targets[name], tensors[name])

    # Page faults limit a copy. torch's own threads, which share one tensor, wait for each other in
    # them; these have a tensor each.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(copy_named, targets))  # raises what a copy raised


def build(kind: type[nn.Module], cfg, source: Source, device: Device, dtype: torch.dtype):
    """The model filled from the source, for inference. Errors: see `blank`."""
    model = blank(kind, cfg, source).to(dtype).to_empty(device=device)
    fill(model, source.tensors, file=source.file)
    return model.eval()


def open_dit(path: str | Path, *, channels: int = 0) -> tuple[DiTConfig, dict[str, Tensor]]:
    """The sizes and tensors of a DiT, mapped.

    path: a release folder, its index, or a file of weights. channels: the latent channels needed;
    0: any. Sizes come from the metadata of an export, else a config.json beside the weights, and
    from the tensors themselves. ValueError for whatever is missing, damaged, of other sizes or in
    another layout.
    """
    source = open_tensors(path, *DIT_FILES)
    return check_dit(source, channels), source.tensors


def load_dit(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32, **options
) -> WanDiT:
    """The DiT of `open_dit`, in dtype on the device. options: channels, as there."""
    cfg, tensors = open_dit(path, **options)
    return build(WanDiT, cfg, Source(Path(path), tensors, {}), device, dtype)


def load_vae(path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> VAE22:
    """The Wan2.2 VAE of a release folder, or of the .pth or .safetensors file itself.

    Errors: see `open_dit`.
    """
    source = open_tensors(path, *VAE_FILES)
    return build(VAE22, vae_config(source), source, device, dtype)


def load_t5(
    path: str | Path, device: Device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> T5Encoder:
    """The umt5 encoder of a release folder, or of the .pth or .safetensors file itself.

    Errors: see `open_dit`.
    """
    source = open_tensors(path, *T5_FILES)
    return build(T5Encoder, t5_config(source), source, device, dtype)


# ------------------------------------------------------------------------------------------- export


def save_dit(
    model: WanDiT, path: str | Path, metadata: dict, *, dtype=None, value=None, overwrite=False
) -> None:
    """Write a model as safetensors under upstream's names.

    metadata: JSON values (levels, shift, chunk, prefix, stage, step); the config is added to it.
    dtype: torch.float32 or torch.bfloat16; by default the model's own. value: name -> Tensor, for
    what is not in the model (gathered shards, an average), called in the state dict's order.

    path is the old file or the whole new one, and the host holds one copy of the model, in dtype.
    ValueError if path exists, unless overwrite.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of an export must end in .safetensors")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass overwrite=True")
    dtype = dtype or model.patch_embedding.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"can't export as {dtype}; choose from torch.float32 and torch.bfloat16")

    metadata = metadata | {"config": asdict(model.cfg)}
    header = {key: json.dumps(entry) for key, entry in metadata.items()}
    state = model.state_dict()
    value = value or state.get
    tensors = {clean(name): value(name).to("cpu", dtype) for name in state}
    write_tensors(path, tensors, header)
