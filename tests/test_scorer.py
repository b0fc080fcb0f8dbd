"""The scorer of the tiny world: true clips pass, and faults that an eye sees are seen."""

from dataclasses import replace

import pytest
import torch
from tiny import LABELS, make_codec, scorer, world

from wan5b.flow import add_noise

CHUNKS = world.pixel_chunks([3, 3, 3])
WORDS = {
    "colour": list(world.COLOURS),
    "shape": list(world.SHAPES),
    "direction": list(world.DIRECTIONS),
}


@pytest.fixture(scope="module")
def clips():
    return world.draw(LABELS, 33, seed=1)


@pytest.fixture(scope="module")
def codec():
    return make_codec()


def judge(video, labels=LABELS):
    return scorer.summary(scorer.score(video.split(CHUNKS, 2), labels))


def test_true_clips_score_one(clips, codec):
    drawn = judge(clips)
    assert {drawn[key] for key in WORDS} == {1}
    assert drawn["overlap"] > 0.9
    assert max(drawn[key] for key in ("ghosts", "drift", "shade")) < 1e-3
    coded = judge(codec.decode(codec.encode(clips)))
    assert {coded[key] for key in WORDS} == {1}
    assert coded["overlap"] > 0.8, "the codec's blur"
    assert coded["ghosts"] < 0.05
    assert coded["drift"] < 1e-3
    assert coded["area_change"] < 0.03


def test_plain_clips_score_one():
    plain = judge(world.draw(LABELS, 33, seed=1, plain=True))
    assert {plain[key] for key in WORDS} == {1}
    assert plain["overlap"] > 0.99


def test_noise_does_not_hide_a_true_clip(clips, codec):
    noise = torch.randn(16, 48, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy = judge(codec.decode(add_noise(codec.encode(clips), noise, 0.05)))
    assert min(noisy[key] for key in WORDS) > 0.95


@pytest.mark.parametrize("key", WORDS)
def test_a_wrong_word_is_seen(clips, key):
    wrong = []
    for label in LABELS:
        place = WORDS[key].index(getattr(label, key))
        wrong.append(replace(label, **{key: WORDS[key][place - 1]}))
    found = judge(clips, wrong)
    assert found[key] == 0
    # A shape of a wrong colour is not all there; one that goes another way leaves its lane.
    others = {"shape": ("colour", "direction")}.get(key, ())
    assert all(found[other] == 1 for other in others)


def test_broken_clips(clips):
    frozen = judge(clips[:, :, :1].expand_as(clips))
    assert (frozen["colour"], frozen["shape"], frozen["direction"]) == (1, 1, 0)
    backwards = judge(clips.flip(2))
    assert (backwards["shape"], backwards["direction"]) == (1, 0)
    grey = judge(torch.zeros_like(clips))
    assert (grey["colour"], grey["shape"], grey["direction"]) == (0, 0, 0)
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert max(judge(0.5 * noise)[key] for key in WORDS) < 0.1


# ---------------------------------------------------------------------- faults that an eye sees


def painted(label, change):
    """A clip [3, 33, 64, 64] of a label on mid-grey; change(mask) -> what is painted of it."""
    colour = torch.tensor(world.COLOURS[label.colour])[:, None, None]
    frames = [colour * change(world.placed_mask(label, -12, t)) for t in range(33)]
    return torch.stack(frames, 1)


def ghost(mask):
    """A second, fainter one, half the torus away."""
    return torch.maximum(mask, 0.5 * mask.roll((32, 32), (0, 1)))


def doubled(mask):
    return torch.maximum(mask, mask.roll((7, 7), (0, 1)))


def broken(mask):
    """What is more than three pixels above its middle is missing."""
    cut = mask.clone()
    cut[: world.SIZE // 2 - 3] = 0
    return cut


def faded(mask):
    return 0.35 * mask


def shrunk(mask):
    """A border of two pixels is missing."""
    return -torch.nn.functional.max_pool2d(-mask[None], 5, 1, 2)[0]


def show(label, change):
    clip = painted(label, change)[None]
    return judge(clip, [label])


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_sound_shape(shape):
    found = show(world.Label("red", shape, "right"), lambda mask: mask)
    assert (found["colour"], found["shape"], found["direction"]) == (1, 1, 1)
    assert found["overlap"] == 1
    assert found["ghosts"] == 0


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("change", [ghost, doubled, broken, faded])
def test_faults(shape, change):
    found = show(world.Label("red", shape, "right"), change)
    assert found["shape"] == 0
    if change is ghost:
        assert found["ghosts"] > 0.5
    if change in (doubled, broken):
        assert found["overlap"] < 0.75
    if change is faded:
        assert (found["colour"], found["overlap"]) == (0, 0)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shrunk_shape(shape):
    found = show(world.Label("red", shape, "right"), shrunk)
    assert found["overlap"] < 0.85


def test_a_wrong_hue():
    """Orange is neither red nor yellow."""
    label = world.Label("red", "square", "right")
    masks = torch.stack([world.placed_mask(label, -12, t) for t in range(33)])
    orange = torch.tensor([0.9, 0.05, -0.6])[:, None, None, None] * masks
    assert judge(orange[None], [label])["colour"] == 0


def test_drift_is_measured(clips):
    """A background that moves to another one; two clips' backgrounds are .2 apart."""
    other = clips.roll(1, 0)
    way = torch.linspace(0, 1, 33)[:, None, None]
    scores = scorer.score((clips * (1 - way) + other * way).split(CHUNKS, 2), LABELS)
    first, middle, last = scores["drift"].mean(0).tolist()
    assert first == 0
    assert 0.05 < middle < last
    assert last > 0.15
    fading = scorer.score((clips * (1 - 0.7 * way)).split(CHUNKS, 2), LABELS)
    assert fading["shade"][:, 2].mean() > 0.3
    assert fading["drift"][:, 2].mean() > 0.05
