"""Whether what is to be written can be, and has room, before any work is done for it.

What is said of a disk that has become full since then is `wan5b.util.writing`'s.
"""

import os
from pathlib import Path

import torch

from wan5b.dit import DiTConfig
from wan5b.extras.budget import adapter_numbers, classifier_parameters, parameters
from wan5b.extras.checkpoints import UNFINISHED, complete, step_of
from wan5b.optim import state_groups
from wan5b.util import MAKE_ROOM, free_at, in_words


def check_folder(folder: Path, option: str) -> None:
    """ValueError if a folder, which need not be there yet, can't be written to. option: what named
    it.
    """
    whole = folder.absolute()
    held = next(filter(os.path.lexists, [whole, *whole.parents]))
    if not os.path.isdir(held):
        raise ValueError(f"cannot write to {folder}: {held} is no folder; choose another {option}")
    if not os.access(held, os.W_OK):
        raise ValueError(f"cannot write to {folder}: {held} is read-only; choose another {option}")


def check_room(path: str | Path, needed: float, held: float = 0) -> None:
    """OSError if a disk has no room for what is to be written.

    path: a file or folder on it, there or not. needed: bytes. held: bytes of what will be removed
    before.
    """
    free = free_at(path) + held
    if needed > free:
        room = f"at least {in_words(needed)} are needed, {in_words(free)} are free"
        raise OSError(f"cannot write {path}: the disk is too full: {room}; {MAKE_ROOM}")


def check_run(cfg, model: DiTConfig, scores: DiTConfig | None) -> None:
    """OSError if the disk of a run has no room for its next checkpoint.

    Older ones stay until it is whole. cfg: train.py's Config; model, scores: as of
    `budget.expected`.
    """
    out = Path(cfg.out)
    saved = complete(out)
    if saved and step_of(saved[-1]) >= cfg.steps:
        return  # only the export is missing
    unfinished = [file.stat().st_size for file in out.glob(f"{UNFINISHED}/*")]
    check_room(out, checkpoint_bytes(cfg, model, scores), sum(unfinished))


def checkpoint_bytes(cfg, model: DiTConfig, scores: DiTConfig | None) -> int:
    """What the tensors of a checkpoint take, all of them float32: of each number that is trained
    its master and the averages of its gradients, of the generator's also the average of masters.
    """
    generator = adapter_numbers(cfg, model) if cfg.lora else parameters(model)
    critic = 0
    if scores:
        critic = generator if cfg.lora else parameters(scores)
    if cfg.with_gan:
        critic += classifier_parameters(scores)
    averages = state_groups(torch.float32, cfg.beta1, ema=False)
    numbers = (1 + len(averages)) * (generator + critic)
    if cfg.ema:
        numbers += generator
    return 4 * numbers
