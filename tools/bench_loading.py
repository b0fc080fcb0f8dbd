"""Private memory and time of loading a float32 release of 4 GB (3 shards, page cache warm) into a bfloat16 DiT.

    python tools/bench_loading.py

Needs 4 GB of disk in the temporary folder and 8 GB of memory, and takes two minutes. Each figure comes from a fresh
process, the best of three. "stream": the files through one 16 MB buffer, the least that reading can cost. "into
memory": the files into memory that is new to the process, as any loader must have it.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from release import write_dit  # noqa: E402

from wan5b.dit import DiTConfig  # noqa: E402
from wan5b.weights import load_dit  # noqa: E402

CONFIG = DiTConfig(1536, 8960, 12, 21)  # 1.01 billion parameters


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("RssAnon:") + 1])


def peak_memory(stop: threading.Event, result: list[int]) -> None:
    while not stop.wait(0.002):
        result[0] = max(result[0], private_memory())


def stream(folder: Path) -> None:
    buffer = bytearray(16 << 20)
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def into_memory(folder: Path) -> list[bytes]:
    return [shard.read_bytes() for shard in folder.glob("*.safetensors")]


def load(folder: Path):
    return load_dit(folder, dtype=torch.bfloat16)


WAYS = {"stream": stream, "into memory": into_memory, "load_dit": load}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds, and private bytes before and at the peak, of one way in this process."""
    stop, peak = threading.Event(), [0]
    sampler = threading.Thread(target=peak_memory, args=(stop, peak))
    before = private_memory()
    sampler.start()
    start = time.perf_counter()
    kept = WAYS[way](folder)
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    model = sum(p.nbytes for p in kept.parameters()) if way == "load_dit" else 0
    return {
        "seconds": seconds,
        "before": before,
        "peak": max(peak[0], private_memory()),
        "model": model,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_dit(Path(folder), CONFIG, shards=3)
        size = sum(shard.stat().st_size for shard in Path(folder).glob("*.safetensors"))
        runs = {way: [] for way in WAYS}
        for _ in range(3):
            for way in WAYS:
                command = [sys.executable, __file__, way, folder]
                runs[way].append(
                    json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                )
    best = {way: min(run["seconds"] for run in runs[way]) for way in WAYS}
    peak, before = (max(run[key] for run in runs["load_dit"]) for key in ("peak", "before"))
    model = runs["load_dit"][0]["model"]
    print(
        f"release {size / 1e9:.2f} GB float32, model {model / 1e9:.2f} GB bfloat16, {torch.get_num_threads()} threads"
    )
    print(
        f"private memory at the peak {peak / 1e9:.2f} GB, {peak / model:.3f} of the model (bar 1.15)"
    )
    print(
        f"  of which before loading {before / 1e9:.2f} GB; without it {(peak - before) / model:.3f}"
    )
    for way in WAYS:
        print(
            f"{way:12} {best[way]:6.2f} s; load_dit takes {best['load_dit'] / best[way]:.2f} of it (bar 1.3)"
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        main()
