"""Rollouts of training that are not all like the plain method's: levels that differ between chunks,
no clean pass, videos longer than what is scored, sinks.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from common import golden_dit, new_cache, randn, rel
from training import PROMPTS, config, first_batch, furthest, make_run, run_phase

import train
from wan5b import stages
from wan5b.distill import replay, rollout
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import graphs, rollouts
from wan5b.extras.checks import check_unchanged
from wan5b.extras.codec import LinearCodec
from wan5b.extras.recipes import check_whole, facts, from_metadata
from wan5b.extras.rollouts import TurningCache, picture
from wan5b.extras.sampling import generate
from wan5b.extras.shards import write_shard
from wan5b.flow import add_noise, few_step_sigmas
from wan5b.kvcache import KVCache
from wan5b.util import rng
from wan5b.vae22 import VAEConfig
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

CFG = PRESETS["tiny"]
CUDA = torch.device("cuda")
AFTER = few_step_sigmas((1000, 500))
LONG = {"rollout_frames": 15, "window": 6}
OPTIONS = {
    "levels": {"levels_after": (1000, 500)},
    "other levels": {"levels_after": (1000, 750, 250)},
    "no clean pass": {"clean_pass": False},
    "both, window": {"levels_after": (1000, 500), "clean_pass": False, "window": 4},
    "long": LONG,
    "long, no window": {"rollout_frames": 12},
    "sink": LONG | {"window": 7, "sink": 2},
    "relative sink": LONG | {"window": 7, "sink": 2, "sink_rope": "relative"},
    "all": LONG
    | {"levels_after": (1000, 500), "clean_pass": False, "window": 5}
    | {"sink": 1, "sink_rope": "relative"},
    "picture, all": LONG | {"prefix": 1, "frames": 7, "rollout_frames": 13, "clean_pass": False},
}


@pytest.fixture
def codec(monkeypatch):
    """In the place of the VAE: a linear one, whose patches are 48 random directions."""
    model = LinearCodec(VAEConfig())
    colours = randn(16, 1, 4, 16, 16).flatten(1)
    basis = torch.linalg.qr(colours.T)[0].T.reshape(16, 1, 4, 16, 16)
    model.load_state_dict({"basis": basis, "dual": basis})
    monkeypatch.setattr(rollouts, "load_vae", lambda *_: model)
    return model


def a_run(data, monkeypatch, stage="dmd", **changes) -> stages.Run:
    """With clips of any length. The stores are for 6 frames, which are never looked at."""
    monkeypatch.setattr(train, "check_fit", lambda *_: None)
    given = {"checkpointing": False, "vae": "a codec", "frames": 6}
    run = make_run(data, stage, **(given | changes))
    clips = randn(8, 48, run.cfg.frames, 4, 4, seed=3)
    monkeypatch.setattr(run, "clips", lambda items: clips[items])
    return run


class Noted:
    """Stands in `rollouts.roll`'s place and remembers what it was asked for."""

    def __init__(self, monkeypatch):
        self.inner = rollouts.roll
        monkeypatch.setattr(rollouts, "roll", self)

    def __call__(self, run, batch, chunks, sigmas, **options):
        self.chunks = chunks
        self.ways = list(sigmas)
        self.steps = list(options.pop("exit_step"))
        self.rest = options
        again = {"exit_step": iter(self.steps), **options}
        return self.inner(run, batch, chunks, iter(self.ways), **again)

    def in_one_graph(self, run, batch) -> list[torch.Tensor]:
        """The same rollout with grad, over a memory of all frames: its chunks."""
        frames = run.cfg.prefix + sum(self.chunks)
        sizes = (len(batch.items), frames, 4, run.window, run.cfg.sink)
        cache = KVCache(run.generator.cfg, *sizes, sink_rope=run.cfg.sink_rope)
        prefix = run.clips(batch.items)[:, :, : run.cfg.prefix] if run.cfg.prefix else None
        noise = batch.draws(torch.randn, *run.shape(sum(self.chunks)))

        def renoise(chunk, step, like):
            return batch.draws(torch.randn, *like.shape[1:])

        given = (run.generator, noise, batch.context, iter(self.ways), self.chunks, cache)
        how = {"exit_step": iter(self.steps), "renoise": renoise, "prefix": prefix, **self.rest}
        made = rollout(*given, **how)
        return [next(made) for _ in self.chunks]


@pytest.mark.parametrize("name", OPTIONS)
def test_replay_is_the_rollout_and_its_gradient(data, monkeypatch, codec, name):
    """Of the chunks that are trained, at every exit and with windows at several places; over a
    memory that holds no more than it must.
    """
    run = a_run(data, monkeypatch, **OPTIONS[name])
    noted = Noted(monkeypatch)
    optimizer = run.optimizers["generator"]
    seen = set()
    for step in range(12):
        batch = first_batch(run, "generator", step)
        rolled = stages.roll_out(run, batch)
        case = (*noted.steps[:2], len(noted.chunks))
        if case in seen:
            continue
        seen.add(case)

        whole = noted.in_one_graph(run, first_batch(run, "generator", step))
        scored = torch.cat(whole[len(whole) - len(run.chunks) :], 2)
        w = randn(*rolled.x0.shape, seed=step)
        w[:, :, : rolled.shown] = 0
        scored.backward(w)
        expected = dict(optimizer.grads)
        optimizer.grads.clear()

        given = (run.generator, batch.context, rolled.sigma, rolled.trace, run.cache)
        again = replay(*given)
        assert rel(again, scored) < 1e-5
        again.backward(w)
        assert furthest(optimizer.grads, expected) < 1e-5
        optimizer.grads.clear()
        first = int(rolled.shown > 0)
        assert rel(rolled.x0[:, :, first:], scored[:, :, first:]) < 1e-5
    assert len(seen) >= 3
    long = run.cfg.rollout_frames > 0
    assert {length > len(run.chunks) for _, _, length in seen} == (
        {False, True} if long else {False}
    )


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_sampling_is_the_rollout_of_training(data, monkeypatch, codec, name):
    """The same draws, the last exit: the same chunks, by what the export says of itself."""
    run = a_run(data, monkeypatch, micro_batch=1, **OPTIONS[name])
    noted = Noted(monkeypatch)
    for step in range(40):
        batch = first_batch(run, "critic", step)
        rolled = stages.roll_out(run, batch)
        longest = sum(noted.chunks) + run.cfg.prefix >= run.cfg.rollout_frames
        last = [len(way) - 2 for way in noted.ways]
        if longest and noted.steps == last:
            break
    else:
        raise AssertionError("no step goes to the last exit")

    said = json.loads(json.dumps(facts(run.cfg, run.generator.cfg, 1, {})))
    recipe = from_metadata(said)
    draws = rng("cpu", run.cfg.seed, "critic", step, 0)
    noise = torch.randn(run.shape(sum(noted.chunks)), generator=draws)[None]
    prefix = run.clips(batch.items)[:, :, : run.cfg.prefix] if run.cfg.prefix else None
    how = {"causal": True, "solver": "renoise", "window": recipe.window or None}
    how |= {"sink": recipe.sink, "sink_rope": recipe.sink_rope, "prefix": prefix, "draws": draws}
    how |= recipe.chunk_options()
    made = generate(run.generator, noise, batch.context, recipe.sigmas(False), noted.chunks, **how)
    whole = torch.cat(list(made), 2)
    first = int(rolled.shown > 0)
    scored = rolled.x0[:, :, first:]
    assert rel(whole[:, :, -scored.shape[2] :], scored) < 1e-5  # memory has another order


def test_exits_are_uniform_in_every_list_and_one_for_all(data, monkeypatch):
    """All chunks leave early, or all late."""
    run = a_run(data, monkeypatch, levels_after=(1000, 750, 250), frames=9, micro_batch=1)
    seen = []

    def fake(run, batch, chunks, sigmas, exit_step, **options):
        seen.append(tuple(exit_step))
        x = torch.zeros(1, *run.shape(9))
        return x, None, list(x.split(chunks, 2))

    monkeypatch.setattr(rollouts, "roll", fake)
    drawn = []
    for step in range(400):
        seen.clear()
        for batch in stages.micro_batches(run, "critic", step, moved=False):
            stages.roll_out(run, batch)
        assert len(seen) == 4
        assert len(set(seen)) == 1, "all samples alike"
        drawn.append(seen[0])
    for first, second, third in drawn:
        assert second == third
        assert abs(first / 4 - second / 3) < 1 / 3
    for which, levels in ((0, 4), (1, 3)):
        mean = 400 / levels
        counts = [[row[which] for row in drawn].count(level) for level in range(levels)]
        assert all(abs(count - mean) < 4 * mean**0.5 for count in counts), counts


# ---------------------------------------------------------------------------------------- contexts


@torch.no_grad()
@pytest.mark.parametrize("leave", [0, 1, 2, 3])
def test_contexts_without_a_clean_pass(leave):
    """Always of the last level: of its own forward where the rollout got there, else of x0 noised
    straight to it.
    """
    model = golden_dit("dit_causal_masks")
    sigmas = few_step_sigmas()
    noise, context = randn(1, 48, 6, 4, 6), randn(1, 12, 24, seed=9)
    calls = []

    def watched(x, sigma, context, **options):
        calls.append((x, sigma))
        return model(x, sigma, context, **options)

    def renoise(chunk, step, like):
        return randn(*like.shape, seed=10 * chunk + step)

    cache = new_cache(model, 6)
    how = {"exit_step": leave, "renoise": renoise, "clean_pass": False}
    first, second = rollout(watched, noise, context, sigmas, [3, 3], cache, **how)
    to_last = [sigmas[i] for i in range(leave + 1)] + [sigmas[3]] * (leave < 3)
    assert [sigma for _, sigma in calls] == 2 * to_last

    # The second chunk, behind the first one's input at the last level.
    shown = calls[len(to_last) - 1][0]
    if leave < 3:
        assert torch.equal(shown, add_noise(first, renoise(0, leave, first), sigmas[3]))
    again = new_cache(model, 6)
    model(shown, sigmas[3], context, cache=again)
    again.commit(3)
    x = calls[len(to_last) + leave][0]
    v = model(x, sigmas[leave], context, cache=again)
    assert rel(x - sigmas[leave] * v, second) < 1e-6
    with pytest.raises(AssertionError, match="ends with a clean pass"):
        next(rollout(model, noise, context, sigmas, [6], cache, solver="euler", clean_pass=False))


@pytest.mark.parametrize("prefix", [0, 1])
def test_ode_learns_as_rollouts_go(data, tmp_path, monkeypatch, prefix):
    """Each chunk at its own levels, behind contexts at the last of them."""
    frames = 9 + prefix
    x = randn(8, 5, 48, frames, 4, 4)
    write_shard(tmp_path / "0.safetensors", {"x": x}, PROMPTS, sigmas=few_step_sigmas())
    options = {"levels_after": (1000, 500), "clean_pass": False, "frames": frames}
    options |= {"prefix": prefix, "trajectories": str(tmp_path), "latents": "", "vae": ""}
    run = make_run(data, "ode", micro_batch=4, **options)
    seen = []

    def model(x, sigma, context, **options):
        seen.append((x, sigma, options["clean"], options["clean_sigma"]))
        return torch.zeros_like(x, requires_grad=True)

    model.cfg = run.generator.cfg
    run.generator = model
    for step in range(60):
        run_phase(run, stages.PHASES["ode"][0], step)
    sigma = torch.cat([row[1] for row in seen])
    for chunk, levels in enumerate((few_step_sigmas(), AFTER, AFTER)):
        part = sigma[:, prefix + 3 * chunk : prefix + 3 * chunk + 3]
        assert (part == part[:, :1]).all()
        known = torch.tensor(levels[:-1])
        counts = (part[:, :1] == known).sum(0)
        mean = len(part) / len(known)
        assert counts.sum() == len(part)
        assert ((counts - mean).abs() < 4 * mean**0.5).all(), counts
    last = torch.tensor([0.0] * prefix + [0.625] * 3 + [AFTER[-2]] * 6)
    residues = []
    for _, _, clean, clean_sigma in seen:
        assert torch.allclose(clean_sigma.float(), last.expand_as(clean_sigma))
        end = torch.stack([run.data.store[i]["x"][-1] for i in range(8)])
        gaps = (clean[:, None] - (1 - last[:, None, None]) * end).flatten(2).norm(dim=2)
        own = end[gaps.argmin(1)]
        assert torch.equal(clean[:, :, :prefix], own[:, :, :prefix])
        residue = (clean - (1 - last[:, None, None]) * own)[:, :, prefix:]
        residues.append(residue / last[prefix:, None, None])
    assert abs(torch.cat(residues).std() - 1) < 0.02  # unit noise


# ------------------------------------------------------------------------------------ long rollouts


@pytest.mark.parametrize("stage", ["dmd", "sid"])
def test_a_window_at_the_start_is_the_plain_step(data, monkeypatch, codec, stage):
    """Bit for bit: metrics and gradients; and in other steps it is not."""
    plain = a_run(data, monkeypatch, stage, window=6)
    long = a_run(data, monkeypatch, stage, **LONG)
    noted = Noted(monkeypatch)
    starts = set()
    for step in range(3):
        for phase in stages.PHASES[stage]:
            rows = [run_phase(run, phase, step) for run in (plain, long)]
            grads = [dict(run.optimizers[phase.moves].grads) for run in (plain, long)]
            for run in (plain, long):
                run.optimizers[phase.moves].grads.clear()
            same = rows[0] == rows[1]
            assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
            at_start = len(noted.chunks) == 2
            starts.add(at_start)
            assert same == at_start
            equal = [torch.equal(grads[0][key], grads[1][key]) for key in grads[0]]
            assert all(equal) == at_start
    assert starts == {False, True}


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_window_inside_begins_with_a_picture(data, monkeypatch, codec, prefix):
    """The last pixel frame in front of what follows it, encoded by itself."""
    given = {"prefix": 1, "frames": 7, "rollout_frames": 13} if prefix else LONG
    run = a_run(data, monkeypatch, **given)
    noted = Noted(monkeypatch)
    inside = 0
    for step in range(6):
        batch = first_batch(run, "critic", step)
        rolled = stages.roll_out(run, batch)
        if len(noted.chunks) == 2:
            continue
        inside += 1
        whole = noted.in_one_graph(run, first_batch(run, "critic", step))
        whole = torch.cat(whole, 2).detach()
        if prefix:
            whole = torch.cat([run.clips(batch.items)[:, :, :1], whole], 2)
        ends = whole.shape[2] - 6 + (1 - prefix)  # of what the picture is of
        pixels = codec.decode(whole[:, :, :ends])
        expected = codec.encode(pixels[:, :, -1:].clamp(-1, 1))
        shown = rolled.prefix if prefix else rolled.x0[:, :, :1]
        assert rel(shown, expected) < 1e-5
        assert rolled.shown == (0 if prefix else 3)
        assert rolled.x0.shape[2] == 6
        assert rel(rolled.x0[:, :, 1 - prefix :], whole[:, :, -6:][:, :, 1 - prefix :]) < 1e-5

        # What is shown alone gets no gradient.
        x0 = rolled.x0.requires_grad_()
        optimizer = run.optimizers["generator"]
        stages.into_weights(run, batch, rolled, x0[:, :, : rolled.shown].sum() + 0 * x0.sum())
        assert not any(grad.any() for grad in optimizer.grads.values())
        optimizer.grads.clear()
    assert inside > 1


def test_a_picture_of_many_frames_is_that_of_a_whole_decoding(codec):
    latents = randn(2, 48, 5, 4, 4)
    whole = codec.decode(latents)[:, :, -1:].clamp(-1, 1)
    assert rel(picture((codec, codec), latents), codec.encode(whole)) < 1e-6


def test_the_memory_holds_what_a_replay_sees_and_no_more(data, monkeypatch, codec):
    run = a_run(data, monkeypatch, **LONG, sink=1)
    assert run.cache.capacity == 9  # 6 scored; the first 3 of these see 3 more, one of them sink
    step = 0
    while run.cache.written < 15:
        batch = first_batch(run, "critic", step)
        rolled = stages.roll_out(run, batch)
        step += 1
    replay(run.generator, batch.context, rolled.sigma, rolled.trace, run.cache)

    sizes = (run.generator.cfg, 2, 8, 4, 6, 1)
    run.cache = KVCache(*sizes)
    batch = first_batch(run, "critic", step - 1)
    rolled = stages.roll_out(run, batch)
    with pytest.raises(AssertionError, match="replaced frames"):
        replay(run.generator, batch.context, rolled.sigma, rolled.trace, run.cache)


@torch.no_grad()
@pytest.mark.parametrize("frames", [7, 16])
def test_a_sink_turned_as_it_is_read(frames):
    """Makes the same video as one that is turned in memory, in a ring or a longer memory."""
    model = golden_dit("dit_causal_masks")
    noise, context = randn(1, 48, 16, 4, 6), randn(1, 12, 24, seed=9)
    videos = []
    for kind in (KVCache, TurningCache):
        cache = kind(model.cfg, 1, frames, 6, window=7, sink=2, sink_rope="relative")
        torch.manual_seed(1)
        made = rollout(model, noise, context, few_step_sigmas(), [2] * 8, cache)
        videos.append(torch.cat(list(made), 2))
    assert torch.equal(*videos)


@pytest.mark.parametrize(
    "change",
    [
        {"who": "critic"},
        {"who": "base"},  # with lora
        {"stage": "ar"},
        {"compile": False},
        {"device": torch.device("cpu")},
        {"mesh": "of two processes"},
        {"sink_rope": "relative"},
    ],
    ids=str,
)
def test_which_networks_of_a_run_are_recorded(change):
    """CUDA graphs read weights, and the sink's angle, as they were when they were recorded."""

    def recorded(who="generator", device=CUDA, mesh=None, **changes):
        plain = {"stage": "dmd", "compile": True, "sink_rope": "absolute"}
        model = WanDiT(CFG)
        world = SimpleNamespace(device=device, mesh=mesh)
        graphs.record_rollouts(SimpleNamespace(**(plain | changes)), world, who, model)
        return isinstance(model.compute, graphs.Graphs)

    assert recorded()
    assert recorded(stage="sid")
    assert not recorded(**change)


@torch.no_grad()
def test_a_place_does_not_say_how_far_a_sink_is_turned():
    """Which is why such a run is not recorded: the same slots are read at another angle."""
    cache = TurningCache(CFG, 1, 9, 6, window=6, sink=1, sink_rope="relative")
    seen = {}
    for _ in range(12):
        attend = cache.append(3)
        own = randn(1, 18, CFG.num_heads, CFG.head_dim)
        keys, _ = cache.extend(0, own, own, attend.spans[0])
        seen.setdefault(attend.place, []).append(keys[:, :6])
        cache.commit(3)
    first, *later = max(seen.values(), key=len)
    assert later
    assert all(rel(sink, first) > 0.1 for sink in later)


# ------------------------------------------------------------------------------------- what is said


def test_metadata_says_it(data):
    """Of the stages that it is of; the plain method's is what it was."""
    for stage in ("ar", "ode", "dmd"):
        cfg = config(data, stage, **OPTIONS["all"])
        said = facts(cfg, PRESETS["tiny"], 3, {})
        recipe = from_metadata(json.loads(json.dumps(said)))
        check_whole(recipe)
        few = stage != "ar"
        assert recipe.levels_after == ((1000.0, 500.0) if few else ())
        assert recipe.clean_pass == (not few)
        sink = (1, "relative") if stage == "dmd" else (0, "absolute")
        assert (recipe.window, recipe.sink, recipe.sink_rope) == (5, *sink)
        options = {"sigmas_after": AFTER, "clean_pass": False}
        assert recipe.chunk_options() == (options if few else {})
    plain = facts(config(data, "dmd"), PRESETS["tiny"], 3, {})
    known = "stage step levels shift chunk prefix window config training data"
    assert list(plain) == known.split()


def test_runs_that_began_before_these_options_go_on(data, tmp_path):
    cfg = config(data, "dmd", tmp_path)
    said = json.loads(json.dumps(facts(cfg, PRESETS["tiny"], 2, {})))
    for name in ("sink", "sink_rope", "levels_after", "clean_pass", "rollout_frames"):
        del said["training"][name]
    said["training"]["kept_blocks"] = 2  # an option that is no more
    save_dit(WanDiT(PRESETS["tiny"]), tmp_path / "x.safetensors", said)
    check_unchanged(cfg, {}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="made with another clean_pass"):
        check_unchanged(replace(cfg, clean_pass=False), {}, tmp_path / "x.safetensors")


def test_an_earlier_kind_of_real_frames_is_not_gone_on_with(data, tmp_path):
    cfg = replace(config(data, "dmd", tmp_path), rollout="data")
    said = json.loads(json.dumps(facts(cfg, PRESETS["tiny"], 2, {})))
    save_dit(WanDiT(PRESETS["tiny"]), tmp_path / "new.safetensors", said)
    check_unchanged(cfg, {}, tmp_path / "new.safetensors")
    del said["training"]["lora_merge"]
    save_dit(WanDiT(PRESETS["tiny"]), tmp_path / "old.safetensors", said)
    with pytest.raises(ValueError, match="another rollout .an earlier version's data, one chunk"):
        check_unchanged(cfg, {}, tmp_path / "old.safetensors")
