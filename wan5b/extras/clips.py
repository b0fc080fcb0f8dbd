"""What a clip leaves on disk: an mp4 that grows, beside it a record, latents and a contact sheet."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.extras.files import sheet_indices, write_sheet
from wan5b.media import VideoWriter, to_frames
from wan5b.util import write_json, write_tensors


def write(
    vae,
    latents: Iterable[Tensor],
    path: Path,
    *,
    frames: int | None = None,
    record: dict | None = None,
    sheet: bool = False,
    save_latents: bool = False,
) -> None:
    """Decode a clip into an mp4 while its latents [1, C, T, H, W] are made, piece by piece.

    Beside it the record as JSON, a sheet (PNG), the latents (safetensors). frames: how many pixel
    frames there will be. Whatever ends it, Ctrl-C included, leaves what is finished, playable.
    FileExistsError if another has written the mp4 meanwhile; all is beside the *.partial.mp4 then.
    """
    writer = VideoWriter(path, keep=sheet_indices(frames) if sheet else set())
    state = vae.stream()
    kept = []
    try:
        with tqdm(total=frames, unit="frame", desc=path.name) as bar, closing(writer):
            for chunk in latents:
                pixels = vae.decode_chunk(chunk, state)
                writer.add(to_frames(pixels[0]))
                if save_latents:
                    kept.append(chunk)
                bar.update(pixels.shape[2])
    finally:
        clip = writer.where
        if writer.kept:
            write_sheet(clip.with_suffix(".png"), writer.kept)
        if kept:
            whole = torch.cat(kept, 2).float().cpu()
            write_tensors(clip.with_suffix(".safetensors"), {"latents": whole})
        if record and writer.count:
            record = record | {"frames_written": writer.count}
            write_json(clip.with_suffix(".json"), record)
