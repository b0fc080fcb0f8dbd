"""Checkpointing that leaves the last blocks out: the same gradients, with less done again; what
these keep, goes first.
"""

import dataclasses
import weakref
from functools import partial

import pytest
import torch
from common import compiling, randn
from test_budget import FusedNorm
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from training import DIT, SIZES, config, finish, gradients, make_run, same

from wan5b import fuse
from wan5b.attention import attention, rope_table
from wan5b.dit import Block, DiTConfig, WanDiT
from wan5b.extras import budget
from wan5b.extras.adapters import TARGETS, attach
from wan5b.extras.budget import Backward
from wan5b.extras.checks import check_config
from wan5b.extras.training_attention import arrange
from wan5b.fsdp import World

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
    """To the bit; a kept block runs once for each forward, of all two."""
    expected = gradients(make_run(data, stage, **changes))
    times = len(blocks_run)
    for kept, share in ((1, 3 / 4), (2, 1 / 2)):
        blocks_run.clear()
        assert same(gradients(make_run(data, stage, kept_blocks=kept, **changes)), expected)
        assert len(blocks_run) == share * times


@pytest.mark.slow
def test_a_run_goes_on_with_another_number(data, tmp_path):
    """The weights come out alike."""
    expected = finish(config(data, "dmd", tmp_path / "plain"))
    out = tmp_path / "out"
    finish(config(data, "dmd", out, steps=2))
    (out / "dmd.safetensors").unlink()
    assert same(finish(config(data, "dmd", out, kept_blocks=1)), expected)


def test_what_is_kept_goes_first():
    """When the first gradients of a recomputed block come, only inputs of blocks are left."""
    model = WanDiT(dataclasses.replace(DIT, num_layers=6)).init_weights()
    model.checkpointing = True
    model.kept_blocks = 2
    hidden = []
    left = []
    for block in model.blocks:
        block.ffn[0].register_forward_hook(lambda *a: hidden.append(weakref.ref(a[-1])))
        weight = block.self_attn.q.weight
        weight.register_post_accumulate_grad_hook(lambda _: left.append(alive(hidden)))
    loss = model(randn(1, *SIZES), 0.5, randn(1, 8, 16)).square().mean()
    assert alive(hidden) == 2
    loss.backward()
    assert left == [1, 0, 0, 0, 0, 0]


def alive(references: list) -> int:
    return sum(x() is not None for x in references)


@pytest.mark.parametrize("keep", [False, True])
def test_flop_that_are_not_done_again(monkeypatch, keep):
    """To the last one."""
    monkeypatch.setattr("wan5b.attention._BACKENDS", [torch.nn.attention.SDPBackend.MATH])
    x = randn(2, *SIZES)
    counted = []
    told = []
    for kept in (0, 1, 2):
        model = WanDiT(DIT).init_weights()
        model.checkpointing = True
        model.kept_blocks = kept
        arrange(model, keep)
        with FlopCounterMode(display=False) as counter:
            model(x, 0.5, randn(2, 8, 16)).mean().backward()
        counted.append(counter.get_total_flops())
        told.append(budget.recomputed_flop(model, x))
    # The keys and values of the text, which are not told.
    text = 2 * 2 * 8 * 2 * DIT.dim**2
    assert told[2] == 0
    assert counted[0] - counted[1] == told[0] - told[1] + text
    assert counted[0] - counted[2] == told[0] + 2 * text


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


def test_refusals(data):
    with pytest.raises(ValueError, match=r"^kept_blocks = 1 is how many .*: leave kept_blocks out"):
        check_config(config(data, "ar", kept_blocks=1, checkpointing=False), World("cpu"))
    with pytest.raises(ValueError, match=r"^kept_blocks = 3, but there are 2 blocks$"):
        make_run(data, "dmd", kept_blocks=3)
