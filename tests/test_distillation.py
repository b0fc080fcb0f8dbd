"""dmd and sid: rollouts, what carries grad through them, and what it is."""

import pytest
import torch
from common import rel
from training import first_batch, furthest, make_run, run_phase

import train
from wan5b import runs, stages
from wan5b.distill import commit, replay, rollout, split_prefix
from wan5b.kvcache import KVCache

pytestmark = pytest.mark.usefixtures("quick_and_clean")


def a_rollout(run: stages.Run, step: int) -> tuple[stages.Batch, stages.Rolled]:
    """What the generator's phase rolls out first; the draws stand where the phase goes on."""
    batch = first_batch(run, "generator", step)
    return batch, stages.roll_out(run, batch)


def rollout_with_grad(run: stages.Run, step: int) -> list[torch.Tensor]:
    """The same rollout in one graph, as algorithm 1 of Self Forcing has it: its chunks."""
    _, rolled = a_rollout(run, step)
    chunks = [x.shape[2] for x in rolled.trace]
    given = run.cfg.prefix

    batch = first_batch(run, "generator", step)  # its draws start anew
    noise = batch.draws(torch.randn, *run.shape(sum(chunks)))
    clips = run.clips(batch.items) if given or run.cfg.rollout == "data" else None

    def renoise(chunk, step, like):
        return batch.draws(torch.randn, *like.shape[1:])

    run.cache.reset()
    made = rollout(
        run.generator,
        noise,
        batch.context,
        run.sigmas,
        chunks,
        run.cache,
        exit_step=rolled.exit_step,
        renoise=renoise,
        prefix=clips[:, :, :given] if given else None,
        committed=clips[:, :, given:] if run.cfg.rollout == "data" else None,
    )
    return [next(made) for _ in chunks]


# ----------------------------------------------------------------------------------------- rollouts


def test_exit_level_is_uniform_and_one_for_all(data, monkeypatch):
    """For all samples of a step; each phase draws its own."""
    run = make_run(data, "dmd", micro_batch=1)
    seen = []

    def fake(generator, noise, context, sigmas, chunks, cache, *, exit_step, **options):
        seen.append(exit_step)
        yield from noise.split(chunks, 2)

    monkeypatch.setattr(stages, "rollout", fake)
    levels = {}
    for phase in ("generator", "critic"):
        for step in range(300):
            seen.clear()
            for batch in stages.micro_batches(run, phase, step, moved=False):
                stages.roll_out(run, batch)
            assert len(seen) == 4
            assert len(set(seen)) == 1
            levels[phase, step] = seen[0]

    for phase in ("generator", "critic"):
        drawn = [levels[phase, step] for step in range(300)]
        counts = [drawn.count(level) for level in range(4)]
        assert min(counts) > 75 - 4 * 7.5, counts  # four standard deviations
        assert sum(counts) == 300
    differ = [levels["generator", step] != levels["critic", step] for step in range(9)]
    assert any(differ), "each phase draws its own"


@pytest.mark.parametrize("mode", ["self", "data"])
def test_rollout_on_its_own_or_on_real_frames(data, monkeypatch, mode):
    """Whose first chunk the second one attends to: the clip's with rollout = "data", else the
    generator's own.
    """
    inner = runs.Draws.__call__

    def second_chunk(clip=0.0, own=0.0):
        run = make_run(data, "dmd", rollout=mode, latents=str(data / "latents"))
        clips = run.clips

        def changed_clips(items):
            x = clips(items)
            x[:, :, :3] += clip
            return x

        def changed_noise(self, draw, *shape):
            x = inner(self, draw, *shape)
            if len(shape) > 1 and shape[1] == 6:  # of the rollout; re-noising is by chunk
                x[:, :, :3] += own
            return x

        with monkeypatch.context() as patch:
            patch.setattr(run, "clips", changed_clips)
            patch.setattr(runs.Draws, "__call__", changed_noise)
            _, rolled = a_rollout(run, 0)
            assert run.cache.written == 6
            return rolled.x0[:, :, -3:]

    plain = second_chunk()
    by_clip = second_chunk(clip=1.0)
    by_own = second_chunk(own=1.0)
    assert torch.equal(plain, by_clip) == (mode == "self")
    assert torch.equal(plain, by_own) == (mode == "data")


@pytest.mark.parametrize(("prefix", "window"), [(0, 0), (1, 0), (0, 6)])
def test_each_chunk_alone_behind_real_frames(data, prefix, window):
    """With frames to commit, a rollout's chunks are those made alone behind these frames."""
    run = make_run(data, "dmd", window=window)
    g = torch.Generator().manual_seed(0)
    frames = prefix + 9
    clip, noise, fresh = torch.randn(3, 2, 48, frames, 4, 4, generator=g).unbind()
    context = run.context(["prompt 0", "prompt 1"])

    def renoise_from(start):
        def renoise(chunk, step, like):
            return fresh[:, :, start + 3 * chunk :][:, :, :3] * (1 + step)

        return renoise

    def make(start, chunks, **options):
        cache = KVCache(run.generator.cfg, 2, frames, 4, window or None)
        given = clip[:, :, :start] if start else None
        part = noise[:, :, start : start + sum(chunks)]
        options |= {"exit_step": 2, "renoise": renoise_from(start), "prefix": given}
        args = (run.generator, part, context, run.sigmas, chunks, cache)
        return torch.cat(list(rollout(*args, **options)), 2), cache

    with torch.no_grad():
        made, cache = make(prefix, [3, 3, 3], committed=clip[:, :, prefix:])
        alone = [make(start, [3])[0] for start in range(prefix, frames, 3)]
        own, _ = make(prefix, [3, 3, 3])
    assert rel(made, torch.cat(alone, 2)) < 1e-6
    assert rel(made[:, :, :3], own[:, :, :3]) < 1e-6
    assert rel(made[:, :, 3:], own[:, :, 3:]) > 1e-3

    # What the cache then holds is the clip, all of it.
    other = KVCache(run.generator.cfg, 2, frames, 4, window or None)
    for part in split_prefix(clip, [3]):
        commit(run.generator, part, context, other)
    assert cache.frames == other.frames
    assert rel(cache.memory, other.memory) < 1e-6


# ---------------------------------------------------------------------------------------- gradients

CHANGES = {
    "text": {},
    "first": {"prefix": 1},
    "data": {"rollout": "data"},
    "first, data": {"prefix": 1, "rollout": "data"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kind", CHANGES)
def test_replay_is_the_rollout_and_its_gradient(data, monkeypatch, checkpointing, window, kind):
    changes = CHANGES[kind]
    frames = 9 + changes.get("prefix", 0)
    clips = torch.randn(8, 48, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train, "check_fit", lambda *_: None)  # the stores are for 6 frames
    changes = {"checkpointing": checkpointing, "window": window, "frames": frames, **changes}
    run = make_run(data, "dmd", **changes)
    monkeypatch.setattr(run, "clips", lambda items: clips[items])
    optimizer = run.optimizers["generator"]

    seen = set()
    for step in range(8):
        batch, rolled = a_rollout(run, step)
        x0 = rolled.x0
        assert x0.shape[2] == 9
        if rolled.exit_step in seen:
            continue
        seen.add(rolled.exit_step)
        w = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))

        # The replay is the rollout, and leaves the cache as it is.
        committed = run.cache.frames
        memory = run.cache.memory[..., : committed * 4, :, :].clone()
        sigma = run.sigmas[rolled.exit_step]
        replayed = replay(run.generator, batch.context, sigma, rolled.trace, run.cache)
        assert rel(replayed, x0) < 1e-5
        replayed.backward(w)
        assert run.cache.frames == committed
        after = run.cache.memory[..., : committed * 4, :, :]
        assert torch.equal(after, memory), "committed keys are read-only"
        by_replay = dict(optimizer.grads)
        optimizer.grads.clear()

        # Its gradient is that of the rollout in one graph.
        whole = torch.cat(rollout_with_grad(run, step), 2)
        assert torch.equal(whole, x0)
        whole.backward(w)
        assert by_replay.keys() == optimizer.parameters.keys()
        assert furthest(by_replay, optimizer.grads) < 1e-4
        optimizer.grads.clear()
    assert len(seen) >= 3


def test_no_gradient_crosses_chunks(data):
    run = make_run(data, "dmd", checkpointing=False)
    first, second = rollout_with_grad(run, 0)
    assert not run.cache.memory.requires_grad
    (grad,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
    assert first.requires_grad
    assert grad is None


def test_only_exit_levels_carry_grad(data):
    run = make_run(data, "dmd", checkpointing=False, micro_batch=4)
    seen = []

    def note(model, arguments):
        seen.append((torch.is_grad_enabled(), arguments[1]))

    run.generator.register_forward_pre_hook(note)
    generator, critic = stages.PHASES["dmd"]
    run_phase(run, generator)
    _, rolled = a_rollout(run, 0)
    with_grad = [sigma for grad, sigma in seen if grad]
    assert with_grad == [run.sigmas[rolled.exit_step]]  # all chunks at once
    seen.clear()
    run_phase(run, critic)
    assert not any(grad for grad, _ in seen)


@pytest.mark.parametrize(("stage", "mode"), [("dmd", "self"), ("sid", "self"), ("dmd", "data")])
def test_gradient_by_hand(data, stage, mode):
    """What reaches the generator is d loss / d x0, chained through the exit levels of one rollout
    with grad.
    """
    changes = {"rollout": mode, "micro_batch": 4, "guidance": 2.0, "checkpointing": False}
    run = make_run(data, stage, **changes)
    optimizer = run.optimizers["generator"]
    (figures,) = run_phase(run, stages.PHASES[stage][0], step=1)
    caught = dict(optimizer.grads)
    optimizer.grads.clear()

    # The rollout at one level a sample.
    batch, rolled = a_rollout(run, 1)
    x0 = rolled.x0.requires_grad_()
    noise = batch.draws(torch.randn, *x0.shape[1:])
    u = batch.draws(torch.rand, 1)
    sigma = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)[:, :, None, None, None]  # [B, 1, 1, 1, 1]
    xs = (1 - sigma) * x0 + sigma * noise

    def clean(model, text):
        return xs - sigma * model(xs, sigma[:, 0, 0, 0, 0], text)

    fake = clean(run.critic, batch.context)
    real = clean(run.teacher, batch.context)
    unconditional = clean(run.teacher, run.context(["neg"] * 4))
    real = real + 2 * (real - unconditional)
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
    if stage == "dmd":
        grad = (fake - real).detach() / scale / x0.numel()
        assert figures["loss"].item() == pytest.approx(0.5 * (grad * x0.numel()).square().mean())
    else:
        (grad,) = torch.autograd.grad(((real - fake) * (fake - x0) / scale).mean(), x0)
    torch.cat(rollout_with_grad(run, 1), 2).backward(grad)
    assert furthest(caught, optimizer.grads) < 1e-4
