"""In which chunks clips are made, what text each is shown, and where scene cuts are.

Lengths are in latent frames: T of them are 1 + 4 (T - 1) pixel frames.
"""

from wan5b.extras.recipes import Recipe
from wan5b.kvcache import chunk_sizes
from wan5b.media import latent_frames
from wan5b.util import nearest

FRAMES = 81  # pixel frames of a clip, if neither --frames nor the recipe says it


def memory(window: int | None, sink: int, chunk: int) -> dict[str, int | None]:
    """Arguments of `generate` for the cache. ValueError unless the window, which includes the sink,
    has room for a chunk.
    """
    if window or sink:
        room = (window or 0) - chunk
        wrong = f"--window {window}: no room for --sink {sink} and a chunk of {chunk} frames"
        if sink > room:
            raise ValueError(wrong)
    return {"window": window, "sink": sink}


def chunk_plan(
    frames: int | None,
    prefix: int,
    size: int,
    first: int,
    *,
    inside: bool = False,
    default: int = FRAMES,
) -> list[int]:
    """How many frames each chunk generates, behind a prefix of so many.

    - frames: pixel frames of the clip, prefix included (None: the default, or the next length above
      it that chunks fill).
    - size: of a chunk. first: of the first one, if it is not that of all (0); a prefix in front
      takes its place.
    - inside: the prefix is part of the first chunk, which then generates the rest of itself.

    ValueError, with the nearest lengths, if chunks don't fill the clip.
    """
    # Chunks of the common size begin at `start`: behind the prefix, or the odd first chunk.
    lead = first if inside or not prefix else 0
    start = lead if inside else prefix + lead
    if frames is None:
        least = max(latent_frames(default), prefix + 1)
        total = least + (start - least) % size
    else:
        total = latent_frames(frames)
    if total <= prefix or (total - start) % size:
        valid = nearest(frames, 4 * size, 4 * (lead or start + size) - 3)
        plan = f"{start} latent frames and chunks of {size}" if start else f"chunks of {size}"
        wrong = f"--frames {frames} is not {plan}; nearest: {valid}"
        raise ValueError(f"{wrong} ({frames} are {total} latent frames, which chunks count)")
    if not inside:
        return chunk_sizes(total - prefix, size, lead)

    # The first chunk holds the prefix, and must have a frame left to generate.
    sizes = chunk_sizes(total, size, lead)
    wrong = f"a first chunk of {sizes[0]} has no room behind {prefix} given frames; try --chunk 8"
    if sizes[0] <= prefix:
        raise ValueError(wrong)
    return [sizes[0] - prefix, *sizes[1:]]


def starts(scenes: int, chunks: int) -> list[int]:
    """The index of each scene's first chunk: equal shares, of which the first ones get the
    remainder.
    """
    share, rest = divmod(chunks, scenes)
    return [i * share + min(i, rest) for i in range(scenes)]


def scene_texts(prompts: list[str], chunks: int, recipe: Recipe) -> list[str]:
    """The text that each chunk is shown: its scene's prompt, behind the recipe's words for a cut in
    the first chunk of a later scene.

    chunks: how many there are. Prompts that have those words already get them once.
    """
    shown = []
    begins = starts(len(prompts), chunks)
    for i, prompt in enumerate(prompts):
        bare = prompt if i == 0 else prompt.removeprefix(recipe.cut_prefix)
        end = begins[i + 1] if i + 1 < len(prompts) else chunks
        shown += [bare] * (end - begins[i])
        if i:
            shown[begins[i]] = recipe.cut_prefix + bare
    return shown


def scene_cuts(scenes: int, prefix: int, chunks: list[int], recipe: Recipe) -> dict[int, int]:
    """The indices of chunks that open a scene by a cut -> RoPE positions left out there.

    prefix: frames in front of the first chunk's own. Empty where the recipe has no cuts: then the
    text alone changes. ValueError if scenes don't fit.
    """
    if not recipe.causal:
        way_out = "leave it out for a clip each, or take --recipe longlive2 and its weights, say"
        raise ValueError(f"--shots needs chunks: here the whole clip is made at once; {way_out}")
    if scenes > len(chunks):
        more = 4 * recipe.chunk * (scenes - len(chunks))
        frames = 4 * (prefix + sum(chunks)) - 3 + more
        counted = f"{scenes} prompts for {len(chunks)} chunks"
        raise ValueError(f"--shots: {counted}; give --frames {frames}, or fewer prompts")
    if not recipe.cut_gap or scenes == 1:
        return {}

    # A scene's first frames stay in the window like the video's own.
    begins = starts(scenes, len(chunks))[1:]
    before = prefix + sum(chunks[: begins[0]])
    if before < recipe.sink:
        way_out = "more --frames, fewer prompts or a smaller --sink"
        raise ValueError(
            f"--shots: the first scene has {before} latent frames, fewer than the sink of "
            f"{recipe.sink}; give {way_out}"
        )
    needed = 2 * recipe.sink + recipe.chunk
    if recipe.window and recipe.window < needed:
        raise ValueError(
            f"--shots: a window of {recipe.window} has no room for the video's sink, a scene's "
            f"and a chunk; give --window {needed} or a smaller --sink"
        )
    return dict.fromkeys(begins, recipe.cut_gap)
