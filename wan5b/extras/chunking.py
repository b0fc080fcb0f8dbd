"""In which chunks clips are made, what text each is shown, and where scene cuts are."""

from wan5b.extras.recipes import Recipe
from wan5b.kvcache import chunk_sizes
from wan5b.media import latent_frames
from wan5b.util import nearest

FRAMES = 81  # of a clip, if neither given nor the recipe's


def memory(window: int | None, sink: int, chunk: int) -> dict[str, int | None]:
    """Window and sink, if they have room for a chunk."""
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
    """Latent frames of each chunk that is generated behind a prefix of so many.

    frames: pixel frames of the clip (None: the default, or what chunks fill next). first: size of
    the first chunk, in whose place a prefix stands, if it is not that of all (0). inside: the
    prefix is part of the first chunk.
    """
    lead = first if inside or not prefix else 0
    start = lead if inside else prefix + lead
    least = max(latent_frames(default), prefix + 1)
    total = least + (start - least) % size if frames is None else latent_frames(frames)
    if total <= prefix or (total - start) % size:
        valid = nearest(frames, 4 * size, 4 * (lead or start + size) - 3)
        plan = f"{start} latent frames and chunks of {size}" if start else f"chunks of {size}"
        raise ValueError(f"--frames {frames} is not {plan}; nearest: {valid}")
    if not inside:
        return chunk_sizes(total - prefix, size, lead)
    sizes = chunk_sizes(total, size, lead)
    wrong = f"a first chunk of {sizes[0]} has no room behind {prefix} given frames; try --chunk 8"
    if sizes[0] <= prefix:
        raise ValueError(wrong)
    return [sizes[0] - prefix, *sizes[1:]]


def starts(scenes: int, chunks: int) -> list[int]:
    """The first chunk of each scene: equal shares, of which the first ones get the remainder."""
    share, rest = divmod(chunks, scenes)
    return [i * share + min(i, rest) for i in range(scenes)]


def scene_texts(prompts: list[str], chunks: int, recipe: Recipe) -> list[str]:
    """What each chunk is shown. A cut's first chunk has the recipe's words in front."""
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
    """The chunks that open a scene by a cut -> RoPE positions left out there.

    prefix: latent frames in front of the first chunk's own. ValueError if scenes don't fit.
    """
    if not recipe.causal:
        raise ValueError("--shots needs chunks: in this mode the whole clip is made at once")
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
