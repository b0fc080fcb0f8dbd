"""The VAE on a device of its own: nothing waits for it, and every picture is what it was."""

import json
import threading
import time
from contextlib import suppress
from itertools import islice

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from common import compiling, gpu, randn
from PIL import Image
from safetensors.torch import load_file
from test_endless import maker, wish
from torch import nn

import live
import sample
from wan5b import fuse
from wan5b.distill import rollout
from wan5b.extras import cards, mp4, random_weights
from wan5b.extras.clips import write
from wan5b.extras.endless import Endless
from wan5b.extras.pace import Pace
from wan5b.extras.resume import STATE
from wan5b.flow import few_step_sigmas
from wan5b.kvcache import KVCache
from wan5b.util import read_json

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two CUDA devices")
TINY = "--random-weights --preset tiny --size 32x64 --frames 45 --prompt a --window 6 --latents"
SECOND = torch.device("cuda:1")


def two_gpus(test):
    return pytest.mark.gpu(TWO_GPUS(test))


class SlowDecoder(nn.Module):
    """Pixels have the value of the chunk's first latent. On a GPU each takes its time."""

    def __init__(self, place="cpu", cycles=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=place))
        self.cycles = cycles

    def stream(self):
        return None

    def decode_chunk(self, latent, state):
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        frames = 4 * latent.shape[2]
        return latent[:, :1, :1, :1, :1].expand(1, 3, frames, 32, 32)


# ------------------------------------------------------------------------------------------ on CPUs


def test_a_clip_ends_in_front_of_what_is_not_finite(tmp_path):
    values = (0.1, 0.2, 0.3, torch.nan, 0.5, 0.6, 0.7)
    taken = []

    def latents():
        for value in values:
            taken.append(value)
            yield torch.full((1, 48, 1, 2, 2), value)

    with pytest.raises(ValueError, match="a.mp4: a chunk is not finite"):
        write(SlowDecoder(), latents(), tmp_path / "a.mp4", record={"seed": 1})
    assert read_json(tmp_path / "a.json") == {"seed": 1, "frames_written": 12}
    assert len(iio.imread(tmp_path / "a.mp4", plugin="pyav")) == 12
    assert len(taken) <= 6  # nobody goes on making chunks for long


def test_the_writer_waits_for_all_but_two_chunks(tmp_path, monkeypatch):
    """So that what waits to be encoded does not grow."""
    go_on = threading.Semaphore(0)
    encode = mp4.VideoWriter._encode

    def slow(*arguments):
        assert go_on.acquire(timeout=10)
        encode(*arguments)

    monkeypatch.setattr(mp4.VideoWriter, "_encode", slow)
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    frames = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    writer.add(frames)
    writer.add(frames)  # the first is being encoded, this one may still be on its way
    third = threading.Thread(target=writer.add, args=(frames,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    go_on.release(3)
    third.join(10)
    writer.close()
    assert writer.count == 12


def test_a_live_video_is_ahead_with_a_gpu_for_each_alone():
    """And then it has the same frames, and knows the prompt of each."""

    def played(make, count=5):
        asked = wish()
        seen = []
        for index, frames in enumerate(islice(make(asked), count)):
            seen.append((frames, asked.version))
            if index == 1:
                make.contexts.of("a blue ball")
                asked.prompts.append("a blue ball")
        return seen

    plain = maker("--window", "6")
    assert not plain.is_ahead
    calm = played(plain)
    assert [version for _, version in calm] == [0, 0, 1, 1, 1]

    class Ahead(Endless):
        is_ahead = True

    early = maker("--window", "6")
    early.__class__ = Ahead
    seen = played(early)
    assert [version for _, version in seen] == [0, 0, 0, 1, 1]  # a chunk later
    for (a, _), (b, version) in zip(calm[:2], seen[:2], strict=True):
        assert np.array_equal(a, b)
        assert version == 0


def test_the_next_chunk_is_begun_before_one_is_waited_for(monkeypatch):
    events = []

    class Ahead(Endless):
        is_ahead = True

    def decode(vae, chunk, state):
        events.append("begun")
        return cards.decode(vae, chunk, state)

    monkeypatch.setattr("wan5b.extras.endless.decode", decode)
    for kind, expected in ((Endless, [1, 2, 3]), (Ahead, [2, 3, 4])):
        make = maker("--window", "6")
        make.__class__ = kind
        events.clear()
        begun = [len(events) for _ in islice(make(wish()), 3)]
        assert begun == expected


def test_what_is_ahead_is_no_measure_of_what_a_chunk_takes():
    for is_ahead, rate in ((False, 40.0), (True, 24.0)):
        pace = Pace(24, 0.5, is_ahead)
        for _ in range(40):
            pace.place(12, 0.3, 0.0)
        assert pace.made() == pytest.approx(rate, rel=0.01)
    pace.place(12, 9.0, 0.0)
    assert pace.made() < 5  # a slow one still is


def test_a_gpu_that_is_not_there(tmp_path):
    """It is refused, also in a record, unless another one is named."""
    with pytest.raises(ValueError, match="--vae-device: invalid choice: 'cuda:77'"):
        sample.parse(["--vae-device", "cuda:77"])
    with pytest.raises(ValueError, match="--vae-device: invalid choice: 'cuda:77'"):
        live.parse(["--vae-device", "cuda:77"])
    settings = vars(sample.parse([*TINY.split(), "--device", "cpu"])) | {"vae_device": "cuda:77"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match="vae_device is 'cuda:77', not one of"):
        sample.parse(["--settings", str(path)])
    assert sample.parse(["--settings", str(path), "--vae-device", "cpu"]).vae_device == "cpu"


def test_float8_is_for_gpus():
    for parse in (sample.parse, live.parse):
        args = parse(["--random-weights", "--fp8-vae", "--vae-device", "cpu"])
        assert (args.fp8_vae, args.vae_device) == (True, "cpu")
    options = ["--random-weights", "--preset", "tiny", "--device", "cpu", "--fp8-vae"]
    with pytest.raises(ValueError, match="--fp8-vae needs bfloat16 on a Hopper GPU"):
        live.plan(live.parse(options))


# -------------------------------------------------------------------------------------- on two GPUs


@two_gpus
def test_neither_card_waits_for_the_other():
    """Ten chunks that take as long to make as to decode: eleven of these times, not twenty. And
    each is brought over when it is there, not before.
    """
    cycles = 2 * 10**8  # a tenth of a second

    def latents(count):
        for index in range(count):
            torch.cuda._sleep(cycles)
            yield torch.full((1, 48, 1, 2, 2), index / 100, device="cuda:0")

    def played(count):
        decoder = SlowDecoder(SECOND, cycles)
        waiting = []
        with torch.cuda.device(SECOND):
            torch.cuda._sleep(1)
        begun = time.monotonic()
        for chunk in cards.carried(latents(count), SECOND):
            with torch.cuda.device(SECOND):
                waiting.append(cards.decode(decoder, chunk, None))
        issued = time.monotonic() - begun
        frames = [decoded.wait() for decoded in waiting]
        return frames, issued, time.monotonic() - begun

    played(2)
    _, _, two = played(2)
    each = two / 3
    frames, issued, whole = played(10)
    assert issued < 2 * each, (issued, each)
    assert whole < 13 * each, (whole, each)
    for index, pixels in enumerate(frames):
        assert (pixels == round((index / 100 + 1) * 127.5)).all()


@gpu
def test_nothing_waits_while_a_clip_is_written(tmp_path):
    """From a process's second clip on no call waits for a GPU, be it of the first chunk, but for
    the thread that encodes. On two GPUs, if there are two.
    """
    model = random_weights.random_dit("tiny", "cuda:0", torch.bfloat16)
    vae = random_weights.random_vae("tiny", f"cuda:{torch.cuda.device_count() - 1}").bfloat16()
    noise = randn(1, 48, 15, 2, 4, seed=0).to("cuda:0")
    context = randn(1, model.cfg.text_len, model.cfg.text_dim, seed=1).to("cuda:0").bfloat16()
    tokens = model.cfg.tokens_per_frame(2, 4)
    cache = KVCache(model.cfg, 1, 15, tokens, device=noise.device, dtype=torch.bfloat16)

    def strictly(mode):
        torch.cuda.set_sync_debug_mode(mode)
        yield from rollout(model, noise, context, few_step_sigmas(), [3] * 5, cache)

    try:
        with torch.no_grad():
            for name, mode in (("a", "default"), ("b", "error")):
                cache.reset()
                write(vae, strictly(mode), tmp_path / f"{name}.mp4")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(iio.imread(tmp_path / "b.mp4", plugin="pyav")) == 57


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """pictures(options, name) -> sample.py's latents and the frames that it gave to the mp4."""
    Image.new("RGB", (64, 32), (200, 40, 90)).save(tmp_path / "a.png")
    add = mp4.VideoWriter.add
    given = []

    def watched(self, frames, *rest):
        given.append((self.path.name, frames))
        add(self, frames, *rest)

    monkeypatch.setattr(mp4.VideoWriter, "add", watched)

    def call(options, out):
        given.clear()
        options = options.replace("IMAGE", str(tmp_path / "a.png")).split()
        if "--resume" not in options:
            options += ["--out", str(tmp_path / out)]
        sample.main(sample.parse(options))
        made = [frames.cpu() for _, frames in given]
        files = sorted(tmp_path.glob(f"{out}*.safetensors"))
        return [load_file(file)["latents"] for file in files], made

    return call


@two_gpus
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--image IMAGE --frames 49",
        "--low-memory",
        "--mode bidirectional --steps 2",
        "--compile --seed 0 1",
        "--dtype float32",
    ],
)
def test_two_cards_make_what_one_makes(pictures, options):
    """To the bit, whichever of them has the VAE."""
    with compiling():
        latents, frames = pictures(f"{TINY} {options}", "one")
        for out, where in (("two", ""), ("turned", "--device cuda:1 ")):
            decoder = "cuda:0" if where else "cuda:1"
            more = f"{TINY} {options} {where}--vae-device {decoder}"
            others = pictures(more, out)
            for ours, theirs in zip((latents, frames), others, strict=True):
                assert len(ours) == len(theirs) > 0
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@two_gpus
def test_a_clip_is_taken_up_again_on_two_cards(pictures, tmp_path, monkeypatch):
    options = TINY.replace(" --latents", " --state-every 1e-9")
    _, whole = pictures(options, "whole")

    class Stop(Exception):
        pass

    stop = mp4.VideoWriter.add
    count = []

    def until(self, *rest):
        count.append(1)
        if len(count) > 2:
            raise Stop
        stop(self, *rest)

    monkeypatch.setattr(mp4.VideoWriter, "add", until)
    with suppress(Stop):
        pictures(options + " --vae-device cuda:1", "half")
    monkeypatch.setattr(mp4.VideoWriter, "add", stop)
    state = tmp_path / f"half{STATE}"
    _, rest = pictures(f"--resume {state} --vae-device cuda:0", "unused")
    rest = torch.cat(rest)
    assert torch.equal(rest, torch.cat(whole)[-len(rest) :])


@two_gpus
def test_a_live_video_on_two_cards():
    """The frames of one card, a chunk ahead, plain and compiled."""
    options = ["--random-weights", "--preset", "tiny", "--size", "32x32", "--window", "6"]

    def taken(decoder):
        args = live.parse([*options, "--device", "cuda", "--vae-device", decoder])
        job = live.plan(args)
        model = random_weights.random_dit("tiny", "cuda", job.dtype)
        vae = random_weights.random_vae("tiny", decoder)
        contexts = live.Contexts(live.text_encoder(args, job))
        make = Endless(job, model, vae, contexts, live.KVCache)
        assert make.is_ahead == (decoder == "cuda:1")
        return list(islice(make(wish()), 4))

    with compiling():
        for on in (False, True):
            fuse.enable(on)
            for a, b in zip(taken("cuda:0"), taken("cuda:1"), strict=True):
                assert np.array_equal(a, b)
