"""The rollout against the reference's vectors, and what training and sampling rely on."""

import pytest
import torch
from common import PLACES, frames_first, golden, golden_dit, new_cache, randn, rel

from wan5b.distill import guided, rollout
from wan5b.flow import few_step_sigmas, sampling_sigmas, solve

SIGMAS = few_step_sigmas()


@pytest.fixture(scope="module")
def model():
    return golden_dit("dit_causal_masks")


def video(frames, seed=0):
    return randn(1, 48, frames, 4, 6, seed=seed)


def text(seed=9):
    return randn(1, 12, 24, seed=seed)


class Recorder:
    """A generator that writes down (frames, sigma, grad enabled, sample) of every forward."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, sigma, context, **kwargs):
        self.calls.append((x.shape[2], sigma, torch.is_grad_enabled(), x))
        return self.model(x, sigma, context, **kwargs)


@pytest.mark.parametrize(("device", "dtype", "bar"), PLACES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["rollout_exit1", "rollout_exit3"])
def test_vectors(name, grad, device, dtype, bar):
    (g, config), model = golden(name), golden_dit(name, device, dtype)
    noise, renoise = frames_first(g["in.noise"]).to(device, dtype), g["in.renoise"]
    levels = few_step_sigmas(config["steps"], config["shift"])
    with torch.set_grad_enabled(grad):
        chunks = rollout(
            model,
            noise,
            g["in.context"].to(device, dtype),
            levels,
            [config["frames_per_block"]] * 2,
            new_cache(model, 6),
            exit_step=config["exit_step"],
            renoise=lambda chunk, step, like: frames_first(renoise[chunk, step]).to(like),
        )
        x0 = torch.cat(list(chunks), 2)
    assert x0.requires_grad == grad
    assert rel(x0, frames_first(g["out.x0"])) < bar


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 5, "sink": 1}])
@pytest.mark.parametrize("exit_step", [0, 2, None])
def test_grad_changes_nothing_but_the_graph(model, exit_step, options):
    """Same noise (the global generator's for re-noising), same latents; only each chunk's exit
    forward has grad.
    """
    results = []
    for grad in (False, True):
        recorder, state = Recorder(model), torch.manual_seed(5)
        with torch.set_grad_enabled(grad):
            out = list(
                rollout(
                    recorder,
                    video(7),
                    text(),
                    SIGMAS,
                    [1, 3, 3],
                    new_cache(model, 7, **options),
                    exit_step=exit_step,
                )
            )
        results.append((torch.cat(out, 2), recorder.calls, state))
    assert rel(results[1][0], results[0][0]) < 1e-6
    last = 3 if exit_step is None else exit_step
    per_chunk = [*SIGMAS[: last + 1], 0.0]
    calls = results[1][1]
    assert [(frames, sigma) for frames, sigma, *_ in calls] == [
        (n, s) for n in (1, 3, 3) for s in per_chunk
    ][:-1] + [(3, 0.0)]
    assert [grad for _, _, grad, _ in calls] == [
        i == last for _ in range(3) for i in range(last + 2)
    ]
    assert not any(x.requires_grad for *_, x in calls)


@torch.no_grad()
def test_a_block_is_yielded_before_its_commit_pass(model):
    recorder, cache = Recorder(model), new_cache(model, 6)
    chunks = rollout(recorder, video(6), text(), SIGMAS, [3, 3], cache)
    assert not recorder.calls  # nothing runs until the first chunk is asked for
    first = next(chunks)
    assert (len(recorder.calls), cache.frames) == (4, 0)
    next(chunks)
    assert (len(recorder.calls), cache.frames) == (9, 3)
    assert recorder.calls[4][1] == 0.0
    assert torch.equal(recorder.calls[4][3], first)
    assert next(chunks, None) is None
    assert (len(recorder.calls), cache.frames) == (10, 6)  # ready to be continued


@pytest.mark.parametrize("given", [1, 4, 7])
@torch.no_grad()
def test_first_frames_continue_a_video(model, given):
    """Handing back the start of a generated video as clean frames makes the same rest: positions,
    levels, text.
    """
    noise, context, cache = video(10), text(), new_cache(model, 10)

    def renoise_from(chunk):
        return lambda index, step, like: randn(*like.shape, seed=100 * (chunk + index) + step)

    whole = torch.cat(
        list(rollout(model, noise, context, SIGMAS, [1, 3, 3, 3], cache, renoise=renoise_from(0))),
        2,
    )
    recorder, cache, done = Recorder(model), new_cache(model, 10), (given + 2) // 3
    rest = rollout(
        recorder,
        noise[:, :, given:],
        context,
        SIGMAS,
        [1, 3, 3, 3][done:],
        cache,
        renoise=renoise_from(done),
        prefix=whole[:, :, :given],
    )
    assert rel(torch.cat(list(rest), 2), whole[:, :, given:]) < 1e-5
    assert [call[:2] for call in recorder.calls[:done]] == [(n, 0.0) for n in (1, 3, 3)[:done]]
    assert cache.frames == 10


@pytest.mark.parametrize(("given", "chunks"), [(1, [1]), (3, [3]), (5, [2, 3]), (7, [1, 3, 3])])
@torch.no_grad()
def test_given_frames_are_taken_in_blocks(model, given, chunks):
    recorder = Recorder(model)
    next(
        rollout(recorder, video(3), text(), SIGMAS, [3], new_cache(model, 10), prefix=video(given))
    )
    assert [call[0] for call in recorder.calls[: len(chunks)]] == chunks


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@torch.no_grad()
def test_many_step_sampling(model, solver):
    """Equals a loop over masked whole-sequence forwards: finished chunks as clean half, the current
    one integrated.
    """
    noise, context, sigmas, chunks = video(6), text(), sampling_sigmas(6), [1, 2, 3]
    ours = torch.cat(
        list(rollout(model, noise, context, sigmas, chunks, new_cache(model, 6), solver=solver)), 2
    )
    done = torch.zeros_like(noise)
    for i, size in enumerate(chunks):
        start = sum(chunks[:i])
        part = slice(start, start + size)

        def field(x, sigma, part=part):
            whole = done.clone()
            whole[:, :, part] = x
            return model(whole, sigma, context, chunks=chunks, clean=done)[:, :, part]

        x = noise[:, :, part]
        if solver == "euler":
            for sigma, following in zip(sigmas, sigmas[1:], strict=False):
                x = x - (sigma - following) * field(x, sigma)
        else:
            x = solve(field, x, sigmas)
        done[:, :, part] = x
    assert rel(ours, done) < 1e-5


@torch.no_grad()
def test_a_context_for_every_chunk(model):
    """Each chunk's levels and its commit attend to its own text, as in forwards that keep none."""
    texts = [text(1), text(2), text(1)]
    cache = new_cache(model, 6)

    def renoise(index, step, like):
        return randn(*like.shape, seed=10 * index + step)

    out = list(
        rollout(model, video(6), texts, SIGMAS, [1, 2, 3], new_cache(model, 6), renoise=renoise)
    )
    for index, (x, own) in enumerate(zip(video(6).split([1, 2, 3], 2), texts, strict=True)):
        for step, sigma in enumerate(SIGMAS[:-1]):
            x = x - sigma * model(x, sigma, own, cache=cache)
            following = SIGMAS[step + 1]
            if following:
                x = (1 - following) * x + following * renoise(index, step, x)
        assert rel(out[index], x) < 1e-5
        model(x, 0.0, own, cache=cache)
        cache.commit(x.shape[2])
    for kind in (list, tuple):  # either would end the video with its last text
        with pytest.raises(AssertionError, match="2 contexts for 3 chunks"):
            next(rollout(model, video(6), kind(texts[:2]), SIGMAS, [1, 2, 3], cache))


@torch.no_grad()
def test_few_step_bidirectional_sampling_is_the_same_solver(model):
    """One chunk of the whole clip over a cache, and `solve` over the network without one."""
    noise, context = video(3), text()
    fresh = [randn(1, 48, 3, 4, 6, seed=step) for step in range(3)]
    cache = new_cache(model, 3)
    whole = next(
        rollout(model, noise, context, SIGMAS, [3], cache, renoise=lambda c, s, like: fresh[s])
    )

    def field(x, sigma):
        return model(x, sigma, context)

    assert rel(solve(field, noise, SIGMAS, "renoise", lambda s, like: fresh[s]), whole) < 1e-5
    torch.manual_seed(3)
    drawn = solve(field, noise, SIGMAS, "renoise")
    torch.manual_seed(3)
    x = noise
    for sigma, following in zip(SIGMAS, SIGMAS[1:], strict=False):
        x = x - sigma * field(x, sigma)
        if following:  # the last step draws nothing
            x = (1 - following) * x + following * torch.randn_like(x)
    assert rel(drawn, x) < 1e-6


@torch.no_grad()
def test_guided_rollout_equals_two_branches_by_hand(model):
    noise, cond, uncond, sigmas = video(6), text(), text(8), sampling_sigmas(5)
    context = torch.cat([cond, uncond])
    both = new_cache(model, 6, batch=2)
    ours = list(rollout(guided(model, 5.0), noise, context, sigmas, [3, 3], both, solver="euler"))
    caches = new_cache(model, 6), new_cache(model, 6)
    for x, chunk in zip(noise.split(3, dim=2), ours, strict=True):
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            v, u = (
                model(x, sigma, c, cache=cache)
                for c, cache in zip((cond, uncond), caches, strict=True)
            )
            x = x + (following - sigma) * (u + 5.0 * (v - u))
        assert rel(chunk, x) < 1e-5
        for c, cache in zip((cond, uncond), caches, strict=True):
            model(x, 0.0, c, cache=cache)
            cache.commit(3)


@torch.no_grad()
def test_guided_per_sample_and_per_frame_levels(model):
    x, context = torch.cat([video(3), video(3, 1)]), torch.cat([text(i) for i in range(4)])
    for sigma in (torch.tensor([0.9, 0.4]), torch.tensor([[0.0, 0.9, 0.9], [0.0, 0.4, 0.4]])):
        v, u = model(x, sigma, context[:2]), model(x, sigma, context[2:])
        assert rel(guided(model, 4.0)(x, sigma, context), u + 4.0 * (v - u)) < 1e-5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunks": [3, 2]}, r"\[3, 2\], noise of 6 frames"),
        ({"exit_step": 4}, r"exit_step 4 of levels \[1.0, "),
        ({"exit_step": -1}, r"exit_step -1 of levels \[1.0, "),
        ({"solver": "heun"}, "heun"),
        ({"solver": "euler", "exit_step": 1}, "euler goes through all levels"),
    ],
)
def test_errors_name_the_values(model, given, says):
    arguments = {"chunks": [3, 3], "cache": new_cache(model, 6), **given}
    with pytest.raises((AssertionError, ValueError), match=says):
        next(rollout(model, video(6), text(), SIGMAS, **arguments))
