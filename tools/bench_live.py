"""Ways to bring frames into a browser as they are made, side by side: what is seen, and when.

    python tools/bench_live.py --browser chromium --size 704x1280 --seconds 15

multipart  JPEGs of one multipart answer in an <img>
socket     JPEGs over a WebSocket, onto a canvas
fetch      JPEGs over one endless answer that fetch() reads, onto a canvas
timed      the same with the live page's own player, which shows each at its time, 0.2 s later
mp4        fragments of H.264, one a frame, over the same kind of answer into a <video> (MSE)

One frame is made every 1/24 s. A bar code in its corner says its number, which the page reads from
the pixels on the screen at every refresh. Chromium or Firefox must be installed; both run headless.
Clocks are those of this one machine. Delay is from a frame's being made (not encoded) to its being
seen.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import shutil
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b.extras.cli import script
from wan5b.extras.files import parse_size

FPS = 24
BITS = 16  # of the bar code
CELL = 16  # pixels
WAYS = ["multipart", "socket", "fetch", "timed", "mp4"]
PAGE = Path(__file__).parents[1] / "wan5b" / "extras" / "page"

SCRIPT = r"""
const [way, seconds, fps] = CONFIG;
const canvas = document.querySelector("canvas"), img = document.querySelector("img");
const video = document.querySelector("video"), context = canvas.getContext("2d", {alpha: false});
const code = new OffscreenCanvas(16, 1).getContext("2d", {willReadFrequently: true});
const now = () => (performance.timeOrigin + performance.now()) / 1000;
const seen = [];
let source = canvas, bytes = 0, last = -1;

function look() {
  requestAnimationFrame(look);
  try { code.drawImage(source, 0, 0, 256, 16, 0, 0, 16, 1); } catch { return; }
  const data = code.getImageData(0, 0, 16, 1).data;
  let index = 0;
  for (let i = 0; i < 16; i++) index = 2 * index + (data[4 * i + 1] > 127);
  if (index !== last && index !== 0) { last = index; seen.push([index, now()]); }
}

let waiting = null;
async function show(jpeg) {
  const picture = await createImageBitmap(new Blob([jpeg], {type: "image/jpeg"}));
  waiting?.close();
  waiting = picture;
}
function paint() {
  requestAnimationFrame(paint);
  if (waiting) { context.drawImage(waiting, 0, 0); waiting.close(); waiting = null; }
}

const joined = async (parts) => new Uint8Array(await new Blob(parts).arrayBuffer());
async function records(reader, take) {
  let parts = [], size = 0;
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    bytes += value.length; parts.push(value); size += value.length;
    for (;;) {
      if (size < 4) break;
      if (parts.length > 1 && parts[0].length < 4) parts = [await joined(parts)];
      const length = new DataView(parts[0].buffer, parts[0].byteOffset).getUint32(0);
      if (size < 4 + length) break;
      if (parts.length > 1) parts = [await joined(parts)];
      take(parts[0].slice(4, 4 + length));
      parts = [parts[0].subarray(4 + length)]; size -= 4 + length;
    }
  }
}

const ways = {
  multipart() { source = img; img.src = "/multipart"; },
  socket() {
    const socket = new WebSocket(`ws://${location.host}/socket`);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({data}) => { bytes += data.byteLength; show(data); };
    paint();
  },
  async fetch() { paint(); records((await fetch("/fetch")).body.getReader(), show); },
  async timed() {
    const {Player} = await import("/player.js");
    const onFrame = () => { bytes = player.counts.bytes; };
    const player = new Player(canvas, {onState() {}, onFrame, onLost() {}});
    player.read((await fetch("/timed")).body.getReader());
  },
  async mp4() {
    source = video;
    const media = new MediaSource();
    video.src = URL.createObjectURL(media);
    await new Promise((done) => media.addEventListener("sourceopen", done));
    const buffer = media.addSourceBuffer('video/mp4; codecs="avc1.640028"');
    const queue = [];
    const next = () => {
      if (queue.length && !buffer.updating) buffer.appendBuffer(queue.shift());
    };
    buffer.addEventListener("updateend", () => {
      next();
      if (!video.buffered.length) return;
      const end = video.buffered.end(video.buffered.length - 1);
      if (video.paused && end - video.buffered.start(0) > 0.15) {
        video.currentTime = end - 0.1; video.play();
      }
    });
    records((await fetch("/mp4")).body.getReader(), (part) => { queue.push(part); next(); });
  },
};
look();
const tell = (what) => fetch("/report", {method: "POST", body: JSON.stringify(what)});
Promise.resolve(ways[way]()).catch((error) => tell({error: String(error)}));
setTimeout(() => tell({seen, bytes}), 1000 * seconds + 3000);
"""
HTML = """<!doctype html><meta charset=utf-8><style>body{margin:0;background:#000}*{display:block}
canvas,img,video{width:100%%;position:absolute;visibility:hidden}.on{visibility:visible}</style>
<canvas width=%d height=%d></canvas><img><video muted></video><script type=module>
const CONFIG=%s, shows={multipart:"img",mp4:"video"}[CONFIG[0]]??"canvas";
document.querySelector(shows).className="on";
%s</script>"""


def scene(height: int, width: int, count: int = 48) -> list[np.ndarray]:
    """Moving pictures with smooth and rough parts, and a little noise, as uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rng = np.random.default_rng(0)
    rough = rng.normal(128, 20, (height // 4, width // 4, 3)).clip(0, 255).astype(np.uint8)
    rough = np.asarray(Image.fromarray(rough).resize((width, height))).astype(np.float32) - 128
    frames = []
    for i in range(count):
        turn = 2 * np.pi * i / count
        layers = [np.sin(x / 90 + turn), np.sin(y / 70 - turn), np.cos((x + y) / 110 + turn)]
        smooth = 128 + 90 * np.stack(layers, -1)
        picture = smooth + np.roll(rough, 4 * i, 1) * (y > height / 2)[..., None]
        frames.append(picture.clip(0, 255).astype(np.uint8))
    return frames


def numbered(frame: np.ndarray, index: int) -> np.ndarray:
    """A copy [H, W, 3] that says its number in a bar code of BITS squares at the top left."""
    frame = frame.copy()
    for bit in range(BITS):
        on = index >> (BITS - 1 - bit) & 1
        frame[:CELL, bit * CELL : (bit + 1) * CELL] = 255 * on
    return frame


class Source:
    """Frames at their times, for one connection."""

    def __init__(self, frames: list[np.ndarray], seconds: float):
        self.frames = frames
        self.count = round(seconds * FPS)
        self.made: dict[int, float] = {}

    def __iter__(self):
        start = time.time() + 0.5
        for index in range(1, self.count + 1):
            frame = numbered(self.frames[index % len(self.frames)], index)
            time.sleep(max(start + index / FPS - time.time(), 0))
            self.made[index] = time.time()
            yield index, frame


def jpeg(frame: np.ndarray, quality: int = 85) -> bytes:
    with tempfile.TemporaryFile() as file:
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        file.seek(0)
        return file.read()


class Handler(BaseHTTPRequestHandler):
    """Serves the page, and frames in each of WAYS by the method of that name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, body: bytes, kind: str) -> None:
        self.begin(kind, Content_Length=str(len(body)))
        self.wfile.write(body)

    def begin(self, kind: str, **more: str) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", kind)
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        bench = self.server.bench
        if self.path == "/":
            self.send(bench.page.encode(), "text/html")
        elif self.path == "/player.js":
            self.send((PAGE / "player.js").read_bytes(), "text/javascript")
        elif self.path[1:] in WAYS:
            with suppress(OSError):
                getattr(self, self.path[1:])(bench.source)
        else:
            self.send_error(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send(b"", "text/plain")
        self.server.bench.report = json.loads(body)
        self.server.bench.done.set()

    def multipart(self, source: Source) -> None:
        self.begin("multipart/x-mixed-replace; boundary=frame")
        for _, frame in source:
            body = jpeg(frame)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body + b"\r\n")
            self.server.bench.sent += len(head) + len(body) + 2

    def socket(self, source: Source) -> None:
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade")):
            self.send_header(name, value)
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.close_connection = True
        for _, frame in source:
            body = jpeg(frame)
            short = len(body) < 1 << 16  # longer heads than needed are refused
            head = (126, len(body)) if short else (127, len(body))
            self.wfile.write(struct.pack(">BBH" if short else ">BBQ", 0x82, *head) + body)

    def fetch(self, source: Source) -> None:
        self.begin("application/octet-stream")
        for _, frame in source:
            body = jpeg(frame)
            self.wfile.write(struct.pack(">I", len(body)) + body)

    def timed(self, source: Source) -> None:
        self.begin("application/octet-stream")
        for index, frame in source:
            due = source.made[index] + 0.2
            body = jpeg(frame)
            head = struct.pack(">BIIIdd", 1, 1, index, 0, due, time.time())
            self.wfile.write(struct.pack(">I", len(head) + len(body)) + head + body)

    def mp4(self, source: Source) -> None:
        self.begin("application/octet-stream")
        target = io.BytesIO()
        flags = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        file = av.open(target, "w", format="mp4", options=flags)
        stream = file.add_stream("libx264", FPS)
        stream.options = {"preset": "veryfast", "tune": "zerolatency", "crf": "21"}
        height, width = source.frames[0].shape[:2]
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index, frame in source:
            picture = av.VideoFrame.from_ndarray(frame)
            picture.pts = index - 1
            for packet in stream.encode(picture):
                file.mux(packet)
            body = target.getvalue()
            target.seek(0)
            target.truncate()
            if body:
                self.wfile.write(struct.pack(">I", len(body)) + body)


class Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True


def browser_command(name: str, folder: str, address: str) -> list[str]:
    """How a browser is started that shows a page, with a profile of its own in the folder.

    ValueError if it is not installed.
    """
    program = shutil.which({"chromium": "chromium", "firefox": "firefox-esr"}[name])
    if program is None:
        raise ValueError(f"{name} is not installed: install it, or name another --browser")
    if name == "chromium":
        flags = ["--headless=new", "--no-sandbox", "--no-first-run", "--window-size=1280,800"]
        flags += ["--autoplay-policy=no-user-gesture-required", "--disable-dev-shm-usage"]
        return [program, *flags, f"--user-data-dir={folder}", address]
    prefs = {"privacy.reduceTimerPrecision": "false", "media.autoplay.default": "0"}
    prefs |= {"datareporting.policy.dataSubmissionEnabled": "false"}
    lines = [f'user_pref("{key}", {value});' for key, value in prefs.items()]
    Path(folder, "user.js").write_text("\n".join(lines))
    return [program, "--headless", "--profile", folder, "--no-remote", address]


def tree_seconds(root: int) -> float:
    """Processor seconds of a process and all below it."""
    parents, spent = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(entry.parent.name)
        parents[number] = int(fields[1])
        spent[number] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    total = 0.0
    for number in spent:
        above = number
        while above not in (0, 1, root):
            above = parents.get(above, 0)
        total += spent[number] if above == root else 0
    return total


class Bench:
    """One way in one browser: its page, what it has reported, and the figures of that."""

    def __init__(self, way: str, browser: str, frames: list[np.ndarray], seconds: float):
        self.source = Source(frames, seconds)
        self.report = None
        self.sent = 0
        self.done = threading.Event()
        height, width = frames[0].shape[:2]
        self.page = HTML % (width, height, json.dumps([way, seconds, FPS]), SCRIPT)
        self.browser = browser
        self.seconds = seconds

    def run(self) -> dict:
        server = Server(("127.0.0.1", 0), Handler)
        server.bench = self
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            address = f"http://127.0.0.1:{server.server_port}/"
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            command = browser_command(self.browser, folder, address)
            process = subprocess.Popen(command, start_new_session=True, **quiet)
            while not self.source.made and not self.done.wait(0.05):
                pass
            before = (time.process_time(), tree_seconds(process.pid), time.time())
            self.done.wait(self.seconds - 1)
            after = (time.process_time(), tree_seconds(process.pid), time.time())
            self.done.wait(60)
            process.terminate()
            process.wait()
        server.shutdown()
        server.server_close()
        return self.figures(before, after)

    def figures(self, before, after) -> dict:
        if not self.report or "error" in self.report or len(self.report["seen"]) < 10:
            return {"error": str(self.report)[:200]}
        made = self.source.made
        # The first second is for starting up.
        seen = [(index, at) for index, at in self.report["seen"] if index > FPS and index in made]
        intervals = sorted(1000 * (b[1] - a[1]) for a, b in zip(seen, seen[1:], strict=False))
        delays = sorted(1000 * (at - made[index]) for index, at in seen)
        wall = after[2] - before[2]
        expected = self.source.count - FPS
        return {
            "lost %": 100 * (1 - len({index for index, _ in seen}) / expected),
            "interval p50": statistics.median(intervals),
            "p99": intervals[int(0.99 * len(intervals))],
            "delay p50": statistics.median(delays),
            "delay p99": delays[int(0.99 * len(delays))],
            "server %": 100 * (after[0] - before[0]) / wall,
            "browser %": 100 * (after[1] - before[1]) / wall,
            "MB/s": (self.report["bytes"] or self.sent) / 1e6 / self.seconds,
        }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--browser", default="chromium", choices=["chromium", "firefox"])
    parser.add_argument("--size", default="704x1280")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    args = parser.parse_args()
    if args.seconds < 2:
        raise ValueError(f"--seconds {args.seconds:g}: give 2 or more, of which one is left out")
    frames = scene(*parse_size(args.size))
    for way in args.ways:
        found = Bench(way, args.browser, frames, args.seconds).run()
        text = [f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()]
        print(f"{args.browser} {args.size} {way:10}", ", ".join(text), flush=True)


if __name__ == "__main__":
    script(main)
