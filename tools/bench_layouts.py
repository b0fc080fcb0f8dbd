"""Published checkpoints at their real sizes: what loading each into bfloat16 takes.

    python tools/bench_layouts.py [NAME ...]

The files have the real names, keys, shapes and dtypes, and are as long as the published ones, but
sparse: their tensors are zeros and take no disk. Each figure comes from a fresh process. Needs
16 GB of memory; all of them take four minutes on two cores.

"published" is the size in bytes that the file's page shows, where it is known; "private" is the
peak of the process's memory that no file backs, less what it had before, as a share of the bfloat16
model.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from bench_loading import PeakMemory, private_memory

from wan5b.extras import formats, layouts

GOLDEN = Path(__file__).parent.parent / "tests/golden"
MANIFESTS = {"dit": "ti2v-5B", "vae": "vae22", "t5": "umt5-xxl"}
# In the order in which safetensors puts tensors into a file.
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES |= {torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
SPIECE = 4548313  # bytes of umt5's SentencePiece model

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


def write_safetensors(path: Path, held: Shapes, **metadata: str) -> None:
    """A file of the real length and header, whose tensors are a hole."""
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
        file.truncate(8 + len(text) + end)


def write_shards(folder: Path, stem: str, held: Shapes, count: int) -> None:
    """Shards of about the same length, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in held.values())
    files = [{} for _ in range(count)]
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


def write_pickle(path: Path, held: Shapes, part: str = "", prefix: str = "") -> None:
    """A file of torch.save, whose storages are holes; perhaps inside a part, behind a prefix."""
    state = {}
    for name, (dtype, shape) in held.items():
        state[prefix + name] = torch.empty(shape, dtype=dtype)  # memory that nobody touches
    with torch.serialization.skip_data():
        torch.save({part: state} if part else state, path)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """A published checkpoint."""

    kind: str
    write: Callable[[Path], None]  # into an empty folder
    open: str  # what of the folder a user names
    published: int | None = None  # bytes of the file
    lora: str = ""


def t5_comfy(fp8: bool) -> Shapes:
    held = shapes("t5", F16, theirs=True)
    if fp8:
        held = scaled(held, mark=0, scale=[])
    return held | {"spiece_model": (torch.uint8, [SPIECE])}


def with_lora(folder: Path, name: str, rank: int, dtype: torch.dtype) -> None:
    write_safetensors(folder / "wan2.2_ti2v_5B_fp16.safetensors", shapes("dit", F16))
    write_safetensors(folder / name, lora_shapes(rank, dtype))


SHARDED = "diffusion_pytorch_model"
COMFY = "wan2.2_ti2v_5B_fp16.safetensors"
KIJAI = "Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors"
TURBO_LORA = "Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors"
FASTWAN_LORA = "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"
KIJAI_VAE = "Wan2_2_VAE_bf16.safetensors"
COMFY_T5 = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
KIJAI_T5 = "umt5-xxl-enc-fp8_e4m3fn.safetensors"

CASES = {
    "release": Case("dit", lambda f: write_shards(f, SHARDED, shapes("dit", F32), 3), ""),
    "diffusers": Case(
        "dit",
        lambda f: write_shards(f / "transformer", SHARDED, shapes("dit", F32, True), 5),
        "",
    ),
    "fastwan": Case(
        "dit",
        lambda f: write_shards(f / "transformer", SHARDED, shapes("dit", BF16, True), 1),
        "transformer",
    ),
    "comfy-fp16": Case(
        "dit", lambda f: write_safetensors(f / COMFY, shapes("dit", F16)), COMFY, 9_999_658_848
    ),
    "kijai-fp8-scaled": Case(
        "dit",
        lambda f: write_safetensors(f / KIJAI, scaled(shapes("dit", F32), mark=2, scale=[1])),
        KIJAI,
        5_277_255_650,
    ),
    "longlive2": Case(
        "dit",
        lambda f: write_pickle(f / "model_bf16.pt", shapes("dit", BF16), "generator", "model."),
        "model_bf16.pt",
    ),
    "turbo": Case("dit", lambda f: write_pickle(f / "model.pt", shapes("dit", F32)), "model.pt"),
    "comfy+turbo-lora": Case(
        "dit", lambda f: with_lora(f, TURBO_LORA, 64, F16), COMFY, 332_348_584, TURBO_LORA
    ),
    "comfy+fastwan-lora": Case(
        "dit", lambda f: with_lora(f, FASTWAN_LORA, 128, BF16), COMFY, 660_874_456, FASTWAN_LORA
    ),
    "vae": Case(
        "vae", lambda f: write_pickle(f / "Wan2.2_VAE.pth", shapes("vae", F32)), "Wan2.2_VAE.pth"
    ),
    "vae-kijai": Case(
        "vae",
        lambda f: write_safetensors(f / KIJAI_VAE, shapes("vae", BF16)),
        KIJAI_VAE,
        1_409_401_152,
    ),
    "t5": Case(
        "t5",
        lambda f: write_pickle(f / "models_t5_umt5-xxl-enc-bf16.pth", shapes("t5", BF16)),
        "",
    ),
    "t5-diffusers": Case(
        "t5",
        lambda f: write_shards(f / "text_encoder", "model", shapes("t5", BF16, True), 3),
        "",
    ),
    "t5-comfy-fp8-scaled": Case(
        "t5", lambda f: write_safetensors(f / COMFY_T5, t5_comfy(True)), COMFY_T5, 6_735_906_897
    ),
    "t5-kijai-fp8": Case(
        "t5",
        lambda f: write_safetensors(f / KIJAI_T5, plain(shapes("t5", BF16)), format="pt"),
        KIJAI_T5,
        6_731_333_792,
    ),
}


# --------------------------------------------------------------------------------------------- main


LOADERS = {"dit": formats.load_dit, "vae": formats.load_vae, "t5": formats.load_t5}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Seconds, and private bytes before and at the peak, of loading in this process."""
    case = CASES[name]
    options = {"loras": [(folder / case.lora, 1.0)]} if case.lora else {}
    before = private_memory()
    with PeakMemory() as peak:
        start = time.perf_counter()
        model = LOADERS[case.kind](folder / case.open, dtype=torch.bfloat16, **options)
        seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "before": before, "peak": peak.bytes, "model": size}


def bytes_of(folder: Path, case: Case) -> int:
    """Of the file that is published, or of all files."""
    named = folder / (case.lora or case.open)
    files = [named] if named.is_file() else [*folder.rglob("*.safetensors"), *folder.glob("*.pth")]
    return sum(file.stat().st_size for file in files)


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    own = "one measurement in this process, as JSON: the benchmark calls itself so"
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=own)
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]}; choose from {', '.join(CASES)}")
    if args.measure:
        name, folder = args.measure
        print(json.dumps(measure(name, Path(folder))))
        return

    print(f"{'':22}{'bytes':>15}{'published':>15}{'model GB':>10}{'private':>9}{'seconds':>9}")
    for name in args.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            CASES[name].write(Path(folder))
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            run = json.loads(done.stdout)
            size = bytes_of(Path(folder), CASES[name])
        published = CASES[name].published or "?"
        private = (run["peak"] - run["before"]) / run["model"]
        line = f"{name:22}{size:>15}{published:>15}{run['model'] / 1e9:>10.2f}"
        print(f"{line}{private:>9.3f}{run['seconds']:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
