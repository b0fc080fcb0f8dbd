"""Attention over a memory in float8. On a CPU its kernels are those of fp8_attention_reference.py;
on a GPU Triton's are held against these.
"""

from argparse import Namespace

import fp8_attention_reference
import pytest
import torch
from common import gpu, randn, rel

import live
import sample
from wan5b import extras
from wan5b.attention import attention, rope_table, rotate
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import fp8_attention
from wan5b.extras.fp8 import FP8
from wan5b.extras.fp8_attention import Fp8Cache, check, position, round_to_fp8
from wan5b.extras.sampling import generate
from wan5b.flow import few_step_sigmas
from wan5b.kvcache import KVCache
from wan5b.util import rng

HEADS = 2
CFG = DiTConfig(HEADS * 128, 112, HEADS, 2, 8, 8, text_dim=24, text_len=12, freq_dim=32)
TOKENS = 10  # a frame; no multiple of a group
ROOM = {"cfg": CFG, "batch": 1, "tokens_per_frame": TOKENS, "dtype": torch.bfloat16}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(extras, "fp8_attention_kernels", fp8_attention_reference, raising=False)


def drawn(frames: int, seed: int, batch: int = 1) -> list[torch.Tensor]:
    """q, k, v of so many frames, bfloat16 values that float8 holds."""
    shape = (batch, frames * TOKENS, HEADS, 128)
    return [round_to_fp8(randn(*shape, seed=3 * seed + i)).bfloat16() for i in range(3)]


def test_positions_are_a_permutation_of_each_group():
    rows = torch.arange(48)
    assert sorted(position(rows).tolist()) == rows.tolist()
    assert (position(rows) // 16).equal(rows // 16)
    assert position(torch.tensor([1, 2, 8, 15])).tolist() == [1, 4, 2, 15]


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"frames": 8}, (3, 1, 2, 2)),
        ({"frames": 5, "window": 5, "sink": 1}, (2, 2, 2, 1, 2, 2)),  # the ring wraps
        ({"frames": 7, "window": 5, "sink": 1}, (2, 2, 2, 1)),  # the sink lies apart
        ({"frames": 7, "window": 5}, (2, 2, 2, 1)),  # what is seen begins inside a group
        ({"frames": 10, "window": 2}, (2, 2, 2, 2, 2)),  # or, at frame 8, at another one
    ],
    ids=["all", "window", "roomy", "inside a group", "at a group"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_chunk_sees_what_it_sees_in_bfloat16(on_cpu, options, steps, batch):
    """With values that float8 holds: equal, but for the rounding of the result."""
    made = ROOM | {"batch": batch} | options
    ours = Fp8Cache(**made)
    plain = KVCache(**made)
    for i, frames in enumerate(steps):
        for level in range(2):  # of which the second replaces the first
            q, k, v = drawn(frames, 2 * i + level, batch)
            expected = plain.append(frames)(1, q, k, v)
            assert rel(ours.append(frames)(1, q, k, v), expected) < 5e-3
        ours.commit(frames)
        plain.commit(frames)


@torch.no_grad()
def test_a_sink_that_turns_is_rounded_once(on_cpu):
    cache = Fp8Cache(**ROOM, frames=3, window=3, sink=1, sink_rope="relative")
    for i in range(6):
        cache.append(1)(0, *drawn(1, i))
        cache.commit(1)
    made = drawn(1, 0)[1].float()
    turned = rotate(made, rope_table(128, 3, 1, 1, 1, made.device))
    assert cache.turned == 3
    assert cache.keys[0, :, :TOKENS].float().equal(round_to_fp8(turned).float())


class RoundedCache(KVCache):
    """A KVCache in bfloat16 that holds what float8 would, and all that it does to it."""

    def attend(self, layer, q, k, v, span):
        q, k, v = (round_to_fp8(x).to(x) for x in (q, k, v))
        keys, values = self.extend(layer, k, v, span)
        return attention(q.double(), keys.double(), values.double()).to(q)

    def _turn_sink(self, turn):
        super()._turn_sink(turn)
        if self.sink_keys is None:  # nothing has turned yet
            return
        rope = rope_table(128, turn, 1, 1, 1, self.memory.device)
        for (keys, _), made in zip(self.memory, self.sink_keys, strict=True):
            keys[:, : made.shape[1]] = round_to_fp8(rotate(made.float(), rope))


WINDOW = {"window": 9, "sink": 2}
TURNING = WINDOW | {"sink_rope": "relative"}
A, B = randn(2, 1, CFG.text_len, CFG.text_dim).bfloat16()  # texts
IMAGE = randn(1, CFG.in_dim, 1, 4, 10, seed=1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("chunks", "context", "options"),
    [
        ([3] * 7, A, WINDOW),
        ([3] * 7, A, TURNING),
        ([1, *[2] * 6], A, {"window": 5, "sink": 1}),
        ([3] * 4, A, {"prefix": IMAGE}),
        ([2, 3, 3, 3], A, {"prefix": IMAGE, "prefix_inside": True}),
        ([3] * 8, [A] * 3 + [B] * 5, {"window": 12, "sink": 3, "cuts": {2: 8, 5: 8}}),
        ([3] * 7, [A] * 4 + [B] * 3, WINDOW | {"recache": True}),
        ([3] * 7, [A] * 4 + [B] * 3, TURNING | {"recache": True}),
        ([3] * 7, A, WINDOW | {"clean_pass": False}),
        ([3] * 5, torch.cat([A, B]), WINDOW | {"solver": "euler", "guidance": 4.0}),
    ],
    ids=[
        *("window", "turning sink", "odd chunks", "prefix", "prefix inside", "scenes"),
        *("recache", "recache, turning sink", "no clean pass", "guidance"),
    ],
)
def test_videos_are_those_of_a_memory_that_is_rounded(on_cpu, chunks, context, options):
    """Whatever a video does to its memory it does to this one."""
    made = []
    model = WanDiT(CFG).init_weights(rng("cpu", 0)).bfloat16()
    noise = randn(1, CFG.in_dim, sum(chunks), 4, 10)
    given = (model, noise, context, few_step_sigmas(), chunks)
    how = {"causal": True, "solver": "renoise"} | options
    for kind in (Fp8Cache, RoundedCache, KVCache):
        made.append(torch.cat(list(generate(*given, **how, new_cache=kind)), 2))
    ours, rounded, plain = made
    assert rel(ours, rounded) < 1e-4
    assert rel(ours, plain) > 5e-3


@torch.no_grad()
def test_it_takes_half_the_memory_and_forgets(on_cpu):
    made = ROOM | {"frames": 8}
    cache = Fp8Cache(**made)
    assert 2 * (cache.keys.nbytes + cache.values.nbytes) == KVCache(**made).memory.nbytes
    for memory in (cache.keys, cache.values):
        memory.copy_(torch.full(memory.shape, torch.nan))
    cache.reset()
    q, k, v = drawn(1, 1)
    assert rel(cache.append(1)(0, q, k, v), attention(q, k, v)) < 5e-3


def test_values_too_large_become_the_largest():
    assert round_to_fp8(torch.tensor([1e9, -500.0])).float().tolist() == [448, -448]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"causal": False}, "is for clips made chunk by chunk"),
        ({"device": "cpu"}, "needs a Hopper GPU .* not cpu"),
        ({"capability": (8, 0)}, "needs a Hopper GPU .* not A100"),
        ({"dtype": torch.float32}, "needs bfloat16"),
        ({"head_dim": 64}, "needs heads of 128 channels, not 64"),
    ],
    ids=str,
)
def test_what_cannot_run_in_float8_is_refused(change, wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")

    def checked(device="cuda", capability=(9, 0), asked=True, **model):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        fits = {"causal": True, "head_dim": 128, "dtype": torch.bfloat16}
        check(Namespace(fp8_attention=asked, device=device), **(fits | model))

    checked()
    with pytest.raises(ValueError, match=f"float8 attention {wrong}.*leave out --fp8-attention"):
        checked(**change)
    checked(asked=False, **change)


class Started(Exception):
    """A script has loaded its networks and would begin."""


@pytest.mark.parametrize("script", [sample, live], ids=["sample", "live"])
@pytest.mark.parametrize("asked", [True, False])
def test_scripts_take_the_cache_that_is_asked_for(script, asked, monkeypatch, tmp_path):
    """Where a GPU is, which is not looked for here."""
    monkeypatch.setattr(fp8_attention, "check", lambda *args: None)
    kinds = []

    def note(kind):
        kinds.append(kind)
        raise Started

    monkeypatch.setattr(script.functools, "cache", note)
    options = ["--random-weights", "--preset", "tiny", "--size", "32x64", "--device", "cpu"]
    options += ["--port", "0"] if script is live else ["--out", str(tmp_path), "--prompt", "a"]
    options += ["--fp8-attention"] * asked
    with pytest.raises(Started):
        script.main(script.parse(options))
    assert kinds == [Fp8Cache if asked else KVCache]


# ------------------------------------------------------------------------------------------ the GPU


@gpu
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames", [1, 3, 13, 64])
@pytest.mark.parametrize("first", [14, 32], ids=["inside a group", "at a group"])
def test_the_kernels_are_the_reference(first, frames, batch):
    """Behind the last row there are large keys and values, which must not be seen."""
    from wan5b.extras import fp8_attention_kernels as kernels

    length = first + frames * TOKENS
    q, k, v = (x[:, :length] for x in drawn(frames + 4, 0, batch))
    rows = length + 16
    rows += -rows % 16
    results = []
    for module, device in ((fp8_attention_reference, "cpu"), (kernels, "cuda")):
        keys = torch.full((batch, rows, HEADS, 128), 64.0, device=device).to(FP8)
        values = torch.full((batch, HEADS, 128, rows), 64.0, device=device).to(FP8)
        q8 = torch.empty(q.shape, dtype=FP8, device=device)
        own = [x.to(device) for x in (q, k, v)]
        for part in (slice(first), slice(first, length)):
            module.round_into(
                q8[:, part], keys, values, part.start or 0, *(x[:, part] for x in own)
            )
        y = module.attend(q8, keys, values, length)
        results.append([x.float().cpu() for x in (q8, keys, values, y)])
    *exact, expected = results[0]
    *rounded, y = results[1]
    assert all(a.equal(b) for a, b in zip(exact, rounded, strict=True))
    assert rel(y, expected) < 3e-2  # the weights of the softmax are rounded, too
