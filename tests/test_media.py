"""Pixels in and out: fitting, the mp4 writer, what a clip leaves on disk."""

import json
import threading

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from odd_files import indices, numbered, picture
from PIL import Image

from wan5b.extras import clips, framing, media, mp4
from wan5b.extras.pictures import read_video


def solid(levels, height=64, width=64):
    """Gray frames, one of each level, uint8 [T, H, W, 3]."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, height, width, 3)


# -------------------------------------------------------------------------------------------- sizes


def test_latent_frames():
    assert [media.latent_frames(n) for n in (1, 5, 81, 121)] == [1, 2, 21, 31]
    for n, valid in {0: "1 or 5", -3: "1 or 5", 4: "1 or 5", 82: "81 or 85"}.items():
        with pytest.raises(ValueError, match=f"{n} frames are not 4k . 1; nearest valid: {valid}"):
            media.latent_frames(n)


# ------------------------------------------------------------------------------------------ fitting


def test_fit_and_to_frames_are_inverse():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    pixels = framing.fit(frames, 32, 64)
    assert pixels.shape == (3, 3, 32, 64)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(media.to_frames(pixels).numpy(), frames)
    beyond = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 5, 1, 1).expand(3, -1, 2, 2)
    assert media.to_frames(beyond)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(media.to_frames(beyond.bfloat16()), media.to_frames(beyond))


@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [  # a picture of (height, width), scaled to (width, height), cut to (left, top, right, bottom)
        ((64, 160), (160, 64), (32, 0, 128, 64)),
        ((131, 96), (96, 131), (0, 33, 96, 97)),
        ((50, 70), (96, 69), (0, 2, 96, 66)),
        ((1000, 999), (96, 96), (0, 16, 96, 80)),
        ((3, 5), (107, 64), (5, 0, 101, 64)),
    ],
)
def test_fit_covers_and_crops_in_the_middle(shape, size, box):
    image = picture(*shape)
    expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS).crop(box))
    frames = media.to_frames(framing.fit(np.asarray(image)[None], 64, 96))
    assert np.array_equal(frames[0].numpy(), expected)


def test_a_picture_of_which_nothing_would_be_seen():
    """Covering the size would take 15 GB."""
    says = "of 1x10000 pixels 704x1280 would show below 1%; crop them first"
    with pytest.raises(ValueError, match=says):
        framing.fit(np.zeros((1, 1, 10000, 3), np.uint8), 704, 1280)
    assert framing.fit(np.zeros((1, 1, 50, 3), np.uint8), 32, 32).shape == (3, 1, 32, 32)


# ------------------------------------------------------------------------------------------- videos


def test_writer_writes_what_it_was_given(tmp_path):
    levels = list(range(0, 250, 10))
    writer = mp4.VideoWriter(tmp_path / "a.b.mp4", fps=24, keep={0, 12, 24})
    for chunk in (levels[:1], levels[1:5], levels[5:]):
        writer.add(solid(chunk))
        assert not (tmp_path / "a.b.mp4").exists()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.b.mp4"]
    frames = iio.imread(tmp_path / "a.b.mp4", plugin="pyav")
    assert frames.shape == (25, 64, 64, 3)
    assert np.abs(frames.mean((1, 2, 3)) - levels).max() < 3
    assert iio.immeta(tmp_path / "a.b.mp4", plugin="pyav")["fps"] == 24
    assert [frame[0, 0, 0] for frame in writer.kept] == [0, 120, 240]
    assert all(frame.base is None for frame in writer.kept), (
        "a view keeps its whole chunk in memory"
    )
    assert np.array_equal(read_video(tmp_path / "a.b.mp4", last=7), frames[-7:])
    assert np.array_equal(read_video(tmp_path / "a.b.mp4"), frames)
    with pytest.raises(ValueError, match="25 frames, 26 are needed"):
        read_video(tmp_path / "a.b.mp4", last=26)


def test_add_returns_before_its_frames_are_encoded(tmp_path, monkeypatch):
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    encode, gate = writer._write, threading.Event()
    monkeypatch.setattr(writer, "_write", lambda frame: gate.wait(30) and encode(frame))
    chunk = solid([200, 100]).clone()
    writer.add(chunk)
    chunk.zero_()  # the caller may use its memory again
    assert writer.count == 0
    gate.set()
    writer.close()
    assert writer.count == 2
    assert np.abs(read_video(tmp_path / "a.mp4").mean((1, 2, 3)) - [200, 100]).max() < 3


def test_failure_to_encode_is_raised_and_claims_no_file(tmp_path, monkeypatch):
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    writer.add(solid([1, 2]))
    writer.pending.result()
    monkeypatch.setattr(writer, "_write", lambda frame: 1 / 0)
    writer.add(solid([3]))
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert list(tmp_path.iterdir()) == [writer.partial] == [writer.where]
    assert writer.partial.match("a.*.partial.mp4")
    assert len(read_video(writer.partial)) == 2


def test_closing_without_frames_leaves_nothing(tmp_path):
    mp4.VideoWriter(tmp_path / "a.mp4").close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        mp4.VideoWriter(tmp_path / "missing" / "a.mp4")


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "%03d.mp4"])
def test_names_like_addresses(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(mp4.VideoWriter(name), 200)
    assert read_video(tmp_path / name).shape == (2, 64, 64, 3)


def write(writer, level):
    writer.add(solid([level] * 2))
    writer.close()


def level(path):
    return read_video(path).mean()


def test_colours_are_bt709_and_said_to_be(tmp_path):
    """Decoded by hand, as a player decodes HD."""
    levels = np.array([(0, 255, 0), (255, 0, 0), (200, 120, 90), (40, 90, 200)], np.uint8)
    frames = levels[None, None].repeat(32, 1).repeat(32, 2).repeat(2, 0)
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    writer.add(torch.from_numpy(frames))
    writer.close()

    with av.open(str(tmp_path / "a.mp4")) as file:
        codec = file.streams.video[0].codec_context
        tags = (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range)
        assert tags == (1, 1, 1, 1)
        planes = []
        for plane in next(file.decode(video=0)).planes:
            planes.append(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size))

    for i, expected in enumerate(levels):
        x = 32 * i + 16
        luma = (float(planes[0][16, x]) - 16) / 219
        cb = (float(planes[1][8, x // 2]) - 128) / 224
        cr = (float(planes[2][8, x // 2]) - 128) / 224
        red = luma + 1.5748 * cr
        blue = luma + 1.8556 * cb
        green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
        assert np.abs(255 * np.clip([red, green, blue], 0, 1) - expected).max() <= 5
    assert np.abs(read_video(tmp_path / "a.mp4")[0, 16, 16::32].astype(int) - levels).max() <= 5


@pytest.mark.parametrize("width", [96, 192, 256])
def test_the_same_frames_make_the_same_file(tmp_path, width):
    coarse = np.random.default_rng(0).integers(0, 256, (60, 4, width // 16, 3), dtype=np.uint8)
    frames = torch.from_numpy(coarse.repeat(16, 1).repeat(16, 2))
    made = set()
    for _ in range(4):
        writer = mp4.VideoWriter(tmp_path / "a.mp4")
        writer.add(frames)
        writer.close()
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_two_writers_of_one_name(tmp_path):
    """The file is one of the two clips, whole; the other is kept beside it."""
    first = mp4.VideoWriter(tmp_path / "a.mp4")
    second = mp4.VideoWriter(tmp_path / "a.mp4")
    first.add(solid([40] * 5))
    second.add(solid([200] * 3))
    first.add(solid([40] * 5))
    first.close()
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(
        FileExistsError, match="a.mp4 exists by now, .*; this clip is .*.partial.mp4"
    ):
        second.close()
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert abs(level(tmp_path / "a.mp4") - 40) < 3
    assert (first.where, second.where) == (tmp_path / "a.mp4", second.partial)
    assert len(read_video(second.where)) == 3
    assert abs(level(second.where) - 200) < 3


def test_what_was_there_at_the_start_is_replaced(tmp_path):
    for value in (40, 200):
        write(mp4.VideoWriter(tmp_path / "a.mp4"), value)
        assert abs(level(tmp_path / "a.mp4") - value) < 3
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_what_came_since_is_replaced_on_demand(tmp_path):
    writer = mp4.VideoWriter(tmp_path / "a.mp4", overwrite=True)
    write(mp4.VideoWriter(tmp_path / "a.mp4"), 40)
    write(writer, 200)
    assert abs(level(tmp_path / "a.mp4") - 200) < 3


def test_files_of_the_user_stay(tmp_path):
    for name in ("a.partial.mp4", "a.mp4.partial", "partial.mp4"):
        (tmp_path / name).write_text("mine")
    write(mp4.VideoWriter(tmp_path / "a.mp4"), 40)
    mp4.VideoWriter(tmp_path / "b.mp4").close()
    assert len(list(tmp_path.iterdir())) == 4
    for name in ("a.partial.mp4", "a.mp4.partial", "partial.mp4"):
        assert (tmp_path / name).read_text() == "mine"


# ----------------------------------------------------------------------------------- clips on disk


class Decoder(torch.nn.Module):
    """A VAE whose latents are gray levels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says where it is

    def stream(self):
        return None

    def decode_chunk(self, latents, state):
        return latents.expand(1, 3, -1, 64, 64) / 127.5 - 1


def latents(levels, error=None):
    for value in levels:
        yield torch.full((1, 3, 2, 1, 1), float(value))
    if error:
        raise error


RECORD = {"record": {"prompt": "a"}, "sheet": True, "save_latents": True}


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt(), RuntimeError("a")])
def test_whatever_ends_a_clip_leaves_what_is_finished(tmp_path, error):
    with pytest.raises(type(error)):
        clips.write(Decoder(), latents([40, 80], error), tmp_path / "a.mp4", frames=9, **RECORD)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["a.json", "a.mp4", "a.png", "a.safetensors"]
    assert len(read_video(tmp_path / "a.mp4")) == 4
    assert json.loads((tmp_path / "a.json").read_text())["frames_written"] == 4


def test_files_beside_belong_to_the_clip(tmp_path):
    """Of two that write one name, the second to end leaves the first's alone."""

    def slow():
        yield from latents([40])
        clips.write(Decoder(), latents([200]), tmp_path / "a.mp4", frames=2, **RECORD)

    with pytest.raises(FileExistsError, match="exists by now"):
        clips.write(Decoder(), slow(), tmp_path / "a.mp4", frames=2, **RECORD)
    suffixes = [".json", ".mp4", ".png", ".safetensors"]
    assert sorted(file.suffix for file in tmp_path.glob("*.partial.*")) == suffixes
    assert (
        sorted(file.suffix for file in tmp_path.glob("a.*") if ".partial" not in file.name)
        == suffixes
    )
    assert abs(level(tmp_path / "a.mp4") - 200) < 3
    assert iio.imread(tmp_path / "a.png")[0, 0, 0] == 200


def test_frames_come_back_in_order(tmp_path):
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    writer.add(torch.from_numpy(numbered(20)))
    writer.close()
    assert indices(read_video(tmp_path / "a.mp4")) == list(range(20))
