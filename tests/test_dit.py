"""The DiT against the reference's vectors, the releases' manifests, its masks' definition and
itself.
"""

import copy
import json
from unittest import mock

import pytest
import torch
from common import GOLDEN, ON_GPU, PLACES, golden, golden_dit, gpu, randn, rel

from wan5b import attention as attention_module
from wan5b.attention import attention, block_mask, causal_mask, dense_mask
from wan5b.dit import MLP, PRESETS, DiTConfig, WanDiT, rope_table, rotate
from wan5b.flow import few_step_sigmas
from wan5b.kvcache import KVCache

TINY = DiTConfig(64, 112, 2, 2, 8, 8, text_dim=24, text_len=12, freq_dim=32)
MASKED = {  # vector: (levels, chunks, options)
    "block3": ("t_block3", [3, 3], {}),
    "block1": ("t_block1", [1] * 6, {}),
    "block1_local2": ("t_block1", [1] * 6, {"window": 2}),
    "first_then_block2": ("t_first", [1, 2, 2], {}),
    "teacher_forcing1": ("t_block1", [1] * 6, {"teacher": True}),
    "teacher_forcing3": ("t_block3", [3, 3], {"teacher": True}),
}


def inputs(name, device="cpu", dtype=torch.float32):
    """Model and inputs of a file of vectors; levels stay float32."""
    g, _ = golden(name)
    x = {key[3:]: value.to(device) for key, value in g.items() if key.startswith("in.")}
    return golden_dit(name, device, dtype), {
        k: v if k.startswith("t") else v.to(dtype) for k, v in x.items()
    }


def masked(model, g, name):
    levels, chunks, options = MASKED[name]
    t, frames = g[levels] / 1000, sum(chunks)
    clean = g["clean"] if "teacher" in options else None
    return model(
        g["x"][:, :, :frames],
        t,
        g["context"],
        chunks=chunks,
        window=options.get("window"),
        clean=clean,
    )


@pytest.fixture(scope="module")
def tiny():
    return WanDiT(TINY).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)


# ------------------------------------------------------------------------------------------ vectors


@pytest.mark.parametrize(("device", "dtype", "bar"), PLACES)
@pytest.mark.parametrize(("levels", "out"), [("t", "v"), ("t_i2v", "v_i2v")])
@torch.no_grad()
def test_bidirectional_vectors(levels, out, device, dtype, bar):
    model, g = inputs("dit_bidirectional", device, dtype)
    v = model(g["x"], g[levels] / 1000, g["context"])
    assert v.dtype == dtype
    assert rel(v, golden("dit_bidirectional")[0][f"out.{out}"]) < bar


@pytest.mark.parametrize(("device", "dtype", "bar"), PLACES)
@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_causal_mask_vectors(name, device, dtype, bar):
    model, g = inputs("dit_causal_masks", device, dtype)
    assert rel(masked(model, g, name), golden("dit_causal_masks")[0][f"out.{name}"]) < bar


# ----------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("ti2v-5B", 4_999_787_712), ("t2v-1.3B", 1_418_996_800), ("t2v-14B", 14_288_491_584)],
)
def test_keys_and_shapes_of_releases(preset, parameters):
    with torch.device("meta"):
        model = WanDiT(PRESETS[preset])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == json.loads((GOLDEN / f"manifest_{preset}.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())
    assert PRESETS[preset].head_dim == 128


def test_init_weights_fills_everything_and_repeats(tiny):
    model = WanDiT(TINY)
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    for (name, a), b in zip(model.named_parameters(), tiny.parameters(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------------------------------- behaviour


@torch.no_grad()
def test_sigma_as_number_per_sample_and_per_frame(tiny):
    x, context = randn(2, 8, 3, 4, 4), randn(2, 12, 24, seed=1)
    v = tiny(x, 0.625, context)
    for sigma in (
        torch.tensor(0.625),
        torch.full((2,), 0.625),
        torch.full((2, 3), 0.625),
        torch.full((1, 3), 0.625),
    ):
        assert rel(tiny(x, sigma, context), v) < 1e-6
    assert rel(tiny(x, torch.tensor([0.625, 0.2]), context)[:1], v[:1]) < 1e-6
    assert rel(tiny(x, 0.2, context), v) > 1e-2
    assert rel(tiny(x, torch.tensor([[0.625, 0.625, 0.2]]), context), v) > 1e-3


@pytest.mark.parametrize("options", [{}, {"chunks": [1, 2]}, {"chunks": [1, 2], "clean": True}])
@torch.no_grad()
def test_batch_equals_singles_and_the_text_matters(tiny, options):
    x, context, sigma = randn(2, 8, 3, 4, 4), randn(2, 12, 24, seed=1), torch.tensor([0.9, 0.4])
    clean = randn(2, 8, 3, 4, 4, seed=2)

    def run(rows, context):
        given = {**options, "clean": clean[rows]} if "clean" in options else options
        return tiny(x[rows], sigma[rows], context[rows], **given)

    both = run(slice(0, 2), context)
    assert rel(torch.cat([run(slice(0, 1), context), run(slice(1, 2), context)]), both) < 1e-6
    changed = run(slice(0, 2), torch.cat([context[:1], -context[1:]]))
    assert rel(changed[:1], both[:1]) < 1e-6
    assert rel(changed[1:], both[1:]) > 1e-2


@pytest.mark.parametrize("level", [0.0, 0.25])
@torch.no_grad()
def test_clean_sigma_is_the_level_of_the_clean_half(tiny, level):
    """A noisy chunk at the level, and with the content, of its clean twin sees what a plain causal
    forward sees.
    """
    x, context = randn(1, 8, 4, 4, 4), randn(1, 12, 24, seed=1)
    plain = tiny(x, level, context, chunks=[2, 2])
    assert rel(tiny(x, level, context, chunks=[2, 2], clean=x, clean_sigma=level), plain) < 1e-6
    assert rel(tiny(x, level, context, chunks=[2, 2], clean=x, clean_sigma=0.9), plain) > 1e-3


def test_rotation_is_a_product_of_complex_numbers():
    """Adjacent channels as complex numbers, (time, row, column) split 3 pairs of 4: 2, 1, 1; start
    is an offset.
    """
    t, h, w, x = 3, 2, 4, randn(1, 3 * 2 * 4, 1, 8)
    angles = torch.stack(
        [
            torch.tensor([p[0], p[0] * 10000**-0.5, p[1], p[2]])
            for p in ((5 + i, j, k) for i in range(t) for j in range(h) for k in range(w))
        ]
    )
    turned = (
        torch.view_as_complex(x.view(1, -1, 1, 4, 2))
        * torch.polar(torch.ones(()), angles)[None, :, None]
    )
    out = rotate(x, rope_table(8, 5, t, h, w, torch.device("cpu")))
    assert rel(out, torch.view_as_real(turned).flatten(-2)) < 1e-6


# -------------------------------------------------------------------------------------------- masks

LAYOUTS = [
    ((3, 3), 6),
    ((1, 2, 2), 50),
    ((1,) * 6, 30),
    ((3,) * 7, 20),
    ((4, 1, 3), 128),
    ((1, 3, 3), 97),
    ((1, 1, 1), 255),
]


def by_definition(chunks, p, window, teacher):
    """The mask, frame by frame from model.md's words, as a boolean matrix over tokens."""
    end = [
        e
        for size, e in zip(chunks, torch.tensor(chunks).cumsum(0).tolist(), strict=True)
        for _ in range(size)
    ]
    start = [
        e - size for size, e in zip(chunks, sorted(set(end)), strict=True) for _ in range(size)
    ]
    t = len(end)
    sees = torch.zeros(2 * t, 2 * t, dtype=torch.bool)
    for q in range(t):
        for kv in range(t):
            near = window is None or kv >= end[q] - window
            sees[q, kv] = kv < end[q] and near
            sees[t + q, kv] = kv < start[q] and near
            sees[t + q, t + kv] = start[q] <= kv < end[q]
    sees = sees if teacher else sees[:t, :t]
    return sees.repeat_interleave(p, 0).repeat_interleave(p, 1)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize(("chunks", "p"), LAYOUTS)
def test_causal_masks_and_their_block_form(chunks, p, window, teacher):
    """The dense mask equals the definition; the BlockMask names every block that holds a key, and
    no other, rightly.
    """
    window = window and max(window, *chunks)
    expected = by_definition(chunks, p, window, teacher)
    with mock.patch.object(attention_module, "interval_mask", lambda intervals: intervals):
        intervals = causal_mask.__wrapped__(chunks, p, window, teacher, torch.device("cpu"))
    assert torch.equal(dense_mask(intervals), expected)

    mask = block_mask(intervals)
    size, n = attention_module.FLEX_BLOCK, -(-len(expected) // attention_module.FLEX_BLOCK)
    pad = n * size - len(expected)
    expected = torch.block_diag(expected, torch.eye(pad, dtype=torch.bool)) if pad else expected
    tiles = (
        expected.unflatten(1, (n, size)).unflatten(0, (n, size)).transpose(1, 2)
    )  # [n, n, 128, 128]
    full, some = tiles.all(-1).all(-1), tiles.any(-1).any(-1)
    assert (mask.shape[-2:], mask.BLOCK_SIZE) == ((n * size, n * size), (size, size))
    lists = {  # forward reads rows of key blocks, backward also columns of query blocks
        "kv": (mask.kv_num_blocks, mask.kv_indices, some & ~full),
        "full_kv": (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        "q": (mask.q_num_blocks, mask.q_indices, (some & ~full).T),
        "full_q": (mask.full_q_num_blocks, mask.full_q_indices, full.T),
    }
    for name, (counts, indices, flags) in lists.items():
        listed = [sorted(indices[0, 0, row, : counts[0, 0, row]].tolist()) for row in range(n)]
        assert listed == [row.nonzero().flatten().tolist() for row in flags], name
    q = torch.arange(n * size)
    assert torch.equal(mask.mask_mod(0, 0, q[:, None], q), expected)  # inside the partial blocks


@pytest.mark.parametrize("options", [{}, {"chunks": [2, 3]}])
def test_training_after_inference_mode(options):
    """Tables and masks of a shape that inference mode was the first to ask for."""
    model, x, context = (
        WanDiT(TINY).init_weights(),
        randn(1, TINY.in_dim, 5, 6, 10),
        randn(1, TINY.text_len, TINY.text_dim),
    )
    with torch.inference_mode():
        expected = model(x, 0.5, context, **options).clone()
    out = model(x, 0.5, context, **options)
    out.mean().backward()
    assert rel(out, expected) < 1e-6


@pytest.mark.parametrize(
    ("chunks", "p", "window"), [((3,) * 3, 23, None), ((1, 2, 3), 64, 4), ((2, 2), 32, None)]
)
def test_both_masks_give_the_same_attention(chunks, p, window):
    """With a padded tail and without; flex_attention not compiled, forward, as the CPU has it."""
    with mock.patch.object(attention_module, "interval_mask", lambda intervals: intervals):
        intervals = causal_mask.__wrapped__(chunks, p, window, True, torch.device("cpu"))
    q, k, v = (randn(1, len(intervals), 2, 32, seed=i) for i in range(3))
    with mock.patch.object(attention_module, "_compiled_flex", attention_module.flex_attention):
        flex = attention(q, k, v, block_mask(intervals))
    assert rel(flex, attention(q, k, v, dense_mask(intervals))) < 1e-6


# ------------------------------------------------------------------------------------------ the GPU


@pytest.mark.parametrize(
    ("head_dim", "dtype", "bar"),
    [
        pytest.param(32, torch.float32, 1e-3, marks=ON_GPU),
        pytest.param(128, torch.bfloat16, 3e-2, marks=ON_GPU),
    ],
)
@pytest.mark.parametrize("window", [None, 6])
def test_flex_attention_forward_and_backward(window, head_dim, dtype, bar):
    """The compiled path with several blocks of 128, a padded tail and full blocks, against dense
    float32.
    """
    chunks, p = (3,) * 7, 23
    compare(
        lambda *qkv: attention(*qkv, causal_mask(chunks, p, window, True, qkv[0].device)),
        [randn(1, 2 * 21 * p, 2, head_dim, seed=i) for i in range(4)],
        dtype,
        bar,
    )


@gpu
@pytest.mark.parametrize(("queries", "keys"), [(264, 264), (264, 1056), (880, 1760)])
def test_cudnn_attention_forward_and_backward(queries, keys):
    q, k, v, grad = (
        randn(1, s, 2, 128, seed=i) for i, s in enumerate((queries, keys, keys, queries))
    )
    out = compare(attention, [q, k, v, grad], torch.bfloat16, 3e-2)
    assert "Cudnn" in out.grad_fn.next_functions[0][0].name()


def compare(function, tensors, dtype, bar):
    """Output and the three gradients of function(q, k, v) on CUDA in dtype against float32 on the
    CPU.
    """
    results = []
    for place in ({"device": "cpu", "dtype": torch.float32}, {"device": "cuda", "dtype": dtype}):
        *qkv, grad = (
            x.to(dtype).to(**place) for x in tensors
        )  # the same rounded values in both places
        qkv = [x.detach().requires_grad_() for x in qkv]
        out = function(*qkv)
        out.backward(grad)
        results.append([out, *(x.grad for x in qkv)])
    for reference, ours, name in zip(*results, ("out", "dq", "dk", "dv"), strict=True):
        assert rel(ours, reference) < bar, name
    return out


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gelu_at_once_is_the_nearer_one(compiled):
    """Without grad the hidden layer is rounded once, with grad twice."""
    mlp = MLP(128, 512, 64)
    x = randn(2, 3, 40, 128)
    mlp = mlp.to("cuda", torch.bfloat16)
    x = x.to("cuda", torch.bfloat16)
    exact = copy.deepcopy(mlp).double()(x.double())
    run = torch.compile(mlp.forward, dynamic=False) if compiled else mlp.forward
    twice = run(x)
    with torch.no_grad():
        once = run(x)
    assert once.shape == exact.shape
    assert rel(once, exact) < rel(twice, exact) < 1e-2


@gpu
@pytest.mark.parametrize("name", ["block1_local2", "teacher_forcing3"])
def test_flex_gradients_of_the_model(name):
    """All parameters' gradients through the compiled masks equal those of the dense masks on the
    CPU.
    """
    grads = []
    for device in ("cpu", "cuda"):
        model, g = inputs("dit_causal_masks", device)
        masked(model, g, name).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert rel(grads[1], grads[0]) < 1e-3


# ------------------------------------------------------------------------------------------- errors

X, CONTEXT = torch.zeros(1, 8, 4, 4, 4), torch.zeros(1, 12, 24)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": X[:, :6]}, ("6 channels", "takes 8")),
        ({"x": X[..., :3]}, ("4x3", "2x2")),
        ({"context": CONTEXT[:, :7]}, ("(1, 12, 24)", "(1, 7, 24)")),
        ({"context": CONTEXT[..., :5]}, ("(1, 12, 24)", "(1, 12, 5)")),
        ({"context": CONTEXT.repeat(2, 1, 1)}, ("(1, 12, 24)", "(2, 12, 24)")),
        ({"sigma": torch.zeros(3)}, ("(1, 8, 4, 4, 4)", "(3,)")),
        ({"sigma": torch.zeros(1, 3)}, ("(1, 8, 4, 4, 4)", "(1, 3)")),
        ({"chunks": [3, 3]}, ("[3, 3]", "of 4 frames")),
        ({"chunks": [1, 3], "window": 2}, ("[1, 3]", "window 2")),
        ({"chunks": []}, ("[]", "of 4 frames")),  # not bidirectional, as without chunks
        ({"window": 2}, ("window 2 without chunks",)),
        ({"clean_sigma": 0.1}, ("clean_sigma without a clean half",)),
        ({"sigma": 500}, ("sigma 500", "[0, 1]")),  # a timestep
        ({"clean": X}, ("teacher forcing takes chunks",)),
        ({"clean": X[:, :, :2], "chunks": [2, 2]}, ("clean half of", "(1, 8, 4, 4, 4)")),
        ({"cache": KVCache(TINY, 1, 4, 4), "chunks": [2, 2]}, ("[2, 2] of 0 frames",)),
        ({"cache": KVCache(TINY, 1, 4, 4), "chunks": []}, ("[]", "of 4 frames")),
        ({"cache": KVCache(TINY, 1, 4, 4), "window": 2}, ("the window is the cache's",)),
        ({"cache": KVCache(TINY, 1, 4, 4), "clean": X}, ("clean= is for whole sequences",)),
    ],
)
def test_errors_name_the_values(tiny, given, says):
    arguments = {"x": X, "sigma": 0.5, "context": CONTEXT, **given}
    with pytest.raises((AssertionError, ValueError), match=".") as error:
        tiny(arguments.pop("x"), arguments.pop("sigma"), arguments.pop("context"), **arguments)
    assert all(text in str(error.value) for text in says), error.value


def test_a_level_of_one_that_was_rounded_up_is_a_level(tiny):
    sigma, _ = few_step_sigmas((1000,), shift=0.1)
    assert sigma > 1
    assert rel(tiny(X, sigma, CONTEXT), tiny(X, 1.0, CONTEXT)) < 1e-6


@pytest.mark.parametrize(
    ("given", "says"),
    [({"dim": 100, "num_heads": 3}, "100"), ({"patch_size": [2, 2, 2]}, r"\(2, 2, 2\)")],
)
def test_config_errors(given, says):
    with pytest.raises(ValueError, match=says):
        DiTConfig(**given)
