"""How does a page look to a person? What headless Chromium says of it, offline, at some widths."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

WIDTHS = (360, 800, 1280)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

#: A page that shows another one at each width, unchanged, and writes down what it finds there.
_FRAMES = """<!DOCTYPE html><meta charset="utf-8"><body><pre id="found"></pre><script>
const found = [], widths = %(widths)s;
function look(frame, width) {
  const page = frame.contentDocument, over = [];
  for (const each of page.querySelectorAll("body *")) {
    const box = each.getBoundingClientRect(), scrolls = each.closest(".scrolls");
    if (!scrolls && box.width && (box.right > width + 1 || box.left < -1
        || (each.children.length === 0 && each.scrollWidth > each.clientWidth + 1
            && getComputedStyle(each).display !== "inline")))
      over.push(each.tagName + ": " + (each.textContent || each.alt || "").slice(0, 60));
  }
  const images = [...page.images];
  found.push({
    width, over,
    scrolls: page.documentElement.scrollWidth > width,
    images: images.length,
    missing: images.filter(i => !i.complete || !i.naturalWidth || !i.alt).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map(r => r.name).filter(n => !n.startsWith("data:")),
    dangling: [...page.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute("href"))
      .filter(h => !page.getElementById(h.slice(1))),
    height: page.documentElement.scrollHeight,
  });
  if (found.length === widths.length)
    document.getElementById("found").textContent = JSON.stringify(found);
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  frame.onload = () => look(frame, width);
  frame.src = %(page)s;
  document.body.append(frame);
}
</script></body>"""


@dataclass(frozen=True)
class Looked:
    """What was found at one width.

    ``over`` are elements that are wider than the page or than their box, ``missing`` images that
    are not shown or have no words, ``requests`` what was asked for besides the page.
    """

    width: int
    over: list[str]
    scrolls: bool
    images: int
    missing: int
    requests: list[str]
    dangling: list[str]
    height: int


def look(page: Path, folder: Path) -> list[Looked]:
    """Open a page in Chromium, without a network, at each of :data:`WIDTHS`."""
    outer = folder / "outer.html"
    names = {"widths": json.dumps(WIDTHS), "page": json.dumps(page.resolve().as_uri())}
    outer.write_text(_FRAMES % names)
    said = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            "--proxy-server=127.0.0.1:9", "--allow-file-access-from-files",
            f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', said.stdout, re.S)
    assert found, said.stderr[-2000:]
    return [Looked(**each) for each in json.loads(html.unescape(found))]
