"""What the tests of interrupted clips share: sample.py in this process, stopped where they want."""

import pytest
import torch
from PIL import Image

import sample
from wan5b.extras import mp4

LONG = ["--window", "9", "--sink", "3", "--frames", "129"]  # 11 chunks of 3 latent frames
OFTEN = ["--state-every", "1e-9"]


class Stop(Exception):
    """In the place of whatever ends a process."""


def runner(release, folder, monkeypatch, frames=129):
    """run(*options, stop=None) -> the pictures that were made. stop: how many chunks until Stop.

    run.until(*options, after=4): those of a run that is stopped. meanwhile: called behind each
    chunk with how many there are.
    """
    (folder / "a.png").exists() or Image.new("RGB", (64, 32), (200, 40, 90)).save(folder / "a.png")
    add = mp4.VideoWriter.add
    made = []

    def call(*options, stop=None, out="a", meanwhile=None):
        def watched(self, frames, *rest):
            if stop is not None and len(made) >= stop:
                raise Stop
            made.append(frames.clone())
            add(self, frames, *rest)
            if meanwhile:
                meanwhile(len(made))

        monkeypatch.setattr(mp4.VideoWriter, "add", watched)
        made.clear()
        base = ["--release", release, "--device", "cpu", "--mode", "few", "--size", "32x64"]
        base += [*LONG, *OFTEN, "--frames", frames, "--out", folder / out]
        if "--resume" in options:
            base = []
        elif "--prompt" not in options:
            base += ["--prompt", "a red ball"]
        sample.main(sample.parse([str(option) for option in (*base, *options)]))
        return torch.cat(made) if made else None

    def stopped(*options, after, **how):
        with pytest.raises(Stop):
            call(*options, stop=after, **how)
        return torch.cat(made) if made else None

    call.until = stopped
    call.release = release
    return call
