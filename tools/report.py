"""What can be said of videos' health from their pixels alone: drift, pulse, cuts, stillness.

    python tools/report.py clip.mp4
    python tools/report.py out/a.mp4 out/b.mp4 --chunk 3 --out reports/

For each video a line, a JSON with every number (clip.report.json, beside it or in --out) and, with
matplotlib, a plot (clip.report.png); for several a table, too. No network is asked and nothing is
downloaded. Frames are read one by one: memory does not grow with the length.

    luma, spread, saturation, sharpness, motion    first 15% of the frames -> last 15%
    PULSE                     repeats with the chunks; without their length: the strongest period
    cut                       another scene from this frame on
    BACK TO THE START         the picture suddenly is the first frames' again
    STATIC                    hardly anything moves: no drift, and no merit

The chunk is read from the JSON that sample.py left beside a clip, if --chunk does not say it. The
numbers compare clips of one size, and of one subject: they are no scores. What each of them is
stands in wan5b/extras/measures.py, pulse.py and report.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b.extras import report, report_plot
from wan5b.extras.cli import script


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("videos", metavar="VIDEO", type=Path, nargs="+")
    add("--chunk", type=int, metavar="LATENTS", help="latent frames of a chunk: 3, say")
    text = "a .json for the report of one video, or a folder"
    add("--out", type=Path, metavar="PATH", help=text)
    add("--overwrite", action="store_true", help="replace reports and plots that are there")
    add("--no-plot", action="store_true")
    args = parser.parse_args(argv)
    if args.chunk is not None and args.chunk < 1:
        raise ValueError(f"--chunk {args.chunk}: must be 1 or more")
    args.videos = list(dict.fromkeys(args.videos))  # one given twice is one
    return args


def targets(videos: list[Path], out: Path | None, overwrite: bool) -> list[Path]:
    """The JSON for each video. ValueError if one is in the way, or two would be the same."""
    names = []
    for video in videos:
        names.append(report.beside(video) if out is None else out / report.beside(video).name)
    if out is not None and out.suffix == ".json":
        if len(videos) > 1:
            raise ValueError(f"--out {out} is one file, for {len(videos)} videos; name a folder")
        names = [out]

    for name, video in zip(names, videos, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"two videos would have the report {name}; run them one by one")
        if name == video.with_suffix(".json"):
            raise ValueError(f"--out {name} is the name of the clip's settings; choose another")
        for file in (name, name.with_suffix(".png")):
            report.check_free(file, overwrite)
    return names


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    names = targets(args.videos, args.out, args.overwrite)
    plots = not args.no_plot and report_plot.available()

    reports = []
    for video, name in zip(args.videos, names, strict=True):
        found = report.report(video, args.chunk)
        report.write(name, found, args.overwrite)
        if plots:
            report_plot.write(name.with_suffix(".png"), found, args.overwrite)
        print(report.line(found), flush=True)
        for text in found["notes"]:
            print(f"note: {text}", file=sys.stderr)
        reports.append(found)
    if len(reports) > 1:
        print(f"\n{report.table(reports)}")


if __name__ == "__main__":
    script(main)
