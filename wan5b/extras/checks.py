"""What is wrong with a run of train.py before it begins: everything that can be known, in one
place.

Each check is a ValueError that names the values and the way out.
"""

import json
import math
import sys
import time
from collections.abc import Set
from dataclasses import asdict, fields
from pathlib import Path

from wan5b.data import Data
from wan5b.dit import DiTConfig
from wan5b.extras import adapters, log
from wan5b.extras.checkpoints import complete, in_the_way, step_of
from wan5b.extras.digest import NOTHING, digest
from wan5b.extras.formats import check_checkpoint, locate, read_metadata
from wan5b.extras.gan import layers_read
from wan5b.extras.rollouts import are_longer
from wan5b.extras.shards import check_texts
from wan5b.extras.untrusted import NUMBER, checked, each
from wan5b.flow import few_step_sigmas
from wan5b.fsdp import World
from wan5b.kvcache import chunk_sizes
from wan5b.stages import DISTILLATIONS, STAGES
from wan5b.weights import about

SHOWN_WITHIN = 60  # seconds, of a file that another machine has written
# What each stage learns from; the others from latents.
LEARNS_FROM = {"ode": "trajectories", "dmd": "teacher", "sid": "teacher"}
# What has an effect in some stages only.
ONLY_IN = {
    **dict.fromkeys(("teacher", "critic_lr", "ratio", "guidance", "rollout"), DISTILLATIONS),
    **dict.fromkeys(("dropout", "bell"), ("teacher", "ar")),
    "latents": ("teacher", "ar", "dmd", "sid"),
    "trajectories": ("ode",),
    "alpha": ("sid",),
    "forcing": ("ar", "ode"),
    "split_attention": ("ar", "ode"),
    **dict.fromkeys(("data_forcing", "gan_weight"), ("dmd",)),
    "window": STAGES[1:],
    **dict.fromkeys(("rollout_frames", "sink", "sink_rope"), DISTILLATIONS),
    **dict.fromkeys(("levels_after", "clean_pass"), ("ode", *DISTILLATIONS)),
}
READS = ("text", "latents", "trajectories", "weights", "lora_weights", "teacher")
# What has no effect without lora, and without gan_weight.
OF_LORA = ("lora_alpha", "lora_targets", "lora_merge")
OF_GAN = ("gan_critic_weight", "gan_relativistic", "gan_r1", "gan_r2", "gan_layers")
# A run may go on with another value of these: what is trained does not depend on them.
FREE = {
    *("out", "device", "micro_batch", "shard", "checkpointing", "compile", "offload"),
    *("keep_attention", "split_attention", "lora_merge"),
    *("save_every", "keep", "vae", "sample_every", "sample_prompts", "sample_guidance"),
}


def check_config(cfg, world: World) -> None:
    """What a config says by itself. cfg: train.py's Config."""
    learns_from = LEARNS_FROM.get(cfg.stage, "latents")
    if cfg.lora and learns_from == "teacher":
        learns_from = "weights"
    for needed in ("out", "text", learns_from):
        if not getattr(cfg, needed):
            raise ValueError(f"stage {cfg.stage} needs {needed}: the config lacks it")
    adapters.check(cfg)
    if cfg.sample_prompts and not cfg.vae:
        raise ValueError("sample_prompts need the release of their VAE: name vae")
    distilling = cfg.stage in DISTILLATIONS
    if distilling and (cfg.prefix or cfg.rollout == "data") and not cfg.latents:
        raise ValueError(
            "prefix = 1 and rollout = 'data' take frames from real clips: name latents"
        )
    if cfg.with_real_clips and not cfg.latents:
        raise ValueError("gan_weight and data_forcing take real clips: name latents")
    if cfg.with_gan and cfg.lora:
        raise ValueError(
            "gan_weight trains all of its classifier, lora adapters alone: leave out one of them"
        )
    if cfg.data_forcing > 1:
        raise ValueError(
            f"data_forcing is a share of the generator's steps, 0 to 1, got {cfg.data_forcing}"
        )

    chunk_sizes(cfg.frames, cfg.chunk, cfg.prefix)
    if cfg.frames == cfg.prefix:
        raise ValueError(
            f"frames = {cfg.frames} is a prefix alone, behind which nothing is learned; "
            f"frames={cfg.prefix + cfg.chunk} would do"
        )
    with about("levels"):
        few_step_sigmas(cfg.levels, cfg.shift)
    if cfg.levels_after:
        with about("levels_after"):
            few_step_sigmas(cfg.levels_after, cfg.shift)
    unknown = set(cfg.levels_after) - set(cfg.levels)
    if cfg.stage == "ode" and unknown:
        raise ValueError(
            f"levels_after has {sorted(unknown)}, which trajectories hold only if they are among "
            f"levels, {list(cfg.levels)}"
        )
    if cfg.window and cfg.window < cfg.chunk:
        raise ValueError(f"a chunk of {cfg.chunk} frames does not fit in a window of {cfg.window}")
    if cfg.prefix and cfg.window == cfg.chunk and not cfg.sink:
        raise ValueError(
            f"window = {cfg.window} is a chunk alone, and none would see the first frames that "
            f"prefix = {cfg.prefix} gives; give window = {cfg.window + 1} or more"
        )
    if distilling:
        _check_rollouts(cfg)
    own = len(world.share(cfg.batch))
    if own % cfg.micro_batch:
        raise ValueError(
            f"batch {cfg.batch} is {own} a process, not a multiple of "
            f"micro_batch {cfg.micro_batch}; "
            f"micro_batch={math.gcd(own, cfg.micro_batch)} would do"
        )


def _check_rollouts(cfg) -> None:
    """Options of the rollouts of a distillation that do not go together."""
    if cfg.sink and cfg.sink + cfg.chunk > cfg.window:
        raise ValueError(
            f"window = {cfg.window} has no room for sink = {cfg.sink} and a chunk of {cfg.chunk}"
        )
    if cfg.sink_rope == "relative" and not cfg.sink:
        raise ValueError("sink_rope = 'relative' needs a sink: give sink and window")
    longer = cfg.rollout_frames
    if longer:
        with about("rollout_frames"):
            chunk_sizes(longer, cfg.chunk, cfg.prefix)
        if longer < cfg.frames:
            raise ValueError(
                f"rollout_frames = {longer} is less than frames = {cfg.frames}, which are scored"
            )
        if longer > cfg.frames and not cfg.vae:
            raise ValueError("rollout_frames above frames needs the release of the VAE: name vae")
        if longer > cfg.frames and cfg.frames == cfg.chunk:
            # Inside of a video the first chunk of these is only shown (extras/rollouts.py).
            raise ValueError(
                f"rollout_frames above frames = {cfg.frames}: of what is scored inside of a video, "
                f"all is one chunk, which is only shown and would teach nothing; give "
                f"frames = {2 * cfg.chunk} or more"
            )
    plain = not (cfg.levels_after or longer > cfg.frames) and cfg.clean_pass
    if cfg.rollout == "data" and not plain:
        raise ValueError(
            "rollout = 'data' is the plain method's baseline: leave levels_after, clean_pass and "
            "rollout_frames out"
        )


def check_alike(cfg, data: dict[str, str], world: World) -> None:
    """Whether all processes are of one run: each machine has its own config file, data and disks,
    and shards of different runs would train together without a word.

    data: `held_by`. For every process to call, process 0 with the lock of the run's folder: so what
    they look for there afterwards, they find alike.
    """
    settings = {}
    for option in fields(cfg):
        if not option.metadata.get("path"):  # files may lie elsewhere on another machine
            settings[option.name] = getattr(cfg, option.name)

    # Process 0's, and what each other one says of itself.
    (settings, data), *others = world.exchange((settings, data))
    for rank, (its_settings, its_data) in enumerate(others, 1):
        for key in settings | its_settings:  # of other versions of the code they are not the same
            here, there = settings.get(key), its_settings.get(key)
            if here != there:
                raise ValueError(
                    f"process {rank} has another {key} than process 0 ({there!r}, not {here!r}): "
                    "start all processes with the same config, of the same version"
                )
        for key in data | its_data:
            if data.get(key) != its_data.get(key):
                raise ValueError(
                    f"process {rank} has other {key} than process 0, or none: every machine needs "
                    "the same files"
                )

    # Process 0 took part in that, so by now it has the lock.
    lock = Path(cfg.out, log.LOCK)
    text = world.exchange(lock.read_text() if world.rank == 0 else "")[0]
    for rank, sees in enumerate(world.exchange(_comes_to_hold(lock, text))):
        if not sees:
            raise ValueError(
                f"process {rank} does not see process 0's folder out ({cfg.out}): all write into "
                "it, so choose one that all machines share"
            )


def _comes_to_hold(path: Path, text: str) -> bool:
    """Whether a file holds a text: now, or as soon as a network file system shows it."""
    end = time.monotonic() + SHOWN_WITHIN
    while not (path.exists() and path.read_text() == text):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def note_ignored(cfg, rank: int) -> None:
    """Keys that were given and do nothing in this stage, and weights that were not given (by an
    unset variable, say), where a stage goes on from another; the first process says so.
    """
    if rank != 0:
        return
    if not cfg.weights and cfg.stage != STAGES[0]:
        print(f"note: no weights: {cfg.stage} starts from random ones", file=sys.stderr)
    if cfg.lora and not cfg.lora_weights and cfg.stage in DISTILLATIONS:
        print(f"note: no lora_weights: {cfg.stage} starts from its teacher", file=sys.stderr)
    given = [option.name for option in fields(cfg) if getattr(cfg, option.name) != option.default]
    ignored = [key for key in given if cfg.stage not in ONLY_IN.get(key, STAGES)]
    if ignored:
        print(f"note: {', '.join(ignored)} has no effect in stage {cfg.stage}", file=sys.stderr)
    for keys, needed in ((OF_GAN, "gan_weight"), (OF_LORA, "lora")):
        alone = [key for key in given if key in keys and not getattr(cfg, needed)]
        if alone:
            print(f"note: {', '.join(alone)} has no effect without {needed}", file=sys.stderr)


def note_apart(cfg, rank: int) -> None:
    """What the networks that a run starts from were trained with, where it has something else: a
    key that this stage's config forgets, say. It may be meant; else clips are worse for no reason
    that shows. Process 0 says so.
    """
    if rank != 0:
        return
    read = [cfg.weights, cfg.lora_weights, cfg.teacher if cfg.stage in DISTILLATIONS else ""]
    for path in dict.fromkeys(filter(None, read)):
        said = adapters.said_by(path)
        is_teacher = said.get("stage") == STAGES[0]
        keys = ("shift", "negative") if is_teacher else ("shift", "chunk", "prefix", "window")
        training = said.get("training", {})
        apart = []
        for key in keys:
            now = getattr(cfg, key)
            if training.get(key, now) != now:
                apart.append(f"{key} ({training[key]!r:.40}, here {now!r:.40})")
        if apart:
            print(f"note: {path} was trained with another {', '.join(apart)}", file=sys.stderr)


def check_fit(cfg, data: Data, model: DiTConfig, scores: DiTConfig, rank: int) -> None:
    """Whether data, config and networks fit each other. scores: the sizes of critic and teacher.

    Process 0 says what in the config has no effect.
    """
    model.tokens_per_frame(cfg.height, cfg.width)
    if cfg.with_gan:
        layers_read(cfg.gan_layers, scores.num_layers)
    _check_stages(cfg)
    adapters.check_files(cfg, model)
    takes = (model.text_dim, model.text_len)
    other = (scores.text_dim, scores.text_len)
    if takes != other:
        raise ValueError(
            f"weights and teacher take different texts (width, length): {takes} and {other}"
        )
    if not data.prompts:
        source = cfg.text if data.store is None else data.store.folder
        raise ValueError(f"{source} holds nothing to train on")
    texts = [*data.prompts, *cfg.sample_prompts]
    if cfg.stage != "ode":
        texts.append(cfg.negative)
    check_texts(data.text, texts, *takes)
    if data.store is not None:
        _check_store(cfg, data, model.in_dim)
    note_ignored(cfg, rank)
    note_apart(cfg, rank)


def _check_stages(cfg) -> None:
    """Weights are of a release, of this stage or of an earlier one; a teacher is of a release or of
    the stage teacher. A distillation starts from `weights` and has a `teacher`; with lora it starts
    from `lora_weights`, and `weights` are its teacher.
    """
    earlier = STAGES[: STAGES.index(cfg.stage) + 1]
    allowed = [(cfg.weights, earlier), (cfg.lora_weights, earlier)]
    if cfg.stage in DISTILLATIONS:
        trained = cfg.lora_weights if cfg.lora else cfg.weights
        scores = cfg.weights if cfg.lora else cfg.teacher
        allowed = [(trained, earlier[1:]), (scores, STAGES[:1])]
    for path, stages in allowed:
        made = adapters.said_by(path).get("stage") if path else None
        if made and made not in stages:
            wrong = f"{path} is of stage {made}; {cfg.stage} takes a release there"
            if cfg.lora and path == cfg.weights:
                wrong += " (with lora it is the teacher too; the stage before is lora_weights)"
            raise ValueError(f"{wrong}, or one of {stages}")


def _check_store(cfg, data: Data, channels: int) -> None:
    """Latents or trajectories of the config's size; trajectories at the config's levels."""
    sigmas = few_step_sigmas(cfg.levels, cfg.shift)
    store = data.store
    name = "latent"
    shape = (channels, cfg.frames, cfg.height, cfg.width)
    if cfg.stage == "ode":
        name = "x"
        shape = (len(sigmas), *shape)
    if store.shapes.get(name) != shape:
        raise ValueError(
            f"{store.folder} holds {store.shapes}, this run needs {name} {shape}, "
            "(levels,) channels, frames, height, width: change these, or make it again"
        )
    if cfg.stage == "ode":
        if store.facts.get("prefix") and not cfg.prefix:
            raise ValueError(
                f"{store.folder} goes on from clean first frames, which this run would train as "
                "noise: give prefix = 1, or make it again without --latents"
            )
        levels = store.facts.get("sigmas")
        checked(store.folder, {"sigmas": levels}, {"sigmas": each(NUMBER)})
        same = [abs(a - b) < 1e-3 for a, b in zip(levels, sigmas, strict=False)]
        if not all(same) or len(levels) != len(sigmas):
            raise ValueError(
                f"{store.folder} has levels {levels}, not {sigmas}: change levels and shift"
            )


def changed_settings(cfg, known: dict, free: Set[str]) -> list[str]:
    """What in a config sets it apart from the run that says `known` of itself, as "lr (0.001, now
    0.002)". Paths do not count, nor what is in `free`.
    """
    # What a run of an earlier version did not know, it did as is the default.
    defaults = {option.name: option.default for option in fields(cfg)}
    training = known.get("training", {})
    before = json.loads(json.dumps(defaults)) | training
    if training.get("rollout") == "data" and "lora_merge" not in training:
        # lora_merge came soon after `data` changed: nearly all versions that lack it generated one
        # chunk, and cut the clip there.
        before["rollout"] = "an earlier version's data, one chunk behind real frames"
    now = json.loads(json.dumps(asdict(cfg)))
    changed = []
    for key, value in now.items():
        if before[key] != value and key not in free and key not in READS:
            changed.append(f"{key} ({before[key]}, now {value})")
    return changed


def check_unchanged(cfg, data: dict[str, str], saved: Path) -> None:
    """Whether a checkpoint is of this run: the same settings, but for those in FREE, the same data.

    data: `held_by` now. Data may lie elsewhere by now; what counts is what they hold.
    """
    if saved.is_dir():
        check_checkpoint(saved)
    known = read_metadata(saved)
    _check_known(saved, known)
    free = FREE if cfg.decay else FREE | {"steps"}  # the decay's length
    changed = changed_settings(cfg, known, free)
    if changed:
        raise ValueError(f"{saved} was made with another {', '.join(changed)}; choose another out")

    digests = known.get("data", {})
    # The VAE only where it was noted: runs with long rollouts do, since some version.
    noted = [*READS, "vae"] if "vae" in digests else READS
    for key in noted:
        if digests.get(key) not in (data.get(key), NOTHING):
            raise ValueError(
                f"{saved} was made with other {key} than {getattr(cfg, key) or 'none'} holds now; "
                "choose another out"
            )
    if known["step"] > cfg.steps:
        raise ValueError(f"{saved} is beyond steps = {cfg.steps}; raise it or choose another out")


def _check_known(saved: Path, known: dict) -> None:
    """ValueError if a checkpoint or an export does not say what it would be compared by, which is
    not to be taken for other settings or data.

    known: what it says of itself.
    """
    parts = {
        "training": "with which settings it was made",
        "data": "what its data held",
        "step": "of which step it is",
    }
    unsaid = [text for part, text in parts.items() if part not in known]
    if unsaid:
        raise ValueError(
            f"{saved} does not say {', nor '.join(unsaid)}: an earlier version or another program "
            "wrote it, and whether it is this run's can't be checked; go on with what wrote it, or "
            "choose another out"
        )


def newest(cfg, data: dict[str, str], world: World) -> Path | None:
    """The checkpoint that a run goes on from, if there is one, which must be its own. For every
    process to call: all take process 0's, as other machines may see new files late.
    """
    if cfg.lora:
        _check_adapter(cfg, data)
    saved = complete(Path(cfg.out))
    name = world.exchange(saved[-1].name if saved else "")[0]
    path = None
    done = 0
    if name:
        path = Path(cfg.out, name)
        done = step_of(path)
        check_unchanged(cfg, data, path)

    others = in_the_way(Path(cfg.out), range(done + 1, cfg.steps + 1))
    if others:
        raise ValueError(
            f"{others[0]} is in the way of a checkpoint, and is none (no facts.json, or a link): "
            "move it away"
        )
    return path


def _check_adapter(cfg, data: dict[str, str]) -> None:
    """Whether an adapter that lies where this run's will is this run's: left by a kill between the
    two exports, or by someone who has moved the merged one away.
    """
    folder = adapters.adapter_folder(cfg, Path(cfg.out))
    file = folder / adapters.FILE
    if not file.is_file():
        return
    if "training" not in read_metadata(file):
        raise ValueError(f"{folder} is another adapter; move it or choose another out")
    check_finished(cfg, data, file)


def check_finished(cfg, data: dict[str, str], final: Path) -> None:
    """Whether an export that lies where this run's will is this run's, made to its end."""
    check_unchanged(cfg, data, final)
    step = read_metadata(final)["step"]
    if step < cfg.steps:
        raise ValueError(f"{final} is of step {step}; move it to go on to steps = {cfg.steps}")


def held_by(cfg) -> dict[str, str]:
    """A digest of everything that a run reads, by the config's keys.

    What is missing has none: the run says so when it opens it.
    """
    digests = {}
    for key in READS:
        path = getattr(cfg, key)
        if path and Path(path).exists():
            digests[key] = digest(path)
    # Elsewhere the VAE only shows what is made; here it encodes what teacher and critic are shown.
    if are_longer(cfg) and Path(cfg.vae).exists():
        digests["vae"] = digest(locate(Path(cfg.vae), "vae"))
    return digests
