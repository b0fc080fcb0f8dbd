"""The live page in Chromium, as people use it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from live_parts import COLOURS, Watcher, ask, drawn, served, state_where
from PIL import Image
from webdriver import Browser, free_port

pytestmark = pytest.mark.live
ROOT = Path(__file__).parents[2]
ENTER = "\ue007"
PIXEL = """
const canvas = document.getElementById("picture");
const [red, green, blue] = canvas.getContext("2d").getImageData(40, 40, 1, 1).data;
return [red, green, blue];
"""
WHOLE = """
const canvas = document.getElementById("picture");
const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let sum = 0;
for (let i = 0; i < data.length; i += 4) sum = (31 * sum + data[i + 1]) | 0;
return sum;
"""


def colour(browser: Browser) -> str:
    """The name of the colour on the screen. (The bar, which is white, passes in a frame.)"""
    names = []
    for _ in range(3):
        pixel = np.array(browser.run(PIXEL))
        names.append(min(COLOURS, key=lambda name: abs(pixel - COLOURS[name]).sum()))
        time.sleep(0.06)
    return max(names, key=names.count)


def write(browser: Browser, text: str) -> None:
    """A new text in the prompt box, and Enter."""
    browser.run("document.getElementById('prompt').value = ''")
    browser.type("#prompt", text + ENTER)


def line(browser: Browser) -> str:
    return browser.run("return document.getElementById('line').textContent")


def begin(browser: Browser, server, text: str = "a red ball") -> None:
    browser.open(server.address())
    write(browser, text)
    browser.until("live.player.counts.shown > 5")


def test_prompt_to_picture_and_another_prompt(page, browser):
    begin(browser, page)
    assert colour(browser) == "red"
    seen = set()
    for _ in range(10):
        seen.add(browser.run(WHOLE))
        time.sleep(0.05)
    assert len(seen) > 3, "the picture stands still"

    delays = []
    for name in ("blue", "green", "red", "blue", "green"):
        write(browser, f"a {name} ball")
        browser.until("live.measured.delay && live.state.figures.shown")
        assert colour(browser) == name
        here, told = browser.run("return [live.measured.delay, live.state.figures.shown]")
        assert here == pytest.approx(told, abs=0.25), "what the server says is what is seen"
        delays.append(here)
        browser.run("live.measured.delay = 0")
    assert max(delays) < 1.1
    print(f"\nprompt to picture: {', '.join(f'{delay:.2f}' for delay in delays)} s")
    assert browser.run("return live.state.figures.stalls") == 0
    assert browser.run("return document.getElementById('now').hidden"), "it says what the box says"
    browser.click("#stop")
    browser.until("!live.state.running")
    still = browser.run(WHOLE)
    time.sleep(0.7)
    assert browser.run(WHOLE) == still


def test_it_starts_from_an_image(page, browser, tmp_path):
    Image.new("RGB", (320, 192), COLOURS["green"]).save(tmp_path / "green.jpg")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    browser.open(page.address())
    browser.type("#file", str(tmp_path / "broken.png"))
    write(browser, "a red ball")
    browser.until("document.getElementById('line').className === 'wrong'")
    assert line(browser).startswith("cannot read the image")
    assert not page.studio.started

    browser.type("#file", str(tmp_path / "green.jpg"))
    assert browser.until("document.getElementById('thumb').naturalWidth") == 320
    browser.click("#go")
    browser.until("live.player.counts.shown === 1")
    assert colour(browser) == "green"
    browser.until("live.player.counts.shown > 10")
    assert colour(browser) == "red"
    assert browser.run("return live.state.image")
    # The same image again is no reason to start again: the button changes the prompt.
    assert browser.run("return document.getElementById('go').textContent") == "Change"
    browser.click("#clear")
    browser.click("#again")
    browser.until("live.state.video === 2 && live.video === 2 && !live.state.image")


def test_what_a_model_raises_is_on_the_page_as_text(page, browser):
    browser.open(page.address())
    for prompt, said in (("nan", "a chunk is not finite"), ("memory", "out of memory")):
        write(browser, prompt)
        browser.until("live.state.error && document.getElementById('line').className === 'wrong'")
        assert said in line(browser)
    write(browser, "<img src=x onerror=\"document.title='broken in'\"> red")
    browser.until("live.player.counts.shown > 5")
    assert line(browser) == ""
    assert browser.run("return document.querySelectorAll('#now img').length") == 0
    assert browser.run("return document.title") == "wan5b live"
    assert colour(browser) == "red"


def test_saved_files_play(page, browser, tmp_path):
    begin(browser, page)
    browser.until("live.state.kept >= 24")
    (tmp_path / "downloads").mkdir(exist_ok=True)
    browser.click("#save")
    seed = browser.run("return live.state.seed")
    file = tmp_path / "downloads" / f"wan5b-1-seed-{seed}.mp4"
    end = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < end, list((tmp_path / "downloads").iterdir())
        time.sleep(0.05)
    with av.open(str(file)) as opened:
        times = [frame.time for frame in opened.decode(video=0)]
    assert len(times) >= 24
    assert np.allclose(np.diff(times), 1 / 24, atol=1e-3)

    # The video goes on meanwhile, and a browser plays what was saved.
    shown = browser.run("return live.player.counts.shown")
    browser.until(f"live.player.counts.shown > {shown + 10}")
    browser.open(file.as_uri())
    browser.until("document.querySelector('video').readyState >= 3")
    assert browser.run("return document.querySelector('video').duration") == pytest.approx(
        len(times) / 24, abs=0.01
    )


def test_two_windows_and_whose_video_it_is(page, browser):
    begin(browser, page)
    first = browser.window()
    second = browser.new_window()
    browser.open(page.address())
    browser.until("live.player.counts.shown > 5 && live.state.windows === 2")
    assert colour(browser) == "red"
    assert line(browser) == "Somebody else directs this video. You are watching."
    assert browser.run("return document.getElementById('go').disabled")
    write(browser, "a blue ball")
    time.sleep(0.2)
    assert page.studio.video.wish.prompts == ["a red ball"]

    # A reload of the first finds its video, and it is still its own.
    browser.go_to(first)
    browser.open(page.address())
    browser.until("live.player.counts.shown > 5 && live.state.owner")
    write(browser, "a green ball")
    browser.until("live.measured.delay")

    browser.close_window()
    browser.go_to(second)
    browser.until("live.state.windows === 1 && live.state.yours", 6)
    assert line(browser) == "Whoever directed this video has left: you may go on."
    write(browser, "a blue ball")
    browser.until("live.measured.delay")
    assert colour(browser) == "blue"


def test_a_browser_that_is_killed_costs_the_others_nothing_and_the_last_one_ends_the_video(page):
    with Watcher(page, "window-other") as window:
        with Browser() as browser:
            begin(browser, page)
            window.frames(3)
            process = browser.processes.get("goog:processID")
            for child in process_tree(process or browser.driver.pid):
                os.kill(child, signal.SIGKILL)
        begun = time.monotonic()
        before = window.until(state_where(windows=1), 10)["frames"]
        window.until(lambda ready: not isinstance(ready, dict) and ready.index > before + 48)
        assert time.monotonic() - begun < 5
        assert window.until(state_where(running=True))["figures"]["stalls"] == 0
    end = time.monotonic() + 6
    while page.studio.running:
        assert time.monotonic() < end
        time.sleep(0.1)


def process_tree(root: int) -> list[int]:
    """The processes below one, the lowest last."""
    found = []
    children = Path(f"/proc/{root}/task/{root}/children")
    for child in children.read_text().split() if children.exists() else []:
        found += [int(child), *process_tree(int(child))]
    return found


def memory() -> int:
    """Bytes that this process holds, the page's server included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_fifty_malformed_requests_in_the_midst_of_a_video(page, browser):
    begin(browser, page)
    chance = random.Random(0)
    good = (
        f"POST /prompt HTTP/1.1\r\nHost: 127.0.0.1:{page.server_port}\r\n"
        f"Origin: http://127.0.0.1:{page.server_port}\r\nContent-Length: 44\r\n\r\n"
        '{"who": "window-bad", "prompt": "a blue one"}'
    ).encode()

    def send_all() -> list[bytes]:
        answers = []
        for i in range(50):
            content = bytearray(good)
            for _ in range(1 + i % 8):
                content[chance.randrange(len(content))] = chance.randrange(256)
            with socket.create_connection(("127.0.0.1", page.server_port), timeout=15) as sender:
                sender.sendall(content[: chance.randrange(20, len(content))])
                sender.shutdown(socket.SHUT_WR)
                answers.append(sender.recv(100))
        return answers

    send_all()
    before = memory()
    for answer in send_all():
        assert answer == b"" or answer[:10] == b"HTTP/1.1 4" or answer[:12] == b"HTTP/1.1 501"
    assert memory() - before < 20e6
    assert page.studio.video.wish.prompts == ["a red ball"]
    shown = browser.run("return live.player.counts.shown")
    browser.until(f"live.player.counts.shown > {shown + 24}")
    assert ask(page, "GET", "/").status == 200


@pytest.mark.parametrize(("width", "height"), [(390, 844), (320, 568), (844, 390), (1280, 800)])
def test_no_window_scrolls_sideways(page, browser, width, height):
    browser.resize(width, height, phone=width < 1000)
    begin(browser, page, "a red ball " + "withoutanyspace" * 20)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    left, right, top = browser.run(
        "const box = document.getElementById('go').getBoundingClientRect();"
        "return [box.left, box.right, box.top]"
    )
    assert left >= 0
    assert right <= width
    assert top < height, "one scrolls to the button"
    if width < 1000:
        small = browser.run(
            "return [...document.querySelectorAll('button, a, label')].filter((one) => "
            "one.offsetParent && one.id !== 'clear' && one.getBoundingClientRect().height < 40)"
            ".map((one) => one.id)"
        )
        assert small == []


def test_two_minutes(browser):
    """Frames, memory and delays over a long video at a real size."""
    with served(drawn((480, 832), seconds=0.3), size=(480, 832), grace=2) as page:
        begin(browser, page)
        time.sleep(10)
        before = memory()
        counts = browser.run("return live.player.counts")
        begun = time.monotonic()
        delays = []
        while time.monotonic() < begun + 120:
            write(browser, f"a {random.choice(list(COLOURS))} ball")
            browser.until("live.measured.delay")
            delays.append(browser.run("return live.measured.delay"))
            browser.run("live.measured.delay = 0")
            time.sleep(5)
        seconds = time.monotonic() - begun
        after = browser.run("return live.player.counts")
        shown = after["shown"] - counts["shown"]
        skipped = after["skipped"] - counts["skipped"]
        figures = browser.run("return live.state.figures")
        grown = (memory() - before) / 1e6
        print(
            f"\n{shown} frames shown in {seconds:.0f} s, {skipped} skipped, {figures['dropped']} "
            f"dropped, {figures['stalls']} stalls, prompt to picture {np.median(delays):.2f} s "
            f"(at most {max(delays):.2f}), memory {grown:+.0f} MB"
        )
        assert shown / seconds == pytest.approx(24, rel=0.05)
        assert figures["stalls"] <= 2
        assert grown < 60


def test_live_py_from_its_first_line_to_ctrl_c(browser, tmp_path):
    port = free_port()
    command = [sys.executable, "live.py", "--random-weights", "--preset", "tiny"]
    command += ["--size", "64x96", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = ""
        while not address:
            said = process.stdout.readline()
            assert said, process.stderr.read()
            address = said.split()[0] if said.startswith("http") else ""
        browser.open(address)
        write(browser, "noise")
        browser.until("live.player.counts.shown > 30", 30)
        write(browser, "other noise")
        browser.until("live.measured.delay", 20)
        assert browser.run("return live.state.figures.memory.host") > 1e8
        assert list(tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in process.stderr.read()
        assert list(tmp_path.iterdir()) == []
        browser.until("document.getElementById('line').textContent.includes('lost')")
    finally:
        process.kill()
        process.wait()
