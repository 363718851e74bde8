"""The README's pictures, made from a real run: python tests/benchmarks/pictures.py [RUN] [--to DIRECTORY]

RUN is the directory of a finished ``lit-bnfold fit``; without one, a run of configs/quick.yaml is made first. Its
report and TensorBoard are opened in a headless Chromium, which has to be installed: ``report.png`` is the head of
folding.html, ``graphs.png`` TensorBoard's graphs of both versions beside each other.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image, ImageChops, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Seconds in which TensorBoard has to answer.
PATIENCE = 60

# Pixels of the screen for each of the page.
SCALE = 2

# Of TensorBoard's page with a graph: width and height, and from where on there is nothing but the graph, in its pixels.
PAGE = (1500, 1400)
GRAPH = (360, 130)

# From where on there is the small map of the graph, which is there at times.
MAP = (1100, 1000)

MARGIN = 24


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="directory of a finished run")
    parser.add_argument("--to", type=Path, default=ROOT / ".github" / "pictures", help="where they go")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"Taking pictures needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium")
    arguments.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.run or make_run(Path(scratch))
        if not (run / "folding.html").is_file():
            sys.exit(f"Expected the directory of a finished run, with its folding.html, at {run}.")
        save(shoot(browser, (run / "folding.html").absolute().as_uri(), (980, 800)), arguments.to / "report.png")
        graphs = {version: shoot_graph(browser, run / "folding" / version) for version in ("original", "folded")}
        save(beside_each_other(graphs), arguments.to / "graphs.png")


def make_run(directory: Path) -> Path:
    """Train for a few seconds, and return the directory of the run."""
    config = ROOT / "configs" / "quick.yaml"
    command = [sys.executable, "-m", "lit_bnfold", "fit", "--config", config, "--trainer.default_root_dir", directory]
    subprocess.run(command, check=True, cwd=ROOT)
    return directory / "lightning_logs" / "version_0"


def shoot(browser: str, address: str, size: tuple[int, int]) -> Image.Image:
    """Take a picture of the beginning of a page."""
    options = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--disable-gpu",
        f"--force-device-scale-factor={SCALE}",
    ]
    # The browser's own clock runs ahead while a page loads and draws.
    options += ["--virtual-time-budget=20000", f"--window-size={size[0]},{size[1]}"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "page.png"
        command = [browser, *options, f"--screenshot={path}", address]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(path) as image:
            return image.convert("RGB")


def shoot_graph(browser: str, directory: Path) -> Image.Image:
    """Take a picture of the graph whose events lie in a directory, without what is around it."""
    with tensorboard(directory) as address:
        page = shoot(browser, f"{address}#graphs", PAGE)
    page.paste("white", (SCALE * MAP[0], SCALE * MAP[1], *page.size))
    graph = page.crop((SCALE * GRAPH[0], SCALE * GRAPH[1], *page.size))
    white = Image.new("RGB", graph.size, "white")
    return graph.crop(ImageChops.difference(graph, white).getbbox())


def beside_each_other(graphs: dict[str, Image.Image]) -> Image.Image:
    """Put pictures side by side, each under its name."""
    margin, font = SCALE * MARGIN, ImageFont.load_default(SCALE * 16)
    width = sum(graph.width + 2 * margin for graph in graphs.values())
    whole = Image.new("RGB", (width, max(graph.height for graph in graphs.values()) + 3 * margin), "white")
    left = 0
    for name, graph in graphs.items():
        middle = left + margin + graph.width // 2
        ImageDraw.Draw(whole).text((middle, margin), name, "black", font, anchor="mm")
        whole.paste(graph, (left + margin, whole.height - margin - graph.height))
        left += graph.width + 2 * margin
    return whole


def save(image: Image.Image, path: Path) -> None:
    """Keep 64 colours, of which text and boxes have no more."""
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1_000:.0f} kB")


@contextmanager
def tensorboard(directory: Path) -> Iterator[str]:
    """Run TensorBoard for a while, on a port that is free; yields its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", directory, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_runs(address, process)
            yield address
        finally:
            process.terminate()


def wait_for_runs(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return when there is something to see."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"{address}data/runs") as answer:
                if answer.read().strip() != b"[]":
                    return
        except URLError:
            pass  # It has not started yet.
        time.sleep(0.5)
    sys.exit(f"TensorBoard shows no run at {address} after {PATIENCE} seconds.")


if __name__ == "__main__":
    main()
