"""In which chunks clips are made, what text each is shown, and where scene cuts are.

Lengths are in latent frames: T of them are 1 + 4 (T - 1) pixel frames.
"""

from wan5b.extras.media import latent_frames
from wan5b.extras.recipes import Recipe
from wan5b.kvcache import chunk_sizes
from wan5b.util import nearest

FRAMES = 81  # pixel frames of a clip, if neither --frames nor the recipe says it


def memory(
    window: int | None, sink: int, chunk: int, sink_rope: str, prefix: int = 0
) -> dict[str, int | str | None]:
    """Arguments of `generate` for the cache. ValueError unless the window, which includes the sink,
    has room for a chunk, and for a frame of the prefix.

    prefix: latent frames in front of the first chunk.
    """
    if window or sink:
        room = (window or 0) - chunk
        given = f"--window {window}" if window else "no --window"
        wrong = f"{given}: no room for --sink {sink} and a chunk of {chunk} frames"
        if sink > room:
            raise ValueError(f"{wrong}; give --window {sink + chunk} or more")
        if prefix and not sink and not room:
            raise ValueError(
                f"{given}: a chunk of {chunk} frames fills it, and none would see the image or "
                f"video in front; give --window {chunk + 1} or more, or --sink"
            )
    return {"window": window, "sink": sink, "sink_rope": sink_rope}


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
        rest = 0
    else:
        total, rest = divmod(frames + 3, 4)  # as latent_frames counts, but here chunks do too
    if total <= prefix or rest or (total - start) % size:
        valid = nearest(frames, 4 * size, 4 * (lead or start + size) - 3)
        plan = f"chunks of {size}" if size > 1 else "single latent frames"
        plan = f"{start} latent frames and {plan}" if start else plan
        counted = f"{frames} are {total} latent frames, which chunks count"
        if rest:
            counted = "chunks count latent frames, and k + 1 of these are 4k + 1 frames"
        raise ValueError(f"--frames {frames} is not {plan}; nearest: {valid} ({counted})")
    if not inside:
        return chunk_sizes(total - prefix, size, lead)

    # The first chunk holds the prefix, and must have a frame left to generate.
    sizes = chunk_sizes(total, size, lead)
    if sizes[0] <= prefix:
        wrong = f"a first chunk of {sizes[0]} has no room behind {prefix} given frames"
        if lead:
            way_out = "the recipe's prefix says its size"
        else:
            way_out = f"try --chunk {max(8, prefix + 1)}"
        raise ValueError(f"{wrong}; {way_out}")
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
    bare = [prompts[0], *(prompt.removeprefix(recipe.cut_prefix) for prompt in prompts[1:])]
    begins = starts(len(prompts), chunks)
    shown = spread(bare, begins, chunks)
    for begin in begins[1:]:
        shown[begin] = recipe.cut_prefix + shown[begin]
    return shown


def spread(prompts: list[str], begins: list[int], chunks: int) -> list[str]:
    """For each of so many chunks the prompt that is in force: each from a chunk in `begins` on."""
    shown = []
    for prompt, begin, end in zip(prompts, begins, [*begins[1:], chunks], strict=True):
        shown += [prompt] * (end - begin)
    return shown


def switches(seconds: list[float], prefix: int, chunks: list[int], fps: int) -> list[int]:
    """The chunks with which prompts change that are to at these times: the first ones that begin
    then or later; and chunk 0, with which the first prompt begins.

    prefix: latent frames in front of the first chunk's own. ValueError unless the times rise, each
    chunk begins one prompt at most, and all lie within the clip.
    """
    # When each chunk's first picture is shown. Of the video's first latent frame there is one.
    times = []
    frame = prefix
    for size in chunks:
        times.append(max(4 * frame - 3, 0) / fps)
        frame += size

    begins = [0]
    for at in seconds:
        later = [index for index, time in enumerate(times) if time >= at]
        wrong = f"--at {at:g}: the last chunk begins at {times[-1]:.2f} seconds"
        if not later:
            raise ValueError(f"{wrong}; give an earlier time, or more --frames")
        if later[0] <= begins[-1]:
            near = ", ".join(f"{time:.2f}" for time in times[begins[-1] + 1 :][:3])
            wrong = f"--at {at:g}: no chunk is left for the prompt before it"
            if not near:
                way_out = "let the times rise, or give more --frames"
                raise ValueError(f"{wrong}, which begins with the last one; {way_out}")
            raise ValueError(f"{wrong}; the next chunks begin at {near} seconds")
        begins.append(later[0])
    return begins


def blended(texts: list[str], over: int) -> dict[int, tuple[str, float]]:
    """Chunks that are shown a mixture where the text changes: (the text before, the share of the
    new one).

    texts: of each chunk. over: how many chunks a change takes: of 3 a third, two thirds, all of it.
    """
    mixed = {}
    for index in range(1, len(texts)):
        before = texts[index - 1]
        if texts[index] == before:
            continue
        for step, chunk in enumerate(range(index, min(index + over - 1, len(texts))), 1):
            if texts[chunk] != texts[index]:
                break
            mixed[chunk] = (before, step / over)
    return mixed


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
    if recipe.sink_rope == "relative":
        raise ValueError("--shots: a sink that follows the window (--sink-rope) has no scene cuts")

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
