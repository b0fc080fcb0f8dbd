"""Context noise: the clean pass shows chunks noised to a small level, in training and sampling."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from common import golden_dit, new_cache, randn, rel
from training import PROMPTS, config, first_batch, make_run, run_phase

from wan5b import stages
from wan5b.distill import guided, rollout
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import previews
from wan5b.extras.checks import check_unchanged
from wan5b.extras.endless import endless
from wan5b.extras.plan import describe, how_sampled
from wan5b.extras.recipes import Recipe, check_whole, facts, from_metadata, in_mode
from wan5b.extras.sampling import MODES, generate
from wan5b.extras.shards import write_shard
from wan5b.flow import add_noise, few_step_sigmas, sampling_sigmas
from wan5b.util import rng
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

SIGMAS = few_step_sigmas()
LEVEL = 0.1


@pytest.fixture(scope="module")
def model():
    return golden_dit("dit_causal_masks")


def video(frames, seed=0):
    return randn(1, 48, frames, 4, 6, seed=seed)


def text():
    return randn(1, 12, 24, seed=9)


def renoise(chunk, step, like):
    return randn(*like.shape, seed=10 * chunk + step)


# ----------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize(
    ("options", "step"),
    [({}, 3), ({"exit_step": 1}, 1), ({"solver": "unipc"}, 3), ({"committed": video(6, 7)}, 3)],
    ids=["last", "early", "unipc", "real frames"],
)
@torch.no_grad()
def test_the_cache_holds_the_keys_of_noised_chunks(model, options, step):
    """To the bit, each by a draw of its own: `step` is the first that no level has used."""
    cache = new_cache(model, 9)
    how = {"renoise": renoise, "prefix": video(3, 5), "context_noise": LEVEL, **options}
    chunks = list(rollout(model, video(6), text(), SIGMAS, [3, 3], cache, **how))
    shown = options["committed"].split(3, 2) if "committed" in options else chunks

    again = new_cache(model, 9)
    again.use_text(context := text())
    model(video(3, 5), 0.0, context, cache=again)  # what was given is clean
    again.commit(3)
    for index, x0 in enumerate(shown):
        noised = add_noise(x0, renoise(index, step, x0), LEVEL)
        model(noised, LEVEL, context, cache=again)
        again.commit(3)
    assert torch.equal(cache.memory, again.memory)

    # Which are others than those of clean chunks, or of the same chunks at that level.
    for noise, sigma in ((0.0, 0.0), (0.0, LEVEL)):
        again.rewind(6)
        x0 = shown[1]
        model(add_noise(x0, renoise(1, step, x0), noise), sigma, context, cache=again)
        assert rel(again.memory, cache.memory) > 1e-3


@torch.no_grad()
def test_a_picture_inside_the_first_chunk_stays_clean(model):
    """It is committed with the chunk, at level 0."""
    seen = []

    def watched(x, sigma, context, **options):
        seen.append((x, sigma))
        return model(x, sigma, context, **options)

    how = {"prefix": video(1, 5), "prefix_inside": True, "renoise": renoise}
    made = rollout(
        watched, video(5), text(), SIGMAS, [2, 3], new_cache(model, 6), context_noise=LEVEL, **how
    )
    first = next(made)
    assert len(seen) == 4  # none more than with a clean context
    next(made)
    x, sigma = seen[4]
    noised = add_noise(first, renoise(0, 3, first), LEVEL)
    assert torch.equal(x, torch.cat([video(1, 5), noised], 2))
    assert sigma.tolist() == [[0.0, LEVEL, LEVEL]]
    assert len(seen) == 9


@torch.no_grad()
def test_none_changes_nothing(model):
    """Nor draws anything; and some changes all chunks but the first."""
    made = []
    for options in ({}, {"context_noise": 0.0}, {"context_noise": LEVEL}):
        asked = []

        def counted(chunk, step, like, asked=asked):
            asked.append((chunk, step))
            return renoise(chunk, step, like)

        cache = new_cache(model, 6)
        how = {"renoise": counted, **options}
        x0 = list(rollout(model, video(6), text(), SIGMAS, [3, 3], cache, **how))
        made.append((x0, cache.memory, asked))
    plain, none, some = made
    assert none[2] == plain[2] == [(chunk, step) for chunk in (0, 1) for step in range(3)]
    assert some[2] == [(chunk, step) for chunk in (0, 1) for step in range(4)]
    assert torch.equal(none[1], plain[1])
    assert torch.equal(none[0][1], plain[0][1])
    assert torch.equal(some[0][0], plain[0][0])
    assert rel(some[0][1], plain[0][1]) > 1e-4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"context_noise": 1.5}, "context_noise 1.5"),
        ({"context_noise": -0.1}, "context_noise -0.1"),
        ({"context_noise": 0.1, "clean_pass": False}, "context_noise 0.1, .* clean_pass False"),
    ],
)
def test_what_can_not_be(model, given, says):
    with pytest.raises(AssertionError, match=says):
        next(rollout(model, video(3), text(), SIGMAS, [3], new_cache(model, 3), **given))


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["dmd", "sid"])
def test_training_shows_noised_chunks(data, stage):
    """At the level of the config, in both phases; the first chunk is as ever."""
    plain = make_run(data, stage)
    noised = make_run(data, stage, context_noise=100)
    for phase in ("generator", "critic"):
        made = [stages.roll_out(run, first_batch(run, phase)) for run in (plain, noised)]
        assert made[0].exit_step == made[1].exit_step
        (first, others), (same, changed) = (rolled.x0.split(3, 2) for rolled in made)
        assert torch.equal(first, same)
        assert rel(changed, others) > 1e-4

    seen = []
    inner = noised.generator.forward

    def watched(x, sigma, context, **options):
        seen.append((x, sigma))
        return inner(x, sigma, context, **options)

    noised.generator.forward = watched
    rolled = stages.roll_out(noised, first_batch(noised, "critic"))
    shown = [x for x, sigma in seen if sigma == 0.1]
    assert len(shown) == 1  # nothing needs the last chunk's
    first = rolled.x0[:, :, :3]
    noise = (shown[0] - 0.9 * first) / 0.1
    assert abs(noise.std() - 1) < 0.1
    assert abs((noise * first).mean()) < 0.1


@pytest.mark.parametrize("prefix", [0, 1])
def test_ode_learns_behind_such_contexts(data, tmp_path, prefix):
    """All but a given frame at the level, noised to it; what is learnt is as ever."""
    frames = 6 + prefix
    x = randn(8, 5, 48, frames, 4, 4)
    write_shard(tmp_path / "0.safetensors", {"x": x}, PROMPTS, sigmas=SIGMAS)
    given = {"prefix": prefix, "frames": frames, "trajectories": str(tmp_path), "micro_batch": 4}
    told = []
    for level in (0, 200):
        run = make_run(data, "ode", context_noise=level, **given)
        seen = []

        def model(x, sigma, context, seen=seen, **options):
            seen.append((x, sigma, options))
            return torch.zeros_like(x, requires_grad=True)

        model.cfg = run.generator.cfg
        run.generator = model
        run_phase(run, stages.PHASES["ode"][0])
        told.append(seen)
    for (x, sigma, plain), (same, levels, options) in zip(*told, strict=True):
        assert torch.equal(x, same)
        assert torch.equal(sigma, levels)
        assert "clean_sigma" not in plain
        expected = torch.tensor([[0.0] * prefix + [0.2] * 6])
        assert torch.allclose(options["clean_sigma"].float(), expected)
        end, clean = plain["clean"], options["clean"]
        assert torch.equal(clean[:, :, :prefix], end[:, :, :prefix])
        noise = ((clean - 0.8 * end) / 0.2)[:, :, prefix:]
        assert abs(noise.std() - 1) < 0.05


def test_runs_of_another_level_are_not_gone_on_with(data, tmp_path):
    """Those that began before there was one are of level 0."""
    cfg = config(data, "dmd", tmp_path)
    said = json.loads(json.dumps(facts(cfg, PRESETS["tiny"], 2, {})))
    assert said["training"].pop("context_noise") == 0
    save_dit(WanDiT(PRESETS["tiny"]), tmp_path / "x.safetensors", said)
    check_unchanged(cfg, {}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="made with another context_noise"):
        check_unchanged(replace(cfg, context_noise=50), {}, tmp_path / "x.safetensors")


# ----------------------------------------------------------------------------------------- sampling


def test_an_export_says_how_it_was_trained(data):
    """And is sampled so; those without say nothing of it."""
    for stage, level in (("ode", 100), ("dmd", 100), ("sid", 250), ("dmd", 0), ("ar", 100)):
        cfg = config(data, stage, context_noise=level)
        said = json.loads(json.dumps(facts(cfg, PRESETS["tiny"], 3, {})))
        recipe = from_metadata(said)
        check_whole(recipe)
        if stage == "ar" or not level:
            assert "context_noise" not in said
            assert recipe.chunk_options() == {}
        else:
            assert recipe.chunk_options() == {"context_noise": level / 1000}


def test_clips_and_the_live_page_go_by_the_recipe():
    for level, told in ((0, {}), (100, {"context_noise": 0.1})):
        recipe = in_mode(Recipe(context_noise=level, window=21), MODES["few"])
        sampler = how_sampled(Namespace(frames=None, image=None), recipe, 0)
        for given in (sampler, endless(recipe, image=True, recache=False)):
            assert {name: given[name] for name in given if name == "context_noise"} == told
        assert ("contexts noised to 0.1" in describe(recipe, sampler)) == (level > 0)


def test_what_becomes_of_it_in_other_modes():
    """It stays where there are chunks."""
    recipe = in_mode(Recipe(context_noise=100), MODES["few"])
    for name, mode in MODES.items():
        other = in_mode(recipe, mode)
        check_whole(other)
        assert other.context_noise == (100 if name in ("few", "many") else 0)
    whole = {"stage": "teacher", "context_noise": 100}
    assert from_metadata(whole).context_noise == 0


@torch.no_grad()
def test_sampling_is_the_rollout(model):
    """In few steps and in many, with the numbers that `generate` draws one after the other."""
    both = torch.cat([text(), randn(1, 12, 24, seed=8)])
    for scale, sigmas, solver in ((1, SIGMAS, "renoise"), (3.0, sampling_sigmas(3), "unipc")):
        how = {"causal": True, "solver": solver, "guidance": scale, "seed": 4}
        given = (video(6), both, sigmas, [3, 3])
        plain, made = (list(generate(model, *given, context_noise=e, **how)) for e in (0.0, LEVEL))

        draws = rng("cpu", 4, "renoise")

        def fresh(chunk, step, like, draws=draws):
            return torch.randn(like.shape, generator=draws)

        rows = 1 if scale == 1 else 2
        field = model if scale == 1 else guided(model, scale)
        given = (field, video(6), both[:rows], sigmas, [3, 3], new_cache(model, 6, rows))
        own = {"renoise": fresh, "context_noise": LEVEL, "solver": solver}
        for x0, expected in zip(made, rollout(*given, **own), strict=True):
            assert torch.equal(x0, expected)
        assert rel(made[1], plain[1]) > 1e-4


def test_sample_videos_go_by_the_config(data, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(previews, "generate", lambda *_, **how: told.append(how) or [video(3)])
    monkeypatch.setattr(previews, "write", lambda *_: None)
    for level in (0, 100):
        run = make_run(data, "dmd", context_noise=level, sample_prompts=(PROMPTS[0],))
        previews.sample_videos(run, None, tmp_path, 1)
    assert [how.get("context_noise", 0) for how in told] == [0, 0.1]
