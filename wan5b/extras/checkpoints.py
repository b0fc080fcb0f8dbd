"""Checkpoint folders of train.py, in the place of a file: how they are known, and whether they are
whole.
"""

import os
import re
from pathlib import Path

from wan5b import fsdp
from wan5b.extras import untrusted

INDEX = ".metadata"  # what torch.distributed.checkpoint writes into its folder


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint folder of train.py, perhaps a link to one, or a copy."""
    named = re.match("step-[0-9]+", os.path.basename(os.path.realpath(path)))
    return named is not None and (path / INDEX).is_file()


def check_checkpoint(path: Path, prefix: str = "") -> None:
    """ValueError if the index of a checkpoint cannot be true, or a tensor is damaged.

    prefix: of the names of the tensors that are looked at.
    """
    with fsdp.opening(path):
        index = fsdp.Reader(path).read_metadata()
        untrusted.check_index(path, index)
        untrusted.check_sums(path, index, prefix)
