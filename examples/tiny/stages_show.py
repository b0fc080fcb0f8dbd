"""Pictures and tables of docs/stages.md, from what stages.py has left in the demos' folders."""

import io
import math
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from sick import CASES, HEALTHY, SICK, Case, has_curves

from wan5b.data import Store
from wan5b.extras.report_plot import BLUE, GREY, INK, RED, available
from wan5b.util import replacing

# Of metrics.jsonl, by stage; those of dmd are told of its generator's steps or its critic's.
CURVES = {
    "teacher": ("loss", "norm"),
    "ar": ("loss", "norm"),
    "ode": ("loss", "norm"),
    "dmd": (
        *("critic_loss", "critic_norm", "gradient", "norm"),
        *("x0_motion", "x0_std_0", "x0_std_8"),
    ),
}
DRAWN = {"dmd": ("critic_loss", "gradient", "x0_motion", "x0_std_8")}  # others: all of CURVES
BIN = {"teacher": 200, "ar": 40, "ode": 15, "dmd": 24}  # steps whose mean is a point
SCORES = ("colour", "shape", "direction", "drift", "motion", "spread")
SURE = 1.0  # widths of the seeds' range that a figure goes beyond it before it counts as sick
WIDTH = 880  # pixels of a picture
TILE = 118
MARGIN = 170
HEADS = ("frame 1", "frame 9", "frame 33", "frame 105", "frame 213", "frame 357")  # of stages.ENDS
LIMIT = 150_000  # bytes of a picture


def binned(rows: list[dict], stage: str) -> dict[str, list[float | None]]:
    """Figure -> its mean over each BIN steps; None where it was not logged."""
    width = BIN[stage]
    count = math.ceil((rows[-1]["step"] + 1) / width) if rows else 0
    found = {}
    for name in CURVES[stage]:
        bins = [[] for _ in range(count)]
        for row in rows:
            if name in row:
                bins[row["step"] // width].append(row[name])
        if any(bins):
            found[name] = [mean(each) if each else None for each in bins]
    return found


# ------------------------------------------------------------------------------------ what is there


def seeds(reports: list[dict], figure: str) -> tuple[list[float], list[float], list[float]]:
    """Mean, lowest and highest of the seeds, a number a bin; NaN where one has none.

    They go as far as the shortest run.
    """
    lines = [report["curves"][figure] for report in reports if figure in report["curves"]]
    columns = list(zip(*lines, strict=False))
    nan = (math.nan,) * 3
    bins = [
        nan if None in column else (mean(column), min(column), max(column)) for column in columns
    ]
    return tuple(list(part) for part in zip(*bins, strict=True)) if bins else ([], [], [])


def first_sign(healthy: list[dict], sick: list[dict], stage: str) -> str:
    """The figure that leaves the healthy seeds' range first, and stays out to the end; and when.

    Out is SURE widths of the range beyond it; so one seed has no range, and all counts. A range is
    the widest of three neighbouring bins.
    """
    found = []
    for figure in CURVES[stage]:
        _, low, high = seeds(healthy, figure)
        now, _, _ = seeds(sick, figure)
        outside = None
        for i, value in enumerate(now[: len(low)]):
            if math.isnan(value):
                continue
            near = slice(max(i - 1, 0), i + 2)
            least, most = min(low[near]), max(high[near])
            reach = SURE * (most - least)
            if not least - reach <= value <= most + reach:
                outside = i if outside is None else outside
            else:
                outside = None
        if outside is not None:
            found.append((outside, figure))
    if not found:
        return "none"
    at, _ = min(found)
    first = [figure for step, figure in found if step == at]
    return f"{', '.join(f'`{figure}`' for figure in first)} by step {(at + 1) * BIN[stage]}"


# ------------------------------------------------------------------------------------------ tables


def usual_table(found: dict[str, list[dict]]) -> str:
    """Every figure of the healthy stages: at the start, half-way, at the end; mean and range."""
    lines = ["| stage | figure | first steps | half-way | last steps |", "|---|---|---|---|---|"]
    for stage in HEALTHY:
        for figure in CURVES[stage] if stage in found else ():
            parts = seeds(found[stage], figure)
            if not parts[0]:
                continue
            places = (0, len(parts[0]) // 2, len(parts[0]) - 1)
            cells = []
            for place in places:
                middle, low, high = (part[place] for part in parts)
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
            lines.append(f"| {stage} | `{figure}` | {' | '.join(cells)} |")
    steps = ", ".join(f"{stage} {width}" for stage, width in BIN.items())
    count = len(next(iter(found.values()), []))
    return "\n".join([*lines, "", f"Training seeds: {count}. Means over so many steps: {steps}."])


def real_clips(run: Path) -> str:
    """The figures of rollouts, of the demo's training clips."""
    store = Store(run / "latents")
    clips = torch.stack([store[i]["latent"] for i in range(len(store))])  # [clips, C, T, H, W]
    figures = {"x0_motion": clips.var(2, correction=0).mean()}
    figures |= {f"x0_std_{i}": clips[:, :, i].std() for i in (0, 8)}
    said = ", ".join(f"`{name}` {float(value):.3f}" for name, value in figures.items())
    return f"Of real clips: {said}."


def sick_table(found: dict[str, list[dict]]) -> str:
    """What each case samples, and which figure told it first."""
    heads = " | ".join(("", "what was done", "first sign", "seeds", "length", *SCORES))
    lines = [f"|{heads} |", "|---" * (5 + len(SCORES)) + "|"]
    for name, reports in found.items():
        case = CASES[name]
        sign = "(healthy)" if name in HEALTHY else "(only sampled)"
        if name in SICK and has_curves(case):
            sign = first_sign(found.get(case.beside, []), reports, case.beside)
        lines.append(
            f"| {name} | {case.about} | {sign} | {len(reports)} | {score_cells(reports)} |"
        )
    return "\n".join(lines)


def score_cells(reports: list[dict]) -> str:
    """Means at the longest length that all seeds have; why there are none, if so."""
    scores = [report["scores"] for report in reports if report["scores"]]
    ended = [report["ended"] for report in reports if report["ended"]]
    if not scores:
        return " | ".join(["-", f"not finite in {', '.join(ended)}", *["-"] * (len(SCORES) - 1)])
    length = max(set.intersection(*(set(each) for each in scores)), key=int)
    cells = [f"{mean(each[length][key] for each in scores):.2f}" for key in SCORES]
    return " | ".join([f"x{length}", *cells])


def filled(text: str, blocks: dict[str, str]) -> str:
    """A page with these blocks between their marks. ValueError if a mark is missing."""
    for name, block in blocks.items():
        begin, end = f"<!-- figures: {name} -->\n", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"stages.md lacks the marks {begin.strip()} and {end}: put them back")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{block}\n{end}{after}"
    return text


# ---------------------------------------------------------------------------------------- pictures


def write(docs: Path, runs: list[Path], found: dict[str, list[dict]]) -> None:
    """DOCS/stages/NAME.png of all that is there; the tables in DOCS/stages.md.

    found: case -> what each of the demos has of it. ValueError without matplotlib, without the
    healthy stages, or without the page's marks.
    """
    if not available():
        raise ValueError("the pictures need matplotlib: pip install -e '.[plot]'")
    missing = [stage for stage in HEALTHY if stage not in found]
    if missing:
        raise ValueError(f"no demo has stages/{missing[0]}.json: run it with --only {missing[0]}")
    page = docs / "stages.md"
    usual = f"{usual_table(found)} {real_clips(runs[0])}"
    blocks = {"usual": usual, "sick": sick_table(found)}
    text = filled(page.read_text(), blocks)
    for name in found:
        picture(docs / "stages" / f"{name}.png", name, found, runs)
    with replacing(page) as partial:
        partial.write_text(text)


def picture(path: Path, name: str, found: dict[str, list[dict]], runs: list[Path]) -> None:
    """The curves of a case over those of the healthy stage; below them frames of both."""
    case = CASES[name]
    parts = []
    if has_curves(case):
        parts.append(curves(name, case, found))
    parts.append(frames(name, case, found[case.beside][0]["captions"], runs))
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height

    # As many colours as there is room for: frames of noise take most.
    for colours in (256, 128, 64, 32, 16):
        content = io.BytesIO()
        small = sheet.quantize(colours, dither=Image.Dither.NONE)
        small.save(content, "PNG", optimize=True)
        if content.tell() <= LIMIT:
            break
    with replacing(path) as partial:
        partial.write_bytes(content.getvalue())


def curves(name: str, case: Case, found: dict[str, list[dict]]) -> Image.Image:
    """A panel a figure: blue the healthy seeds, mean and range; red the sick ones."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = DRAWN.get(case.beside, CURVES[case.beside])
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK, "text.color": INK}
    with pyplot.rc_context(style):
        size = (WIDTH / 100, 1.75)
        figure, panels = pyplot.subplots(1, len(names), figsize=size, layout="constrained")
        for panel, each in zip(panels, names, strict=True):
            line(panel, found[case.beside], each, case.beside, BLUE)
            if name in SICK:
                line(panel, found[name], each, case.beside, RED)
            panel.set_title(each, fontsize=8, loc="left")
            scaled(panel, found[case.beside], each)
        content = io.BytesIO()
        figure.savefig(content, dpi=100, format="png")
        pyplot.close(figure)
    return Image.open(content).convert("RGB")


def line(panel, reports: list[dict], figure: str, stage: str, color: str) -> None:
    middle, low, high = seeds(reports, figure)
    steps = [(i + 0.5) * BIN[stage] for i in range(len(middle))]
    panel.plot(steps, middle, color=color, linewidth=1.4)
    panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def scaled(panel, healthy: list[dict], figure: str) -> None:
    """From 0; in decades where the sick one is ten times the healthy one's highest."""
    most = max((value for value in seeds(healthy, figure)[2] if value == value), default=1.0)
    if panel.get_ylim()[1] > 10 * most:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)


def frames(name: str, case: Case, captions: list[str], runs: list[Path]) -> Image.Image:
    """Rows of frames, the healthy one above the sick one for each caption, of the first demo that
    has both.
    """
    shown = [case.beside] if name in HEALTHY else [case.beside, name]
    files = [[run / "stages" / f"{each}.png" for each in shown] for run in runs]
    there = [each for each in files if all(file.exists() for file in each)]
    if not there:  # its training has diverged
        shown = shown[:1]
        there = [each[:1] for each in files if each[0].exists()]
    sheets = [Image.open(file).convert("RGB") for file in there[0]]

    font = ImageFont.load_default(12)
    out = Image.new("RGB", (WIDTH, 22 + TILE * len(captions) * len(shown)), "white")
    pen = ImageDraw.Draw(out)
    columns = max(sheet.width for sheet in sheets) // 64
    for column, head in enumerate(HEADS[:columns]):
        pen.text((MARGIN + TILE * column + 2, 4), head, INK, font)
    for caption, label in enumerate(captions):
        for i, (each, sheet) in enumerate(zip(shown, sheets, strict=True)):
            top = 22 + TILE * (caption * len(shown) + i)
            color = BLUE if each in HEALTHY else RED
            word = "healthy" if each in HEALTHY else "sick"
            pen.text((6, top + 40), f"{word}: {each}\n{label}", color, font)
            strip = sheet.crop((0, 64 * caption, sheet.width, 64 * caption + 64))
            for column in range(strip.width // 64):
                tile = strip.crop((64 * column, 0, 64 * column + 64, 64))
                tile = tile.resize((TILE - 2, TILE - 2), Image.Resampling.NEAREST)
                out.paste(tile, (MARGIN + TILE * column, top))
    return out
