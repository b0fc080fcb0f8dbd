"""What can be said of a video's health from its pixels alone: no network, no reference, no score.

Numbers first: a number that differs from another clip's may be the subject's doing. The words of
`findings` stand only where a number passes a limit, and every limit has its reason beside it.

tools/report.py is the command; report_plot.py draws.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from wan5b.extras.measures import GROUP, Series, measure
from wan5b.extras.pictures import video_frames
from wan5b.extras.pulse import CYCLES, Pulse, pulse, steps, strongest
from wan5b.util import read_json, write_json

SHARE = 0.15  # of the frames, at both ends, that drift compares
DRIFTS = ("luma", "spread", "saturation", "sharpness", "motion")
OPENING = 12  # frames that similarity looks back to, where the chunk is not known
POINTS = 1200  # of a series in the report, at most

# Percent of the shorter side a second: seven pixels of 704; a picture that pans like that is across
# after 100 seconds. A still picture of 704x1280 under grain of 4 levels measures 0.3, of 8 levels
# 0.6, one of 256x448 0.8 and 1.4: in small ones strong grain hides that nothing moves.
STILL = 1.0

# Of two pictures that have nothing in common `jump` is 1; a dissolve over n frames has about
# 1 / n^2 a frame. Fast motion has much of it too, but in every frame.
CUT = 0.25
OUTSTANDING = 4.0  # times the median of the frames beside it

# A return to the first frames: similarity rises by at least RISE within a latent's frames, and at
# least half of the way that was open, where the picture itself jumps.
RISE = 0.2
RETURN = 0.5

# Noise, random walks and smooth curves surpass it in 0.2% of clips of 81 frames, or fewer.
STRONG = 8.0
# What is smaller is no pulse. Half a level of luma is 1% of the light at mid-grey, about what eyes
# see of slow flicker (de Lange 1958); the others are set beside it, for want of better.
LEAST = {"luma": 0.5, "saturation": 0.5, "sharpness": 1.0, "change": 0.5}
UNITS = {"luma": "levels", "saturation": "points", "sharpness": "%", "change": "levels"}
SHOWN = {
    "luma": "{:.0f}".format,
    "spread": "{:.0f}".format,
    "saturation": "{:.0%}".format,
    "sharpness": "{:.2f}".format,
    "motion": "{:.1f}%/s".format,
}
SEARCHED = 96  # frames: the longest period that is looked for


def report(path: str | Path, chunk: int | None = None) -> dict:
    """Everything about a video file, as JSON values.

    chunk: latent frames of a chunk. None: as the JSON says that sample.py left beside the clip,
    else unknown, and the strongest period is looked for.

    ValueError for what is not a video, or a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} latent frames: it must be 1 or more")
    notes = []
    source = "given" if chunk else None
    if chunk is None:
        chunk, source = recorded_chunk(Path(path), notes)
    opening = min(GROUP * chunk, 4 * OPENING) if chunk else OPENING
    return describe(measure(video_frames(path), opening), path, chunk, source, opening, notes)


def recorded_chunk(path: Path, notes: list[str]) -> tuple[int | None, str | None]:
    """The latent frames of a clip's chunks, and the file that says so: sample.py's JSON.

    The first chunk may be shorter, so that of the others counts. (None, None) if there is no such
    file, or the clip was made at once; of one that can't be read a note is left.
    """
    record = path.with_suffix(".json")
    if not record.is_file():
        return None, None
    try:
        chunks = read_json(record).get("chunks")
    except ValueError as error:
        notes.append(f"no chunks: {error}")
        return None, None
    whole = isinstance(chunks, list) and all(type(size) is int and size > 0 for size in chunks)
    if not whole or len(chunks) < 2:
        return None, None
    return Counter(chunks[1:]).most_common(1)[0][0], record.name


def describe(
    series: Series,
    path: str | Path,
    chunk: int | None,
    source: str | None,
    opening: int,
    notes: list[str],
) -> dict:
    """The report of what was measured, as JSON values.

    path: of the video, of which the name is told. chunk, source: as of `recorded_chunk`. opening:
    how many frames similarity looks back to. notes: what else is to be said.
    """
    frames = len(series.luma)
    fps = (frames - 1) / series.seconds if series.seconds else None
    cuts = find_cuts(series.jump, chunk)
    returns = find_returns(series, opening, chunk)
    moved = series.motion[np.isfinite(series.motion)]
    found = {
        "video": printable(Path(path).name),
        "size": list(series.size),
        "frames": frames,
        "fps": number(fps),
        "chunk": chunk,
        "chunk_from": source,
        "drift": {name: drift(getattr(series, name)) for name in DRIFTS},
        "drift_frames": ends(frames),
        "motion": number(np.median(moved) if len(moved) else None),
        "still": number((moved < STILL).mean() if len(moved) else None),
        "cuts": cuts,
        "returns": returns,
        "pulse": find_pulse(series, chunk, sorted({*cuts, *(item["frame"] for item in returns)})),
        "notes": notes,
    }
    found["findings"] = findings(found)
    found["series"] = thinned(series)
    return found


# ------------------------------------------------------------------------------------------- drift


def ends(frames: int) -> int:
    """How many frames at each end drift compares: 15% of them, at least one."""
    return max(int(SHARE * frames), 1)


def drift(values: np.ndarray) -> dict[str, float | None]:
    """The mean over the first 15% of the frames, over the last 15%, and the second less the first.

    As FramePack's start-end contrast (Zhang and Agrawala 2025, arXiv 2504.12626), but with its
    sign. It is a change, not yet a fault: a scene may get dark. None with fewer than two
    numbers.
    """
    there = values[np.isfinite(values)]
    if len(there) < 2:
        return {"start": None, "end": None, "change": None}
    count = min(ends(len(values)), len(there))
    start = there[:count].mean()
    end = there[-count:].mean()
    return {"start": number(start), "end": number(end), "change": number(end - start)}


# --------------------------------------------------------------------------------- cuts and returns


def around(values: np.ndarray, reach: int, gap: int = 0) -> np.ndarray:
    """For each frame the median over `reach` frames on both sides, without those up to `gap` away
    and itself. NaN with fewer than three.
    """
    padded = np.pad(values, reach, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1).copy()
    windows[:, reach - gap : reach + gap + 1] = np.nan
    few = np.isfinite(windows).sum(1) < 3
    windows[few] = 0
    medians = np.nanmedian(windows, axis=1)
    medians[few] = np.nan
    return medians


def in_step(values: np.ndarray, chunk: int | None) -> np.ndarray:
    """For each frame what is usual at its place in a latent frame and, if its length is known, in a
    chunk: the larger of the medians over four of these to both sides. Decoders that move by jerks,
    and models whose chunks begin with one, make each of these alike. NaN with fewer than three.
    """
    usual = np.full(len(values), np.nan)
    for period in {GROUP, GROUP * (chunk or 1)}:
        places = np.full(-(-len(values) // period) * period, np.nan)
        places[: len(values)] = values
        columns = [around(column, 4) for column in places.reshape(-1, period).T]
        usual = np.fmax(usual, np.stack(columns, 1).reshape(-1)[: len(values)])
    return usual


def find_cuts(jump: np.ndarray, chunk: int | None = None) -> list[int]:
    """The frames that show another scene than the one before: hard cuts.

    Where `jump` is CUT or more, and OUTSTANDING times the median of three frames to both sides, as
    PySceneDetect's AdaptiveDetector goes by what is around. A dissolve is none, nor is a change of
    brightness alone; one odd frame makes two cuts, to it and from it. Nor is a jerk with which
    latent frames or chunks begin: a cut is half OUTSTANDING times what is usual there (`in_step`).
    """
    limit = np.maximum(OUTSTANDING * around(jump, 3), CUT)
    limit = np.fmax(limit, OUTSTANDING / 2 * in_step(jump, chunk))
    return np.flatnonzero(jump >= limit).tolist()  # NaN compares false


def find_returns(series: Series, opening: int, chunk: int | None = None) -> list[dict]:
    """Where the picture suddenly goes back to the first frames: "sink-collapse" of models whose
    cache keeps the first frames; in published ones around latent frames 132 and 201 (LoL, Cui et
    al. 2026, arXiv 2601.16914).

    - frame: the first one that is back; latent: the latent frame that it comes from.
    - before, after: similarity over eight frames ahead of it, and behind it.

    A rise counts if it is RISE at least, RETURN of the way to 1, and if the picture itself jumps
    there, within a latent's frames: motion that comes round again does not.
    """
    similarity = series.similarity
    usual = np.fmax(around(series.jump, 12, gap=GROUP), in_step(series.jump, chunk))
    jumps = series.jump >= OUTSTANDING / 2 * usual
    leaps = series.leap >= OUTSTANDING / 2 * around(series.leap, 12, gap=2 * GROUP)
    for i in range(1, GROUP):
        leaps[:-i] |= leaps[i:]  # a leap ends up to three frames after the rise
    rises = []
    for frame in range(opening + 8, len(similarity) - 1):
        rise = similarity[frame] - similarity[frame - 1]
        if rise < RISE / GROUP or not (jumps[frame] or leaps[frame]):
            continue
        # A latent's frames may share the jump.
        before = float(np.median(similarity[max(frame - 8, 0) : frame]))
        behind = similarity[frame + GROUP - 1 : frame + GROUP + 7]
        after = float(np.median(behind if len(behind) else similarity[-1:]))
        if after - before >= max(RISE, RETURN * (1 - before)):
            rises.append((float(rise), frame, before, after))

    found = []
    for _, frame, before, after in sorted(rises, reverse=True):
        if all(abs(frame - other["frame"]) > 12 for other in found):
            found.append({"frame": frame, "latent": (frame + GROUP - 1) // GROUP})
            found[-1] |= {"before": number(before), "after": number(after)}
    return sorted(found, key=lambda item: item["frame"])


# ------------------------------------------------------------------------------------------- pulse


def find_pulse(series: Series, chunk: int | None, breaks: list[int]) -> dict:
    """What repeats with every chunk, which is 4 pixel frames for each of its latent frames; or, if
    the chunk is not known, with the period that is strongest. See `pulse.pulse`.

    - period: in frames; None if nothing was found. known: whether it is the chunk's.
    - tested: false if the clip is too short: fewer than 6 times the period, or, where that is not
      known, than 6 times the shortest one that is looked for.
    - of: for each series its strength, amplitude, unit and mean cycle. `visible` says whether it
      passes the limits.

    Key frames of an encoder that come with the same period look alike, and so do steps.
    """
    rows = {}
    for name in LEAST:
        values = getattr(series, name)
        if name == "saturation":
            values = 100 * values
        elif name == "sharpness":
            values = 100 * values / np.nanmean(values) if np.isfinite(values).any() else values
        rows[name] = steps(values, breaks)

    period = GROUP * chunk if chunk else None
    if period is None:
        longest = min(len(series.luma) // CYCLES, SEARCHED)
        best = [strongest(row, longest, STRONG) for row in rows.values()]
        best = [item for item in best if item]
        if best:
            period = max(best, key=lambda item: item.strength).period

    found = {name: pulse(row, period) for name, row in rows.items()} if period else {}
    found = {name: item for name, item in found.items() if item}
    of = {name: _as_json(name, item) for name, item in found.items()}
    tested = len(series.luma) > CYCLES * (period or GROUP + 1)
    return {"period": period, "known": bool(chunk), "tested": tested, "of": of}


def _as_json(name: str, item: Pulse) -> dict:
    visible = item.strength >= STRONG and item.own >= LEAST[name]
    values = {"visible": visible, "amplitude": number(item.amplitude), "unit": UNITS[name]}
    values["strength"] = number(item.strength)
    return values | {"cycle": [number(value) for value in item.cycle]}


# ------------------------------------------------------------------------------------------- words


def number(value: float | None) -> float | None:
    """Four digits of it; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def printable(name: str) -> str:
    """A file's name, in which a terminal or a plot may find no commands and no broken bytes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


def findings(found: dict) -> list[str]:
    """In words, what passes a limit."""
    words = []
    if found["motion"] is not None and found["motion"] < STILL:
        words.append("STATIC: hardly anything moves, so its drift says nothing")
    elif found["still"]:
        words.append(f"still for {found['still']:.0%} of the time")

    beat = found["pulse"]
    visible = {name: item for name, item in beat["of"].items() if item["visible"]}
    if visible:
        sizes = [
            f"{name} by {item['amplitude']:.2g} {item['unit']}" for name, item in visible.items()
        ]
        what = "PULSE with the chunks" if beat["known"] else "repeats"
        words.append(f"{what} every {beat['period']} frames: {', '.join(sizes)}")
    elif not beat["tested"]:
        words.append("too short to tell a pulse")

    if found["cuts"]:
        words.append(f"{plural(len(found['cuts']), 'cut')} at {listed(found['cuts'])}")
    if found["returns"]:
        frames = [f"{item['frame']} (latent {item['latent']})" for item in found["returns"]]
        words.append(f"BACK TO THE START at {listed(frames)}")
    return words


def line(found: dict) -> str:
    """A report in one line."""
    words = []
    for name, show in SHOWN.items():
        drifted = found["drift"][name]
        if drifted["change"] is not None:
            words.append(f"{name} {show(drifted['start'])} -> {show(drifted['end'])}")
    numbers = ", ".join(words) or "a single frame, which cannot drift"
    return "; ".join([f"{found['video']}: {numbers}", *found["findings"]])


def table(reports: list[dict]) -> str:
    """Reports side by side, a row each: how its numbers changed from start to end, and the rest."""
    head = ["", "frames", *SHOWN, "moves", "pulse", "cuts", "returns"]
    rows = []
    for found in reports:
        cells = [found["video"], str(found["frames"])]
        for name in SHOWN:
            cells.append(_changed(name, found["drift"][name]))
        moves = found["motion"]
        if moves is None:
            cells.append("-")
        else:
            cells.append(f"{moves:.1f}%/s" if moves >= STILL else "STATIC")
        cells.append(_pulse_cell(found["pulse"]))
        cells += [str(len(found["cuts"])), str(len(found["returns"]))]
        rows.append(cells)

    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for cells in [head, *rows]:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        aligned[0] = cells[0].ljust(widths[0])
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _pulse_cell(beat: dict) -> str:
    if any(item["visible"] for item in beat["of"].values()):
        return f"{beat['period']} frames"
    return "none" if beat["tested"] else "-"


def _changed(name: str, drifted: dict) -> str:
    """Levels as a difference, all else in percent of the start."""
    start = drifted["start"]
    change = drifted["change"]
    if change is None or (name == "motion" and start < STILL):
        return "-"
    if name in ("luma", "spread"):
        return f"{change:+.1f}"
    return f"{100 * change / start:+.0f}%" if start else "-"


def plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def listed(items: list) -> str:
    """The first ones, and that there are more."""
    shown = ", ".join(str(item) for item in items[:5])
    return f"{shown} and {len(items) - 5} more" if len(items) > 5 else shown


def thinned(series: Series) -> dict:
    """The series for a plot: where there are more than POINTS frames, means over `every` frames."""
    frames = len(series.luma)
    every = -(-frames // POINTS)
    rows = {"every": every}
    for name in ("luma", "spread", "saturation", "sharpness", "change", "motion", "similarity"):
        values = getattr(series, name)
        points = []
        for i in range(0, frames, every):
            there = values[i : i + every]
            there = there[np.isfinite(there)]
            points.append(number(there.mean()) if len(there) else None)
        rows[name] = points
    return rows


def beside(video: Path) -> Path:
    """Where a video's report goes by default: clip.mp4 has clip.report.json. ValueError if that is
    no name of a file.
    """
    if not video.name:
        raise ValueError(f"{str(video)!r} is no video: name a file")
    return video.with_suffix(".report.json")


def write(path: str | Path, found: dict, overwrite: bool = False) -> None:
    """A report as JSON. ValueError if the file exists, unless `overwrite`."""
    check_free(Path(path), overwrite)
    write_json(path, found)


def check_free(path: Path, overwrite: bool) -> None:
    """ValueError if the file exists, unless `overwrite`."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another --out, or --overwrite")
