"""The HTML report in a real browser: console, width, links, contents. Skipped where there is none.

Chromium is `apt-get install chromium`. A window has at least 500 px there, so that the page is
shown in a frame of the wanted width.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lib.report import report
from lib.results.reading import Source
from tests.support.made_up_grid import write_grid

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; `apt-get install chromium` brings one"
)

# What the frame's page is asked once it is there; the answer goes into the frame's own page.
PROBE = """
const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
const folded = [...page.querySelectorAll("details")], closed = root.scrollHeight;
for (const one of folded) one.open = true;
view.scrollTo(0, root.scrollHeight / 2);
const links = [...page.links].map(a => a.getAttribute("href"));
const nav = page.querySelector("nav").getBoundingClientRect();
const boxes = [...page.querySelectorAll("table, img")].map(inside => {
  const box = inside.closest(".scroll");
  return box !== null && box.getBoundingClientRect().right <= view.innerWidth + 1;
});
const answer = {
  width: view.innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, closed,
  folded: folded.length,
  dead: links.filter(to => to.startsWith("#") && !page.getElementById(to.slice(1))),
  files: links.filter(to => !to.startsWith("#") && !/^https?:/.test(to)),
  outside: links.filter(to => /^https?:/.test(to)).length,
  doubled: page.querySelectorAll("[id]").length - new Set(
    [...page.querySelectorAll("[id]")].map(one => one.id)).size,
  contents: page.querySelectorAll("nav a").length,
  navigation: nav.top >= 0 && nav.top < view.innerHeight && nav.left >= 0,
  boxes: boxes.length, cut: boxes.filter(fits => !fits).length,
  broken: [...page.images].filter(one => !one.complete || !one.naturalWidth).length,
};
document.body.textContent = "ANSWER" + JSON.stringify(answer) + "END";
"""


def chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    write_grid(root, "main_results", "paper")
    write_grid(root, "ablations", "quick")
    return next(path for path in report.report(Source("quick", root)) if path.suffix == ".html")


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_or_dead_at_this_width(page: Path, width: int, tmp_path: Path) -> None:
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe id="frame" width="{width}" height="900" src="{page.as_uri()}"></iframe>'
        f"<script>frame.onload = () => {{{PROBE}}}</script></body>"
    )
    done = chromium(
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--window-size=1500,1000",
        "--dump-dom",
        outer.as_uri(),
    )
    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    match = re.search(r"ANSWER(.*)END", done.stdout)
    assert match, done.stdout[-500:] + done.stderr[-500:]
    found = json.loads(match[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert found["width"] == width and found["scroll"] <= width
    assert found["dead"] == [] and found["doubled"] == 0 and found["broken"] == 0
    assert [to for to in found["files"] if not (page.parent / to).exists()] == []
    assert found["outside"] >= 3
    assert found["contents"] == 11 and found["navigation"], "the contents stay in sight"
    assert found["folded"] > 5 and found["closed"] < found["height"]
    assert found["boxes"] > 5 and found["cut"] == 0, "tables and figures scroll in their own box"
