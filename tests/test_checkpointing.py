"""Checkpointing: the same gradients, blocks run once more; what a block keeps, and that it goes."""

import dataclasses
import weakref
from functools import partial

import pytest
import torch
from common import compiling, randn
from test_budget import FusedNorm
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from training import DIT, SIZES, gradients, make_run, same

from wan5b import fuse
from wan5b.attention import attention, rope_table
from wan5b.dit import Block, DiTConfig, WanDiT
from wan5b.extras import budget
from wan5b.extras.adapters import TARGETS, attach
from wan5b.extras.budget import Backward
from wan5b.extras.training_attention import arrange

pytestmark = pytest.mark.usefixtures("quick_and_clean")

METHODS = [
    ("teacher", {}),
    ("ar", {"split_attention": True, "keep_attention": True}),
    ("dmd", {"keep_attention": True}),
    ("dmd", {"gan_weight": 0.1, "gan_critic_weight": 0.1}),
    ("dmd", {"lora": 4, "teacher": ""}),
    ("sid", {"keep_attention": True}),
]


@pytest.fixture
def blocks_run(monkeypatch) -> list:
    """A note of each block that runs with grad."""
    ran = []
    inner = Block.forward

    def forward(block, *arguments):
        if torch.is_grad_enabled():
            ran.append(block)
        return inner(block, *arguments)

    monkeypatch.setattr(Block, "forward", forward)
    return ran


@pytest.mark.parametrize(("stage", "changes"), METHODS)
def test_gradients_are_the_same(data, blocks_run, stage, changes):
    """To the bit; each block runs once for each forward in place of twice."""
    expected = gradients(make_run(data, stage, checkpointing=True, **changes))
    times = len(blocks_run)
    blocks_run.clear()
    assert same(gradients(make_run(data, stage, checkpointing=False, **changes)), expected)
    assert times == 2 * len(blocks_run) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_block_keeps_goes_as_gradients_come(checkpointing):
    """With checkpointing nothing is kept, and what a block makes again goes before the next one
    does.
    """
    model = WanDiT(dataclasses.replace(DIT, num_layers=6)).init_weights()
    model.checkpointing = checkpointing
    hidden = []
    left = []
    for block in model.blocks:
        block.ffn[0].register_forward_hook(lambda *a: hidden.append(weakref.ref(a[-1])))
        weight = block.self_attn.q.weight
        weight.register_post_accumulate_grad_hook(lambda _: left.append(alive(hidden)))
    loss = model(randn(1, *SIZES), 0.5, randn(1, 8, 16)).square().mean()
    assert alive(hidden) == (0 if checkpointing else 6)
    loss.backward()
    assert len(hidden) == (12 if checkpointing else 6)
    assert left == ([0] * 6 if checkpointing else [5, 4, 3, 2, 1, 0])


def alive(references: list) -> int:
    return sum(x() is not None for x in references)


@pytest.mark.parametrize("keep", [False, True])
def test_flop_that_are_done_again(monkeypatch, keep):
    """To the last one."""
    monkeypatch.setattr("wan5b.attention._BACKENDS", [torch.nn.attention.SDPBackend.MATH])
    x = randn(2, *SIZES)
    counted = []
    for checkpointing in (False, True):
        model = WanDiT(DIT).init_weights()
        model.checkpointing = checkpointing
        arrange(model, keep)
        with FlopCounterMode(display=False) as counter:
            model(x, 0.5, randn(2, 8, 16)).mean().backward()
        counted.append(counter.get_total_flops())
    # The keys and values of the text, which are not told.
    text = DIT.num_layers * 2 * 2 * 8 * 2 * DIT.dim**2
    assert counted[1] - counted[0] == budget.recomputed_flop(model, x) + text


def bytes_kept(dtype: torch.dtype, rank: int) -> tuple[float, float, float]:
    """Of one block, counted in what autograd saves, and as the budget tells it eager and
    compiled.
    """
    sizes = DiTConfig(384, 1792, 3, 1, text_dim=16, text_len=8, freq_dim=16)
    model = WanDiT(sizes).to(dtype)
    if rank:
        attach(model.requires_grad_(False), rank, 1.0, TARGETS)
    x = randn(1, 3, 1024, 384).to(dtype).requires_grad_()
    mod = randn(1, 3, 6, 384).requires_grad_(not rank)
    rope = rope_table(128, 0, 3, 32, 32, x.device)
    context = randn(1, 8, 384).to(dtype).requires_grad_(not rank)

    shared = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), rope)}
    found = {}

    def pack(saved):
        storage = saved.untyped_storage()
        # Beside weights' copies, and what there is of a frame or of the text.
        if storage._cdata not in shared and saved.numel() >= 3 * 1024:
            found[storage._cdata] = saved
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        model.blocks[0](x, mod, rope, context, partial(attention))
    counted = sum(saved.untyped_storage().nbytes() for saved in found.values())
    told = Backward(3 * 1024, dtype.itemsize, True, ranks=10 * rank)
    return counted, told.layer(sizes), dataclasses.replace(told, compiled=True).layer(sizes)


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_keeps(monkeypatch, dtype, rank):
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
        counted, told, _ = bytes_kept(dtype, rank)
    assert told == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiled_block_keeps(dtype, rank):
    with compiling():
        torch._dynamo.reset()
        fuse.enable()
        counted, _, told = bytes_kept(dtype, rank)
    assert told == pytest.approx(counted, rel=0.02)
