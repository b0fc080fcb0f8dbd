"""What loading each published checkpoint into bfloat16 takes, at its real size.

    python tools/bench_layouts.py [NAME ...]

The files are those of real_size.py. Each figure comes from a fresh process. Needs 16 GB of memory;
all of them take ten minutes on two cores.

"private" is the peak of the process's memory that no file backs, less what it had before, as a
share of the bfloat16 model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import real_size
from bench_loading import PeakMemory, private_memory

from wan5b.extras import formats


class Case(NamedTuple):
    """A model to load."""

    kind: str  # "dit", "vae" or "t5": one of LOADERS
    folder: str  # one of real_size.FOLDERS
    file: str = ""  # in the folder; "": the user names the folder itself
    lora: str = ""  # a file in the folder that is merged while loading, or none


KIJAI = real_size.KIJAI
CASES = {
    "release": Case("dit", "Wan2.2-TI2V-5B"),
    "diffusers": Case("dit", "Wan2.2-TI2V-5B-Diffusers"),
    "FastWan": Case("dit", "FastWan2.2-TI2V-5B-FullAttn-Diffusers"),
    "ComfyUI fp16": Case("dit", "ComfyUI", real_size.COMFY),
    "Kijai fp8 scaled": Case("dit", "Kijai", KIJAI),
    "LongLive 2": Case("dit", "LongLive-2.0-5B", "model_bf16.pt"),
    "Turbo": Case("dit", "Wan2.2-TI2V-5B-Turbo", "model.pt"),
    "fp8 and Turbo LoRA": Case("dit", "Kijai", KIJAI, real_size.TURBO_LORA),
    "fp8 and FastWan LoRA": Case("dit", "Kijai", KIJAI, real_size.FASTWAN_LORA),
    "VAE": Case("vae", "Wan2.2-TI2V-5B"),
    "VAE, diffusers": Case("vae", "Wan2.2-TI2V-5B-Diffusers"),
    "VAE, ComfyUI": Case("vae", "ComfyUI", real_size.COMFY_VAE),
    "VAE, Kijai": Case("vae", "Kijai", real_size.KIJAI_VAE),
    "T5": Case("t5", "Wan2.2-TI2V-5B"),
    "T5, diffusers": Case("t5", "Wan2.2-TI2V-5B-Diffusers"),
    "T5, ComfyUI fp8": Case("t5", "ComfyUI", real_size.COMFY_T5),
    "T5, Kijai fp8": Case("t5", "Kijai", real_size.KIJAI_T5),
}
LOADERS = {"dit": formats.load_dit, "vae": formats.load_vae, "t5": formats.load_t5}


def measure(case: Case, folder: Path) -> dict[str, float]:
    """What loading takes in this process: "seconds"; bytes of private memory "before" it and at its
    "peak"; bytes of the "model". folder: which `real_size` has filled.
    """
    options = {"loras": [(folder / case.lora, 1.0)]} if case.lora else {}
    before = private_memory()
    with PeakMemory() as peak:
        start = time.perf_counter()
        model = LOADERS[case.kind](folder / case.file, dtype=torch.bfloat16, **options)
        seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "before": before, "peak": peak.bytes, "model": size}


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    own = "one measurement in this process, as JSON: the benchmark calls itself so"
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=own)
    args = parser.parse_args(argv)

    # One case, in this process, for the call that started it.
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; choose from {', '.join(CASES)}")
    if args.measure:
        name, folder = args.measure
        print(json.dumps(measure(CASES[name], Path(folder))))
        return

    # Each case in a process of its own, on files that are gone afterwards.
    print(f"{'':22}{'model GB':>10}{'private':>9}{'seconds':>9}")
    for name in args.names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, CASES[name].folder)
            made.mkdir()
            real_size.FOLDERS[made.name](made)
            command = [sys.executable, __file__, "--measure", name, made]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            run = json.loads(done.stdout)
        private = (run["peak"] - run["before"]) / run["model"]
        figures = f"{run['model'] / 1e9:>10.2f}{private:>9.3f}{run['seconds']:>9.1f}"
        print(f"{name:22}{figures}", flush=True)


if __name__ == "__main__":
    main()
