"""The small model of the tiny world, as it comes with the repository: it is sampled like any other,
shows what captions say, and follows when they change.
"""

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_codec, scorer, small, world

import sample
from wan5b.extras.formats import load_dit, load_vae
from wan5b.extras.sampling import generate

# Twelve captions with every colour, shape and direction, and another one for each of them.
ORDER = range(0, 60, 5)
FIRST = [world.LABELS[i % 48] for i in ORDER]
SECOND = [world.LABELS[(i + 19) % 48] for i in ORDER]


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "live"
    small.make_live(folder)
    return folder


@pytest.fixture(scope="module")
def scored(live):
    """Six chunks of the first captions, judged by these; four more of the second, by those."""
    contexts = small.captions(live / "release").flatten(0, 2)
    first, second = (
        contexts[[world.LABELS.index(label) for label in labels]] for labels in (FIRST, SECOND)
    )
    chunks = [small.CHUNK] * 10
    noise = torch.randn(12, 48, sum(chunks), 4, 4, generator=torch.Generator().manual_seed(1))
    how = {"causal": True, "solver": "renoise", "window": 9, "seed": 1, "recache": True}
    texts = [first] * 6 + [second] * 4
    with torch.no_grad():
        model = load_dit(live / "small.safetensors")
        latents = torch.cat([*generate(model, noise, texts, small.SIGMAS, chunks, **how)], 2)
    video = load_vae(live / "release").decode(latents)
    pieces = with_the_frame_before(video, world.pixel_chunks(chunks))
    return scorer.score(pieces[:6], FIRST), scorer.score(pieces, SECOND)


def with_the_frame_before(video, pixels):
    """The chunks, each with the last judged frame of the one before: motion counts across edges."""
    ends = torch.tensor(pixels).cumsum(0).tolist()
    starts = [0, *(end - scorer.EVERY for end in ends[:-1])]
    return [video[:, :, start:end] for start, end in zip(starts, ends, strict=True)]


def test_the_size_of_the_file():
    assert small.SHIPPED.stat().st_size < 450_000


def test_what_captions_say(scored):
    """First chunks are weak, in shape and in direction."""
    first, _ = scored
    assert first["colour"].mean() >= 0.98
    assert first["kind"][:, 1:].mean() >= 0.9
    assert first["overlap"][:, 1:].mean() >= 0.75
    assert first["direction"][:, 1:].mean() >= 0.85


def test_another_caption(scored):
    """It is followed from the second chunk behind the change."""
    _, second = scored
    for word in ("colour", "kind", "direction"):
        assert second[word][:, 8:].mean() >= 0.9, word
    assert second["colour"][:, :6].mean() < 0.5, "the scorer tells the captions apart"


def test_sample_takes_it(live, tmp_path, capsys):
    options = ["--release", live / "release", "--weights", live / "small.safetensors"]
    options += ["--prompt", "a red ring moves left", "--size", "64x64", "--frames", 33]
    options += ["--out", tmp_path / "clip.mp4"]
    sample.main(sample.parse([str(option) for option in options]))
    assert "window 9" in capsys.readouterr().out
    frames = torch.from_numpy(iio.imread(tmp_path / "clip.mp4")).float() / 127.5 - 1
    assert frames.shape == (33, 64, 64, 3)
    label = world.label_of("a red ring moves left")
    video = frames.permute(3, 0, 1, 2)[None]
    scores = scorer.score(with_the_frame_before(video, world.pixel_chunks([3] * 3)), [label])
    assert scores["colour"].all()
    assert scores["kind"].all()


def test_again(live):
    """A second `make live` keeps the release and writes the same model."""
    model = live / "small.safetensors"
    before = load_file(model)
    made = (live / "release" / "models_t5_tiny.pth").stat().st_mtime_ns
    small.make_live(live)
    after = load_file(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (live / "release" / "models_t5_tiny.pth").stat().st_mtime_ns == made


def test_packing(tmp_path):
    """Rows in int8 are within half a step of their largest number."""
    torch.manual_seed(0)
    model = small.initial()
    small.pack(model, tmp_path / "a.safetensors")
    there = small.widened(model).state_dict()
    back = small.unpack(tmp_path / "a.safetensors").state_dict()
    name = "blocks.0.self_attn.v.weight"
    step = there[name].abs().amax(1, keepdim=True) / 127
    assert ((there[name] - back[name]).abs() <= 0.501 * step).all()
    assert torch.equal(back[name], back["blocks.1.self_attn.v.weight"]), "layers share it"
    assert not torch.equal(back["blocks.0.modulation"], back["blocks.1.modulation"])


def test_drawing_in_latents():
    """It is the codec's view of the world's clips; where a caption changes the place is kept."""
    codec = make_codec(mean_scale=1.0)
    labels = world.LABELS[::7]
    latents = codec.encode(world.draw(labels, 33, seed=2, plain=True))
    index = torch.tensor([divmod(world.LABELS.index(label), 4) for label in labels])
    index = torch.stack([index[:, 0] // 3, index[:, 0] % 3, index[:, 1]], 1)
    starts = torch.arange(16).expand(len(labels), -1)
    drawn, _ = small.draw_chunk(index[:, None].expand(-1, 16, -1), starts, opens=True)
    place = (drawn - latents[:, None, :, :3]).abs().amax((2, 3, 4, 5)).argmin(1)
    for k, piece in enumerate(latents.split(3, 2)):
        drawn, place = small.draw_chunk(index, place, opens=k == 0)
        assert (drawn - piece).abs().max() < 1e-4
    right, up = torch.tensor([[0, 0, 1]]), torch.tensor([[3, 2, 2]])
    assert small.draw_chunk(right, torch.tensor([2]), False)[1] == 5
    assert small.draw_chunk(up, torch.tensor([2]), False)[1] == 15
