"""The picture of a report: what was measured over time, and the mean cycle of a chunk.

Needs matplotlib, which is imported only here.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

from wan5b.extras.report import STILL, UNITS, beside, check_free, line, report
from wan5b.util import replacing, write_json

INK = "#333333"
BLUE = "#2a6f97"
RED = "#c1121f"
GREY = "#8d99ae"
MARKED = 40  # cuts and returns that have a line of their own
LEGEND = (
    "black: means of the first and last 15%    shade: luma's spread over the picture    "
    "dotted: below it a picture is still    dashed: a cut    "
    "red: back to the start, or a visible pulse"
)
PANELS = {
    "luma": "luma, levels",
    "saturation": "saturation",
    "sharpness": "sharpness",
    "motion": "motion, %/s",
    "similarity": "like the start",
}


def available() -> bool:
    """Whether matplotlib is there; says so if not."""
    found = find_spec("matplotlib") is not None
    if not found:
        print("no plot: matplotlib is not installed (pip install -e '.[plot]')")
    return found


def write(path: str | Path, found: dict, overwrite: bool = False) -> None:
    """A report as a PNG. ValueError if the file exists, unless `overwrite`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    check_free(Path(path), overwrite)
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK}
    style |= {"ytick.color": INK, "text.color": INK, "axes.titlesize": 8}
    with pyplot.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names in scripts that the font does not have
        figure = draw(found)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=120, format="png")
        pyplot.close(figure)


def draw(found: dict):
    """The figure: a row for each of PANELS over all frames, and a column of mean cycles."""
    from matplotlib import pyplot

    cycles = found["pulse"]["of"]
    figure = pyplot.figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.4, 1))
    panels = left.subplots(len(PANELS), 1, sharex=True)
    for panel, name in zip(panels, PANELS, strict=True):
        _row(panel, found, name)
    panels[-1].set_xlabel("frame")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_xlim(0, max(found["frames"] - 1, 1))
    _marks(panels, found)

    beat = found["pulse"]
    columns = right.subplots(len(PANELS), 1, sharex=True)
    for panel, name in zip(columns, [*UNITS, None], strict=True):
        if name in cycles:
            _cycle(panel, cycles[name], name, beat["period"])
        else:
            panel.axis("off")
    if cycles:
        lowest = columns[len(UNITS) - 1]
        lowest.set_xlabel(f"frame of the {beat['period']}")
        lowest.xaxis.get_major_locator().set_params(integer=True)
        lowest.tick_params(labelbottom=True)
        title = "mean cycle of a chunk" if beat["known"] else "mean cycle of the strongest period"
        right.suptitle(title, fontsize=8)
    else:
        why = "no period stands out" if beat["tested"] else "too short for a pulse"
        columns[0].text(0, 0.9, why, va="top", transform=columns[0].transAxes)

    figure.suptitle(_title(found), x=0.01, ha="left", fontsize=10)
    figure.supxlabel(LEGEND, x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def _title(found: dict) -> str:
    height, width = found["size"]
    facts = f"{found['video']}   {found['frames']} frames of {height}x{width}"
    if found["fps"]:
        facts += f" at {found['fps']:g} a second"
    words = "\n".join(found["findings"]) or "nothing found"
    return f"{facts}\n{words}".replace("$", r"\$")  # which would begin a formula


def _row(panel, found: dict, name: str) -> None:
    """A series over the frames; where drift compares its ends, their means."""
    series = found["series"]
    values = [float("nan") if value is None else value for value in series[name]]
    middle = (series["every"] - 1) / 2
    frames = [i * series["every"] + middle for i in range(len(values))]
    marker = "." if len(values) < 40 else None
    panel.plot(frames, values, color=BLUE, linewidth=1, marker=marker)
    panel.set_ylabel(PANELS[name])
    panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)

    if name == "luma":
        spread = [float("nan") if value is None else value for value in series["spread"]]
        low = [value - width for value, width in zip(values, spread, strict=True)]
        high = [value + width for value, width in zip(values, spread, strict=True)]
        panel.fill_between(frames, low, high, color=BLUE, alpha=0.12, linewidth=0)
    if name == "similarity":
        panel.set_ylim(min(-0.05, *panel.get_ylim()), 1.05)
        return
    if name == "motion":
        panel.axhline(STILL, color=GREY, linewidth=0.7, linestyle=":")
    if name != "luma":
        panel.set_ylim(0, 1.15 * panel.get_ylim()[1])

    drifted = found["drift"][name]
    if drifted["change"] is None:
        return
    last = found["frames"] - 1
    count = found["drift_frames"]
    panel.hlines(drifted["start"], 0, count - 1, color=INK, linewidth=2)
    panel.hlines(drifted["end"], last - count + 1, last, color=INK, linewidth=2)
    panel.set_title(f"{drifted['start']:.3g} → {drifted['end']:.3g}", loc="right", pad=2)


def _marks(panels, found: dict) -> None:
    """Cuts and returns, through all rows; of very many, ticks at the top alone."""
    returns = [item["frame"] for item in found["returns"]]
    height = 0.0 if len(returns) + len(found["cuts"]) <= MARKED else 0.9
    for panel in panels:
        for frame in found["cuts"]:
            panel.axvline(frame, height, color=GREY, linewidth=0.8, linestyle="--")
        for frame in returns:
            panel.axvline(frame, height, color=RED, linewidth=1)
    for item in found["returns"] if height == 0 else []:
        panels[-1].annotate(
            f"latent {item['latent']}",
            (item["frame"], 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color=RED,
        )


def _cycle(panel, item: dict, name: str, period: int) -> None:
    """One mean cycle, red where it is a visible pulse."""
    color = RED if item["visible"] else GREY
    panel.step(range(period), item["cycle"], where="mid", color=color, linewidth=1.2)
    reach = max(*map(abs, item["cycle"]), 0.5) * 1.2
    panel.set_ylim(-reach, reach)
    panel.set_ylabel(f"{name}, {item['unit']}")
    panel.axhline(0, color=GREY, linewidth=0.5)


def leave_beside(video: Path) -> None:
    """A clip's report and, with matplotlib, its plot, in place of older ones; a line for people."""
    found = report(video)
    write_json(beside(video), found)
    if available():
        write(beside(video).with_suffix(".png"), found, overwrite=True)
    print(line(found))
