"""A checkpoint of any layout -> the original release's, diffusers' or ComfyUI's.

    python tools/convert.py Wan2.2-TI2V-5B out/diffusers --layout diffusers
    python tools/convert.py Wan2.2-TI2V-5B-Diffusers out/release --layout original
    python tools/convert.py runs/dmd/final.safetensors out/transformer --layout diffusers
    python tools/convert.py model.safetensors out/merged.safetensors --layout comfy \\
        --lora style.safetensors turbo.safetensors:0.8 --dtype float16

SOURCE is whatever sample.py takes: a release or pipeline folder, a file of weights, an index of
shards, a trainer's .pt, an export or a checkpoint folder of train.py. A folder with a VAE and a
text encoder is converted whole, with its tokenizer; of everything else the DiT alone. (Of a
spiece.model alone, as ComfyUI has it, transformers makes a tokenizer if protobuf is there.)

TARGET must not exist. It becomes

    layout     a whole model                                  a DiT alone
    original   a release folder: the DiT, Wan2.2_VAE.pth,     a folder: weights and config.json
               models_t5_*.pth, google/umt5-xxl/
    diffusers  a folder for WanPipeline.from_pretrained       a folder for WanTransformer3DModel
    comfy      a folder of three single files                 a file, TARGET.safetensors

An adapter that train.py leaves (runs/dmd/dmd-lora) stays one: with --layout comfy it becomes
TARGET.safetensors, which ComfyUI and diffusers' load_lora_weights take.

The DiT (and diffusers' text encoder) above --shard-size goes into shards and their index.

Numbers stay as they are: every tensor is written in its own dtype, but float8 as bfloat16, with its
scale multiplied in. --dtype is for the DiT alone; the VAE loses in 16 bits, and the text encoder
has them. LoRAs are merged in float32 and rounded once. Weights that are not finite, or not in
float16, end the call.

What an export, or an adapter of train.py, says of itself (levels, shift, chunk, stage ...) stays in
the header of the DiT, in every layout, beside the names of merged LoRAs. So does the recipe of
sample.py that the source calls for (FastWan's by its pipeline's class, LongLive's by its
checkpoint_format), which nothing else keeps; --recipe says it where the source does not, and where
LoRAs make another one of it. Of a trainer's .pt the entry is converted that the recipe samples.
This project reads the header again; other programs skip it.

The host holds one tensor at a time, but for upstream's .pth files (the text encoder: 11 GB) and
checkpoint folders of train.py, which are held whole. TARGET appears when all of it is on the disk;
until then it is a .partial beside, which a killed run leaves behind.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b import weights
from wan5b.extras import adapters, exports, formats, layouts, peers, recipes
from wan5b.extras.adapters import said_by
from wan5b.extras.cli import script
from wan5b.extras.disk import check_room
from wan5b.extras.exports import Model, Release
from wan5b.extras.formats import Loras
from wan5b.extras.layouts import Kind
from wan5b.extras.lora import HEADER, merged, parse_lora
from wan5b.extras.refusals import refuse_sizes
from wan5b.extras.scaled import Made
from wan5b.extras.tensor_files import GB, Entry, new_folder, write_stream, written_dtype
from wan5b.t5 import T5Encoder
from wan5b.util import read_json, replacing
from wan5b.vae22 import VAE22


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path)
    add("target", metavar="TARGET", type=Path)
    add("--layout", required=True, choices=exports.LAYOUTS)
    text = "LoRAs to merge into the DiT, of any layout; FILE:0.8 for another strength"
    add("--lora", default=[], nargs="+", metavar="FILE[:STRENGTH]", help=text)
    text = "how the result is sampled, if SOURCE does not say so or LoRAs change it"
    add("--recipe", choices=recipes.known(), help=text)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the DiT (default: each tensor's own)")
    add("--shard-size", type=float, default=10, metavar="GB", help="10^9 bytes; default 10")
    args = parser.parse_args(argv)
    if not 0 < args.shard_size < 1e6:
        raise ValueError(f"--shard-size {args.shard_size} is no size in GB; give 10, say")
    return args


# ------------------------------------------------------------------------------------------ reading


def is_whole(source: Path) -> bool:
    """Whether a folder holds a VAE and a text encoder too, beside the DiT.

    ValueError if it holds only one of the two.
    """
    if not source.is_dir() or formats.is_checkpoint(source):
        return False
    found = []
    for kind in ("vae", "t5"):
        if formats.candidates(source, kind) or (source / formats.PIPELINE[kind]).is_dir():
            found.append(kind)
    if len(found) == 1:
        has, lacks = ("VAE", "text encoder") if found == ["vae"] else ("text encoder", "VAE")
        way_out = "add it, or name the file of the DiT to convert that alone"
        raise ValueError(f"{source} holds a {has} but no {lacks}; {way_out}")
    return len(found) == 2


def entries(
    base: Mapping[str, Tensor | Made], tensors: Mapping[str, Tensor | Made], dtype: str | None
) -> dict[str, Entry]:
    """What is to be written, by the same names.

    dtype: name of the dtype for all of them. None: each as the base's tensor of its name is kept
    (`tensors` have LoRAs merged in, which are float32 until they are written).
    """
    own = {name: written_dtype(tensor) for name, tensor in base.items()}
    asked = getattr(torch, dtype) if dtype else None
    return {name: Entry(tensor, asked or own[name]) for name, tensor in tensors.items()}


def open_dit(source: Path, loras: Loras, dtype: str | None, part: str = "") -> Model:
    """The DiT, strictly, as `formats.open_dit` does."""
    opened = formats.open_layout(source, "dit", part=part)
    refuse_sizes(opened.file, opened.tensors)
    cfg = weights.check_dit(opened)
    tensors = merged(opened.tensors, loras)
    return Model("dit", cfg, entries(opened.tensors, tensors, dtype))


def open_part(source: Path, kind: Kind) -> Model:
    """The VAE or the text encoder, strictly, as `formats.load_vae` and `load_t5` do. ValueError for
    the tiny world's codec, which only this project has.
    """
    opened = formats.open_layout(source, kind)
    if "basis" in opened.tensors:
        way_out = "name the file of the DiT to convert that alone"
        raise ValueError(f"{opened.file} is a linear codec, which other layouts lack; {way_out}")
    cfg = formats.vae_config(opened) if kind == "vae" else formats.t5_config(opened)
    weights.blank(VAE22 if kind == "vae" else T5Encoder, cfg, opened)  # checks names and shapes
    return Model(kind, cfg, entries(opened.tensors, opened.tensors, None))


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """The tokenizer's files by name. ValueError if there is no SentencePiece model."""
    formats.load_tokenizer(source)  # checks that there is one, and that it is whole
    for folder in (source / "google" / "umt5-xxl", source / "tokenizer"):
        if (folder / "spiece.model").exists():
            files = [file for file in sorted(folder.glob("[!.]*")) if file.is_file()]
            return {file.name: file.read_bytes() for file in files}

    # ComfyUI's lies among the tensors of the text encoder.
    file = formats.locate(source, "t5")
    return {"spiece.model": layouts.tokenizer_bytes(weights.open_tensors(file).tensors)}


def open_release(source: Path, dit: Model, metadata: Mapping) -> Release:
    """The whole folder, around a DiT that is open already; with its own scheduler, if any."""
    scheduler = peers.SCHEDULER | {"flow_shift": metadata.get("shift", 5.0)}
    beside = source / "scheduler" / "scheduler_config.json"
    if beside.exists():
        scheduler = read_json(beside)
    vae = open_part(source, "vae")
    t5 = open_part(source, "t5")
    classes = {recipe: name for name, recipe in recipes.PIPELINES.items()}
    pipeline = classes.get(metadata.get("recipe"), "WanPipeline")
    return Release(dit, vae, t5, metadata, tokenizer_files(source), scheduler, pipeline)


def sampled_as(source: Path, named: str | None, loras: Loras, metadata: Mapping) -> str:
    """The recipe that the result is sampled by, as far as it is known and published; else "".

    named: by --recipe. metadata: of the source.
    """
    if named:
        return named
    # As sample.py takes it: a whole model as --release, else as --weights.
    given = (str(source), None) if is_whole(source) else (None, str(source))
    found = recipes.recognise(*given, dict(metadata))
    name = found.name if found and found.name in recipes.known() else ""
    for path in [*([] if found else [source]), *(path for path, _ in loras)]:
        other = recipes.looks_like(path)
        if other not in ("", "wan22", name):
            say = f"if it makes these weights {other}, add --recipe {other}"
            print(f"note: by its name {path} is {other}'s: {say}", file=sys.stderr)
            return ""
    return name


# ----------------------------------------------------------------------------------------- adapters


def adapter_file(source: Path) -> Path | None:
    """The file of an adapter that train.py left, its folder's or the file itself; else None."""
    file = source / adapters.FILE if source.is_dir() else source
    if not file.is_file() or file.suffix != ".safetensors":
        return None
    return file if said_by(file).get("training", {}).get("lora") and is_lora(file) else None


def is_lora(file: Path) -> bool:
    return any(name.endswith(adapters.DOWN) for name in weights.open_tensors(file).tensors)


def write_adapter(file: Path, args: argparse.Namespace) -> None:
    """An adapter of train.py as ComfyUI's files have it: a layer's alpha beside its matrices."""
    alone = args.layout == "comfy" and not (args.lora or args.recipe)
    if not alone or args.target.suffix != ".safetensors":
        way_out = "give --layout comfy and a TARGET.safetensors, and nothing to merge"
        raise ValueError(f"{args.source} is an adapter, which stays one: {way_out}")
    source = weights.open_tensors(file)
    training = source.metadata["training"]
    alpha = torch.tensor(float(training.get("lora_alpha") or training["lora"]))
    asked = getattr(torch, args.dtype or "float32")
    found = {}
    layers = 0
    for name, tensor in source.tensors.items():
        name = f"diffusion_model.{name.removeprefix(adapters.PREFIX)}"
        found[name] = Entry(tensor, asked)
        if name.endswith(adapters.DOWN):
            layers += 1
            found[name.replace(adapters.DOWN, "alpha")] = Entry(alpha, torch.float32)
    said = {key: json.dumps(entry) for key, entry in source.metadata.items() if key != HEADER}
    with replacing(args.target) as partial:
        write_stream(partial, found, said | exports.PT)
    print(f"{args.target}: an adapter of {layers} layers, alpha {alpha:g}")


# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    source, target = args.source, args.target
    if target.exists():
        raise ValueError(f"{target} exists; choose another name")

    adapter = adapter_file(source)
    if adapter:
        write_adapter(adapter, args)
        return

    # What there is to write: nothing is read yet.
    loras = [parse_lora(text) for text in args.lora]
    dit = open_dit(source, loras, args.dtype)
    metadata = formats.read_metadata(source)
    for path, _ in loras:
        metadata = said_by(path) or metadata  # of a run with lora
        adapters.note_base(path, source)
    recipe = sampled_as(source, args.recipe, loras, metadata)
    metadata.pop("recipe", None)
    if recipe:
        metadata["recipe"] = recipe
        part = recipes.sampled_part(recipes.load(recipe), str(source))
        dit = open_dit(source, loras, args.dtype, part) if part else dit
    if loras:
        metadata["loras"] = [[Path(path).name, strength] for path, strength in loras]
    release = open_release(source, dit, metadata) if is_whole(source) else None
    models = [release.dit, release.vae, release.t5] if release else [dit]
    check_room(target, sum(model.nbytes for model in models))

    # A file or a folder that is whole or not there.
    single = args.layout == "comfy" and not release
    if single and target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name of a file must end in .safetensors")
    opening = replacing(target) if single else new_folder(target)
    limit = int(args.shard_size * GB)
    with opening as partial:
        if release:
            exports.write_release(partial, release, args.layout, limit)
        else:
            exports.write_dit(partial, dit, args.layout, metadata, limit)

    for model in models:
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{model.kind:4}{len(model.entries):5} tensors{model.nbytes / GB:8.2f} GB, {dtype}")
    print(f"{target}, in the {args.layout} layout")
    if metadata:
        print(f"{', '.join(metadata)}: in the DiT's header, which only this project reads")


if __name__ == "__main__":
    script(main)
