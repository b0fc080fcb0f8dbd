"""What a run of the demo found, for people: a table, a sheet of frames, a plot of drift."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wan5b.extras.media import to_frames
from wan5b.extras.report_plot import BLUE, GREY, INK, RED, available
from wan5b.util import replacing

COLUMNS = (
    "colour",
    "shape",
    "direction",
    "overlap",
    "ghosts",
    "shade",
    "drift",
)
NAMES = {
    "teacher": "teacher, all at once",
    "ar": "teacher forcing (ar)",
    "ode": "ODE init",
    "dmd-data": "DMD behind real frames",
    "dmd": "DMD on own rollouts",
}
COLOURS = {"ar": "#e09f3e", "ode": GREY, "dmd-data": RED, "dmd": BLUE}
TILE = 96  # pixels of a frame on the sheet
MARGIN = 190  # ... and of what names its row


def check_demos(demos: list[Path]) -> None:
    """ValueError for a folder that is none, and for one that would count as two training seeds."""
    for run in demos:
        if not (run / "report.json").exists():
            raise ValueError(f"{run} is no finished demo: make demo first")
    if len({run.resolve() for run in demos}) < len(demos):
        raise ValueError(f"a demo counts once, got {' '.join(map(str, demos))}: name it once")


def read_reports(runs: list[Path]) -> list[dict]:
    """What `demo` left in these folders. Errors as `check_demos`'; those of several must have been
    judged alike.
    """
    check_demos(runs)
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    for run, report in zip(runs, reports, strict=True):
        if report["rows"].keys() != reports[0]["rows"].keys():
            raise ValueError(f"{run} was judged at other lengths than {runs[0]} (--longest)")
    return reports


def table(runs: list[Path]) -> None:
    """Print the report of one run, or means over several of other training seeds."""
    reports = read_reports(runs)
    heads = " ".join(f"{column:>14}" for column in COLUMNS)
    spread = f"   mean +- sd, {len(runs)} training seeds" if len(runs) > 1 else ""
    print(f"\n{'stage, length':14}{'steps':>6}{'ms/frame':>9} {heads}{spread}")

    for name, first in reports[0]["rows"].items():
        cells = []
        for column in COLUMNS:
            values = torch.tensor([report["rows"][name][column] for report in reports])
            cell = f"{values.mean():.3f}"
            if len(runs) > 1:
                cell += f" +- {values.std():.3f}"
            cells.append(f"{cell:>14}")
        print(f"{name:14}{first['steps']:6}{first['ms_per_frame']:9.2f} {' '.join(cells)}")

    for run, report in zip(runs, reports, strict=True):
        minutes = ", ".join(f"{key} {value / 60:.1f}" for key, value in report["seconds"].items())
        print(f"{run}, minutes: {minutes}; in all {report['total'] / 60:.1f}")


def draw_sheet(path: Path, rows: list[tuple[str, str, Tensor]], frames: list[str]) -> None:
    """A PNG with a row for each (stage, caption, pictures [3, n, H, W]), n at most len(frames).

    frames: what stands over the columns.
    """
    font = ImageFont.load_default(12)
    size = (MARGIN + TILE * len(frames), 24 + TILE * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(frames):
        pen.text((MARGIN + TILE * column + 4, 5), text, "black", font)
    for row, (stage, caption, pictures) in enumerate(rows):
        top = 24 + TILE * row
        pen.text((6, top + 30), f"{NAMES[stage]}\n{caption}", "black", font)
        for column, picture in enumerate(to_frames(pictures).numpy()):
            tile = Image.fromarray(picture).resize((TILE - 2, TILE - 2), Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + TILE * column, top))
    with replacing(path) as partial:
        sheet.save(partial, "PNG")


def draw_drift(path: Path, runs: list[Path]) -> None:
    """A PNG of drift and shape over the length of a video; of several runs their means and ranges.

    Without matplotlib there is none.
    """
    if not available():
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    reports = read_reports(runs)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        curve(panels[0], reports, "drift")
        curve(panels[1], reports, "shape")
        another = sum(report["another"] for report in reports) / len(reports)
        panels[0].axhline(another, color=GREY, linewidth=0.8, linestyle=":")
        panels[0].text(30, another, "another clip", va="bottom", ha="right", fontsize=8, color=GREY)
        panels[0].set_title("How far the background goes from the first chunk's", loc="left")
        panels[0].set_ylabel("root mean square, of [-1, 1]")
        panels[0].set_ylim(bottom=0)
        panels[1].set_title("Shapes that are whole, with nothing beside them", loc="left")
        panels[1].set_ylabel("share of chunks")
        panels[1].set_ylim(0, 1.03)
        panels[0].legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=8.5)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=120, format="png")
        pyplot.close(figure)


def curve(panel, reports: list[dict], key: str) -> None:
    """A line for each causal stage over the length, in lengths of a training clip."""
    for stage, color in COLOURS.items():
        values = torch.tensor([report["curves"][stage][key] for report in reports])
        lengths = reports[0]["curves"][stage]["lengths"]
        width = 2.2 if stage == "dmd" else 1.4
        panel.plot(lengths, values.mean(0), color=color, linewidth=width, label=NAMES[stage])
        if len(reports) > 1:
            low = values.amin(0)
            high = values.amax(0)
            panel.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
    ticks = (1, 3, 10, 30)
    panel.set_xscale("log")
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.axvline(1, color=GREY, linewidth=0.5)
    panel.set_xlabel("length of the video, in lengths of a training clip")
