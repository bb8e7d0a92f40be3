"""The comparison page in a real browser, without a network: no errors, and hover, switches, search and sorting work."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from draftplus.report import write_report
from draftplus.report.grouping import comparisons
from draftplus.report.inputs import read_inputs
from draftplus.report.points import figures_of
from draftplus.report.rings import rings
from tests.report.synthetic import write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("DRAFTPLUS_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome; DRAFTPLUS_BROWSER may name one"),
    pytest.mark.slow,
]

# Runs in the page after its own script, and leaves what it saw where --dump-dom shows it.
ACT = """
<script>
addEventListener("load", () => {
  const told = {errors: window.seenErrors};
  const shown = (element) => element.getClientRects().length > 0;
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);
  const tip = document.getElementById("tip");
  const at = (element, kind) => {
    const box = element.getBoundingClientRect();
    const init = {bubbles: true, pointerType: "mouse", clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    element.closest("svg").dispatchEvent(new PointerEvent(kind, init));
  };
  const chip = (name) => [...document.querySelectorAll(".chip")].find((one) => one.textContent === name);

  const loaded = performance.getEntriesByType("resource").map((one) => one.name);
  told.loaded = loaded.filter((one) => !one.startsWith("data:"));
  told.overflow = document.documentElement.scrollWidth > innerWidth;

  const data = JSON.parse(document.getElementById("data").textContent);
  const point = data.points.findIndex((p) => p.label.includes("β"));
  const mark = all(`.large .mark[data-point="${point}"]`)[0];
  mark.scrollIntoView();
  at(mark, "pointermove");
  const picture = tip.querySelector("img");
  told.hover = {text: tip.textContent, shown: shown(tip), picture: picture?.src.slice(0, 22), lit: all(".lit").length};
  at(mark, "pointerleave");
  told.left = shown(tip);

  mark.focus();
  told.focused = {text: tip.textContent, shown: shown(tip), label: mark.getAttribute("aria-label"),
    order: mark.tabIndex, role: mark.getAttribute("role"), of: mark.closest("svg").getAttribute("role")};
  mark.blur();
  told.blurred = shown(tip);

  const viewer = document.getElementById("viewer");
  const tile = all(".tile")[0];
  const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  tile.focus();
  press(tile, "Enter");
  told.opened = {modal: viewer.matches(":modal"), same: viewer.querySelector("img").src === tile.src,
    wide: viewer.querySelector("img").getBoundingClientRect().width, said: viewer.querySelector("p").textContent,
    focusable: tile.tabIndex === 0 && tile.getAttribute("role") === "button", named: tile.getAttribute("aria-label")};
  press(viewer, "ArrowRight");
  told.next = viewer.querySelector("img").src === all(".tile")[1].src;
  viewer.querySelector("img").click();
  told.closed = !viewer.open;
  tile.click();
  told.clicked = viewer.open;
  viewer.close();

  told.cut = all(".chip").filter((one) => {
    const box = one.getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth || one.scrollWidth > one.clientWidth;
  }).map((one) => one.textContent);
  told.chips = all(".chip").length;

  const curve = all(".curve .run")[0];
  const figure = curve.closest("figure");
  const d = curve.querySelector("path").getAttribute("d").match(/[\\d.]+/g).map(Number);
  const svg = curve.closest("svg");
  const place = new DOMPoint(d[0], d[1]).matrixTransform(svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: place.x, clientY: place.y}));
  told.curve = tip.textContent;

  const counts = () => ({marks: all(".large .mark").length, runs: all(".curve .run").length,
    rows: all(".sortable tbody tr").length, columns: all(".mosaic td[data-series]").length,
    said: document.getElementById("count").textContent});
  const rings = () => all(".large .ring").map((one) => data.points[one.dataset.point].label).sort();
  const note = () => document.querySelector(".large .note").textContent;
  told.before = counts();
  told.rings = [rings(), note()];
  chip("DRaFT+").click();
  told.without = counts();
  told.fewer = [rings(), note()];
  told.pressed = chip("DRaFT+").getAttribute("aria-pressed");
  chip("DRaFT+").click();
  const search = document.getElementById("search");
  search.value = "SEED=1";
  search.dispatchEvent(new Event("input"));
  told.searched = counts();
  search.value = "";
  search.dispatchEvent(new Event("input"));
  told.after = counts();

  const table = document.querySelector(".sortable");
  const column = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === "LPIPS");
  const values = () => [...table.tBodies[0].rows].map((row) => +row.cells[column].dataset.value);
  table.tHead.rows[0].cells[column].querySelector("button").click();
  told.up = values();
  table.tHead.rows[0].cells[column].querySelector("button").click();
  told.down = values();

  const select = document.querySelector(".grids select");
  select.value = "1";
  select.dispatchEvent(new Event("change"));
  told.prompt = all(".grids h4").map((one) => one.textContent);

  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(told);
  document.body.append(result);
});
</script>
"""
LISTEN = '<script>window.seenErrors = []; addEventListener("error", (e) => window.seenErrors.push(e.message));</script>'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        for kl in (0.0, 1.0):
            changes = {"seed": seed, "objective.kl_coeff": kl}
            write_run(
                directory / "runs" / f"kl{kl:g}-{seed}", changes, steps=20, every=10, prompts=["an owl", "a crab"]
            )
    path = write_report(directory / "runs", directory / "report.html", figures=False)
    text = path.read_text(encoding="utf-8")
    acted = text.replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{ACT}</body>", 1)
    (directory / "acted.html").write_text(acted, encoding="utf-8")
    return directory / "acted.html"


@pytest.fixture(scope="module")
def ringed(page: Path) -> list[list[str]]:
    """The labels of the ringed marks, with DRaFT+ and without."""
    (one,) = comparisons(read_inputs([page.parent / "runs"]).runs)
    shown = figures_of(one).shown()
    sets = (shown, [point for point in shown if point.series != "DRaFT+"])
    return [sorted(point.label for point in rings(points, "emoji_clip").marks) for points in sets]


def visit(page: Path, width: int) -> tuple[dict, str]:
    """What the script saw, and what the browser logged."""
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={page.parent / f'profile-{width}'}", f"--window-size={width},900",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(page, ringed, width):
    told, log = visit(page, width)
    assert told["errors"] == [] and "CONSOLE" not in log
    assert told["loaded"] == [] and not told["overflow"]

    assert "DRaFT+, β = 1" in told["hover"]["text"] and "kl1-0, kl1-1" in told["hover"]["text"]
    assert "seeds 0, 1" in told["hover"]["text"] and "±" in told["hover"]["text"]
    assert told["hover"]["shown"] and told["hover"]["lit"] == 1 and told["hover"]["picture"] == "data:image/jpeg;base64"
    assert not told["left"]
    assert "step1" in told["curve"] and "method" in told["curve"]

    focused = told["focused"]
    assert focused["shown"] and not told["blurred"] and "DRaFT+, β = 1" in focused["text"]
    assert (focused["order"], focused["role"], focused["of"]) == (0, "img", "group")
    assert focused["label"].startswith("DRaFT+, β = 1; reward emoji_clip 1") and "LPIPS" in focused["label"]

    opened = told["opened"]  # a modal dialog closes at Escape by itself
    assert opened["modal"] and opened["same"] and opened["focusable"] and told["next"] and told["closed"]
    assert told["clicked"] and opened["wide"] >= 300 and opened["named"].endswith("open at full size")
    assert "an owl" in opened["said"] and "/samples/step-0000" in opened["said"]

    assert told["chips"] >= 3 and told["cut"] == []
    assert told["rings"][0] == ringed[0] != ringed[1] == told["fewer"][0]

    before, without, searched = told["before"], told["without"], told["searched"]
    assert before["rows"] == 4 and before["runs"] == 4 * 4 and before["said"] == ""
    assert without["rows"] == 2 and without["runs"] == 2 * 4 and without["said"] == "2 of 4 runs"
    assert without["marks"] == before["marks"] - 1 and 0 < without["columns"] < before["columns"]
    assert told["pressed"] == "false"
    assert searched["rows"] == 2 and searched["runs"] == 2 * 4 and searched["marks"] == before["marks"]
    assert told["after"] == before

    assert told["up"] == sorted(told["up"]) and told["down"] == told["up"][::-1] and len(set(told["up"])) == 4
    assert told["prompt"] == ["“a crab”"]
