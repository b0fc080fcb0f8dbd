"""What training reads: prompts, text embeddings, latents and trajectories on disk; clips of videos; order and chance.

A store is a folder of safetensors shards of one kind, 00000.safetensors, 00001.safetensors, ...; it is mapped, and what
is read of it is what is asked for. The header of a shard holds, as JSON: the prompts of its items; facts, which are the
same in all shards of a store (sizes, levels, guidance, ...); made_from, by which prepare.py knows it again.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan5b.media import read_image, video_frames
from wan5b.weights import write_tensors

HEADER = "wan5b"  # the one key of a shard's metadata: with several, their order in the file would be left to chance

# ------------------------------------------------------------------------------------------------------ shards


def write_shard(
    path: str | Path,
    tensors: dict[str, Tensor],
    prompts: list[str],
    *,
    made_from: str = "",
    **facts,
):
    """Write a shard, as `write_tensors` does.

    tensors: [len(prompts), ...] each; for a `TextStore`, rows [sum of lengths, D] and lengths [len(prompts)].
    """
    assert all(len(tensor) == len(prompts) for name, tensor in tensors.items() if name != "rows")
    header = json.dumps(
        {"prompts": prompts, "facts": facts, "made_from": made_from}, ensure_ascii=False
    )
    write_tensors(path, tensors, {HEADER: header})


def open_shard(path: Path) -> tuple[safe_open, dict]:
    """The mapped file and its header. ValueError if it is damaged or something else."""
    try:
        file = safe_open(path, "pt")
        return file, json.loads((file.metadata() or {})[HEADER])
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged or not of prepare.py ({error!r}); delete it, make it again"
        ) from error


def difference(a: dict, b: dict) -> str:
    """What two dicts of facts disagree in: "guidance 6.0 and 5.0, seed 0 and 1"."""
    keys = [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]
    return ", ".join(f"{key} {a.get(key)} and {b.get(key)}" for key in keys)


class Store:
    """store[i] -> the tensors of item i, without the leading axis; len(store); iterable.

    prompts: of all items, in order. facts: see the module. shapes: of an item's tensors, by name.
    ValueError if the folder is missing or empty, a shard is damaged, or shards disagree in facts or shapes.
    """

    def __init__(self, folder: str | Path):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{folder} is no folder of shards; make it with prepare.py (its --help shows how)"
            )
        self.folder = Path(folder)
        self.files, headers = zip(*map(open_shard, paths), strict=True)
        shapes = [
            {name: tuple(f.get_slice(name).get_shape()[1:]) for name in f.keys()}
            for f in self.files
        ]
        self.facts, self.shapes = headers[0]["facts"], shapes[0]
        for path, header, shape in zip(paths, headers, shapes, strict=True):
            if apart := difference(self.facts | self.shapes, header["facts"] | shape):
                raise ValueError(
                    f"{path} does not belong with {paths[0].name}: {apart}; keep one kind in a folder"
                )
        self.prompts = [prompt for header in headers for prompt in header["prompts"]]
        rows = [range(len(header["prompts"])) for header in headers]
        self.places = [
            (file, row) for file, own in zip(self.files, rows, strict=True) for row in own
        ]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        file, row = self.places[i]
        # cloned: a slice is the mapped memory itself, and a write to it would be seen by the next reader
        return {name: file.get_slice(name)[row : row + 1][0].clone() for name in self.shapes}


class TextStore(Store):
    """text[prompt] -> the embedding [L, D] of its L tokens, as stored (bfloat16). Errors as `Store`'s.

    prompts: all that it holds. facts: among them negative, the negative prompt, which it holds as well as "".
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if self.shapes.keys() != {"rows", "lengths"}:
            raise ValueError(f"{folder} holds {', '.join(self.shapes)} and no text embeddings")
        ends = [(file, file.get_tensor("lengths").cumsum(0).tolist()) for file in self.files]
        places = [(file, *span) for file, end in ends for span in zip([0, *end], end, strict=False)]
        self.places = dict(
            zip(self.prompts, places, strict=True)
        )  # prompt -> its file, first row, end

    def check(
        self, prompts: list[str], width: int | None = None, length: float = float("inf")
    ) -> None:
        """ValueError, with the way out, unless all prompts are there, D is width (None: any) and no L above length."""
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.places]:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} prompts ({missing[0][:40]!r}); see prepare.py text"
            )
        (own,), spans = self.shapes["rows"], [self.places[prompt][1:] for prompt in prompts]
        longest = max((end - start for start, end in spans), default=0)
        if own != (width or own) or longest > length:
            given = f"{self.folder} holds embeddings of width {own} and up to {longest} tokens"
            raise ValueError(
                f"{given}, the network takes {width or own, length}: shorten, or use its own text encoder"
            )

    def __getitem__(self, prompt: str) -> Tensor:
        self.check([prompt])
        file, start, end = self.places[prompt]
        return file.get_slice("rows")[start:end].clone()

    def batch(self, prompts: list[str], length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[len(prompts), length, D], zero behind each prompt. ValueError if one is missing or longer than length."""
        self.check(prompts, length=length)
        rows = [self[prompt] for prompt in prompts]
        return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]).to(dtype)


# ------------------------------------------------------------------------------------------- prompts and videos


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; blank lines are dropped. ValueError if missing, not UTF-8, or without prompts."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{path} holds no prompts; it should have one a line")
    return prompts


def read_clips(path: str | Path, frames: int, fps: float) -> Iterator[np.ndarray]:
    """The consecutive clips of a video at this rate, read as they are asked for: uint8 [frames, H, W, 3] each.

    path: a video file, of which the frames nearest to the times k / fps are taken (its rate must be constant); or a
    folder of images, sorted by length of name, then name, all taken. What is left over at the end is dropped.
    One of `media.UNREADABLE` if unreadable, ValueError if too short for one clip.
    """
    if Path(path).is_dir():
        files = sorted(Path(path).glob("[!.]*"), key=lambda file: (len(file.name), file.name))
        source, ratio = (read_image(file)[0] for file in files), 1.0
    else:
        source, ratio = video_frames(path), iio.immeta(path, plugin="pyav")["fps"] / fps
    clip, k = [None] * frames, 0
    for i, frame in enumerate(source):
        while int(k * ratio + 0.5) == i:  # one frame may be nearest to several times, or to none
            clip[k % frames] = frame
            k += 1
            if k % frames == 0:
                yield np.stack(clip)
    if k < frames:
        raise ValueError(f"{path} has {k} frames at {fps:g} fps, fewer than {frames}")


# --------------------------------------------------------------------------------------------- order and chance


def rng(device: str | torch.device, *keys: int | str) -> torch.Generator:
    """A generator of random numbers that the keys alone determine: (seed, step, sample, "noise"), say.

    All chance in training comes from here, so it depends on no number of processes, and there is no state to save.
    CPU and CUDA give different numbers.
    """
    assert all(isinstance(key, int | str) for key in keys), keys
    digest = blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def order(n: int, position: int, seed: int | str) -> int:
    """The item at a global position of an endless pass over n items, shuffled anew in every epoch."""
    epoch, place = divmod(position, n)
    return int(torch.randperm(n, generator=rng("cpu", seed, "order", epoch))[place])
