"""Videos that grow for hours: killed at any moment, gone on from, told of when they are on the
disk.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from wan5b.extras import mp4, remux

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """For the disk: a test that is about it looks for itself."""
    monkeypatch.setattr(mp4, "sync", lambda path: None)


def moving(count, height=64, width=96):
    """Frames of a picture that moves, uint8 [T, H, W, 3]."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 4, 300, 3), dtype=np.uint8)
    picture = coarse.repeat(4, 0).repeat(4, 1)
    frames = [picture[:, 2 * i : 2 * i + width] for i in range(count)]
    return torch.from_numpy(np.stack(frames))


def decoded(path, **options):
    """What a player shows of a file that may be cut off: rgb24 frames, up to the first gap."""
    frames = []
    with av.open(str(path)) as file:
        decoder = file.streams.video[0].codec_context
        for name, value in options.items():
            setattr(decoder, name, value)
        for packet in whole_packets(file):
            frames += decoder.decode(packet)
        frames += decoder.decode(None)
    pictures = []
    for frame in frames:
        if frame.pts != len(pictures) * 512:
            break
        pictures.append(frame.to_ndarray(format="rgb24", threads=1))
    return pictures


def whole_packets(file):
    try:
        for packet in file.demux(video=0):
            if packet.is_corrupt or not packet.size:
                return
            yield packet
    except av.FFmpegError:  # half a box
        pass


def same(some, others):
    return len(some) == len(others) and all(map(np.array_equal, some, others))


def write(path, frames, sizes, after=None, marks=True, seen=None, **options):
    """A clip in chunks of those sizes, each but the first begins with a mark."""
    writer = mp4.VideoWriter(path, after=after, **options)
    at = after[1] if after else 0
    with closing(writer):
        for chunk in frames[at:].split(sizes):
            whole = None
            if marks and at:
                whole = (lambda at=at: seen(at, writer)) if seen else (lambda: None)
            writer.add(chunk, whole)
            at += len(chunk)
    return writer


# --------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("length", range(24, 40))
def test_the_last_picture_is_shown_whichever_packet_comes_last(tmp_path, length):
    """FFmpeg forgets it when the last fragment has only B-frames, in 2 of these 16 lengths."""
    levels = torch.arange(length, dtype=torch.uint8).view(-1, 1, 1, 1) * 5
    writer = write(tmp_path / "a.mp4", levels.expand(-1, 64, 64, 3), length)
    assert writer.count == length
    assert len(decoded(tmp_path / "a.mp4")) == length
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.frames == length
        assert abs(stream.duration * stream.time_base - length / 24) <= 0.001
        assert abs(file.duration / av.time_base - length / 24) <= 0.001


def test_a_closed_file_is_an_ordinary_one(tmp_path):
    frames = moving(60)
    write(tmp_path / "a.mp4", frames, [20, 40])
    with open(tmp_path / "a.mp4", "rb") as file:
        content = file.read()
    kinds = []
    while content:
        length = int.from_bytes(content[:4], "big")
        if length == 1:
            length = int.from_bytes(content[8:16], "big")
        kinds.append(content[4:8])
        content = content[length:]
    assert kinds == [b"ftyp", b"free", b"mdat", b"moov"]
    whole = decoded(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        for i in (45, 3, 20, 59, 0):
            file.seek(i * 512, stream=stream)
            shown = next(frame for frame in file.decode(stream) if frame.pts == i * 512)
            assert np.array_equal(shown.to_ndarray(format="rgb24", threads=1), whole[i])


def test_marks_change_pictures_only_by_keyframes(tmp_path):
    """Nothing refers across one: each part decodes alone to the same."""
    write(tmp_path / "a.mp4", moving(60), [20, 1, 39])
    whole = decoded(tmp_path / "a.mp4")
    assert len(whole) == 60
    with remux.source(tmp_path / "a.mp4") as file:
        gops = list(remux.read_gops(file, 60, 24))
        assert [gop[0].pts for gop in gops] == [0, 20, 21]
        for gop in gops:
            numbers = {packet.pts for packet in gop}
            assert numbers == set(range(min(numbers), max(numbers) + 1))
            part = whole[min(numbers) : max(numbers) + 1]
            assert same(remux.decode_frames(gop, file, numbers), part)


# ------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("width", [96, 256])
def test_whole_is_called_when_the_disk_has_what_is_in_front(tmp_path, monkeypatch, width):
    """A copy of the file at that moment plays. At 256 x264 looks 40 frames ahead."""
    copies, synced = {}, []
    monkeypatch.setattr(mp4, "sync", lambda path: synced.append(path.stat().st_size))

    def seen(at, writer):
        copies[at] = shutil.copy(writer.partial, tmp_path / f"{at}.copy")
        assert os.path.getsize(copies[at]) == synced[-1]

    write(tmp_path / "a.mp4", moving(100, width=width), [1, 1, 23, 1, 30, 44], seen=seen)
    assert list(copies) == [1, 2, 25, 26, 56]
    whole = decoded(tmp_path / "a.mp4")
    for at, copy in copies.items():
        assert len(decoded(copy)) >= at
        assert same(decoded(copy)[:at], whole[:at])


def test_whole_comes_while_the_clip_grows(tmp_path):
    """And the growing file plays, but for what the encoder and the last fragment hold."""
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    called = []
    writer.add(moving(30), lambda: called.append(0))
    writer.add(moving(30), lambda: called.append(30))
    writer.pending.result()
    assert called == [0, 30]
    assert 60 - len(decoded(writer.partial)) < 30
    writer.close()


def test_close_calls_what_is_outstanding(tmp_path):
    called = []

    def interrupted():
        with closing(mp4.VideoWriter(tmp_path / "a.mp4")) as writer:
            writer.add(moving(5))
            writer.add(moving(2), lambda: called.append(len(decoded(writer.partial))))
            writer.add(moving(1)[:0], lambda: called.append(len(decoded(writer.partial))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert called[0] >= 5
    assert called[1] == 7
    assert len(decoded(tmp_path / "a.mp4")) == 7


def test_what_whole_raises_ends_the_clip(tmp_path):
    called = []
    writer = mp4.VideoWriter(tmp_path / "a.mp4")
    writer.add(moving(20))
    writer.add(moving(20), lambda: 1 / 0)

    def two_more():
        """While the encoder is still at work, its error can't be raised by the first."""
        writer.add(moving(20), lambda: called.append(1))
        writer.add(moving(20), lambda: called.append(2))

    with pytest.raises(ZeroDivisionError):
        two_more()
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert not called
    assert writer.where == writer.partial
    assert len(decoded(writer.partial)) == writer.count >= 20


# ------------------------------------------------------------------------------------------- after


@pytest.mark.parametrize("width", [66, 256])
def test_going_on_makes_the_same_file(tmp_path, width):
    """From a closed file, from states that a kill can leave; all bytes, of all pictures."""
    frames = moving(75, 48, width)
    sizes = [1, 1, 25, 1, 32, 15]
    copies = {}

    def seen(at, writer):
        copies[at] = shutil.copy(writer.partial, tmp_path / f"{at}.killed")

    write(tmp_path / "a.mp4", frames, sizes, seen=seen)
    expected = (tmp_path / "a.mp4").read_bytes()
    assert list(copies) == [1, 2, 27, 28, 60]
    with open(copies[27], "ab") as file:
        file.write(b"\0\0\1\0moof\0\0")  # half a box
    for i, (boundary, copy) in enumerate(copies.items()):
        for source in (tmp_path / "a.mp4", Path(copies[60] if boundary == 1 else copy)):
            before = source.read_bytes()
            write(tmp_path / "b.mp4", frames, sizes[i + 1 :], after=(source, boundary))
            assert (tmp_path / "b.mp4").read_bytes() == expected
            assert source.read_bytes() == before


def test_a_clip_that_ends_at_the_boundary(tmp_path):
    write(tmp_path / "a.mp4", moving(30), 30)
    write(tmp_path / "b.mp4", moving(50), 20, after=(tmp_path / "a.mp4", 30))
    first, both = decoded(tmp_path / "a.mp4"), decoded(tmp_path / "b.mp4")
    assert len(both) == 50
    assert same(first, both[:30])
    write(tmp_path / "c.mp4", moving(30), 1, after=(tmp_path / "a.mp4", 30))
    assert same(first, decoded(tmp_path / "c.mp4"))
    write(tmp_path / "d.mp4", moving(3, 32, 32), 3, after=(tmp_path / "a.mp4", 0))
    assert len(decoded(tmp_path / "d.mp4")) == 3


@pytest.mark.parametrize("threads", [("SLICE", 1), ("FRAME", 4), ("AUTO", 3)])
def test_other_frames_go_on_smoothly(tmp_path, threads):
    """As other decoders read it, too, and while it grows."""
    options = {"thread_type": threads[0], "thread_count": threads[1]}
    copies = []
    write(tmp_path / "a.mp4", moving(60), [20, 40])
    write(
        tmp_path / "b.mp4",
        255 - moving(60),
        20,
        after=(tmp_path / "a.mp4", 20),
        seen=lambda at, writer: copies.append(shutil.copy(writer.partial, tmp_path / f"{at}.copy")),
    )
    first, both = decoded(tmp_path / "a.mp4", **options), decoded(tmp_path / "b.mp4", **options)
    assert len(both) == 60
    assert same(first[:20], both[:20])
    assert np.abs(np.stack(both[20:]).astype(int) - (255 - moving(60)[20:]).numpy()).mean() < 25
    growing = decoded(copies[1], **options)
    assert len(growing) >= 40
    assert same(growing, both[: len(growing)])


def test_frames_to_keep_are_found_in_what_is_copied(tmp_path):
    write(tmp_path / "a.mp4", moving(40), [10, 30])
    keep = {3, 9, 10, 25}
    whole = write(tmp_path / "b.mp4", moving(40), 30, keep=keep)
    again = write(tmp_path / "c.mp4", moving(40), 30, after=(tmp_path / "a.mp4", 10), keep=keep)
    first = decoded(tmp_path / "a.mp4")
    assert len(again.kept) == len(whole.kept) == 4
    assert same(again.kept[:2], [first[3], first[9]])
    assert same(again.kept[2:], whole.kept[2:])


WRONG = {
    "which has 40; go on from 40 or fewer": {"after": 41},
    "no keyframe follows them": {"after": 11},
    "which has 24 frames a second, not 12": {"after": 10, "fps": 12},
    "another version of x264": {"after": 10, "encoder": "old"},
    "damaged in frame 0": {"after": 10, "damage": True},
}


@pytest.mark.parametrize("says", WRONG)
def test_what_cannot_be_gone_on_from(tmp_path, monkeypatch, says):
    case = WRONG[says]
    source = tmp_path / "a.mp4"
    write(source, moving(40), [10, 30])
    if "encoder" in case:
        start = mp4.VideoWriter._start_encoder
        monkeypatch.setattr(
            mp4.VideoWriter,
            "_start_encoder",
            lambda self, height, width: start(self, height + 2, width),
        )
    if "damage" in case:
        content = bytearray(source.read_bytes())
        with av.open(str(source)) as file:
            content[next(file.demux(video=0)).pos] = 1
        source.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        mp4.VideoWriter(tmp_path / "b.mp4", case.get("fps", 24), after=(source, case["after"]))
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_files_that_are_no_video_of_ours(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with av.open(str(tmp_path / "b.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", 24)
        stream.width = stream.height = 64
        file.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        file.mux(stream.encode())
    for name, says in {
        "a.txt": "cannot go on from",
        "b.mp4": "no mp4 of H.264",
        "c": "No such",
    }.items():
        with pytest.raises(ValueError, match=says):
            mp4.VideoWriter(tmp_path / "x.mp4", after=(tmp_path / name, 1))
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.mp4"]


@pytest.mark.parametrize("format", ["mp4", "h264"])
def test_videos_of_other_programs(tmp_path, format):
    """The same encoder, but with a gap, and as a bare stream without times."""
    with av.open(str(tmp_path / "a"), "w", format=format) as file:
        stream = file.add_stream("libx264", 24)
        stream.width = stream.height = 64
        stream.codec_context.options = {"x264-params": "mbtree=0"}
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for i in (0, 1, 2, 5, 6):
            frame = av.VideoFrame(64, 64, "yuv420p")
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="cannot go on from .*a"):
        mp4.VideoWriter(tmp_path / "x.mp4", after=(tmp_path / "a", 5))
    assert os.listdir(tmp_path) == ["a"]


def test_another_size(tmp_path):
    write(tmp_path / "a.mp4", moving(10), 10)
    writer = mp4.VideoWriter(tmp_path / "b.mp4", after=(tmp_path / "a.mp4", 10))
    assert writer.count == 10
    with pytest.raises(ValueError, match="of 96x64 cannot be added to a clip of 64x96"):
        writer.add(moving(3, 96, 64))
    writer.close()
    assert len(decoded(tmp_path / "b.mp4")) == 10


# ------------------------------------------------------------------------------------------ faults


def test_killed_at_any_moment(tmp_path):
    """Copies while it grows stand for kills: what was written is there, whoever writes it."""
    frames = moving(120)
    reached, states = [0], []

    def seen(at, writer):
        reached.append(at)

    def state(writer, packets, mux=mp4.VideoWriter._mux):
        mux(writer, packets)
        content = writer.partial.read_bytes()
        if b"moof" in content:
            states.append((reached[-1], content))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mp4.VideoWriter, "_mux", state)
        write(tmp_path / "a.mp4", frames, [40, 30, 50], seen=seen)
    whole = decoded(tmp_path / "a.mp4")
    states = list(dict.fromkeys(states))
    assert len(states) > 8
    for at, content in states:
        (tmp_path / "state").write_bytes(content)
        shown = decoded(tmp_path / "state")
        assert len(shown) >= at
        assert same(shown, whole[: len(shown)])


CHILD = """
import sys, time
from wan5b.extras import mp4
sys.path.insert(0, "tests")
from test_mp4 import moving
frames = moving(400)
writer = mp4.VideoWriter(sys.argv[1])
for at in range(0, 400, 8):
    writer.add(frames[at : at + 8], lambda at=at: print(at, flush=True))
time.sleep(60)
"""


@pytest.mark.slow
def test_killed(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if int(line) >= 40:
                break
        time.sleep(np.random.default_rng().uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        boundary = max(map(int, [line, *child.stdout]))
    (left,) = tmp_path.glob("*.partial.mp4")
    shown = decoded(left)
    assert len(shown) >= boundary
    write(tmp_path / "b.mp4", moving(400)[: boundary + 40], 8, after=(left, boundary))
    write(tmp_path / "c.mp4", moving(400)[: boundary + 40], 8)
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99, 1])
def test_a_full_disk_leaves_what_whole_has_told(tmp_path, share):
    """Also if only the end of the file has no more room."""
    write(tmp_path / "a.mp4", moving(60), 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = int((tmp_path / "a.mp4").stat().st_size * share) - 1
    told = [0]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="b.*partial.mp4"):
            write(tmp_path / "b.mp4", moving(60), 10, seen=lambda at, _: told.append(at))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (left,) = tmp_path.glob("b.*")
    shown = decoded(left)
    assert len(shown) >= told[-1] >= 10
    assert same(shown, decoded(tmp_path / "a.mp4")[: len(shown)])
    write(tmp_path / "c.mp4", moving(60), 10, after=(left, told[-1]))
    assert (tmp_path / "c.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
