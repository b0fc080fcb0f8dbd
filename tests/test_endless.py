"""live.py without a browser: what its options come to, and frames by tiny random networks."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from common import compiling, gpu

import live
from wan5b import fuse
from wan5b.extras import endless, graphs, random_weights
from wan5b.extras.codec import split_vae
from wan5b.extras.endless import PATIENCE, TEXTS, Contexts, Endless, plan
from wan5b.extras.server import Server
from wan5b.extras.studio import Wish
from wan5b.kvcache import KVCache

TINY = ["--random-weights", "--preset", "tiny", "--size", "32x32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maker(*options: str, encode=None) -> Endless:
    args = live.parse([*TINY, *options])
    job = plan(args)
    contexts = Contexts(encode or live.text_encoder(args, job))
    model = random_weights.random_dit("tiny", "cpu", job.dtype)
    vae = split_vae(random_weights.random_vae("tiny", "cpu"), job.dtype)
    return Endless(job, model, vae, contexts, KVCache, args.interpolate or 1, args.anew)


def wish(prompt="a red ball", seed=0, image=None) -> Wish:
    return Wish(prompt, seed, image, threading.Condition())


def taken(make: Endless, asked: Wish, count: int) -> list[np.ndarray]:
    return list(islice(make(asked), count))


def test_chunks_for_ever_and_the_same_for_a_seed():
    make = maker("--window", "6", "--sink", "3")
    chunks = taken(make, wish(), 4)
    assert [chunk.shape for chunk in chunks] == [(9, 32, 32, 3)] + 3 * [(12, 32, 32, 3)]
    assert chunks[0].dtype == np.uint8
    again = taken(make, wish(), 4)
    other = taken(make, wish(seed=1), 1)
    assert all(np.array_equal(a, b) for a, b in zip(chunks, again, strict=True))
    assert not np.array_equal(chunks[0], other[0])


def test_latents_go_to_the_decoder_s_card(monkeypatch):
    """Wherever the encoder is."""
    make = maker("--window", "6")
    elsewhere = torch.nn.Linear(1, 1, device="meta")
    make = Endless(make.job, make.model, (elsewhere, make.decoder), make.contexts, KVCache)
    places = []

    def carried(latents, place):
        places.append(place)
        return latents

    monkeypatch.setattr(endless, "carried", carried)
    taken(make, wish(), 1)
    assert places == [torch.device("cpu")]


def changed(*options: str) -> list[np.ndarray]:
    """Four chunks, the last two under another prompt."""
    make = maker("--window", "6", *options)
    asked = wish()
    chunks = make(asked)
    begun = [next(chunks), next(chunks)]
    asked.prompts.append("a blue ball")
    make.contexts.of("a blue ball")
    begun += [next(chunks), next(chunks)]
    assert asked.in_force == 1
    return begun


def test_a_new_prompt_changes_what_follows_and_nothing_before():
    calm = taken(maker("--window", "6"), wish(), 4)
    plain = changed()
    recached = changed("--recache")
    interpolated = changed("--interpolate", "2")
    for other in (plain, recached, interpolated):
        equal = [np.array_equal(a, b) for a, b in zip(calm, other, strict=True)]
        assert equal == [True, True, False, False]
    assert not np.array_equal(plain[2], recached[2])
    assert not np.array_equal(plain[2], interpolated[2])


def test_a_new_prompt_may_begin_a_new_video():
    before, _, *after = changed("--anew")
    assert np.array_equal(before, taken(maker("--window", "6"), wish(), 1)[0])
    begun = taken(maker("--window", "6"), wish("a blue ball", seed=1), 2)
    assert [len(chunk) for chunk in begun] == [9, 12]
    assert all(np.array_equal(a, b) for a, b in zip(after, begun, strict=True))


@pytest.mark.parametrize("other", [["--recache"], ["--interpolate", "2"]])
def test_what_a_new_video_cannot_keep(other):
    with pytest.raises(ValueError, match="--anew keeps nothing of the old prompt"):
        live.parse([*TINY, "--anew", *other])


def test_a_decoder_in_bfloat16_leaves_the_encoder_as_it_is():
    vae = random_weights.random_vae("tiny", "cpu")
    video = torch.linspace(-1, 1, 32 * 32).expand(1, 3, 1, 32 * 32).reshape(1, 3, 1, 32, 32)
    latents = vae.encode(video)
    pixels = vae.decode(latents)
    encoder, decoder = split_vae(vae, torch.bfloat16)
    assert torch.equal(encoder.encode(video), latents)
    found = decoder.decode(latents)
    assert found.dtype == torch.bfloat16
    assert (found.float() - pixels).norm() < 0.05 * pixels.norm()


def test_a_prompt_waits_for_its_context_and_the_video_does_not():
    free = threading.Event()

    def encode(text):
        if text == "slow":
            assert free.wait(10)
        return torch.full((1, 512, 64), float(len(text)))

    make = maker("--window", "6", encode=encode)
    texts = make.texts(asked := wish())
    first = next(texts)
    asked.prompts.append("slow")
    make.contexts.begin("slow")
    assert next(texts) is first
    assert next(texts) is first
    assert asked.in_force == 0
    free.set()
    make.contexts.of("slow")
    assert next(texts) is make.contexts.of("slow")
    assert asked.in_force == 1


def test_a_chunk_waits_for_many_prompts_no_longer_than_for_one():
    free = threading.Event()
    encoded = []

    def encode(text):
        assert text == "a red ball" or free.wait(10)
        encoded.append(text)
        return torch.zeros(1, 2, 4)

    make = maker("--window", "6", encode=encode)
    texts = make.texts(asked := wish())
    first = next(texts)
    asked.prompts += [f"prompt {i}" for i in range(TEXTS + 8)]
    for prompt in asked.prompts:
        make.contexts.begin(prompt)
    begun = time.monotonic()
    for _ in range(3):
        assert next(texts) is first
    assert time.monotonic() - begun < 3 * PATIENCE + 0.5
    free.set()
    newest = make.contexts.of(asked.prompts[-1])
    assert next(texts) is newest
    assert len(encoded) == len(set(encoded))
    make.contexts.close()


def test_a_prompt_may_come_in_over_several_chunks():
    values = {"zero": 0.0, "nine": 9.0, "three": 3.0}
    make = maker("--interpolate", "3", encode=lambda text: torch.full((1, 2, 4), values[text]))
    texts = make.texts(asked := wish("zero"))
    seen = [next(texts)[0, 0, 0].item()]
    for text in ("nine", "", "", "", "three", "", ""):
        if text:
            make.contexts.of(text)
            asked.prompts.append(text)
        seen.append(next(texts)[0, 0, 0].item())
    assert seen == pytest.approx([0, 3, 6, 9, 9, 7, 5, 3])
    # At the ends they are the texts' own tensors, which the rollout knows again.
    assert next(texts) is make.contexts.of("three")


def test_an_image_comes_first():
    make = maker("--window", "6")
    image = np.zeros((1, 50, 70, 3), np.uint8)
    chunks = taken(make, wish(image=image), 3)
    assert [len(chunk) for chunk in chunks] == [1, 12, 12]
    white = taken(make, wish(image=image + 255), 1)
    assert not np.array_equal(chunks[0], white[0])


def test_what_is_not_finite_is_said():
    make = maker("--window", "6")
    with torch.no_grad():
        make.model.head.head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        next(make(wish()))


@gpu
def test_graphs_made_while_warming_up_serve_the_studios_thread():
    """The same frames by a compiled model in another thread as by a plain one in this."""
    options = [*TINY[:-1], "cuda", "--window", "6", "--dtype", "float32"]
    args = live.parse(options)
    job = plan(args)
    cache = functools.cache(KVCache)

    def make() -> Endless:
        model = random_weights.random_dit("tiny", "cuda", job.dtype)
        vae = split_vae(random_weights.random_vae("tiny", "cuda"), job.dtype)
        return Endless(job, model, vae, Contexts(live.text_encoder(args, job)), cache)

    plain = taken(make(), wish(), 6)
    with compiling():
        fuse.enable(True)
        fast = make()
        graphs.record(fast.model)
        assert fast.warm_up() > 0
        with ThreadPoolExecutor(1) as thread:
            chunks = thread.submit(taken, fast, wish(), 6).result()
    for a, b in zip(plain, chunks, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 2


def test_an_error_of_the_text_encoder_is_raised_and_not_kept():
    calls = []

    def encode(text):
        calls.append(text)
        if len(calls) == 1:
            raise MemoryError("no room")
        return torch.zeros(1, 2, 4)

    contexts = Contexts(encode)
    with pytest.raises(MemoryError):
        contexts.of("a")
    assert contexts.of("a").shape == (1, 2, 4)
    contexts.close()


def test_warming_up_tells_how_long_a_chunk_takes():
    make = maker("--window", "6")
    begun = time.monotonic()
    seconds = make.warm_up()
    assert 0 < seconds < time.monotonic() - begun


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--mode", "bidirectional"], "invalid choice"),
        (["--recipe", "wan22"], "makes the whole clip at once"),
        (["--size", "30x32"], "multiples of 32"),
        (["--window", "2"], "no room"),
        (["--sink", "-1"], "--sink -1"),
        (["--port", "70000"], "--port 70000"),
        (["--interpolate", "0"], "--interpolate 0"),
        (["--seed", "1"], "unrecognized arguments: --seed"),
        (["--fp8"], "--fp8 needs"),
        (["--fp8-vae"], "--fp8-vae needs"),
        (["--fp8-attention"], "float8 attention needs"),
    ],
)
def test_options_that_are_wrong_are_one_line(options, wrong):
    with pytest.raises(ValueError, match=wrong) as error:
        plan(live.parse([*TINY, *options]))
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_not_causal_are_refused(pristine):
    with pytest.raises(ValueError, match="wan22 .* makes the whole clip at once"):
        plan(live.parse(["--release", str(pristine), "--device", "cpu"]))


def test_a_recipe_without_a_window_gets_one_with_a_note(capsys):
    job = plan(live.parse(TINY))
    assert job.samplers[False]["window"] == 21
    assert "no window" in capsys.readouterr().err
    plan(live.parse([*TINY, "--window", "9"]))
    assert "no window" not in capsys.readouterr().err


def test_an_address_that_is_taken_and_one_that_others_reach(capsys):
    with Server() as server:
        taken = live.parse([*TINY, "--port", str(server.server_port)])
        with pytest.raises(ValueError, match=f"port {server.server_port}: .* give another --port"):
            live.bind(taken)
    assert not capsys.readouterr().err
    live.bind(live.parse([*TINY, "--host", "0.0.0.0", "--port", "0"])).server_close()
    assert "whoever reaches" in capsys.readouterr().err
