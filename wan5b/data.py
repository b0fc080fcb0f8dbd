"""What training reads: prompts; stores of text, latents and trajectories; clips of videos; order.

A store is a folder of safetensors shards of one kind, 00000.safetensors, 00001.safetensors, ...
It is mapped, and only what is asked for is read. The header of a shard holds, as JSON:

prompts      of its items;
facts        the same in all shards of a store: sizes, levels, guidance, ...;
made_from    a digest of the shard's inputs, by which prepare.py knows it again.

extras/shards.py writes them.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan5b.util import finite, first_line, raise_interrupted, rng

HEADER = "wan5b"  # the only key of a shard's metadata: the order of several would be left to chance

# ------------------------------------------------------------------------------------------- shards


def open_shard(path: Path) -> tuple[safe_open, dict]:
    """The mapped file and its header. ValueError if it is damaged or something else."""
    try:
        file = safe_open(path, "pt")
        header = json.loads((file.metadata() or {})[HEADER])

        _check_shard(file, header)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise_interrupted(error)
        cause = f"damaged or not of prepare.py ({type(error).__name__}: {first_line(error)})"
        raise ValueError(f"{path} is {cause}; delete it, make it again") from error
    return file, header


def _check_shard(file: safe_open, header: dict) -> None:
    """TypeError, LookupError or ValueError unless they are as extras/shards.py made them."""
    prompts = header["prompts"]
    kinds = (type(prompts), type(header["facts"]), type(header["made_from"]))
    if kinds != (list, dict, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts, facts or made_from of another type")
    for name in file.keys():
        count = file.get_slice(name).get_shape()[0]
        if name == "rows":
            lengths = file.get_tensor("lengths")
            if (lengths < 0).any() or lengths.sum() != count or lengths.is_floating_point():
                raise ValueError(f"lengths that are not those of {count} rows")
        elif count != len(prompts):
            raise ValueError(f"{count} of {name} and {len(prompts)} prompts")


def difference(a: dict, b: dict) -> str:
    """What two dicts of facts disagree in: "guidance 6.0 and 5.0, seed 0 and 1"."""
    apart = []
    for key in {**a, **b}:
        if key not in a or key not in b or a[key] != b[key]:
            apart.append(f"{key} {a.get(key)} and {b.get(key)}")
    return ", ".join(apart).replace("\n", " ")


class Store:
    """store[i] -> the tensors of item i, without the leading axis; len(store); iterable.

    prompts    of all items, in order
    facts      what the shards have in common (see the top of this file)
    shapes     of an item's tensors, by name

    ValueError if the folder is missing or empty, a shard is damaged, or shards disagree in facts or
    shapes.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} is no folder of shards; to make it, see prepare.py --help")

        self.files = []
        self.prompts = []
        self.places = []  # the file and row of each item
        for path in paths:
            file, header = open_shard(path)
            shapes = {name: tuple(file.get_slice(name).get_shape()[1:]) for name in file.keys()}

            # The first shard says what all must be.
            if not self.files:
                self.facts = header["facts"]
                self.shapes = shapes
            apart = difference(self.facts | self.shapes, header["facts"] | shapes)
            if apart:
                where = f"{path} does not belong with {paths[0].name}"
                raise ValueError(f"{where}: {apart}; keep one kind in a folder")

            self.files.append(file)
            self.prompts += header["prompts"]
            self.places += [(file, row) for row in range(len(header["prompts"]))]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        file, row = self.places[i]
        parts = {name: file.get_slice(name)[row : row + 1][0] for name in self.shapes}
        return {name: self._copy(part, f"{name} {i}") for name, part in parts.items()}

    def _copy(self, part: Tensor, what: str) -> Tensor:
        """A slice is the mapped memory itself, where the next reader would see a write."""
        if not finite(part):
            way_out = "delete its shard, make it again"
            raise ValueError(f"{self.folder}: NaN or infinity in {what}; {way_out}")
        return part.clone()


class TextStore(Store):
    """text[prompt] -> the embedding [L, D] of its L tokens, as stored (bfloat16).

    prompts    all that it holds, the empty and the negative prompt among them
    facts      of which negative is the negative prompt

    Errors as `Store`'s.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        if self.shapes.keys() != {"rows", "lengths"}:
            raise ValueError(f"{folder} holds {', '.join(self.shapes)} and no text embeddings")
        places = []
        for file in self.files:
            ends = file.get_tensor("lengths").cumsum(0).tolist()
            places += [(file, start, end) for start, end in pairwise([0, *ends])]
        # The file of each prompt, its first row and its end.
        self.places = dict(zip(self.prompts, places, strict=True))

    def check(self, prompts: list[str]) -> None:
        """ValueError unless all prompts are there."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.places]
        if missing:
            named = f"{len(missing)} prompts ({missing[0][:40]!r})"
            raise ValueError(f"{self.folder} lacks {named}; see prepare.py text")

    def __getitem__(self, prompt: str) -> Tensor:
        self.check([prompt])
        file, start, end = self.places[prompt]
        return self._copy(file.get_slice("rows")[start:end], repr(prompt[:40]))

    def batch(self, prompts: list[str], length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[len(prompts), length, D], zero behind each prompt, of which none is longer.

        ValueError if one is missing.
        """
        self.check(prompts)
        batch = torch.zeros(len(prompts), length, *self.shapes["rows"], dtype=dtype)
        for padded, prompt in zip(batch, prompts, strict=True):
            embedding = self[prompt]
            assert len(embedding) <= length, f"{len(embedding)} tokens, not {length}: {prompt!r}"
            padded[: len(embedding)] = embedding
        return batch


class Data:
    """What a run of train.py reads: texts, and the clips or trajectories that its stage learns
    from.

    prompts    of all items to train on, in order: the clips', else all that the texts hold

    cfg is train.py's Config. Errors as `Store`'s.
    """

    def __init__(self, cfg):
        self.text = TextStore(cfg.text)
        folder = cfg.trajectories if cfg.stage == "ode" else cfg.latents
        self.store = Store(folder) if folder else None
        if self.store is not None:
            self.prompts = self.store.prompts
        else:
            apart = (cfg.negative, self.text.facts.get("negative"), "")
            self.prompts = [prompt for prompt in self.text.prompts if prompt not in apart]

    def clip(self, i: int) -> Tensor:
        """The clean latents of item i [C, T, H, W], as stored: a clip's, or a trajectory's end."""
        row = self.store[i]
        return row["x"][-1] if "x" in row else row["latent"]


# ------------------------------------------------------------------------------- prompts, order


def order(n: int, position: int, seed: int | str) -> int:
    """The item at a position of an endless pass over n items, shuffled anew in every epoch."""
    epoch, place = divmod(position, n)
    return int(torch.randperm(n, generator=rng("cpu", seed, "order", epoch))[place])
