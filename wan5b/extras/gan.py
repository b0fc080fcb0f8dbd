"""The GAN branch of dmd: a classifier tells real clips from rollouts by the critic's features.

It is what DMD2 (arXiv 2405.14867, section 4.3) adds to DMD, with the classifier of Self Forcing's
code (arXiv 2506.08009, model/gan.py): three learned register tokens, each of which reads
the features of one layer of the critic by cross-attention; then LayerNorm(3 D) -> Linear(3 D, D) ->
SiLU -> Linear(D, 1), where that code has its width of 1536 typed in. Losses are softplus, or
relativistic (clip against rollout of one caption); R1 and R2 are finite differences.

A step of the critic is its own with the classifier's loss on top. A step of the generator is
`dmd_step` with the fooling of the classifier on top, and one forward of the critic serves both.
Classifier and critic are one module to the optimizer, to checkpoints and to a resumed run; exports
hold the generator alone.

What differs from Self Forcing's code: a reader has no feed-forward layer of its own; the levels'
embedding is not appended to what was read; a clip has the rollout's noise in the generator's step
too, where that code draws another; DMD's loss and the critic's flow loss stay, where that code's
GAN stands alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan5b import fsdp, stages
from wan5b.attention import attention
from wan5b.distill import dmd_gradient, dmd_loss
from wan5b.dit import Attention, DiTConfig, WanDiT, linear32
from wan5b.extras.data_forcing import is_forced, noised_clip
from wan5b.flow import x0_from_v
from wan5b.runs import Batch, Run
from wan5b.stages import Noised
from wan5b.util import rng
from wan5b.weights import fill

READERS = 3
DIFFERENCE = 0.01  # sigma of the perturbation that R1 and R2 look at

# --------------------------------------------------------------------------------------- classifier


class Reader(nn.Module):
    """A register token that reads a layer's features by cross-attention."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.eps = cfg.eps
        self.register = nn.Parameter(torch.empty(1, cfg.dim))
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps)
        self.attention = Attention(cfg)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, P, D] -> [B, D]"""
        norm = self.norm
        h = features.float()
        h = F.layer_norm(h, h.shape[-1:], norm.weight.float(), norm.bias.float(), self.eps)
        keys, values = self.attention.keys_values(h.to(features.dtype))  # [B, S, N, K]

        token = self.register.expand(len(features), 1, -1)  # [B, 1, D]
        read = attention(self.attention.queries(token), keys, values)  # [B, 1, N, K]
        return (token + self.attention.output(read, token)).squeeze(1)


class Classifier(nn.Module):
    """Features of three layers -> a logit a sample; above 0: a real clip.

    layers: of the critic, from 0. blocks: the readers, under the name by which `World.shard` knows
    what is gathered as one.
    """

    def __init__(self, cfg: DiTConfig, layers: tuple[int, ...]):
        super().__init__()
        self.cfg = cfg
        self.layers = layers
        self.checkpointing = False
        self.blocks = nn.ModuleList(Reader(cfg) for _ in layers)
        self.norm = nn.LayerNorm(len(layers) * cfg.dim, cfg.eps)
        self.hidden = nn.Linear(len(layers) * cfg.dim, cfg.dim)
        self.logit = nn.Linear(cfg.dim, 1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "Classifier":
        """Random weights to train from: registers near 0, else as a WanDiT's."""
        for name, w in self.named_parameters():
            if name.endswith("register"):
                w.normal_(0, 0.02, generator=generator)
            elif w.ndim == 2:
                w.normal_(0, (2 / sum(w.shape)) ** 0.5, generator=generator)
            else:
                w.fill_(float("norm" in name and name.endswith("weight")))
        return self

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of its layers, [B, T, P, D] each -> [B] float32"""
        read = []
        for reader, x in zip(self.blocks, features, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                read.append(checkpoint(reader, x, use_reentrant=False))
            else:
                read.append(reader(x))

        norm = self.norm
        h = torch.cat(read, -1).float()  # [B, 3 D]
        h = F.layer_norm(h, h.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
        return linear32(self.logit, F.silu(linear32(self.hidden, h))).squeeze(-1)


def layers_read(given: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers that the config names, else those that Self Forcing's code reads of 30: 13, 21,
    29; of other depths at the same shares. ValueError for layers that are not there.
    """
    layers = given or tuple(max(round(depth * share / 30), 1) - 1 for share in (14, 22, 30))
    if len(layers) != READERS or not all(0 <= layer < depth for layer in layers):
        raise ValueError(
            f"gan_layers must name {READERS} layers of the critic, 0 to {depth - 1}, "
            f"got {list(layers)}; without it they follow from the depth"
        )
    return layers


def attach(cfg, world: fsdp.World, critic: WanDiT) -> dict[str, Tensor]:
    """Give the critic its classifier, if the config asks for one -> the classifier's first weights,
    by their names in the critic.

    Before anything runs through the critic: FSDP then takes both for one network.
    """
    if not cfg.with_gan:
        return {}
    sizes = critic.cfg
    layers = layers_read(cfg.gan_layers, sizes.num_layers)
    tensors = Classifier(sizes, layers).init_weights(rng("cpu", cfg.seed, "gan")).state_dict()
    with torch.device("meta"):
        classifier = Classifier(sizes, layers).to(getattr(torch, cfg.dtype))
    classifier = world.shard(classifier).to_empty(device=world.device)
    fill(classifier, tensors, fsdp.copy_part, "the classifier")
    classifier.checkpointing = cfg.checkpointing
    critic.classifier = classifier
    return {f"classifier.{name}": tensor for name, tensor in tensors.items()}


@contextmanager
def tapped(model: WanDiT, layers: tuple[int, ...]) -> Iterator[None]:
    """Inside, the model returns (v, the outputs of these layers) in place of v.

    By hooks, which are gone before a backward runs layers again. The features leave through the
    model's own forward: so FSDP gathers what lies outside of the layers for a backward that comes
    through features alone.
    """
    kept = {}

    def keep(layer: int, block: nn.Module, args: tuple, features: Tensor) -> None:
        kept[layer] = features

    def hand_out(model: WanDiT, args: tuple, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = [kept[layer] for layer in layers]
        kept.clear()
        return v, features

    hooks = []
    try:
        for layer in layers:
            hooks.append(model.blocks[layer].register_forward_hook(partial(keep, layer)))
        hooks.append(model.register_forward_hook(hand_out, prepend=True))  # ahead of FSDP's
        yield
    finally:
        for hook in hooks:
            hook.remove()


def judge(run: Run, noised: Noised, context: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's velocity of noised clips [B, C, T, H, W], and the classifier's logits [B]."""
    classifier = run.critic.classifier
    with tapped(run.critic, classifier.layers):
        v, features = run.critic(noised.xs, noised.sigma, context)
    return v, classifier(features)


# ------------------------------------------------------------------------------------------- losses


def fooling_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The generator's, of logits [B]; relativistic (R3GAN, arXiv 2501.05441) if it is given real
    ones too.
    """
    margin = fake if real is None else fake - real
    return F.softplus(-margin).mean()


def telling_loss(fake: Tensor, real: Tensor, relativistic: bool) -> Tensor:
    """The classifier's, of logits [B]."""
    if relativistic:
        return F.softplus(fake - real).mean()
    return F.softplus(fake).mean() + F.softplus(-real).mean()


def slope(here: Tensor, there: Tensor) -> Tensor:
    """mean(((there - here) / sigma)^2) of logits at x and at x + sigma noise: in the mean over unit
    normal noise the squared gradient, as R1 and R2 penalise it, without a second derivative (APT,
    arXiv 2501.08316). In bfloat16 a forward's own rounding is no smaller than this difference.
    """
    return ((there - here) / DIFFERENCE).square().mean()


def moved(batch: Batch, noised: Noised) -> Noised:
    """Inputs a little off, where `slope` looks."""
    noise = batch.draws(torch.randn, *noised.xs.shape[1:])
    return noised._replace(xs=noised.xs + DIFFERENCE * noise)


def judged(cfg, logits: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The classifier's loss in the critic's, and its parts. logits [B]: of "fake" and "real", and
    a little off of them: "fake_moved" for R2, "real_moved" for R1.
    """
    fake = logits["fake"]
    real = logits["real"]
    telling = telling_loss(fake, real, cfg.gan_relativistic)
    loss = cfg.gan_critic_weight * telling
    figures = {
        "gan_critic_loss": telling.detach(),
        "gan_right": torch.cat([real > 0, fake <= 0]).float().mean(),
        "gan_margin": (real - fake).detach().mean(),
    }
    for name, weight, kind in (("gan_r1", cfg.gan_r1, "real"), ("gan_r2", cfg.gan_r2, "fake")):
        if weight:
            steepness = slope(logits[kind], logits[f"{kind}_moved"])
            loss = loss + weight * steepness
            figures[name] = steepness.detach()
    return loss, figures


# -------------------------------------------------------------------------------------------- steps


def gan_generator_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """`dmd_step`, or `data_forcing_step`, and beside it the fooling of the classifier.

    Both losses are of the rollout at one level, so the critic runs once, and only the classifier's
    part of it carries grad.
    """
    cfg = run.cfg
    rolled = stages.roll_out(run, batch)
    x0 = rolled.x0.requires_grad_()
    frames = x0.shape[2]

    # The teacher's score; with data_forcing it may be of the real clips, which relativistic logits
    # need.
    noised = stages.noise_again(run, batch, rolled)
    with torch.no_grad():
        seen = noised._replace(xs=noised.xs.detach())
        clip = noised_clip(run, batch, noised)
        forced = is_forced(run, batch)
        real, real_uncond = stages.teach(run, batch, clip if forced else seen, frames)
        real_logit = judge(run, clip, batch.context)[1] if cfg.gan_relativistic else None

    # The critic's score, and what the classifier thinks of the noised rollout: this gradient comes
    # through the critic into x0 first, to be looked at by itself.
    fake, fooling, pull = fool(run, batch, noised, x0, real_logit)
    gradient = dmd_gradient(x0, fake, real, real_uncond, cfg.guidance)
    loss = dmd_loss(x0, gradient)
    stages.into_weights(run, batch, rolled, loss + (pull * x0).sum())

    # gan_gradient beside gradient shows which of the two moves the generator.
    figures = {
        "loss": loss.detach().float(),
        "gan_loss": fooling,
        "gan_gradient": pull.abs().mean() * pull.numel(),
        "forced": x0.new_tensor(float(forced)),
    }
    return figures | stages.health(rolled, gradient)


def fool(
    run: Run, batch: Batch, noised: Noised, x0: Tensor, real_logit: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The critic's x0 of the noised rollout, the fooling of the classifier, and its weighted
    gradient in x0 [B, C, T, H, W].

    The graph goes with this function. A backward into x0 alone does not free it: paths into weights
    alone, as through the text's keys, aren't run, and hold the inputs of all layers.
    """
    v, fake_logit = judge(run, noised, batch.context)
    fake = x0_from_v(noised.xs, v, noised.sigma)[:, :, -x0.shape[2] :].detach()
    del v  # so the head's part of it goes before the backward
    fooling = fooling_loss(fake_logit, real_logit)
    (pull,) = torch.autograd.grad(run.cfg.gan_weight * fooling, x0)
    return fake, fooling.detach(), pull


def gan_critic_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """`critic_step`, and beside it the classifier's: rollouts against the real clips of their
    captions, at the same level and with the same noise.

    Every input has a forward and a backward of its own, so that no two are in memory at once, and
    that gradients of weights are reduced as they come, not at the end of all.
    """
    cfg = run.cfg
    rolled = stages.roll_out(run, batch)
    noised = stages.noise_again(run, batch, rolled)
    shown = {"fake": noised, "real": noised_clip(run, batch, noised)}
    if cfg.gan_r1:
        shown["real_moved"] = moved(batch, shown["real"])
    if cfg.gan_r2:
        shown["fake_moved"] = moved(batch, noised)

    # The loss's derivative in one logit takes the values of all, where it compares them.
    logits = dict.fromkeys(shown, noised.xs.new_zeros(len(noised.xs)))
    if cfg.gan_relativistic or cfg.gan_r1 or cfg.gan_r2:
        with torch.no_grad():
            logits = {name: judge(run, each, batch.context)[1] for name, each in shown.items()}

    figures = {}
    for name, each in shown.items():
        v, logits[name] = judge(run, each, batch.context)
        loss, parts = judged(cfg, logits)
        if name == "fake":
            flow, figures = stages.critic_figures(rolled, noised, v)
            loss = loss + flow
        loss.backward()
        logits[name] = logits[name].detach()
    return figures | parts
