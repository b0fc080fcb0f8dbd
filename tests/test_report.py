"""The report of a video's health: clips that are drawn with one fault each, and without any."""

import numpy as np
import pytest
from health import FRAMES, H, W, described, dissolve, journey, landscape, sawtooth, softened, still

from wan5b.extras import report
from wan5b.extras.pulse import pulse, steps, strongest

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def clean():
    return journey()


def visible(found):
    """The series with a visible pulse, and their amplitudes."""
    of = found["pulse"]["of"]
    return {name: item["amplitude"] for name, item in of.items() if item["visible"]}


# ----------------------------------------------------------------------------------- without faults


@pytest.mark.parametrize("chunk", [3, None])
def test_a_clean_moving_clip_has_no_findings(clean, chunk):
    found = described(clean, chunk)
    assert found["findings"] == []
    assert found["frames"] == FRAMES
    assert found["fps"] == 24
    assert found["still"] == 0
    assert found["motion"] > 5 * report.STILL


def test_noise_has_no_findings():
    """Every frame is another picture, and none of them is a cut."""
    found = described(RNG.uniform(0, 255, (120, H, W, 3)))
    assert found["findings"] == []
    assert max(found["series"]["similarity"][12:]) < 0.1


# ------------------------------------------------------------------------------------------- drift


def test_brightness_drifts_alone():
    """By 60 levels over the clip. The middles of its first and last 15% are 85 frames apart."""
    ramp = np.linspace(-30, 30, 100)[:, None, None, None]
    found = described(still(100) + ramp)["drift"]
    assert found["luma"]["change"] == pytest.approx(60 * 85 / 99, abs=0.1)
    assert found["luma"]["start"] == pytest.approx(
        (still(1) @ [0.2126, 0.7152, 0.0722]).mean() - 30 + 60 * 7 / 99, abs=0.1
    )
    assert found["spread"]["change"] == pytest.approx(0, abs=0.1)
    assert found["sharpness"]["change"] == pytest.approx(0, abs=0.01 * found["sharpness"]["start"])


def test_exposure_changes_neither_saturation_nor_sharpness():
    gain = np.linspace(1, 0.5, 100)[:, None, None, None]
    found = described(still(100) * gain)["drift"]
    factor = (1 - 0.5 * 92 / 99) / (1 - 0.5 * 7 / 99)
    for name in ("luma", "spread"):
        assert found[name]["end"] / found[name]["start"] == pytest.approx(factor, rel=0.01)
    for name in ("saturation", "sharpness"):
        assert found[name]["end"] / found[name]["start"] == pytest.approx(1, rel=0.02)


def test_saturation_is_that_of_hsv():
    """For one colour; and colours that fade to gray of their own luma change nothing else."""
    plain = np.ones((9, H, W, 1)) * [200, 120, 80]
    assert described(plain)["drift"]["saturation"]["start"] == 0.6

    gray = still(40) @ np.array([[0.2126], [0.7152], [0.0722]])
    found = described(dissolve(still(40), gray, 6, 27))["drift"]
    assert found["saturation"]["start"] > 0.2
    assert found["saturation"]["end"] == 0
    assert found["luma"]["change"] == pytest.approx(0, abs=0.1)
    assert found["spread"]["change"] == pytest.approx(0, abs=0.1)


def test_sharpness_falls_with_blur_and_rises_with_checks(clean):
    blurred = clean.copy()
    blurred[-60:] = softened(blurred[-60:])
    found = described(blurred)["drift"]["sharpness"]
    whole = described(clean)["drift"]["sharpness"]
    assert found["start"] == whole["start"]
    assert found["end"] < 0.5 * whole["end"]

    # Of a chessboard the Laplacian is 8 times the distance from the middle, everywhere.
    board = 128 + 50 * (-1.0) ** np.add.outer(np.arange(H), np.arange(W))
    found = described(np.repeat(board[None, :, :, None], 3, 3).repeat(3, 0))["drift"]
    assert found["sharpness"]["start"] == pytest.approx(8, rel=1e-3)
    assert found["spread"]["start"] == pytest.approx(50, rel=1e-3)


# ------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize("pixels", [0.05, 0.2, 0.3])
@pytest.mark.parametrize("angle", [0, 0.5, 1.5])
def test_slow_motion_has_its_speed(angle, pixels):
    """Waves of 20 to 40 pixels in all directions shift by so many pixels a frame."""
    y, x = np.mgrid[:H, :W].astype(float)
    rng = np.random.default_rng(3)
    waves = []
    for direction in np.arange(12) * np.pi / 12:
        turn, length, phase = direction, rng.uniform(20, 40), rng.uniform(0, 7)
        waves.append((2 * np.pi / length * np.cos(turn), 2 * np.pi / length * np.sin(turn), phase))
    clip = []
    for i in range(30):
        right, down = i * pixels * np.cos(angle), i * pixels * np.sin(angle)
        clip.append(sum(np.sin(a * (x - right) + b * (y - down) + c) for a, b, c in waves))
    clip = 128 + 14 * np.stack(clip)[..., None].repeat(3, 3)
    expected = 24 * 100 * pixels / H
    assert described(clip)["motion"] == pytest.approx(expected, rel=0.12)


def test_faster_is_more():
    motions = [described(journey(60, speed=speed))["motion"] for speed in (0.1, 1, 2, 4)]
    assert motions == sorted(motions)
    assert motions[0] > report.STILL


STATIC = {
    "as it is": still,
    "grain": lambda: still() + RNG.normal(0, 1.5, (FRAMES, H, W, 1)),
    "darker and darker": lambda: still() * np.linspace(1, 0.6, FRAMES)[:, None, None, None],
    "black": lambda: np.zeros((FRAMES, H, W, 3)),
}


@pytest.mark.parametrize("name", STATIC)
def test_a_static_clip_is_called_static(name):
    found = described(STATIC[name]())
    assert found["findings"] == ["STATIC: hardly anything moves, so its drift says nothing"]
    assert found["still"] > 0.95
    assert "STATIC" in report.table([found])


def test_a_small_thing_that_moves_is_motion():
    """A square that wanders over a still picture."""
    clip = still()
    for i in range(FRAMES):
        clip[i, 20:40, 5 + 2 * i // 5 : 25 + 2 * i // 5] = 255
    found = described(clip)
    assert found["findings"] == []


def test_a_clip_that_freezes():
    moving = journey(81)
    found = described(np.concatenate([moving, moving[-1:].repeat(80, 0)]))
    share = (80 - 17) / (161 - 18)  # what is 18 frames back must be frozen, too
    assert found["still"] == pytest.approx(share, abs=0.02)
    assert found["drift"]["motion"]["end"] == 0
    assert found["findings"] == [f"still for {share:.0%} of the time"]


# ------------------------------------------------------------------------------------------- pulse


@pytest.mark.parametrize(("size", "speed"), [(1.5, 2), (4, 8)])
def test_a_pulse_of_luma_under_strong_motion(size, speed):
    found = described(journey(speed=speed) + size * sawtooth())
    assert found["pulse"]["period"] == 12
    assert visible(found).keys() == {"luma"} | visible(found).keys() & {"saturation"}
    assert visible(found)["luma"] == pytest.approx(size, rel=0.15)
    assert found["findings"][0].startswith("PULSE with the chunks every 12 frames: luma by ")

    # The cycle begins at frame 9, and with it all chunks.
    cycle = found["pulse"]["of"]["luma"]["cycle"]
    assert int(np.argmin(np.diff([*cycle, cycle[0]]))) == 8


@pytest.mark.parametrize(("chunk", "period"), [(1, 4), (8, 32)])
def test_chunks_of_other_sizes(chunk, period):
    frames = 6 * 32 + 1
    found = described(journey(frames) + 3 * sawtooth(frames, period), chunk)
    assert visible(found)["luma"] == pytest.approx(3, rel=0.15)


def test_a_pulse_of_sharpness(clean):
    """At each chunk's end a quarter of the way to the blurred picture."""
    clip = dissolve(clean, softened(clean), 0, 1) * 0.25 * sawtooth()
    found = described(clean * (1 - 0.25 * sawtooth()) + clip)
    assert visible(found).keys() == {"sharpness"}
    assert 5 < visible(found)["sharpness"] < 25


def test_jumps_of_position():
    """Three pixels too many at each chunk's start: the picture is as bright and as sharp."""
    wide = np.roll(landscape(), 100, 1)
    at = np.cumsum(np.where(np.arange(FRAMES) % 12 == 9, 4, 1))
    found = described(np.stack([wide[:H, x : x + W] for x in at]))
    assert "change" in visible(found)
    assert "luma" not in visible(found)


def test_an_unknown_period_is_found(clean):
    found = described(clean + 3 * sawtooth(period=16), None)
    assert found["pulse"]["period"] == 16
    assert visible(found)["luma"] == pytest.approx(3, rel=0.15)
    assert found["findings"][0].startswith("repeats every 16 frames: luma by ")


@pytest.mark.parametrize("period", [11, 12.7, 14])
def test_motion_with_a_period_beside_the_chunks(period):
    """Brightness and position swing strongly, in waves that no chunk makes."""
    land = landscape()
    swing = np.sin(2 * np.pi * np.arange(FRAMES) / period)
    clip = [land[50 : 50 + H, x : x + W] for x in (300 + 40 * swing).astype(int)]
    found = described(np.stack(clip) + 5 * swing[:, None, None, None])
    assert visible(found) == {}


def test_what_each_latent_repeats_is_not_the_chunks(clean):
    """Four frames come from one latent, whatever the chunk."""
    found = described(clean + 3 * sawtooth(period=4))
    assert visible(found) == {}
    assert found["pulse"]["of"]["luma"]["amplitude"] == pytest.approx(3, rel=0.15)


def test_a_pulse_that_nobody_sees():
    """The longer the clip, the smaller one that is found."""
    found = described(journey(193) + 0.4 * sawtooth(193))
    assert found["findings"] == []
    luma = found["pulse"]["of"]["luma"]
    assert luma["amplitude"] == pytest.approx(0.4, rel=0.2)
    assert luma["strength"] > report.STRONG


@pytest.mark.parametrize("frames", [72, 73])
def test_six_chunks_are_needed(frames):
    found = described(journey(frames) + 3 * sawtooth(frames))
    assert ("too short to tell a pulse" in found["findings"]) == (frames == 72)
    assert ("luma" in visible(found)) == (frames == 73)


def test_cuts_are_no_pulse():
    """A scene for each four chunks: their cuts come with the chunks' period."""
    scenes = [journey(48 + 20 * seed, seed)[20 * seed :] for seed in range(4)]
    found = described(np.concatenate(scenes))
    assert found["cuts"] == [48, 96, 144]
    assert visible(found) == {}


@pytest.mark.parametrize("frames", [81, 241])
def test_false_alarms(frames):
    """Of noise, random walks and smooth curves at most 4 of 1,000 surpass the limit."""
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(500):
        noise = rng.normal(0, 5, frames + 14)
        walk = np.cumsum(noise)[14:]
        smooth = np.convolve(noise, np.hanning(15), "valid")
        for series in (noise[14:], walk, smooth):
            alarms += pulse(steps(series, []), 12).strength > report.STRONG
    assert alarms <= 6
    assert strongest(steps(walk, []), frames // 6, report.STRONG) is None


# --------------------------------------------------------------------------------- cuts and returns


@pytest.mark.parametrize("at", [[100], [2], [60, 64, 150]])
def test_cuts(at):
    scenes = [journey(FRAMES, seed) for seed in range(len(at) + 1)]
    clip = scenes[0]
    for scene, frame in zip(scenes[1:], at, strict=True):
        clip[frame:] = scene[frame:]
    found = described(clip)
    assert found["cuts"] == at
    assert found["returns"] == []
    named = ", ".join(map(str, at))
    assert found["findings"] == [f"{len(at)} cut{'s' * (len(at) > 1)} at {named}"]


@pytest.mark.parametrize("frames", [4, 12])
def test_a_dissolve_is_no_cut(clean, frames):
    assert described(dissolve(clean, journey(seed=5), 100, frames))["findings"] == []


def test_light_is_no_cut(clean):
    """A flash, a lamp that is switched on, a picture that comes up from black."""
    light = np.zeros((FRAMES, 1, 1, 1))
    light[50] = 40
    light[120:] = 35
    rise = np.clip(np.arange(FRAMES) / 12, 0, 1)[:, None, None, None]
    assert described((clean + light) * rise)["findings"] == []


def test_one_odd_frame_is_two_cuts(clean):
    odd = clean.copy()
    odd[77] = landscape(9)[:H, :W]
    assert described(odd)["cuts"] == [77, 78]


@pytest.mark.parametrize(("at", "over"), [(60, 4), (150, 1)])
def test_a_return_to_the_start(at, over):
    """At once, or blended over the frames of a latent; and then it goes on from there."""
    clip = softened(softened(journey(speed=1.5)))
    again = np.concatenate([clip[:at], clip[: FRAMES - at]])
    found = described(dissolve(clip, again, at - 1, over))
    (item,) = found["returns"]
    assert at <= item["frame"] < at + over
    assert item["latent"] == (item["frame"] + 3) // 4
    assert item["before"] < 0.3
    assert item["after"] > 0.8
    assert found["findings"][-1].startswith(f"BACK TO THE START at {item['frame']} (latent")


def test_motion_that_comes_round_is_no_return():
    """A landscape that scrolls round and round, and a camera that goes back where it came from."""
    land = landscape()[:H, :160]
    assert described(np.stack([np.roll(land, 3 * i, 1) for i in range(120)]))["returns"] == []
    there = journey(61, speed=4)
    assert described(np.concatenate([there, there[::-1]]))["returns"] == []


# ------------------------------------------------------------------------------------- odd clips


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_clips(frames):
    found = described(journey(frames), None)
    assert found["findings"] == ["too short to tell a pulse"]
    assert found["cuts"] == []
    assert (found["drift"]["luma"]["change"] is None) == (frames == 1)
    assert (found["motion"] is None) == (frames == 1)
    assert report.table([found, found])


@pytest.mark.parametrize("shape", [(33, 47), (8, 8), (2, 2), (1, 1), (1, 300), (131, 67)])
def test_odd_sizes(shape):
    height, width = shape
    clip = journey(80)[:, :height, :width] if height <= H else still(80).repeat(2, 1)
    clip = np.resize(clip, (80, height, width, 3))
    found = described(clip)
    assert found["size"] == [height, width]
    assert found["drift"]["luma"]["change"] is not None


def test_two_frames_a_second():
    """Each frame differs much from the one before; a cut is still one."""
    found = described(journey(60, speed=30), fps=2)
    assert found["fps"] == 2
    assert found["findings"] == ["too short to tell a pulse"]
    clip = np.concatenate([journey(30, speed=3), journey(30, 7, speed=3)])
    assert described(clip, fps=2)["cuts"] == [30]


def test_long_clips_keep_their_means(monkeypatch):
    """A plot gets POINTS points at most; the numbers come from all frames."""
    monkeypatch.setattr(report, "POINTS", 120)
    clip = np.arange(301)[:, None, None, None] % 200 * np.ones((1, 2, 2, 3))
    found = described(clip)
    assert found["series"]["every"] == 3
    assert found["series"]["luma"][:3] == [1, 4, 7]
    assert len(found["series"]["luma"]) == 101
    assert found["drift_frames"] == 45


def test_a_jerk_with_every_chunk_is_no_cut():
    """Chunks that begin with a jump are a pulse; a scene's jump stands out among these."""
    jump = np.full(240, 0.02)
    jump[::4] = 0.1
    jump[9::12] = 0.3
    jump[129] = 0.9
    assert report.find_cuts(jump, 3) == [129]
    jump[137] = 0.9  # in mid-chunk
    assert report.find_cuts(jump, 3) == [129, 137]
    # Where every latent frame begins with one, its length need not be known.
    jump = np.full(240, 0.02)
    jump[1::4] = 0.3
    assert report.find_cuts(jump) == []
