"""The board in a real browser: it looks right, keeps to itself, and does what is clicked."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from facm_dashboards.config import BoardConfig
from facm_platform.tracking import TrackingConfig
from tests.dashboards.conftest import served
from tests.dashboards.gallery import MODEL, Gallery

PICTURES = Path(__file__).resolve().parents[2] / "build/screenshots"
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    # Chromium has no sandbox for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def copied(
    config: BoardConfig, gallery: Gallery, tmp_path_factory: pytest.TempPathFactory
) -> BoardConfig:
    """A copy of the gallery, in which promotions may happen."""
    root = tmp_path_factory.mktemp("browser") / "runs"
    shutil.copytree(gallery.root, root)
    tracking = TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}")
    return replace(config, storage_uri=str(root), tracking=tracking)


@pytest.fixture(scope="module")
def address(copied: BoardConfig) -> Iterator[str]:
    with served(copied) as address:
        yield address


class Watched:
    """A page, and what it complained about or asked for elsewhere."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.complaints: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and self._note(m.text))
        page.on("pageerror", lambda error: self._note(str(error)))
        page.on("request", self._request)

    def open(self, path: str) -> Page:
        """Until everything is drawn."""
        self.page.goto(self.address + path)
        waiting = self.page.locator("[data-charts]:not([data-ready])")
        expect(waiting).to_have_count(0, timeout=30_000)
        self.page.wait_for_load_state("networkidle")
        return self.page

    def _note(self, text: str) -> None:
        self.complaints.append(text)

    def _request(self, request: object) -> None:
        url = str(getattr(request, "url", ""))
        if not url.startswith((self.address, "data:", "blob:")):
            self._note(f"asked for {url}")


@pytest.fixture
def watched(browser: Browser, address: str) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    watched = Watched(context.new_page(), address)
    yield watched
    assert watched.complaints == []
    context.close()


def pages(gallery: Gallery) -> dict[str, str]:
    runs = gallery.runs
    return {
        "runs": "/runs",
        "run": f"/runs/{runs['strong-anchor']}",
        "run-under-way": f"/runs/{runs['under-way']}",
        "compare": f"/compare?run={runs['strong-anchor']}&run={runs['weak-anchor']}",
        "searches": "/searches",
        "search": f"/searches/{runs['search']}",
        "registry": "/registry",
        "model": f"/registry/{MODEL}",
        "version": f"/registry/{MODEL}/2",
        "empty": "/runs?q=nothing-like-that",
        "missing": "/runs/" + "0" * 32,
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_page(
    browser: Browser, address: str, gallery: Gallery, size: str, theme: str
) -> None:
    """No complaint, no outside request, nothing beyond the edge, accessible; and its picture."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if theme == "dark" else "light",
    )
    watched = Watched(context.new_page(), address)
    for name, path in pages(gallery).items():
        page = watched.open(path)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        beyond = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert beyond <= 0, f"{name}: {beyond} pixels beyond the edge"
        for plot in page.locator(".plot").all():
            assert plot.locator("canvas").count() >= 1, f"{name}: not drawn"
        found = Axe().run(page).response["violations"]
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        told = [(one["id"], [node["html"][:150] for node in one["nodes"][:3]]) for one in grave]
        assert told == [], name
        # The browser itself complains of a page that is not there.
        known = [c for c in watched.complaints if "status of 404" not in c or name != "missing"]
        assert known == [], name
        page.screenshot(path=PICTURES / f"{name}-{size}-{theme}.png", full_page=True)
        # Taking the picture puts a style into the page, which the policy refuses.
        watched.complaints.clear()
    context.close()


def test_filter_choose_compare(watched: Watched, gallery: Gallery) -> None:
    page = watched.open("/runs")
    page.get_by_role("searchbox").fill("anchor")
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    assert "q=anchor" in page.url
    assert page.get_by_role("button", name="Compare").is_disabled()
    for name in ("strong-anchor", "weak-anchor"):
        page.get_by_label(f"Compare {name}").check()
    expect(page.locator("#chosen")).to_have_text("2 of 8 chosen.")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="FID against steps")).to_be_visible()
    for name in ("strong-anchor", "weak-anchor"):
        assert gallery.runs[name] in page.url
    page.get_by_label("Leave out weak-anchor").click()
    assert gallery.runs["weak-anchor"] not in page.url


def test_what_is_chosen_survives_a_renewal(watched: Watched) -> None:
    page = watched.open("/runs")
    page.get_by_label("Compare weak-anchor").check()
    page.evaluate("document.activeElement.blur()")
    with page.expect_response(re.compile("/runs/rows"), timeout=15_000):
        pass
    expect(page.get_by_label("Compare weak-anchor")).to_be_checked()


def test_charts_are_handed_out(watched: Watched, gallery: Gallery, tmp_path: Path) -> None:
    run = gallery.runs["strong-anchor"]
    page = watched.open(f"/runs/{run}")
    with page.expect_download() as told:
        page.get_by_role("button", name="Losses as CSV").click()
    assert told.value.suggested_filename == "strong-anchor-losses.csv"
    told.value.save_as(tmp_path / "losses.csv")
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "series,images seen,loss,standard error"
    kept = gallery.store.client.get_metric_history(run, "loss")
    found = [line.split(",") for line in lines if line.startswith("loss,")]
    assert [(int(x), float(y)) for _, x, y, _ in found] == [(p.step, p.value) for p in kept]
    figures = page.locator("figure.chart:has(.plot)")
    for k in range(figures.count()):
        if k % 8 == 7:
            # Chromium lets a page hand out ten files.
            watched.open(f"/runs/{run}")
        figure = figures.nth(k)
        with page.expect_download() as told:
            figure.get_by_role("button", name=re.compile("as PNG")).click()
        told.value.save_as(tmp_path / "chart.png")
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_samples_by_keyboard_and_by_address(watched: Watched, gallery: Gallery) -> None:
    run = gallery.runs["strong-anchor"]
    page = watched.open(f"/runs/{run}")
    before = page.locator("#student").get_attribute("src")
    page.get_by_role("slider", name="Training").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#told-images")).to_have_text("48 images")
    page.get_by_role("slider", name="Steps").focus()
    page.keyboard.press("ArrowRight")
    after = page.locator("#student").get_attribute("src")
    assert after is not None
    assert after != before
    assert "nfe2_images000000000048" in after
    assert page.url.endswith("?images=48&steps=2")
    page.reload()
    expect(page.locator("#student")).to_have_attribute("src", after)


def test_the_theme_is_chosen_and_kept(watched: Watched) -> None:
    page = watched.open("/runs")
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == "light"
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.evaluate(theme) == "dark"
    watched.open("/searches")
    assert page.evaluate(theme) == "dark"


def test_the_keyboard_skips_to_the_content(watched: Watched) -> None:
    page = watched.open("/runs")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()


def test_trials_are_brushed(watched: Watched, gallery: Gallery) -> None:
    page = watched.open(f"/searches/{gallery.runs['search']}")
    plot = page.locator(".plot.parallel")
    plot.scroll_into_view_if_needed()
    pixels = "document.querySelector('.plot.parallel canvas').toDataURL()"
    before, box = page.evaluate(pixels), plot.bounding_box()
    assert box is not None
    # The first axis, from its middle upwards.
    x, y = box["x"] + 70, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 60, steps=5)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert page.evaluate(pixels) != before
    active = page.evaluate(
        "echarts.getInstanceByDom(document.querySelector('.plot.parallel'))"
        ".getModel().getSeriesByIndex(0).getRawIndicesByActiveState('active').length"
    )
    assert 0 < active < 5


def test_promote_and_refuse(watched: Watched) -> None:
    page = watched.open(f"/registry/{MODEL}/2")
    page.get_by_label("Why").fill("it looks good")
    page.get_by_role("button", name="Promote to champion").click()
    expect(page.get_by_text("Version 2 is the champion")).to_be_visible(timeout=30_000)
    watched.open(f"/registry/{MODEL}/1")
    page.get_by_role("button", name="Promote to champion").click()
    expect(page.get_by_role("alert")).to_contain_text("not better than 30", timeout=30_000)
    # The browser tells of the status, 409.
    assert [c for c in watched.complaints if "409" not in c] == []
    watched.complaints.clear()
