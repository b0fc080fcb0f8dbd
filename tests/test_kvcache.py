"""The cache against the reference's vectors and against masked whole-sequence forwards; gradients,
ring, errors.
"""

import re
from unittest import mock

import pytest
import torch
from common import PLACES, compiling, golden, golden_dit, gpu, new_cache, randn, rel

from wan5b import dit, fuse
from wan5b.attention import attention, interval_mask
from wan5b.distill import rollout
from wan5b.extras import graphs
from wan5b.flow import few_step_sigmas
from wan5b.kvcache import KVCache, chunk_sizes

P = 6  # tokens of a 4 x 6 latent frame


@pytest.fixture(scope="module")
def model():
    return golden_dit("dit_causal_masks")


def video(frames, seed=0, batch=1):
    return randn(batch, 48, frames, 4, 6, seed=seed)


def text(seed=9, batch=1):
    return randn(batch, 12, 24, seed=seed)


def cached(model, x, sigma, context, chunks, cache, clean=None):
    """v of x chunk by chunk. The next chunks attend to the pass over `clean` at sigma 0, or else to
    x as it was run.
    """
    out, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        out.append(model(x[:, :, part], sigma[:, part], context, cache=cache))
        if clean is not None:
            model(clean[:, :, part], 0.0, context, cache=cache)
        cache.commit(size)
        start += size
    return torch.cat(out, 2)


def levels(chunks):
    """[1, T], another level for every chunk."""
    return torch.cat(
        [torch.full((1, size), 1 - 0.8 * i / len(chunks)) for i, size in enumerate(chunks)], 1
    )


# ---------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize(("device", "dtype", "bar"), PLACES)
@pytest.mark.parametrize(
    ("name", "chunks", "options", "frames", "grad"),
    [
        (name, chunks, options, frames, grad)
        for name, chunks, options in (
            ("block3", [3, 3], {}),
            ("block1", [1] * 6, {}),
            ("first_then_block2", [1, 2, 2], {}),
            ("block1_local3", [1] * 6, {"window": 3}),
            ("block1_local3_sink1", [1] * 6, {"window": 3, "sink": 1}),
        )
        # the whole video in memory, or the window alone, which a rollout with grad does not allow
        for frames, grad in (
            (sum(chunks), False),
            (sum(chunks), True),
            (options.get("window"), False),
        )
        if frames
    ],
)
def test_vectors(name, chunks, options, frames, grad, device, dtype, bar):
    model = golden_dit("dit_kv_cache", device, dtype)
    g, _ = golden("dit_kv_cache")
    x, clean, context = (g[f"in.{key}"].to(device, dtype) for key in ("x", "clean", "context"))
    cache, out, start = new_cache(model, frames, 2, **options), [], 0
    with torch.set_grad_enabled(grad):
        for size in chunks:
            part = slice(start, start + size)
            model(x[:, :, part], 1.0, context, cache=cache)
            out.append(
                model(0.5 * x[:, :, part] + 0.5 * clean[:, :, part], 0.625, context, cache=cache)
            )
            model(clean[:, :, part], 0.0, context, cache=cache)
            cache.commit(size)
            start += size
    assert rel(torch.cat(out, 2), g[f"out.{name}"]) < bar


# --------------------------------------------------------------- against masked forwards, no memory

LAYOUTS = [
    ([3, 3], None),
    ([1] * 6, 2),
    ([1, 2, 3], None),
    ([1, 2, 3], 4),
    ([4, 1, 2], 5),
    ([3, 3, 3], 4),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("chunks", "window"), LAYOUTS)
def test_equals_teacher_forcing(model, chunks, window, grad):
    """Clean chunks committed at sigma 0, then a noisy one: what teacher forcing does for all chunks
    at once.
    """
    t = sum(chunks)
    x, clean, context, sigma = (
        video(t, batch=2),
        video(t, 1, batch=2),
        text(batch=2),
        levels(chunks),
    )
    with torch.set_grad_enabled(grad):
        v = cached(model, x, sigma, context, chunks, new_cache(model, t, 2, window=window), clean)
    with torch.no_grad():
        assert rel(v, model(x, sigma, context, chunks=chunks, window=window, clean=clean)) < 2e-6


@pytest.mark.parametrize(("chunks", "window"), LAYOUTS)
@torch.no_grad()
def test_equals_block_causal_forward(model, chunks, window):
    """Every chunk committed as it was run, at its own level."""
    t = sum(chunks)
    x, context, sigma = video(t), text(), levels(chunks)
    v = cached(model, x, sigma, context, chunks, new_cache(model, t, window=window))
    assert rel(v, model(x, sigma, context, chunks=chunks, window=window)) < 2e-6


# chunks, window, sink: the ring of window - sink slots is not a multiple of the chunks in most
RINGS = [
    ([1] * 9, 3, 1),
    ([2] * 5, 5, 0),
    ([3] * 4, 7, 2),
    ([3] * 4, 5, 2),
    ([1, 3, 3, 3], 5, 1),
    ([2, 1, 3, 2, 3], 6, 1),
    ([4, 1, 1, 4, 2], 7, 3),
]


@pytest.mark.parametrize(("chunks", "window", "sink"), RINGS)
@torch.no_grad()
def test_ring_equals_long_memory_and_sink_mask(model, chunks, window, sink):
    """Memories from just the window to the whole video, and a masked forward that has no memory,
    agree.
    """
    t = sum(chunks)
    x, context, sigma = video(t), text(), levels(chunks)
    end = [sum(chunks[: i + 1]) for i, size in enumerate(chunks) for _ in range(size)]
    runs = [(0, min(sink, e), max(sink, e - (window - sink)), e) for e in end for _ in range(P)]
    mask = interval_mask(P * torch.tensor([(a, b, max(b, c), max(b, d)) for a, b, c, d in runs]))
    with mock.patch.object(dit, "causal_mask", return_value=mask):
        expected = model(x, sigma, context, chunks=chunks)
    for frames in sorted({window, window + 1, window + 4, t}):
        cache = new_cache(model, frames, window=window, sink=sink)
        memory = cache.memory
        cached(
            model, x[:, :, : max(sink, chunks[0])], sigma, context, [max(sink, chunks[0])], cache
        )
        cache.reset()
        assert rel(cached(model, x, sigma, context, chunks, cache), expected) < 2e-6, (
            f"memory of {frames} frames"
        )
        assert cache.frames == t
        assert cache.memory is memory


@torch.no_grad()
def test_committed_memory_is_read_only(model):
    """A forward changes its own slots alone; sink frames keep their bits to the end."""
    cache, x, context = new_cache(model, 6, window=6, sink=2), video(15), text()
    slots = cache.memory.view(torch.int32).unflatten(
        3, (6, P)
    )  # bits: a NaN of unused memory equals itself
    for index, part in enumerate(x.split(3, dim=2)):
        before = slots.clone()
        model(part, 0.5, context, cache=cache)
        changed = [not torch.equal(before[:, :, :, i], slots[:, :, :, i]) for i in range(6)]
        assert sum(changed) == 3
        if index:
            assert changed[:2] == [False, False]
        cache.commit(3)


# ---------------------------------------------------------------------------------------- gradients


def gradients(model, loss):
    """Gradients of all parameters, in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


def weighted(x):
    """A loss that treats no two elements alike."""
    return (x * randn(*x.shape, seed=7).to(x)).sum()


def play(model, chunks, exit_step, noise, context, checkpointing=False, **options):
    cache = new_cache(model, noise.shape[2] + 1, **options)
    renoise = lambda index, step, like: randn(*like.shape, seed=100 + 10 * index + step)  # noqa: E731
    sigmas, model.checkpointing = few_step_sigmas(), checkpointing
    try:
        out = list(
            rollout(
                model, noise, context, sigmas, chunks, cache, exit_step=exit_step, renoise=renoise
            )
        )
        return out, gradients(
            model, weighted(torch.cat(out, 2))
        ) if torch.is_grad_enabled() else None
    finally:
        model.checkpointing = False


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 5, "sink": 1}])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_checkpointing_changes_no_gradient(model, exit_step, options):
    """Backward comes after all commits, so a recomputation must read what its forward read, not
    what is there now.
    """
    noise, context = video(7), text()
    calls = []
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        _, plain = play(model, [1, 3, 3], exit_step, noise, context, **options)
        once, calls[:] = len(calls), []
        _, recomputed = play(
            model, [1, 3, 3], exit_step, noise, context, checkpointing=True, **options
        )
    finally:
        handle.remove()
    assert rel(recomputed, plain) < 1e-6
    assert len(calls) == once + 3  # each chunk's exit forward twice


def test_no_recomputation_reads_a_sink_that_has_moved_on(model):
    """A later chunk has turned it in memory: gradients would be 2% off, without a word."""
    options = {"window": 5, "sink": 1, "sink_rope": "relative"}
    noise, context = video(7), text()
    _, plain = play(model, [1, 2, 2], 2, noise[:, :, :5], context, **options)
    fits = play(model, [1, 2, 2], 2, noise[:, :, :5], context, checkpointing=True, **options)
    assert rel(fits[1], plain) < 1e-6
    play(model, [1, 3, 3], 2, noise, context, **options)
    with pytest.raises(AssertionError, match="the sink moved on"):
        play(model, [1, 3, 3], 2, noise, context, checkpointing=True, **options)


def test_recomputation_leaves_committed_memory_alone(model):
    """One backward per chunk, oldest first: a recomputation that wrote would spoil what the next
    one reads.
    """
    noise, context, sigmas, cache = video(9), text(), few_step_sigmas(), new_cache(model, 9)
    _, expected = play(model, [3, 3, 3], 1, noise, context)
    model.checkpointing = True
    try:
        renoise = lambda index, step, like: randn(*like.shape, seed=100 + 10 * index + step)  # noqa: E731
        out = list(
            rollout(model, noise, context, sigmas, [3, 3, 3], cache, exit_step=1, renoise=renoise)
        )
        memory, written = cache.memory.clone(), cache.written
        weights = randn(1, 48, 9, 4, 6, seed=7).split(3, dim=2)
        ours = sum(gradients(model, (x * w).sum()) for x, w in zip(out, weights, strict=True))
    finally:
        model.checkpointing = False
    assert torch.equal(cache.memory, memory)
    assert (cache.written, cache.frames) == (written, 9)
    assert rel(ours, expected) < 1e-6


@pytest.mark.parametrize(("chunks", "window"), [([3, 3], None), ([1, 2, 3], 4)])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradients_equal_teacher_forcing(model, chunks, window, exit_step):
    """One masked forward over the exit level's inputs, with the finished chunks as its clean half,
    has no cache.

    Detached latents are not enough there: the keys of the clean half must be cut off from the
    parameters too.
    """
    inputs = []

    def with_detached_keys(q, k, v, mask=None):
        if mask is not None:  # not to the text
            half = k.shape[1] // 2
            k, v = (torch.cat([x[:, :half].detach(), x[:, half:]], 1) for x in (k, v))
        return attention(q, k, v, mask)

    def generator(x, *args, **kwargs):
        if torch.is_grad_enabled():
            inputs.append(x)
        return model(x, *args, **kwargs)

    generator.head, generator.cfg = model.head, model.cfg
    noise, context, sigma = video(6), text(), few_step_sigmas()[exit_step]
    cache = new_cache(model, 6, window=window)
    out = torch.cat(
        list(
            rollout(
                generator, noise, context, few_step_sigmas(), chunks, cache, exit_step=exit_step
            )
        ),
        dim=2,
    )
    ours = gradients(model, weighted(out))
    x = torch.cat(inputs, 2).detach()
    with mock.patch.object(dit, "attention", with_detached_keys):
        v = model(x, sigma, context, chunks=chunks, window=window, clean=out.detach())
    assert rel(out, x - sigma * v) < 2e-6
    assert rel(ours, gradients(model, weighted(x - sigma * v))) < 1e-5


def test_no_gradient_crosses_blocks(model):
    """A loss on the second chunk: nothing reaches the first one's noise, and the first may as well
    be given data.
    """
    noise, context, sigmas = video(6).requires_grad_(), text(), few_step_sigmas()
    first, second = rollout(model, noise, context, sigmas, [3, 3], new_cache(model, 6), exit_step=0)
    ours = gradients(model, weighted(second))
    assert noise.grad[:, :, :3].count_nonzero() == 0
    assert noise.grad[:, :, 3:].count_nonzero() > 0
    given = first.detach().clone()
    (alone,) = rollout(
        model,
        noise[:, :, 3:].detach(),
        context,
        sigmas,
        [3],
        new_cache(model, 6),
        exit_step=0,
        prefix=given,
    )
    assert rel(alone, second) < 1e-6
    assert rel(gradients(model, weighted(alone)), ours) < 1e-6


@pytest.mark.parametrize(
    ("device", "dtype", "bar"), [place for place in PLACES if place.id != "cpu"]
)
def test_rollout_gradients_in_other_places(model, device, dtype, bar):
    """A checkpointed rollout with grad on the GPU and in bf16 against float32 on the CPU."""
    noise, context = video(6), text()
    chunks, reference = play(model, [3, 3], 0, noise, context)
    other = golden_dit("dit_causal_masks", device, dtype)
    out, grads = play(other, [3, 3], 0, noise.to(device), context.to(device), checkpointing=True)
    assert rel(torch.cat(out, 2), torch.cat(chunks, 2)) < bar
    assert rel(grads, reference) < (1e-3 if dtype == torch.float32 else 6e-2)


# --------------------------------------------------------------------------------------------- text


@torch.no_grad()
def test_text_is_embedded_once_per_context_and_reset(model):
    calls = []
    handle = model.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        x, cache, context, other = video(3), new_cache(model, 3), text(), text(8)
        unkept = [model(x, 0.5, context, cache=cache) for _ in range(2)]
        assert len(calls) == 2  # nobody has put a text in force: nothing is kept
        calls.clear()
        cache.use_text(context)
        v = [model(x, 0.5, context, cache=cache) for _ in range(3)]
        assert len(calls) == 1
        assert torch.equal(v[0], unkept[1])
        assert torch.equal(v[0], v[2])
        expected = model(x, 0.5, other, cache=new_cache(model, 3))
        # Another text than the one in force is never answered from the kept keys.
        assert rel(model(x, 0.5, other, cache=cache), expected) < 1e-6
        assert rel(model(x, 0.5, context, cache=cache), v[0]) < 1e-6
        cache.use_text(other)
        assert rel(model(x, 0.5, other, cache=cache), expected) < 1e-6
        assert rel(model(x, 0.5, other, cache=cache), expected) < 1e-6
        cache.use_text(context)
        assert rel(model(x, 0.5, context, cache=cache), v[0]) < 1e-6
        before, calls[:] = len(calls), []
        assert before == 5
        cache.reset()
        cache.use_text(context)
        model(x, 0.5, context, cache=cache)
        model(x, 0.5, context, cache=cache)
        assert len(calls) == 1
        with torch.enable_grad():  # kept keys carry no graph: a forward with grad makes its own
            model(x, 0.5, context, cache=cache).sum().backward()
        assert len(calls) == 2
        assert model.text_embedding[0].weight.grad.count_nonzero() > 0
        assert not cache.text.requires_grad
    finally:
        handle.remove()
        model.zero_grad()


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ((21, 3), [3] * 7),
        ((31, 3, 1), [1] + [3] * 10),
        ((1, 3, 1), [1]),
        ((5, 2, 3), [3, 2]),
        ((4, 1), [1] * 4),
        ((6, 3, 0), [3, 3]),
    ],
)
def test_block_sizes(arguments, sizes):
    assert chunk_sizes(*arguments) == sizes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((20, 3), ("20 latent", "chunks of 3", "valid: 18 or 21")),
        ((21, 3, 1), ("21 latent", "first chunk of 1 and chunks of 3", "valid: 19 or 22")),
        ((2, 3), ("2 latent", "valid: 3")),
        ((0, 3), ("0 latent", "valid: 3")),
        ((2, 3, 4), ("2 latent", "first chunk of 4", "valid: 4 or 7")),
        ((6, 0), ("size 0",)),
        ((6, 3, -1), ("first -1",)),
    ],
)
def test_block_size_errors_name_the_nearest_valid_counts(arguments, says):
    with pytest.raises(ValueError, match=".") as error:
        chunk_sizes(*arguments)
    assert all(part in str(error.value) for part in says), error.value


@pytest.mark.parametrize(
    ("options", "says"),
    [({"window": 3, "sink": 3}, "sink 3, window 3"), ({"sink": 1}, "sink 1, window None")],
)
def test_cache_configuration_errors(model, options, says):
    with pytest.raises(ValueError, match=says):
        new_cache(model, 6, **options)


@pytest.mark.parametrize(
    ("frames", "options", "grad", "sizes", "says"),
    [
        (4, {}, False, [3, 3], "3 + 3 frames in 4: no room"),
        (4, {"window": 6}, False, [3, 3], "3 + 3 frames in 4"),  # the memory is below the window
        (4, {"window": 4}, True, [3, 3], "3 + 3 frames in 4"),
        (6, {"window": 2}, False, [3], "(3, 2, 0, 0)"),  # the chunk, the window, the sink
        (6, {"window": 4, "sink": 2}, False, [1, 3], "(3, 4, 2, 0)"),
    ],
)
def test_forwards_that_do_not_fit(model, frames, options, grad, sizes, says):
    cache, x, context = new_cache(model, frames, **options), video(3), text()
    *fitting, last = sizes
    with torch.set_grad_enabled(grad):
        for size in fitting:
            model(x[:, :, :size], 0.5, context, cache=cache)
            cache.commit(size)
        with pytest.raises(AssertionError, match=re.escape(says)):
            model(x[:, :, :last], 0.5, context, cache=cache)
    assert cache.frames == sum(fitting)


@torch.no_grad()
def test_commit_must_match_the_last_forward(model):
    cache, x, context = new_cache(model, 6), video(3), text()
    with pytest.raises(AssertionError, match=r"commit\(3\) of 0 frames run behind 0"):
        cache.commit(3)
    model(x, 0.5, context, cache=cache)
    for n in (0, 4, -1):
        with pytest.raises(AssertionError, match=rf"commit\({n}\) of 3 frames run behind 0"):
            cache.commit(n)
    cache.commit(3)
    with pytest.raises(AssertionError, match=r"commit\(3\) of 0 frames run behind 3"):
        cache.commit(3)
    model(x, 0.5, context, cache=cache)
    model(x[:, :, :1], 0.5, context, cache=cache)  # replaces the longer one
    with pytest.raises(AssertionError, match=r"commit\(3\) of 1 frames run behind 3"):
        cache.commit(3)
    assert cache.frames == 3


@torch.no_grad()
def test_a_longer_forward_in_a_full_ring_must_be_committed(model):
    """It has replaced frames that a shorter one would still see: no quiet use of the wrong keys."""
    cache, x, context = new_cache(model, 4, window=4), video(2), text()
    for _ in range(2):
        model(x, 0.5, context, cache=cache)
        cache.commit(2)
    model(x, 0.5, context, cache=cache)
    with pytest.raises(AssertionError, match="replaced"):
        model(x[:, :, :1], 0.5, context, cache=cache)


@pytest.mark.parametrize(("batch", "tokens"), [(1, P - 2), (1, P + 2), (2, P)])
@torch.no_grad()
def test_a_cache_made_for_other_latents_is_refused(model, batch, tokens):
    """Batch or tokens per frame differ: an error before anything is written, never a part of the
    tokens.
    """
    cache = KVCache(model.cfg, batch, 3, tokens)
    with pytest.raises(
        AssertionError, match=rf"\(2, {batch}, {tokens}\), forward of \(2, 1, {P}\)"
    ):
        model(video(3), 0.5, text(), cache=cache)


@torch.no_grad()
def test_an_interrupted_forward_leaves_the_cache_usable(model):
    """Ctrl-C or out of memory between two layers, then the same call again."""
    cache, x, context, other = new_cache(model, 3), video(3), text(), text(1)
    expected = model(x, 0.5, context, cache=new_cache(model, 3))
    for interrupted in (context, other):
        cache.use_text(interrupted)
        with (
            mock.patch.object(model.blocks[1], "forward", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            model(x, 0.5, interrupted, cache=cache)
        cache.use_text(context)  # behind the second one, the first layer's keys are another text's
        assert rel(model(x, 0.5, context, cache=cache), expected) < 1e-6
        assert rel(model(x, 0.5, context, cache=cache), expected) < 1e-6


@gpu
@pytest.mark.parametrize(
    "options", [{"frames": 9}, {"frames": 6, "window": 6, "sink": 2}], ids=["whole", "ring"]
)
def test_graphs_repeat_the_forwards(options):
    """Replayed forwards equal plain ones: for another text, another start of the video, other
    weights in place.
    """
    net = golden_dit("dit_causal_masks").cuda()
    noise, frames = video(18).cuda(), options.pop("frames")

    def run(cache, seed):
        cache.reset()
        draws = torch.Generator("cuda").manual_seed(seed)
        again = {
            "renoise": lambda b, s, like: torch.randn(like.shape, generator=draws, device="cuda")
        }
        part = noise[:, :, seed : seed + (18 if options else 9)][:, :, : 16 if options else 9]
        chunks = [2] * 8 if options else [3] * 3
        return torch.cat(
            [*rollout(net, part, text(seed).cuda(), few_step_sigmas(), chunks, cache, **again)], 2
        )

    cache = new_cache(net, frames, **options)
    with compiling(), torch.no_grad():
        recorder = graphs.Graphs(net.compute)
        for seed in (0, 1, 2):
            net.blocks[0].modulation.mul_(1.1)
            plain = run(new_cache(net, frames, **options), seed)
            net.compute = recorder
            fuse.enable()
            assert rel(run(cache, seed), plain) < 1e-5
            fuse.enable(False)
            graphs.forget(net)
        assert sum(graph is not None for graph in recorder.of_cache[cache].values()) > 2

        # Their memory goes with them; what is recorded later has its own.
        del cache
        assert not recorder.of_cache
        net.compute = recorder
        assert rel(run(new_cache(net, frames, **options), 2), plain) < 1e-5
        graphs.forget(net)


@torch.no_grad()
def test_the_place_of_a_forward_is_that_of_a_turn_of_the_ring_before(model):
    """What a recorded forward is known by: memory alone, so a long video needs no new graphs."""
    cache, places = new_cache(model, 7, window=7, sink=1), []
    for _ in range(12):
        places.append(cache.append(3).place)
        cache.commit(3)
    assert places[3:7] == places[5:9] == places[7:11]
    assert len(set(places)) < 6


@torch.no_grad()
def test_cuts_that_a_window_has_no_room_for_are_errors(model):
    """Never a frame seen twice, never one that is not there."""
    cache = new_cache(model, 9, window=9, sink=3)
    with pytest.raises(AssertionError, match="a cut at frame 0, within sink 3"):
        cache.cut(3, 8)
    cache = new_cache(model, 6, window=6, sink=2)
    for index in range(3):
        if index == 2:
            cache.cut(3, 8)
        cache.append(3)
        cache.commit(3)
    with pytest.raises(AssertionError, match=re.escape("(3, 6, 2, 2)")):
        cache.append(3)


@torch.no_grad()
def test_a_scene_keeps_its_first_frames(model):
    """The example in `_past`."""
    cache = new_cache(model, 12, window=12, sink=3)
    for index in range(5):
        if index == 2:
            cache.cut(3, 8)
        cache.append(3)
        cache.commit(3)
    assert cache._past(15, 18) == [0, 1, 2, 6, 7, 8, 12, 13, 14]
