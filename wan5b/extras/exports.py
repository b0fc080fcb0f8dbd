"""Models -> files in the layouts of the original release, of diffusers and of ComfyUI.

What formats.py reads is written back by the same tables of names (layouts.py), the other way round,
tensor by tensor (tensor_files.py). The JSON files beside are peers.py's.

The header of a DiT's files holds, beside {"format": "pt"}, what `weights.save_dit` puts there: the
sizes, and the levels, shift, chunk, stage ... of an export. Others' loaders skip it; ours read it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import layouts, peers
from wan5b.extras.layouts import Kind
from wan5b.extras.tensor_files import (
    DTYPES,
    SHARD,
    Entry,
    new_folder,
    write_shards,
    write_stream,
    written_dtype,
)
from wan5b.t5 import T5Config
from wan5b.util import write_json, writing
from wan5b.vae22 import VAEConfig
from wan5b.weights import about, clean

Layout = Literal["original", "diffusers", "comfy"]
LAYOUTS = get_args(Layout)
STEM = "diffusion_pytorch_model"  # of the names that diffusers gives to files of weights
PT = {"format": "pt"}  # without it transformers refuses a file

# ------------------------------------------------------------------------------------------- models


class Model(NamedTuple):
    """A network to write, whatever it was read from."""

    kind: Kind
    cfg: DiTConfig | VAEConfig | T5Config
    entries: dict[str, Entry]  # by upstream's names

    @property
    def nbytes(self) -> int:
        """When written."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """In which most of its bytes are written."""
        sizes = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=sizes.get)

    def theirs(self) -> dict[str, Entry]:
        """The entries by the names of diffusers or transformers, which depend on how many blocks a
        stage of the VAE has.
        """
        blocks = self.cfg.num_res_blocks if self.kind == "vae" else 2
        rename = layouts.names(self.kind, back=True, num_res_blocks=blocks)
        renamed = {rename(name): entry for name, entry in self.entries.items()}
        assert None not in renamed, "a name that upstream hasn't"
        return renamed


def write_pickle(path: Path, model: Model) -> None:
    """A state dict of torch.save, as upstream has its VAE and its text encoder."""
    state = {}
    for name, entry in model.entries.items():
        with about(entry.label(name)):
            state[name] = entry.value().clone()  # mapped ones share one storage
    with writing(path), path.open("xb") as file:
        torch.save(state, file)  # of a path it would not say why it cannot write


# ------------------------------------------------------------------------------------------ layouts


def dit_header(cfg: DiTConfig, metadata: Mapping) -> dict[str, str]:
    """What every file of a DiT says of itself."""
    entries = {**metadata, "config": asdict(cfg)}
    return {key: json.dumps(entry) for key, entry in entries.items()} | PT


def write_dit(
    path: Path, model: Model, layout: Layout, metadata: Mapping, limit: int = SHARD
) -> None:
    """A DiT alone: a file for ComfyUI; else into a folder, which is there, with a config.json.

    metadata: JSON values for the header. limit: bytes of a shard.
    """
    header = dit_header(model.cfg, metadata)
    if layout == "comfy":
        write_stream(path, model.entries, header)
        return
    config = peers.original_config if layout == "original" else peers.dit_config
    write_json(path / "config.json", config(model.cfg))
    entries = model.entries if layout == "original" else model.theirs()
    write_shards(path, STEM, entries, header, limit)


class Release(NamedTuple):
    """A whole model to write."""

    dit: Model
    vae: Model
    t5: Model
    metadata: Mapping  # JSON values for the header of the DiT
    tokenizer: Mapping[str, bytes]  # its files by name, spiece.model among them
    scheduler: Mapping  # diffusers' scheduler_config.json
    pipeline: str = "WanPipeline"  # the class of it that diffusers is to make


def write_release(folder: Path, release: Release, layout: Layout, limit: int = SHARD) -> None:
    """All of it into a folder, which is there. limit: bytes of a shard."""
    write = {"original": _original, "diffusers": _diffusers, "comfy": _comfy}[layout]
    write(folder, release, limit)


def _original(folder: Path, release: Release, limit: int) -> None:
    """Under the names that upstream's code looks for, whatever dtype they speak of."""
    write_dit(folder, release.dit, "original", release.metadata, limit)
    write_pickle(folder / "Wan2.2_VAE.pth", release.vae)
    write_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", release.t5)
    _write_files(folder / "google" / "umt5-xxl", release.tokenizer)


def _diffusers(folder: Path, release: Release, limit: int) -> None:
    """A folder for each model, as `WanPipeline.save_pretrained` makes them."""
    for part in ("transformer", "vae", "text_encoder"):
        (folder / part).mkdir()
    write_json(folder / "model_index.json", peers.model_index(release.scheduler, release.pipeline))
    write_json(folder / "scheduler" / "scheduler_config.json", release.scheduler)
    write_dit(folder / "transformer", release.dit, "diffusers", release.metadata, limit)

    # As diffusers saves it, in one file; ours takes no other.
    vae = folder / "vae"
    write_json(vae / "config.json", peers.vae_config(release.vae.cfg))
    write_stream(vae / f"{STEM}.safetensors", release.vae.theirs(), PT)

    t5 = folder / "text_encoder"
    dtype = str(release.t5.dtype).removeprefix("torch.")
    write_json(t5 / "config.json", peers.t5_config(release.t5.cfg) | {"dtype": dtype})
    write_shards(t5, "model", release.t5.theirs(), PT, limit)

    said = json.dumps(peers.TOKENIZER, indent=2).encode()
    _write_files(folder / "tokenizer", {"tokenizer_config.json": said, **release.tokenizer})


def _comfy(folder: Path, release: Release, limit: int) -> None:
    """Single files, whatever the limit."""
    _, dtype = DTYPES[release.dit.dtype]
    path = folder / f"wan2.2_ti2v_5B_{dtype}.safetensors"
    write_dit(path, release.dit, "comfy", release.metadata)
    write_stream(folder / "wan2.2_vae.safetensors", release.vae.entries, PT)

    # ComfyUI finds the tokenizer among the tensors.
    spiece = bytearray(release.tokenizer["spiece.model"])
    pieces = Entry(torch.frombuffer(spiece, dtype=torch.uint8), torch.uint8)
    _, dtype = DTYPES[release.t5.dtype]
    entries = release.t5.theirs() | {"spiece_model": pieces}
    write_stream(folder / f"umt5_xxl_{dtype}.safetensors", entries, PT)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        with writing(folder / name):
            (folder / name).write_bytes(content)


def export_diffusers(model: WanDiT, folder: str | Path, metadata: Mapping) -> None:
    """A DiT as diffusers' `WanTransformer3DModel.from_pretrained(folder)` takes it, in its dtype.

    metadata: as of `weights.save_dit`, for the header. ValueError if the folder exists, and for
    weights that are not finite.
    """
    entries = {}
    for name, tensor in model.state_dict().items():
        entries[clean(name)] = Entry(tensor, written_dtype(tensor))
    with new_folder(folder) as partial:
        write_dit(partial, Model("dit", model.cfg, entries), "diffusers", metadata)
