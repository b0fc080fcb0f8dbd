"""LoRA over one base: what the networks compute, where gradients go, what stays as it is."""

import pytest
import torch
from common import compiling, gpu, randn, rel
from safetensors.torch import load_file
from training import (
    DIT,
    SIZES,
    STAGES,
    apart,
    config,
    finish,
    furthest,
    make_run,
    run_phase,
    same,
)

import train
from wan5b import fsdp, fuse, stages
from wan5b.dit import Block, WanDiT
from wan5b.extras.adapters import LoraLinear, adapters, flop_share

pytestmark = pytest.mark.usefixtures("quick_and_clean")

DISTILLATIONS = ("dmd", "sid")


def lora_run(data, stage: str, **changes) -> stages.Run:
    """A run of rank 4, over what is the others' generator, with adapters that have an effect."""
    changes = {"lora": 4, "lora_alpha": 6.0, "ratio": 1, **changes}
    if stage in DISTILLATIONS:
        changes["teacher"] = ""
    run = make_run(data, stage, **changes)
    for seed, network in enumerate(trained(run).values()):
        stir(network, seed)
    return run


def trained(run: stages.Run) -> dict[str, WanDiT]:
    networks = {"generator": run.generator}
    if run.critic is not None:
        networks["critic"] = run.critic
    return networks


@torch.no_grad()
def stir(model: WanDiT, seed: int) -> None:
    """B away from zero."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        if "lora_B" in name:
            parameter.normal_(0, 0.1, generator=draws)


def merged(model: WanDiT) -> dict[str, torch.Tensor]:
    """The weights of a plain network that computes the same."""
    weights = {}
    for name in WanDiT(DIT).state_dict():
        weights[name] = model.get_parameter(name).detach().clone()
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, LoraLinear) and name.endswith(".weight"):
            weights[name] += layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    return {name: value.detach() for name, value in weights.items()}


def weights_of(model: WanDiT) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def gradients(run: stages.Run, which: str) -> dict[str, torch.Tensor]:
    """Those of a phase's two micro-batches; no network moves."""
    phase = next(phase for phase in stages.PHASES[run.cfg.stage] if phase.moves == which)
    run_phase(run, phase)
    found = run.optimizers[which].grads
    run.optimizers[which].grads = {}
    return found


# --------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_nothing(data, dtype):
    """Not one bit: whole sequences, causal ones, and both networks that are trained."""
    run = make_run(data, "dmd", lora=4, teacher="", dtype=dtype)
    x = randn(2, *SIZES)
    context = run.context(["prompt 1", "neg"])
    options = [{}, {"chunks": [3, 3]}, {"chunks": [3, 3], "clean": randn(2, *SIZES, seed=1)}]
    for given in options:
        expected = run.teacher(x, 0.5, context, **given)
        for network in (run.generator, run.critic):
            assert torch.equal(network(x, 0.5, context, **given), expected)
    stir(run.critic, 0)
    assert rel(run.critic(x, 0.5, context), run.teacher(x, 0.5, context)) > 1e-2
    assert torch.equal(run.generator(x, 0.5, context), run.teacher(x, 0.5, context))


def test_all_linear_layers_of_the_blocks_by_default(data):
    run = make_run(data, "ar", lora=4)
    assert len(adapters(run.generator)) == 2 * 10 * DIT.num_layers
    a, b = list(adapters(run.generator).values())[:2]
    assert a.shape == (4, DIT.dim)
    assert b.shape == (DIT.dim, 4)
    assert {p.dtype for p in adapters(run.generator).values()} == {torch.float32}
    assert all(name.startswith("blocks.") for name in adapters(run.generator))

    run = make_run(data, "ar", lora=4, lora_targets=("self_attn.q", "ffn.2"))
    layers = {name.split(".", 2)[2] for name in adapters(run.generator)}
    expected = {f"{layer}.lora_{m}.weight" for layer in ("self_attn.q", "ffn.2") for m in "AB"}
    assert layers == expected
    with pytest.raises(ValueError, match=r"lora_targets: 'ffn.1' is no linear layer.*cross_attn.k"):
        make_run(data, "ar", lora=4, lora_targets=("q", "ffn.1"))


def test_generator_and_critic_start_alike_but_not_the_same(data):
    """From different A, and again from the same."""
    run = make_run(data, "dmd", lora=4, teacher="")
    one = adapters(run.generator)
    two = adapters(run.critic)
    again = adapters(make_run(data, "dmd", lora=4, teacher="").generator)
    for name, value in one.items():
        assert torch.equal(value, again[name])
        if "lora_A" in name:
            assert not torch.equal(value, two[name])
            assert value.abs().max() <= value.shape[1] ** -0.5
        else:
            assert not value.any()


# ------------------------------------------------------------------------------------- one base


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_learn_and_the_base_does_not(data, stage):
    run = lora_run(data, stage)
    base = {name: p for name, p in run.generator.named_parameters() if "lora" not in name}
    before = {name: value.clone() for name, value in base.items()}
    networks = list(trained(run).values())
    adapters_before = [weights_of(network) for network in networks]
    if stage in DISTILLATIONS:
        for network in (run.critic, run.teacher):
            shared = dict(network.named_parameters())
            assert all(shared[name] is parameter for name, parameter in base.items())
        assert base.keys() == shared.keys(), "the teacher is the base, without adapters"

    for step in range(2):
        stages.iteration(run, step)
    assert all(p.grad is None and not p.requires_grad for p in base.values())
    assert same({name: value.detach() for name, value in base.items()}, before)
    for network, earlier in zip(networks, adapters_before, strict=True):
        for name, parameter in adapters(network).items():
            assert not torch.equal(parameter, earlier[name]), name
    for who, optimizer in run.optimizers.items():
        assert optimizer.parameters.keys() == adapters(trained(run)[who]).keys()
        assert all("low" not in state for state in optimizer.state_of.values())


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_separate_networks(data, stage):
    """Of three networks with the merged weights, by the chain rule: dA = s B^T G, dB = s G A^T.

    The metrics too: losses, norms, figures of the rollouts.
    """
    run = lora_run(data, stage)
    changes = {"teacher": run.cfg.weights} if stage in DISTILLATIONS else {}
    plain = make_run(data, stage, ratio=1, **changes)
    for who, network in trained(run).items():
        getattr(plain, who).load_state_dict(merged(network))

    for phase in stages.PHASES[stage]:
        rows = run_phase(run, phase)
        expected_rows = run_phase(plain, phase)
        for row, expected in zip(rows, expected_rows, strict=True):
            for key, value in row.items():
                assert value.item() == pytest.approx(expected[key].item(), rel=1e-4, abs=1e-6), key

        model = trained(run)[phase.moves]
        whole = plain.optimizers[phase.moves].grads
        expected = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLinear):
                scaled = layer.scale * whole[f"{name}.weight"]
                expected[f"{name}.lora_A.weight"] = layer.lora_B.weight.detach().t() @ scaled
                expected[f"{name}.lora_B.weight"] = scaled @ layer.lora_A.weight.detach().t()
        assert furthest(run.optimizers[phase.moves].grads, expected) < 1e-5
        for optimizer in (*run.optimizers.values(), *plain.optimizers.values()):
            optimizer.grads = {}


def test_what_runs_again_runs_with_its_own_adapters(data):
    """Checkpointing's recomputation, long after other networks had a forward: generator, critic and
    teacher in one graph, then another forward without grad, then the backward.
    """
    x = randn(2, *SIZES)

    def backward(checkpointing: bool) -> tuple[torch.Tensor, dict]:
        run = lora_run(data, "sid", checkpointing=checkpointing)
        context = run.context(["prompt 1", "neg"])
        made = x.clone().requires_grad_()
        v = run.generator(made, 0.7, context)
        loss = (run.critic(v, 0.5, context) * run.teacher(v, 0.5, context)).mean()
        with torch.no_grad():
            run.critic(x, 0.5, context)
            run.generator(x, 0.5, context)
        loss.backward()
        found = {}
        for who, optimizer in run.optimizers.items():
            found |= {f"{who}.{name}": grad for name, grad in optimizer.grads.items()}
        return made.grad, found

    grad, found = backward(True)
    expected_grad, expected = backward(False)
    assert len(found) == 2 * 2 * 10 * DIT.num_layers
    assert rel(grad, expected_grad) < 1e-5
    assert furthest(found, expected) < 1e-5


@pytest.mark.parametrize("changes", [{"keep_attention": True}, {"split_attention": True}])
def test_gradients_with_attention_arranged(data, changes):
    stage = "ar" if "split_attention" in changes else "dmd"
    expected = gradients(lora_run(data, stage), "generator")
    found = gradients(lora_run(data, stage, **changes), "generator")
    assert furthest(found, expected) < 1e-5


def test_accumulation(data):
    """Two micro-batches of two, or four of one: the same mean."""
    two = gradients(lora_run(data, "dmd"), "critic")
    four = gradients(lora_run(data, "dmd", micro_batch=1), "critic")
    half = {name: value / 2 for name, value in four.items()}
    assert furthest(half, two) < 1e-4


@pytest.mark.slow
def test_gradients_of_compiled_pieces(data, monkeypatch):
    """All but code of their own; generator and critic share what is compiled."""
    compile = torch.compile

    def traced(*arguments, **options):
        return compile(*arguments, backend="aot_eager_decomp_partition", **options)

    monkeypatch.setattr(torch, "compile", traced)
    for name in ("before", "between", "after"):
        monkeypatch.setattr(Block, name, fuse.fused(getattr(Block, name).__wrapped__))
    run = lora_run(data, "dmd")
    plain = {who: gradients(run, who) for who in ("generator", "critic")}
    with compiling():
        fuse.enable()
        for who, expected in plain.items():
            assert furthest(gradients(run, who), expected) < 1e-5
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for step in range(2):
            stages.iteration(run, step)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made
        moved = gradients(run, "critic")
        fuse.enable(False)
        assert furthest(moved, gradients(run, "critic")) < 1e-5


@gpu
def test_on_a_gpu(data, tmp_path):
    """In bfloat16: new adapters change nothing; compiled, with state in host memory, as without."""
    options = {"lora": 4, "teacher": "", "device": "cuda", "dtype": "bfloat16"}
    run = train.build(config(data, "dmd", **options), fsdp.World("cuda"))
    x = randn(2, *SIZES).cuda()
    context = run.context(["prompt 1", "neg"])
    with torch.no_grad():
        expected = run.teacher(x, 0.5, context)
        assert torch.equal(run.generator(x, 0.5, context), expected)

    left = []
    for name, more in (("plain", {}), ("hosted", {"offload": True, "compile": True})):
        with compiling():
            finish(config(data, "dmd", tmp_path / name, **options, **more))
        left.append(load_file(tmp_path / name / "dmd-lora/adapter_model.safetensors"))
    assert apart(*left) < 0.5


# ------------------------------------------------------------------------------------------- counts


def test_share_of_the_flop(data):
    """Of each token's: six projections of D x D and two of the feed-forward layer."""
    run = make_run(data, "ar", lora=4)
    whole = 6 * DIT.dim**2 + 2 * DIT.dim * DIT.ffn_dim
    own = 4 * (6 * 2 * DIT.dim + 2 * (DIT.dim + DIT.ffn_dim))
    assert flop_share(run.generator) == pytest.approx(own / whole)
    assert flop_share(WanDiT(DIT)) == 0.0
