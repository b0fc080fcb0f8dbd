"""Published checkpoints as sparse files: real names, keys, shapes, dtypes and lengths, no content.

    python tools/real_size.py FOLDER

writes, in seconds and on next to no disk, what is published around the 5B, in folders named as
people have them. Every tensor is zeros, so all of it loads, and samples to a picture of one colour:
whatever is to be said of names, sizes, time and memory can be tried with it. The tokenizers are
those of the tests.
"""

import argparse
import json
import shutil
import struct
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b.dit import DiTConfig
from wan5b.extras import layouts, peers
from wan5b.t5 import T5Config
from wan5b.util import write_json
from wan5b.vae22 import VAEConfig

GOLDEN = Path(__file__).parent.parent / "tests/golden"
MANIFESTS = {"dit": "ti2v-5B", "vae": "vae22", "t5": "umt5-xxl"}
# What safetensors calls dtypes; their order is that in which it puts tensors into a file.
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
SPIECE = GOLDEN / "tokenizer" / "spiece.model"
SPIECE_BYTES = 4548313  # of umt5's own SentencePiece model

Shapes = dict[str, tuple[torch.dtype, list[int]]]  # of a file's tensors


def shapes(kind: str, dtype: torch.dtype, theirs: bool = False) -> Shapes:
    """All tensors of a model in one dtype, under upstream's names or diffusers' (transformers')."""
    manifest = json.loads((GOLDEN / f"manifest_{MANIFESTS[kind]}.json").read_text())
    named = layouts.names(kind, back=True) if theirs else str
    return {named(name): (dtype, shape) for name, shape in manifest.items()}


def is_linear(name: str, shape: list[int]) -> bool:
    """The matrices of blocks, which quantised files hold in float8; embeddings are not among them.

    Of the text encoder, the tables of relative positions are none either.
    """
    in_block = name.startswith(("blocks.", "encoder.block."))
    return in_block and len(shape) == 2 and "relative" not in name and "pos_emb" not in name


def scaled(held: Shapes, mark: int, scale: list[int]) -> Shapes:
    """ComfyUI's scaled float8: matrices of blocks with a scale each, and the mark of the format."""
    made = {"scaled_fp8": (torch.float8_e4m3fn, [mark])}
    for name, (dtype, shape) in held.items():
        if is_linear(name, shape):
            made[name] = (torch.float8_e4m3fn, shape)
            made[name.replace(".weight", ".scale_weight")] = (torch.float32, scale)
        else:
            made[name] = (dtype, shape)
    return made


def plain(held: Shapes) -> Shapes:
    """Kijai's plain float8 of the text encoder: its matrices, without scales."""
    made = {}
    for name, (dtype, shape) in held.items():
        made[name] = (torch.float8_e4m3fn if is_linear(name, shape) else dtype, shape)
    return made


def lora_shapes(rank: int, dtype: torch.dtype) -> Shapes:
    """Kijai's LoRAs of the 5B: every linear layer, and differences of biases and norms."""
    made = {}
    for name, (_, shape) in shapes("dit", dtype).items():
        layer = f"diffusion_model.{name.rpartition('.')[0]}"
        if name.endswith(".bias"):
            made[f"{layer}.diff_b"] = (dtype, shape)
        elif len(shape) == 2:
            made[f"{layer}.lora_down.weight"] = (dtype, [rank, shape[1]])
            made[f"{layer}.lora_up.weight"] = (dtype, [shape[0], rank])
        elif "norm" in name:
            made[f"{layer}.diff"] = (dtype, shape)
    return made


# -------------------------------------------------------------------------------------------- files


def write_safetensors(
    path: Path, held: Shapes, metadata: dict[str, str] | None = None, **content: bytes
) -> None:
    """A file of the real length and header, whose tensors are a hole but for what has content.

    metadata: of the header. content: bytes of tensors, by name.
    """
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    order = list(NAMES)
    for name in sorted(held, key=lambda name: (order.index(held[name][0]), name)):
        dtype, shape = held[name]
        start = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, written in content.items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(written)
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, stem: str, held: Shapes, count: int) -> None:
    """`count` shards of about the same length, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in held.values())
    files = [{} for _ in range(count)]

    # A tensor goes to the shard in whose share of all bytes it begins.
    done = 0
    for name, (dtype, shape) in held.items():
        files[min(done * count // total, count - 1)][name] = (dtype, shape)
        done += torch.Size(shape).numel() * dtype.itemsize

    index = {}
    for i, part in enumerate(files, 1):
        name = f"{stem}-{i:05d}-of-{count:05d}.safetensors"
        write_safetensors(folder / name, part)
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / f"{stem}.safetensors.index.json").write_text(text)


def write_pickle(path: Path, held: dict) -> None:
    """A file of torch.save, whose storages are holes.

    held: Shapes, or a dict of these and of texts.
    """

    def filled(entry):
        if isinstance(entry, dict):
            return {key: filled(inner) for key, inner in entry.items()}
        if isinstance(entry, tuple):
            dtype, shape = entry
            return torch.empty(shape, dtype=dtype)  # memory that nobody touches
        return entry

    with torch.serialization.skip_data():
        torch.save(filled(held), path)


# ------------------------------------------------------------------------------------------ folders

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIT = "diffusion_pytorch_model"
COMFY = "wan2.2_ti2v_5B_fp16.safetensors"
COMFY_VAE = "wan2.2_vae.safetensors"
COMFY_T5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
KIJAI = "Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors"
KIJAI_VAE = "Wan2_2_VAE_bf16.safetensors"
KIJAI_T5 = "umt5-xxl-enc-fp8_e4m3fn.safetensors"
TURBO = "Wan2_2-TI2V-5B-Turbo_fp16.safetensors"
TURBO_LORA = "Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors"
FASTWAN_LORA = "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"

# Lengths in bytes, of the files whose pages on the hub show them.
PUBLISHED = {
    COMFY: 9_999_658_848,
    COMFY_VAE: 1_409_400_960,
    COMFY_T5: 6_735_906_897,
    KIJAI: 5_277_255_650,
    KIJAI_VAE: 1_409_401_152,
    KIJAI_T5: 6_731_333_792,
    TURBO_LORA: 332_348_584,
    FASTWAN_LORA: 660_874_456,
}


def original(folder: Path) -> None:
    """Wan-AI/Wan2.2-TI2V-5B"""
    write_shards(folder, DIT, shapes("dit", F32), 3)
    write_json(folder / "config.json", peers.original_config(DiTConfig()))
    write_pickle(folder / "Wan2.2_VAE.pth", shapes("vae", F32))
    write_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", shapes("t5", BF16))
    copy_tokenizer(folder / "google" / "umt5-xxl")


def diffusers(folder: Path, dtype: torch.dtype, shards: int, pipeline: str) -> None:
    """Wan-AI/Wan2.2-TI2V-5B-Diffusers, FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers"""
    write_json(folder / "model_index.json", peers.model_index(peers.SCHEDULER, pipeline))
    write_json(folder / "scheduler" / "scheduler_config.json", peers.SCHEDULER)

    dit = folder / "transformer"
    write_json(dit / "config.json", peers.dit_config(DiTConfig()))
    if shards > 1:
        write_shards(dit, DIT, shapes("dit", dtype, theirs=True), shards)
    else:
        write_safetensors(dit / f"{DIT}.safetensors", shapes("dit", dtype, theirs=True))
    write_json(folder / "vae" / "config.json", peers.vae_config(VAEConfig()))
    write_safetensors(folder / "vae" / f"{DIT}.safetensors", shapes("vae", F32, theirs=True))
    write_json(folder / "text_encoder" / "config.json", peers.t5_config(T5Config()))
    write_shards(folder / "text_encoder", "model", shapes("t5", BF16, theirs=True), 3)
    copy_tokenizer(folder / "tokenizer")


def comfy(folder: Path) -> None:
    """Comfy-Org/Wan_2.2_ComfyUI_Repackaged, the files of the 5B"""
    write_safetensors(folder / COMFY, shapes("dit", F16))
    write_safetensors(folder / COMFY_VAE, shapes("vae", F16))
    t5 = scaled(shapes("t5", F16, theirs=True), mark=0, scale=[])
    t5["spiece_model"] = (torch.uint8, [SPIECE_BYTES])
    write_safetensors(folder / COMFY_T5, t5, spiece_model=long_spiece())


def long_spiece() -> bytes:
    """The tests' SentencePiece model, and the head of an unknown field that fills the real length.

    Protocol buffers skip such fields: number 1000, of bytes, whose count is a varint of 4 bytes.
    """
    model = SPIECE.read_bytes()
    tag = bytes([0xC2, 0x3E])  # 1000 << 3 | 2
    count = SPIECE_BYTES - len(model) - len(tag) - 4
    varint = bytes((count >> 7 * i & 0x7F) | (0x80 if i < 3 else 0) for i in range(4))
    return model + tag + varint


def kijai(folder: Path) -> None:
    """Kijai/WanVideo_comfy and WanVideo_comfy_fp8_scaled, the files of the 5B, LoRAs among them"""
    write_safetensors(folder / KIJAI, scaled(shapes("dit", F32), mark=2, scale=[1]))
    write_safetensors(folder / KIJAI_VAE, shapes("vae", BF16))
    write_safetensors(folder / KIJAI_T5, plain(shapes("t5", BF16)), {"format": "pt"})
    write_safetensors(folder / TURBO, shapes("dit", F16))
    write_safetensors(folder / TURBO_LORA, lora_shapes(64, F16))
    write_safetensors(folder / FASTWAN_LORA, lora_shapes(128, BF16))


def longlive(folder: Path) -> None:
    """Efficient-Large-Model/LongLive-2.0-5B"""
    said = {"checkpoint_format": "longlive_generator_merged_lora", "dtype": "bfloat16"}
    state = {f"model.{name}": held for name, held in shapes("dit", BF16).items()}
    write_pickle(folder / "model_bf16.pt", {"generator": state, **said})


def turbo(folder: Path) -> None:
    """quanhaol/Wan2.2-TI2V-5B-Turbo"""
    write_pickle(folder / "model.pt", shapes("dit", F32))


def copy_tokenizer(folder: Path) -> None:
    """The tests' SentencePiece model into a new folder."""
    folder.mkdir(parents=True)
    shutil.copy(SPIECE, folder)


FOLDERS = {
    "Wan2.2-TI2V-5B": original,
    "Wan2.2-TI2V-5B-Diffusers": lambda to: diffusers(to, F32, 5, "WanPipeline"),
    "FastWan2.2-TI2V-5B-FullAttn-Diffusers": lambda to: diffusers(to, BF16, 1, "WanDMDPipeline"),
    "ComfyUI": comfy,
    "Kijai": kijai,
    "LongLive-2.0-5B": longlive,
    "Wan2.2-TI2V-5B-Turbo": turbo,
}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new one")
    folder = parser.parse_args(argv).folder
    for name, write in FOLDERS.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            size = file.stat().st_size
            published = PUBLISHED.get(file.name)
            apart = f"  {size - published:+} of the published" if published else ""
            print(f"{size:>15,}  {file.relative_to(folder)}{apart}")


if __name__ == "__main__":
    main()
