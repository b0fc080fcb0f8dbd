"""What a run costs: the memory that it will need, before anything is loaded, and the FLOP that it
does.

All of it is arithmetic over the config and the networks' sizes; benchmarks hold it against what is
measured. A `Meter` measures every step of a run.
"""

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras.adapters import flop_share, of_a_block
from wan5b.extras.gan import READERS, Classifier, layers_read
from wan5b.extras.merging import copied_bytes, runs_merged
from wan5b.extras.offload import HostStorage
from wan5b.extras.training_attention import keeps_results
from wan5b.fsdp import World
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.optim import state_groups
from wan5b.runs import Run

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
Parts = dict[str, float]  # what is held -> bytes

# ------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Backward:
    """What decides how much the peak of a backward holds, beside the weights.

    tokens: of the forward, all samples together. graphs: forwards that share one backward (SiD's).
    late: bytes of weight gradients, counted elsewhere, that come only as the activations go, so
    that the larger of the two makes the peak. keys: how many keys self-attention reads as copies
    (of a cache's, of other chunks', and its own beside them). keeps: whether checkpointing keeps
    the results of self-attention. ranks: of all adapters of a layer, added up; 0: weights are
    trained. compiled: whether the pieces of layers are. read: how many layers' features a
    classifier reads.
    """

    tokens: int
    itemsize: int  # of the compute dtype
    checkpointing: bool
    graphs: int = 1
    late: float = 0
    keys: int = 0
    keeps: bool = False
    ranks: int = 0
    compiled: bool = False
    read: int = 0

    def layer(self, cfg: DiTConfig) -> float:
        """Bytes that a layer keeps for its backward.

        Of a token, in values: 12 D in the compute dtype (inputs of the projections, of the query
        and key norms, of both attentions, and their outputs), 7 D in float32 (three normed inputs,
        two outputs of norms, two gated branches; the last four are for the gradients of modulation
        and gates, which a frozen base has not), twice the hidden layer, and what adapters have
        between their matrices. Compiled pieces keep nothing in float32: 17 D, or 15, of the compute
        dtype.
        """
        width = cfg.dim * self.itemsize
        if self.compiled:
            layer = (15 if self.ranks else 17) * width
        else:
            layer = 12 * width + (3 if self.ranks else 7) * cfg.dim * 4
        layer += (2 * cfg.ffn_dim + self.ranks) * self.itemsize
        layer *= self.tokens
        if self.keys:
            # A replay copies the keys and values that it reads, and joins outputs made in parts.
            layer += (2 * self.keys + self.tokens) * width
        return layer

    def activations(self, cfg: DiTConfig) -> float:
        """Bytes held at the peak."""
        tokens = self.tokens
        width = cfg.dim * self.itemsize
        wide = cfg.dim * 4
        hidden = cfg.ffn_dim * self.itemsize
        layer = self.layer(cfg)

        # With checkpointing only the inputs of all layers and one layer's values are there at once.
        if self.checkpointing:
            kept = cfg.num_layers * self.graphs * tokens * width * (2 if self.keeps else 1)
        else:
            kept = (cfg.num_layers * self.graphs - 1) * layer

        # On top come gradients, at most of the hidden layer and of D twice in float32, and what the
        # heads of further graphs keep, 3 D in float32.
        gradients = tokens * (hidden + 2 * wide)
        if not self.checkpointing:
            # The last layer's values are there in the head's backward, which has those 3 D of its
            # own, four gradients of D in float32, and its input.
            gradients = max(gradients, tokens * (7 * wide + width))
        heads = tokens * (self.graphs - 1) * 3 * wide
        # The gradients of features wait for their layers. Without checkpointing a classifier keeps
        # its input in float32 too, and four values of D.
        features = tokens * self.read * (width if self.checkpointing else 4 * width + wide)
        return layer + gradients + heads + features + max(kept - self.late, 0)


def expected(cfg, world: World, model: DiTConfig, scores: DiTConfig | None) -> dict[str, Parts]:
    """Bytes that this process comes to hold, on the "device" (of a CPU: all) and on the "host".

    cfg: train.py's Config. model: the trained network; scores: critic and teacher of a
    distillation. Gradients are float32 and of one network at a time. With lora one base is all
    weights that are not trained.
    """
    dtype = getattr(torch, cfg.dtype)
    size = dtype.itemsize
    base = parameters(model) / world.shards
    generator = base
    critic = parameters(scores) / world.shards if scores else 0
    weights = size * (generator + 2 * critic)
    if cfg.lora:
        dtype = torch.float32  # of what is trained
        generator = adapter_numbers(cfg, model) / world.shards
        critic = generator if scores else 0
        weights = size * base + 4 * (generator + critic)
    if cfg.with_gan:
        classifier = classifier_parameters(scores) / world.shards
        critic += classifier
        weights += size * classifier

    device = {"weights": weights, "gradients": 4 * max(generator, critic)}
    host = {}
    if dtype != torch.float32:
        host["masters while saving"] = 4 * (generator + critic)

    # The optimizers' state, group by group, where it is kept.
    groups = state_groups(dtype, cfg.beta1, cfg.ema > 0)
    hosted = HostStorage(world.device, cfg.offload).hosted(groups)
    for group, kind in groups.items():
        place = host if group in hosted else device
        weights = generator if group == "ema" else generator + critic
        place[f"optimizer: {group}"] = kind.itemsize * weights

    if scores:
        tokens = cache_frames(cfg) * model.tokens_per_frame(cfg.height, cfg.width)  # of one sample
        positions = cfg.micro_batch * (tokens + model.text_len)
        device["KV cache"] = 2 * model.num_layers * positions * model.dim * size
    device["activations"] = activations(cfg, world, model, scores, device["gradients"])
    gathered = 0
    if world.size > 1:
        # FSDP gathers two layers in a backward, with the gradients of one, and all of them in a
        # rollout, which keeps no activations.
        frozen = size * base * world.shards if cfg.lora else 0
        layers = (3 * dtype.itemsize + 4) * max(generator, critic) * world.shards + 2 * frozen
        gathered = generator * world.shards * dtype.itemsize + frozen
        device["activations"] += layers / model.num_layers
    if scores:
        device["activations"] = max(device["activations"], gathered)
    if scores or cfg.sample_prompts:
        # While rollouts run there are no activations, but copies.
        merged = gathered + copied_bytes(cfg, model) - device["activations"]
        if merged > 0:
            device["merged weights"] = merged
    if world.device.type == "cuda":
        return {"device": device, "host": host}
    return {"device": device | host}


def cache_frames(cfg) -> int:
    """How many frames the cache of a distillation holds: all that a replay of what is scored sees.

    With a window these may be fewer than a long rollout's: the frames that are scored, and what the
    first chunk of them sees. cfg: train.py's Config.
    """
    longest = max(cfg.frames, cfg.rollout_frames)
    if not cfg.window:
        return longest
    return min(longest, max(cfg.frames, cfg.frames - cfg.chunk + cfg.window))


def activations(
    cfg, world: World, model: DiTConfig, scores: DiTConfig | None, gradients: float
) -> float:
    """Of the longest forward with grad, over a whole sequence."""
    size = getattr(torch, cfg.dtype).itemsize
    tokens = cfg.micro_batch * cfg.frames * model.tokens_per_frame(cfg.height, cfg.width)
    common = {"itemsize": size, "checkpointing": cfg.checkpointing, "keeps": cfg.keep_attention}
    common["compiled"] = cfg.compile
    if cfg.lora:
        layers = len(of_a_block(cfg, model)) // 2  # with two matrices each
        common["ranks"] = cfg.lora * layers

    # With one micro-batch a phase, weight gradients come as activations go; with a GAN a critic's
    # micro-batch has several backwards.
    one = len(world.share(cfg.batch)) == cfg.micro_batch and not cfg.with_gan
    common["late"] = gradients if one else 0

    # The keys that all chunks see, in tokens; each chunk's own among them. The frames may be the
    # end of a longer rollout.
    before = max(cfg.rollout_frames - cfg.frames, 0) if scores else 0
    sizes = chunk_sizes(cfg.frames, cfg.chunk, cfg.prefix)
    ends = [before + end for end in accumulate(sizes)]
    seen = sum(min(end, cfg.window or end) for end in ends) * tokens // cfg.frames

    if scores is None:
        halves = 2 if cfg.stage in ("ar", "ode") and cfg.forcing == "teacher" else 1
        # Under a mask nothing is copied, and nothing kept.
        if cfg.stage != "teacher":
            common["keeps"] = cfg.keep_attention and cfg.split_attention
            common["keys"] = halves * seen if cfg.split_attention else 0
        return Backward(halves * tokens, **common).activations(model)

    # The critic's step; for SiD its forward and both of the teacher's are in one graph.
    graphs = 1
    if cfg.stage == "sid":
        graphs = 3 if cfg.guidance else 2
    read = READERS if cfg.with_gan else 0
    scored = Backward(tokens, graphs=graphs, read=read, **common).activations(scores)

    # The replay, whose chunks copy all keys that they see; the first one sees its own, where they
    # are.
    copied = seen - sizes[0] * tokens // cfg.frames
    replayed = Backward(tokens, keys=copied, **common).activations(model)
    return max(scored, replayed)


def adapter_numbers(cfg, model: DiTConfig) -> int:
    """In all adapters of one network of a run with lora."""
    return model.num_layers * sum(map(math.prod, of_a_block(cfg, model)))


def parameters(cfg: DiTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in WanDiT(cfg).parameters())


def classifier_parameters(cfg: DiTConfig) -> int:
    """Of the GAN branch of a critic of these sizes."""
    with torch.device("meta"):
        classifier = Classifier(cfg, layers_read((), cfg.num_layers))
        return sum(p.numel() for p in classifier.parameters())


def afford(cfg, world: World, budget: dict[str, Parts], free: Parts) -> None:
    """Print the budget. ValueError, with what would help, if more is needed than is free."""
    for place, parts in budget.items():
        needed = sum(parts.values())
        if world.rank == 0:
            for part, size in [*parts.items(), ("in all", needed), ("free", free[place])]:
                if size:
                    print(f"{place:8}{part:24}{size / GIB:8.2f} GiB")
        if needed <= free[place]:
            continue

        helps = ["processes on more machines", "or offload = false"]
        if place == "device":
            helps = []
            if world.device.type == "cuda" and not cfg.offload:
                helps.append("offload = true")
            if not cfg.checkpointing:
                helps.append("checkpointing = true")
            if cfg.micro_batch > 1:
                helps.append("a smaller micro_batch")
            if "merged weights" in parts:
                helps.append("lora_merge = false")
            helps.append("more processes")
        raise ValueError(
            f"{needed / GIB:.2f} GiB are needed on the {place}, {free[place] / GIB:.2f} are free; "
            f"what helps: {', '.join(helps)}"
        )


def free(world: World) -> Parts:
    """Bytes this process may still take: on the "device", and as its share of the "host"."""
    host = float("inf")  # where the system doesn't say
    if MEMINFO.exists():
        available = MEMINFO.read_text().partition("MemAvailable:")[2]
        host = 1024 * int(available.split()[0]) / world.local_size
    if world.device.type == "cuda":
        return {"device": torch.cuda.mem_get_info()[0], "host": host}
    return {"device": host, "host": host}


def memory_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: of a GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------- FLOP


def forward_flop(
    cfg: DiTConfig,
    x: Tensor,
    *,
    cache: KVCache | None = None,
    chunks: list[int] | None = None,
    window: int | None = None,
    clean: Tensor | None = None,
) -> tuple[float, float]:
    """FLOP of the layers' projections and of their attention in a forward; arguments are WanDiT's.

    Left out: what is done once a text, a frame or a forward.
    """
    frames = x.shape[2]
    start = 0
    if cache is not None:
        window = cache.window
        start = cache.written - frames if chunks else cache.frames

    pairs = 0  # of frames, (query, key)
    for begin, end in pairwise(accumulate(chunks or [frames], initial=start)):
        pairs += (end - begin) * min(end, window or end)

    sequences = len(x) if clean is None else 2 * len(x)
    per_frame = cfg.tokens_per_frame(*x.shape[3:])
    tokens = sequences * frames * per_frame
    linear = 2 * tokens * (6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim)
    attention = 4 * cfg.dim * (sequences * pairs * per_frame**2 + tokens * cfg.text_len)
    return cfg.num_layers * linear, cfg.num_layers * attention


def recomputed_flop(model: WanDiT, x: Tensor, share: float = 0.0, **options) -> float:
    """FLOP of a forward that checkpointing does once more, if it is on.

    share: the adapters' part, of the projections'. options: as in `forward_flop`.
    """
    if not model.checkpointing:
        return 0.0
    linear, attention = forward_flop(model.cfg, x, **options)
    linear *= 1 + share
    if not keeps_results(model, x, options):
        return linear + attention
    tokens = model.cfg.tokens_per_frame(*x.shape[3:]) * len(x) * x.shape[2]
    if options.get("clean") is not None:
        tokens *= 2
    # Attention to the text alone.
    return linear + model.cfg.num_layers * 4 * model.cfg.dim * tokens * model.cfg.text_len


class FlopCount:
    """FLOP done so far by the networks that it watches, by arithmetic.

    torch's own counter would switch compiled flex_attention off.
    """

    def __init__(self):
        self.done = 0.0

    def watch(self, model: WanDiT) -> None:
        count = partial(self._count, flop_share(model))
        model.register_forward_pre_hook(count, with_kwargs=True)
        for part in model.children():
            if isinstance(part, Classifier):
                part.register_forward_pre_hook(self._count_classifier)

    def _count_classifier(self, classifier: Classifier, args: tuple[list[Tensor]]) -> None:
        """Before it reads: keys and values of all tokens; the rest is nothing beside them."""
        linear = sum(4 * features.numel() * classifier.cfg.dim for features in args[0])
        self.done += linear
        if torch.is_grad_enabled():
            # Recomputed or not, and the two products of a layer's backward.
            self.done += (classifier.checkpointing + 2) * linear

    def _count(self, share: float, model: WanDiT, args: tuple, options: Mapping) -> None:
        """Before a forward: add its FLOP, and with grad the recomputation's and the backward's to
        come. share: the adapters' part, of the projections'.
        """
        known = {name: value for name, value in options.items() if name != "clean_sigma"}
        linear, attention = forward_flop(model.cfg, args[0], **known)
        beside = 0 if runs_merged(model) else share
        self.done += (1 + beside) * linear + attention
        if not torch.is_grad_enabled():
            return
        self.done += recomputed_flop(model, args[0], share, **known)
        # Two products of a layer's backward, or one where the input needs grad and the weights
        # don't (SiD; a base under adapters); attention's recomputes the scores: 2.5 forwards.
        products = 1 if args[0].requires_grad else 2
        of_base = 1 if share else products
        self.done += (of_base + products * share) * linear + 2.5 * attention


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this device: what MFU is measured by."""
    n = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / Timer("a @ b", globals={"a": a, "b": b}).timeit(10).mean


# ---------------------------------------------------------------------------------------- measured


class Meter:
    """What each step of a run takes.

    Tokens are those of one global batch, though a distillation's step runs two; mfu counts all FLOP
    that are done, recomputed ones too.
    """

    def __init__(self, run: Run):
        cfg = run.cfg
        self.device = run.device
        self.flop = FlopCount()
        for model in filter(None, (run.generator, run.critic, run.teacher)):
            self.flop.watch(model)
        self.ceiling = matmul_rate(run.device, run.dtype)
        per_frame = run.generator.cfg.tokens_per_frame(cfg.height, cfg.width)
        self.tokens = cfg.batch * cfg.frames * per_frame
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()
        self.flop_before = self.flop.done

    def read(self) -> dict[str, float]:
        """What has been taken since then, and the peak of memory so far."""
        seconds = time.perf_counter() - self.began
        return {
            "seconds": seconds,
            "gib": memory_gib(self.device),
            "tokens_per_second": self.tokens / seconds,
            "mfu": (self.flop.done - self.flop_before) / seconds / self.ceiling,
        }


def peak(run: Run) -> str:
    """The peak of memory beside what was expected, as a line."""
    needed = sum(run.budget["device"].values()) / GIB
    reached = memory_gib(run.device)
    return f"peak memory: {reached:.2f} GiB (on a CPU the process's), expected {needed:.2f}"
