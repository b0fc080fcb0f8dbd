"""extras/training_attention.py: gradients as without it, with less to do; what it keeps, goes."""

import dataclasses
import weakref

import pytest
import torch
from common import randn, rel
from torch.nn import functional
from training import DIT, SIZES, STAGES, config, finish, furthest, gradients, make_run, same

from wan5b.attention import causal_mask
from wan5b.dit import WanDiT
from wan5b.extras import training_attention
from wan5b.extras.training_attention import Layout, arrange, layout_of

pytestmark = pytest.mark.usefixtures("quick_and_clean")


@pytest.fixture
def calls(monkeypatch) -> list:
    """The queries of every attention, those to the text included."""
    made = []
    inner = functional.scaled_dot_product_attention

    def attention(q, *arguments, **options):
        made.append(q.shape)
        return inner(q, *arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    return made


# Of a micro-batch, two layers: the self-attentions that a backward makes once more.
AGAIN = {"teacher": 2, "ar": 8, "ode": 8, "dmd": 2 * 2 + 2, "sid": 2 * 2 + 4 * 2}


@pytest.mark.parametrize("stage", STAGES)
def test_kept(data, calls, stage):
    """The same bits, and each self-attention once less."""
    plain = make_run(data, stage, split_attention=True)
    expected = gradients(plain)
    times = len(calls)
    calls.clear()
    kept = make_run(data, stage, split_attention=True, keep_attention=True)
    assert same(gradients(kept), expected)
    assert times - len(calls) == 2 * AGAIN[stage]


@pytest.mark.parametrize("stage", ["ar", "ode"])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
@pytest.mark.parametrize("window", [0, 3])
def test_split(data, calls, stage, forcing, window):
    """As under the mask, but for rounding; chunk by chunk."""
    changes = {"forcing": forcing, "window": window}
    expected = gradients(make_run(data, stage, **changes))
    calls.clear()
    split = gradients(make_run(data, stage, split_attention=True, **changes))
    assert furthest(split, expected) < 1e-5
    frames = {shape[2] // 4 for shape in calls}
    assert frames == {3, 12 if forcing == "teacher" else 6}  # the latter to the text


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("window", [None, 4, 5, 7, 9])
@pytest.mark.parametrize("chunks", [(3, 3, 3), (1, 3, 3), (2, 1, 4, 2)])
def test_layouts_are_the_masks(chunks, window, teacher):
    """Piece by piece; where the window cuts through a chunk, there is none."""
    layout = layout_of(chunks, window, teacher, 2)
    if layout is None:
        layout = Layout(chunks, window, teacher, 2)
        exact = False
    else:
        exact = True
    rows = sum(layout.sizes)
    q, k, v = (randn(1, rows, 2, 4, seed=seed) for seed in range(3))
    parts = [training_attention.attention(*part) for part in layout.parts(q, k, v)]
    mask = causal_mask(chunks, 2, window, teacher, torch.device("cpu"))
    expected = training_attention.attention(q, k, v, mask)
    assert (rel(torch.cat(parts, 1), expected) < 1e-5) == exact


def test_a_window_through_chunks_takes_the_mask(data, calls):
    run = make_run(data, "ar", window=4, split_attention=True, keep_attention=True)
    expected = gradients(make_run(data, "ar", window=4))
    calls.clear()
    assert same(gradients(run), expected)
    assert {shape[2] for shape in calls} == {48}


def test_what_is_kept_goes_as_gradients_come(monkeypatch):
    """Until then the results alone are there; q, k and v come again, layer by layer, and go."""
    inner = training_attention.attention
    inputs = []
    results = []

    def attention(q, k, v):
        y = inner(q, k, v)
        inputs.extend(weakref.ref(x.untyped_storage()) for x in (q, k, v))
        results.append(weakref.ref(y.untyped_storage()))
        return y

    monkeypatch.setattr(training_attention, "attention", attention)
    model = WanDiT(dataclasses.replace(DIT, num_layers=6)).init_weights()
    model.checkpointing = True
    arrange(model, keep=True)
    again = []  # q, k and v of the second calls
    inner_call = training_attention.Kept.__call__

    def call(self, *qkv):
        y = inner_call(self, *qkv)
        if self.again:
            again.extend(weakref.ref(x.untyped_storage()) for x in qkv)
        return y

    monkeypatch.setattr(training_attention.Kept, "__call__", call)
    loss = model(randn(1, *SIZES), 0.5, randn(1, 8, 16)).square().mean()
    assert alive(inputs) == 0
    assert alive(results) == 6

    left = []
    for block in model.blocks:
        weight = block.self_attn.q.weight
        weight.register_post_accumulate_grad_hook(
            lambda _: left.append((alive(results), alive(again)))
        )
    loss.backward()
    assert [kept for kept, _ in left] == [5, 4, 3, 2, 1, 0]
    assert max(count for _, count in left) <= 3, "of one layer"
    assert len(results) == 6, "attention was made again"


def alive(references: list) -> int:
    return sum(x() is not None for x in references)


@pytest.mark.parametrize("stage", ["ode", "dmd"])
def test_a_run_goes_on_under_other_options(data, tmp_path, stage):
    """They are free to change; the weights come out alike."""
    plain = finish(config(data, stage, tmp_path / "plain"))
    out = tmp_path / "other"
    finish(config(data, stage, out, steps=2, save_every=2))
    (out / f"{stage}.safetensors").unlink()
    changed = finish(config(data, stage, out, keep_attention=True))
    assert same(changed, plain)
