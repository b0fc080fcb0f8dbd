"""The optimizer against torch's; its state wherever it is kept, and in checkpoints."""

import pytest
import torch
from common import rel
from torch import nn
from training import names, same

from wan5b import fsdp, optim
from wan5b.extras import checkpoints
from wan5b.extras.offload import HostStorage
from wan5b.extras.previews import averaged

pytestmark = pytest.mark.usefixtures("quick_and_clean")


def make_mlp(dtype=torch.float32) -> tuple[nn.Module, dict]:
    """A small network, the same every time, and its exact weights."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    initial = {name: value.clone() for name, value in mlp.state_dict().items()}
    return mlp.to(dtype), initial


def loss_of(mlp, seed) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=g).to(mlp[0].weight.dtype)
    target = torch.randn(8, 3, generator=g)
    return (mlp(x).float() - target).square().mean()


def make_optimizer(
    mlp, initial, lr=1e-2, betas=(0.0, 0.999), weight_decay=0.01, **options
) -> optim.AdamW:
    return optim.AdamW(mlp, fsdp.World("cpu"), initial, lr, betas, weight_decay, **options)


# --------------------------------------------------------------------------------------------- step


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_adamw_is_torch_s(beta1, weight_decay, clip):
    ours, initial = make_mlp()
    theirs, _ = make_mlp()
    betas = (beta1, 0.95)
    optimizer = make_optimizer(ours, initial, 1e-2, betas, weight_decay)
    reference = torch.optim.AdamW(theirs.parameters(), 1e-2, betas, weight_decay=weight_decay)
    for step in range(6):
        for part in range(2):
            loss_of(ours, 2 * step + part).backward()
            (loss_of(theirs, 2 * step + part) / 2).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        reference.zero_grad()
        norm = optimizer.step(0.5, clip)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert not optimizer.grads
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(("exp_avg" in state) == (beta1 > 0) for state in optimizer.state_of.values())
    assert any(name.startswith("exp_avg.") for name in optimizer.state()) == (beta1 > 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    mlp, initial = make_mlp()
    optimizer = make_optimizer(mlp, initial, ema=True)
    loss_of(mlp, 0).backward()
    optimizer.step(1.0, 1.0)
    before = {name: value.clone() for name, value in optimizer.state().items()}
    loss_of(mlp, 1).backward()
    optimizer.grads["0.weight"][0, 0] = bad
    assert not optimizer.step(1.0, 1.0).isfinite()
    assert same(before, optimizer.state())
    assert (optimizer.steps, optimizer.grads) == (1, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_swaps_and_restores(dtype):
    mlp, initial = make_mlp(dtype)
    optimizer = make_optimizer(mlp, initial, ema=True)
    for seed in range(2):
        loss_of(mlp, seed).backward()
        optimizer.step(1.0, 1e9, 0.5)
    everything = {**optimizer.state(), **mlp.state_dict()}
    held = {name: value.clone() for name, value in everything.items()}
    with averaged(optimizer):
        for name, p in mlp.named_parameters():
            assert torch.equal(p.detach(), held[f"ema.{name}"].to(dtype))
            assert not torch.equal(p.detach(), held[name])
    assert same(held, {**optimizer.state(), **mlp.state_dict()})


# ------------------------------------------------------------------------------------------ masters


def test_a_master_is_its_bfloat16_and_16_bits():
    """Bit for bit: against integers of numpy, for patterns of all kinds, ties, zeros and denormals
    among them.
    """
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=g).int()
    ties = torch.randint(-(2**15), 2**15, (5000,), generator=g).int() * 65536 + 0x8000
    edges = torch.tensor([0, -(2**31), 1, 0x7FFF, 0x8000, 0x8001, 0x3F7FFFFF, 0x7F7F7FFF]).int()
    value = torch.cat([bits, ties, edges]).view(torch.float32)
    value = value[value.isfinite() & value.bfloat16().isfinite()].view(-1, 2)
    high = torch.empty_like(value, dtype=torch.bfloat16)
    low = torch.empty_like(value, dtype=torch.int16)
    optim.split(value, high, low)

    numbers = value.numpy().view("uint32").astype("int64")
    upper = (numbers + 0x8000) >> 16
    assert (high.view(torch.int16).numpy().view("uint16") == upper).all()
    assert (low.numpy() == numbers - (upper << 16)).all()
    assert torch.equal(optim.join(high, low).view(torch.int32), value.view(torch.int32))
    tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.sum() > 4000
    assert torch.equal(high[~tie], value.bfloat16()[~tie]), "rounding to nearest, but for ties"


def test_bfloat16_weights_follow_masters_that_move_by_little():
    mlp, initial = make_mlp(torch.bfloat16)
    optimizer = make_optimizer(mlp, initial, lr=2e-6, weight_decay=0.0)
    for name, exact in initial.items():
        assert torch.equal(optimizer.master(name), exact), "not from rounded weights"

    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    for step in range(3):
        loss_of(mlp, step).backward()
        optimizer.step(1.0, 1e9)
    still = [(before[name] == p).float().mean().item() for name, p in mlp.named_parameters()]
    assert min(still) > 0.9, "a step of 2e-6 is below half a spacing of nearly every bfloat16"
    moved = {name: (optimizer.master(name) - initial[name]).abs().max().item() for name in initial}
    assert all(1e-6 < distance < 1e-5 for distance in moved.values()), moved

    for _ in range(3000):
        for name in optimizer.parameters:
            optimizer.grads[name] = torch.ones_like(optimizer.master(name))
        optimizer.step(1.0, 1e9)
    for name, p in mlp.named_parameters():
        master = optimizer.master(name)
        assert torch.equal(p.detach(), master.bfloat16())
        torch.testing.assert_close(master, initial[name] - 6e-3, rtol=0, atol=1e-4)


def test_weights_are_of_one_dtype():
    """State of another would be without masters, and not move by little."""
    mlp, initial = make_mlp()
    mlp[2].bfloat16()
    with pytest.raises(AssertionError, match="weights of one dtype"):
        make_optimizer(mlp, initial)
    mlp[2].requires_grad_(False)
    assert make_optimizer(mlp, initial).parameters.keys() == {"0.weight", "0.bias"}


def test_gradients_add_up_in_float32():
    mlp, initial = make_mlp(torch.bfloat16)
    optimizer = make_optimizer(mlp, initial)
    added = dict.fromkeys(initial, 0)
    for seed in range(300):
        loss = loss_of(mlp, seed)
        grads = torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True)
        for name, grad in zip(initial, grads, strict=True):
            added[name] = added[name] + grad.double()
        loss.backward()
    for name, grad in optimizer.grads.items():
        assert grad.dtype == torch.float32
        assert rel(grad, added[name]) < 1e-5  # in bfloat16: 1e-2


# ---------------------------------------------------------------------------------- where state is


class AverageInHostMemory(HostStorage):
    """What a GPU's storage keeps there without offload."""

    def hosted(self, groups):
        return {"ema": groups["ema"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_streamed_state_gives_the_same_bits(tmp_path, dtype, beta1):
    """Nothing, all state, or the average alone passes through buffers; and a checkpoint goes from
    one to the other.
    """
    cpu = torch.device("cpu")
    world = fsdp.World("cpu")

    def train_one(storage, resume=None):
        """Six steps, of which the third is not finite; a checkpoint after four, unless resumed."""
        mlp, initial = make_mlp(dtype)
        optimizer = make_optimizer(mlp, initial, betas=(beta1, 0.99), ema=True, storage=storage)
        optimizers = {"generator": optimizer}
        start = checkpoints.load(world, resume, optimizers)["step"] if resume else 0
        saved = None
        for step in range(start, 6):
            loss_of(mlp, step).backward()
            if step == 2:
                optimizer.grads["2.bias"][0] = torch.nan
            optimizer.step(0.5, 0.3, 0.9)
            if step == 3 and not resume:
                folder = tmp_path / type(storage).__name__
                saved = checkpoints.save(world, folder, optimizers, {"step": 4})
        return optimizer, mlp.state_dict(), saved

    resident, weights, _ = train_one(None)
    hosted, other, saved = train_one(HostStorage(cpu, everything=True))
    groups = hosted.storage.groups
    memory = hosted.storage.memory
    assert groups == optim.state_groups(dtype, beta1, True)
    low = memory.data_ptr()
    high = low + len(memory)
    for state in hosted.state_of.values():
        assert list(state) == list(groups)
        assert all(low <= value.data_ptr() < high for value in state.values())
    assert same(hosted.state(), resident.state())
    assert same(other, weights)

    for storage, bytes_there in (
        (None, None),
        (HostStorage(cpu, everything=False), False),
        (AverageInHostMemory(cpu, everything=False), True),
    ):
        resumed, third, _ = train_one(storage, saved)
        assert storage is None or (len(storage.memory) > 0) == bytes_there
        assert same(resumed.state(), resident.state())
        assert same(third, weights)


def test_what_the_state_costs():
    """The average never lies on a GPU; with offload nothing does. A bfloat16 weight's master costs
    2 bytes more.
    """
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")
    half = torch.bfloat16

    def placed(dtype, beta1, ema, everything, device):
        """The groups kept (on the device, in host memory)."""
        groups = optim.state_groups(dtype, beta1, ema)
        hosted = HostStorage(device, everything).hosted(groups)
        assert all(groups[group] == kept for group, kept in hosted.items())
        return [group for group in groups if group not in hosted], list(hosted)

    assert placed(half, 0.0, True, False, cuda) == (["exp_avg_sq", "low"], ["ema"])
    assert placed(half, 0.0, False, False, cuda) == (["exp_avg_sq", "low"], [])
    assert placed(half, 0.9, True, True, cuda) == ([], ["exp_avg_sq", "exp_avg", "ema", "low"])
    assert placed(torch.float32, 0.0, True, False, cpu) == (["exp_avg_sq", "ema"], [])

    mlp, initial = make_mlp(half)
    weights = sum(p.numel() for p in mlp.parameters())
    states = make_optimizer(mlp, initial, ema=True).state_of.values()
    held = sum(value.nbytes for state in states for value in state.values())
    assert held == weights * (4 + 4 + 2)


def test_checkpoints(tmp_path):
    """keep; half-written ones are no checkpoints and go with the next save; what is read back is
    what was saved.
    """
    world = fsdp.World("cpu")
    mlp, initial = make_mlp()
    optimizer = make_optimizer(mlp, initial, betas=(0.9, 0.99), ema=True)
    (tmp_path / "step-0000099.partial").mkdir()
    (tmp_path / "samples").mkdir()
    assert checkpoints.complete(tmp_path) == []
    for step in range(1, 6):
        loss_of(mlp, step).backward()
        optimizer.step(1.0, 1.0)
        facts = {"step": step, "stage": "ar"}
        checkpoints.save(world, tmp_path, {"generator": optimizer}, facts, keep=3)
    assert names(tmp_path) == ["step-0000003", "step-0000004", "step-0000005"]

    other, _ = make_mlp(torch.bfloat16)
    loaded = make_optimizer(other, initial, betas=(0.9, 0.99), ema=True)
    facts = checkpoints.load(world, checkpoints.complete(tmp_path)[-1], {"generator": loaded})
    assert (facts["step"], facts["stage"], loaded.steps) == (5, "ar", 5)
    assert same(loaded.state(), optimizer.state())
    for name, p in other.named_parameters():
        assert torch.equal(p.detach(), mlp.get_parameter(name).bfloat16())
