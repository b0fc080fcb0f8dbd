"""Long videos: a sink that follows the window, texts that change, memory that is made again."""

from dataclasses import replace
from itertools import chain, islice, pairwise, repeat

import pytest
import torch
from common import golden_dit, new_cache, randn, rel

from wan5b.distill import commit, rollout
from wan5b.dit import WanDiT
from wan5b.extras.past import Past
from wan5b.extras.sampling import draw_noise, generate
from wan5b.flow import few_step_sigmas, sampling_sigmas

CHUNK = 2
WINDOW = 8
SINK = 2
SIGMAS = few_step_sigmas()
HOW = {"causal": True, "solver": "renoise", "window": WINDOW, "sink": SINK}
GUIDED = HOW | {"solver": "unipc", "guidance": 3.0}
AFTER = few_step_sigmas((1000, 500))
KEPT = HOW | {"clean_pass": False}


@pytest.fixture(scope="module")
def model():
    return golden_dit("dit_kv_cache")


def text(seed=0, rows=1):
    return randn(rows, 12, 24, seed=100 + seed)


def latents(frames, seed=0):
    return randn(1, 48, frames, 4, 6, seed=seed)


def run(model, chunks, texts, noise=None, sigmas=SIGMAS, **options):
    """All latents of a video."""
    if noise is None:
        noise = draw_noise(5, chunks, (48, 4, 6))
    return torch.cat(list(generate(model, noise, texts, sigmas, chunks, **options)), 2)


# ------------------------------------------------------------------------------ sink that follows


def next_chunk(model, start, seed=0, **options):
    """v of a chunk behind a full memory: the sink, then frames that begin at `start`."""
    cache = new_cache(model, WINDOW, window=WINDOW, sink=SINK, **options)
    context = text()
    commit(model, latents(SINK, 1), context, cache)
    cache.rewind(start)
    for i in range((WINDOW - SINK) // CHUNK):
        commit(model, latents(CHUNK, 2 + i), context, cache)
    return model(latents(CHUNK, 50 + seed), 0.7, context, cache=cache)


@torch.no_grad()
def test_a_relative_sink_makes_chunks_independent_of_their_place(model):
    """Not so with an absolute one, which is further away in each."""
    near = next_chunk(model, 100, sink_rope="relative")
    assert rel(next_chunk(model, 100_000, sink_rope="relative"), near) < 1e-5
    assert rel(next_chunk(model, 100_000), next_chunk(model, 100)) > 1e-3


@torch.no_grad()
def test_a_relative_sink_lies_right_in_front_of_the_window(model):
    """In one layer keys depend on their own frame alone. So a chunk late in a video sees what it
    would see if sink, window and itself were all the video.
    """
    one = WanDiT(replace(model.cfg, num_layers=1))
    one.load_state_dict({k: v for k, v in model.state_dict().items() if k in one.state_dict()})
    context = text()
    x = latents(60)
    for frames, options in ((WINDOW, {}), (60, {"sink_rope": "relative"})):
        cache = new_cache(one, WINDOW, window=WINDOW, sink=SINK, **options)
        shown = torch.cat([x[:, :, :SINK], x[:, :, 60 - WINDOW + SINK :]], 2)
        parts = (x if frames == 60 else shown).split(CHUNK, 2)
        for part in parts[:-1]:
            commit(one, part, context, cache)
        v = one(parts[-1], 0.7, context, cache=cache)
        if frames == WINDOW:
            expected = v
    assert rel(v, expected) < 1e-6

    # An absolute one is elsewhere.
    cache = new_cache(one, WINDOW, window=WINDOW, sink=SINK)
    for part in x.split(CHUNK, 2)[:-1]:
        commit(one, part, context, cache)
    assert rel(one(parts[-1], 0.7, context, cache=cache), expected) > 1e-3


@torch.no_grad()
def test_a_relative_sink_does_not_drift(model):
    """Its keys, after many chunks, are the first ones turned once; back at the start they are the
    first ones again, bit for bit.
    """
    cache = new_cache(model, WINDOW, window=WINDOW, sink=SINK, sink_rope="relative")
    rows = SINK * cache.tokens_per_frame
    context = text()
    commit(model, latents(SINK, 1), context, cache)
    made = cache.memory[:, 0, :, :rows].clone()
    for i in range(40):
        commit(model, latents(CHUNK, i), context, cache)
    far = cache.memory[:, 0, :, :rows].clone()
    assert rel(far, made) > 0.1

    other = new_cache(model, WINDOW, window=WINDOW, sink=SINK, sink_rope="relative")
    commit(model, latents(SINK, 1), context, other)
    other.rewind(cache.frames - CHUNK)
    commit(model, latents(CHUNK), context, other)
    assert torch.equal(other.memory[:, 0, :, :rows], far)
    cache.rewind(SINK)
    commit(model, latents(CHUNK), context, cache)
    assert torch.equal(cache.memory[:, 0, :, :rows], made)


@torch.no_grad()
def test_without_a_sink_relative_changes_nothing(model):
    options = HOW | {"sink": 0}
    plain = run(model, [CHUNK] * 8, text(), **options)
    assert torch.equal(run(model, [CHUNK] * 8, text(), **options, sink_rope="relative"), plain)


# --------------------------------------------------------------------------------------- new texts


@torch.no_grad()
def test_texts_are_asked_for_when_their_chunk_begins(model):
    """Both the noise and the texts may have no end."""
    seen = []

    def texts():
        for i in range(99):
            seen.append(i)
            yield first if i < 3 else second

    first, second = text(), text(1)
    noise = draw_noise(5, repeat(CHUNK), (48, 4, 6))
    made = []
    for x0 in generate(model, noise, texts(), SIGMAS, [CHUNK], endless=True, **HOW):
        made.append(x0)
        assert len(seen) == len(made)
        if len(made) == 7:
            break
    listed = run(model, [CHUNK] * 7, [first] * 3 + [second] * 4, **HOW)
    assert torch.equal(torch.cat(made, 2), listed)
    assert rel(listed, run(model, [CHUNK] * 7, first, **HOW)) > 1e-3


@pytest.mark.parametrize("count", [2, 4])
@torch.no_grad()
def test_a_list_of_texts_has_one_for_each_chunk(model, count):
    """Fewer would end the video early, without a word."""
    with pytest.raises(AssertionError, match=f"{count} contexts for 3 chunks"):
        run(model, [CHUNK] * 3, [text()] * count, **HOW)


@pytest.mark.parametrize("at", [1, 3, 6])
@torch.no_grad()
def test_recache_equals_a_fresh_cache_under_the_new_text(model, at):
    """The chunk behind the switch is what a new cache gives that holds the same sink and window."""
    first, second = text(), text(1)
    chunks = [CHUNK] * 8
    texts = [first] * at + [second] * (8 - at)
    noise = torch.cat(list(draw_noise(5, chunks, (48, 4, 6))), 2)
    made = run(model, chunks, texts, noise, sampling_sigmas(4), **HOW | {"solver": "unipc"})
    again = HOW | {"solver": "unipc", "recache": True}
    switched = run(model, chunks, texts, noise, sampling_sigmas(4), **again)
    assert torch.equal(made[:, :, : at * CHUNK], switched[:, :, : at * CHUNK])

    fresh = new_cache(model, WINDOW, window=WINDOW, sink=SINK)
    done = made[:, :, : at * CHUNK]
    commit(model, done[:, :, :SINK], second, fresh)
    recent = max(SINK, at * CHUNK - (WINDOW - SINK))
    fresh.rewind(recent)
    for part in done[:, :, recent:].split(CHUNK, 2):
        if part.shape[2]:
            commit(model, part, second, fresh)
    rest = noise[:, :, at * CHUNK :]
    how = {"solver": "unipc"}
    left = rollout(model, rest, second, sampling_sigmas(4), chunks[at:], fresh, **how)
    assert rel(switched[:, :, at * CHUNK :], torch.cat(list(left), 2)) < 1e-6
    assert rel(switched, made) > 1e-3


# ------------------------------------------------------------------------------- memory made again


CHUNKS = [CHUNK] * 14  # more than the memory of two layers reaches back
CASES = {
    "plain": (HOW, CHUNKS, None),
    "relative": (HOW | {"sink_rope": "relative"}, CHUNKS, None),
    "no sink": (HOW | {"sink": 0}, CHUNKS, None),
    "no window": (HOW | {"sink": 0, "window": None}, CHUNKS, None),
    "odd sink": (HOW | {"window": 9, "sink": 3}, CHUNKS, None),
    "guided": (GUIDED, CHUNKS, None),
    "first": (HOW, [1, *CHUNKS], None),
    "prefix": (HOW, CHUNKS, 3),
    "inside": (HOW | {"prefix_inside": True}, [1, *CHUNKS], 1),
    "recache": (HOW | {"recache": True}, CHUNKS, None),
    "recache, prefix": (HOW | {"recache": True}, CHUNKS, 3),
    "levels": (HOW | {"sigmas_after": AFTER}, CHUNKS, None),
    "kept": (KEPT, CHUNKS, None),
    "kept, prefix": (KEPT, CHUNKS, 3),
    "kept, inside": (KEPT | {"prefix_inside": True}, [1, *CHUNKS], 1),
    "kept, recache": (KEPT | {"recache": True, "sigmas_after": AFTER}, CHUNKS, 3),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_video_goes_on_bit_for_bit(model, name):
    """From the chunks that `Past` keeps, at any chunk: as if it had not been interrupted, until the
    window has only new ones.
    """
    options, chunks, prefix = CASES[name]
    sigmas = sampling_sigmas(4) if options["solver"] == "unipc" else SIGMAS
    given = None if prefix is None else latents(prefix, 9)
    first, second = (text(i, 2 if "guidance" in options else 1) for i in (0, 1))
    texts = [first] * 7 + [second] * (len(chunks) - 7)
    memory = (model.cfg.num_layers, options["window"], options["sink"])

    past = Past(*memory)
    states = []
    pieces = []
    draws = torch.Generator().manual_seed(3)
    noise = draw_noise(5, chunks, (48, 4, 6))
    whole = generate(
        model, noise, texts, sigmas, chunks, prefix=given, past=past, draws=draws, **options
    )
    for piece in whole:
        pieces.append(piece)
        if past.chunks:
            states.append((list(past.commits), past.frames, past.chunks, draws.get_state()))
    if prefix:
        pieces.pop(0)

    if options["window"]:
        kept = sum(made.latents.shape[2] for made in past.commits)
        reach = model.cfg.num_layers * (options["window"] - options["sink"])
        assert kept < reach + 2 * max(chunks) + options["sink"]
    for at in (1, 6, 8, len(chunks) - 2):
        past = Past(*memory)
        past.commits, past.frames, past.chunks, state = states[at - 1]
        assert past.chunks == at
        draws.set_state(state)
        noise = draw_noise(5, chunks[at:], (48, 4, 6), first=at)
        left = (noise, texts[at:], sigmas, chunks[at:])
        again = list(islice(generate(model, *left, past=past, draws=draws, **options), 4))
        assert torch.equal(torch.cat(again, 2), torch.cat(pieces[at : at + 4], 2)), at


def test_noise_depends_on_its_chunk_alone():
    whole = list(draw_noise(5, [1, 3, 3], (2, 4, 6)))
    (late,) = draw_noise(5, [3], (2, 4, 6), first=2)
    assert torch.equal(whole[2], late)
    for one, other in pairwise(chain(whole[1:], draw_noise(6, [3], (2, 4, 6), first=2))):
        assert not torch.equal(one, other)
    assert abs(torch.cat(whole, 2).std() - 1) < 0.1
