"""Private memory and time of loading a float32 release of 4 GB into a bfloat16 DiT.

    python tools/bench_loading.py

The release has 3 shards, and the page cache is warm. Needs 4 GB of disk in the temporary folder and
8 GB of memory, and takes two minutes. Each figure comes from a fresh process, the best of three.

"stream": the files through one 16 MB buffer, the least that reading can cost. "into memory": the
files into memory that is new to the process, as any loader must have it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from release import write_dit

from wan5b.dit import DiTConfig, WanDiT
from wan5b.weights import load_dit

CONFIG = DiTConfig(1536, 8960, 12, 21)  # 1.01 billion parameters

# ------------------------------------------------------------------------------------------- memory


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index("RssAnon:") + 1])


class PeakMemory:
    """The most private memory that this process has inside a block: `with PeakMemory() as peak`.

    peak.bytes: so far; asked for every 2 ms by a thread.
    """

    def __init__(self):
        self.bytes = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.bytes = max(self.bytes, private_memory())

    def __enter__(self) -> "PeakMemory":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        self.bytes = max(self.bytes, private_memory())


# ------------------------------------------------------------------------------------ ways to read


def stream(folder: Path) -> None:
    buffer = bytearray(16 << 20)
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def into_memory(folder: Path) -> list[bytes]:
    return [shard.read_bytes() for shard in folder.glob("*.safetensors")]


def load(folder: Path) -> WanDiT:
    return load_dit(folder, dtype=torch.bfloat16)


WAYS = {"stream": stream, "into memory": into_memory, "load_dit": load}


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds, and private bytes before and at the peak, of one way in this process."""
    before = private_memory()
    with PeakMemory() as peak:
        start = time.perf_counter()
        kept = WAYS[way](folder)
        seconds = time.perf_counter() - start

    model = 0
    if way == "load_dit":
        model = sum(p.nbytes for p in kept.parameters())
    return {"seconds": seconds, "before": before, "peak": peak.bytes, "model": model}


def measure_all() -> tuple[int, dict[str, list[dict[str, float]]]]:
    """Bytes of the release, and three measurements of every way, each by a process of its own."""
    runs = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_dit(Path(folder), CONFIG, shards=3)
        size = sum(shard.stat().st_size for shard in Path(folder).glob("*.safetensors"))
        for _ in range(3):
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, folder]
                done = subprocess.run(command, check=True, capture_output=True)
                runs[way].append(json.loads(done.stdout))
    return size, runs


# --------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    own = "one measurement in this process, as JSON: the benchmark calls itself so"
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=own)
    args = parser.parse_args(argv)
    if args.measure:
        way, folder = args.measure
        print(json.dumps(measure(way, Path(folder))))
        return

    size, runs = measure_all()
    best = {way: min(run["seconds"] for run in runs[way]) for way in WAYS}
    peak = max(run["peak"] for run in runs["load_dit"])
    before = max(run["before"] for run in runs["load_dit"])
    model = runs["load_dit"][0]["model"]

    print(
        f"release {size / 1e9:.2f} GB float32, model {model / 1e9:.2f} GB bfloat16, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        f"private memory at the peak {peak / 1e9:.2f} GB, {peak / model:.3f} of the model "
        "(bar 1.15)"
    )
    without = (peak - before) / model
    print(f"  of which before loading {before / 1e9:.2f} GB; without it {without:.3f}")
    for way, seconds in best.items():
        ratio = best["load_dit"] / seconds
        print(f"{way:12} {seconds:6.2f} s; load_dit takes {ratio:.2f} of it (bar 1.3)")


if __name__ == "__main__":
    main()
