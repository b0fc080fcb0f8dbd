"""Stores of text, latents and trajectories (data.py): how they are written, and whether a network
takes what one holds.
"""

import json
from pathlib import Path

from torch import Tensor

from wan5b.data import HEADER, TextStore
from wan5b.util import write_tensors


def write_shard(
    path: str | Path, tensors: dict[str, Tensor], prompts: list[str], made_from: str = "", **facts
) -> None:
    """Write a shard, as `write_tensors` does: the old file or the whole new one.

    tensors: [len(prompts), ...] each; for a `TextStore`, rows [sum of lengths, D] and lengths
    [len(prompts)].
    """
    for name, tensor in tensors.items():
        assert name == "rows" or len(tensor) == len(prompts), (name, tensor.shape, len(prompts))
    header = {"prompts": prompts, "facts": facts, "made_from": made_from}
    write_tensors(path, tensors, {HEADER: json.dumps(header, ensure_ascii=False)})


def check_texts(text: TextStore, prompts: list[str], width: int, length: int) -> None:
    """ValueError unless the embeddings of all prompts are there, of this width, none longer."""
    text.check(prompts)
    tokens = {}
    for prompt in prompts:
        _, start, end = text.places[prompt]
        tokens[prompt] = end - start
    longest = max(tokens, key=tokens.get)
    (held,) = text.shapes["rows"]
    if held != width or tokens[longest] > length:
        raise ValueError(
            f"{text.folder} holds embeddings of width {held} and up to {tokens[longest]} tokens, "
            f"the network takes {width, length}: shorten {longest[:40]!r} and the like, or use its "
            "own text encoder"
        )
