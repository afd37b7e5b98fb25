"""The comparison's page, clicked in headless Chromium."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.files import write_json
from eval.compare import compare_metric, summarise
from eval.options import CompareOptions
from eval.report import write_report
from eval.scores import ScoredImage

HOSTILE = "<img src=x onerror=\"document.title='executed'\"><script>document.title='executed'</script> & </script>"
PAIRS = 40


def write_comparison(folder: Path, pairs: int = PAIRS) -> Path:
    """A comparison of random scores; pair 0 has a hostile prompt."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    paired = []
    for index in range(pairs):
        sides = []
        for side in "ab":
            path = folder / "images" / f"{side}{index} #1.png"  # a name that a URL must quote
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            scores = {"pickscore": rng.normal(0.2, 0.02), "clip": rng.normal(0.3, 0.02)}
            sides.append(ScoredImage("", "", path, scores=scores))
        if index == 3:
            sides[1].scores = dict(sides[0].scores)  # a tie
        paired.append((HOSTILE if index == 0 else f"prompt {index:02d} {'cat' if index % 4 == 0 else 'dog'}", *sides))
    compared = {metric: compare_metric(metric, paired, "Model A", "B <b>", "half") for metric in ("pickscore", "clip")}
    for metric, (pair_file, _) in compared.items():
        write_json(folder / f"pair_{metric}.json", pair_file)
    options = CompareOptions("a", "b", "Model A", "B <b>")
    write_json(folder / "summary.json", summarise([row for _, row in compared.values()], options, {
        "by": "prompt", "pairs": pairs, "left_out_for_missing_images": 0, "images_without_partner_a": 0,
        "images_without_partner_b": 0}))
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("report") / "vs")
    write_report(folder)
    return folder


@pytest.fixture
def page(browser, comparison):
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and page.faults.append(request.url))
    page.goto((comparison / "report.html").as_uri())
    yield page
    assert page.faults == []
    page.close()


def margins(page, label: str) -> list[float]:
    chips = page.locator(".card .chip", has_text=label).all_inner_texts()
    return [float(re.search(r"[+\u2212]?[\d.]+$", chip)[0].replace("\u2212", "-")) for chip in chips]


def test_sorting_by_metric_and_margin(page, comparison):
    results = json.loads((comparison / "pair_clip.json").read_text())["results"]
    expected = sorted((r["score_a"] - r["score_b"] for r in results), reverse=True)
    page.locator("#metric").select_option("clip")
    assert margins(page, "CLIPScore") == pytest.approx(expected[:24], abs=1e-4)
    page.locator("#order").select_option("margin-b")
    assert margins(page, "CLIPScore") == pytest.approx(expected[::-1][:24], abs=1e-4)
    page.locator("#order").select_option("closest")
    assert margins(page, "CLIPScore") == pytest.approx(sorted(expected, key=abs)[:24], abs=1e-4)
    page.locator("#tabs button", has_text="PickScore").click()
    assert page.locator("#metric").input_value() == "pickscore"
    page.locator("#next").click()
    assert page.locator("#page").inner_text() == "2 / 2" and page.locator(".card").count() == PAIRS - 24


def test_filtering_by_text_and_by_winner(page):
    page.locator("#filter").fill("CAT 0")
    prompts = page.locator(".card .prompt").all_inner_texts()
    assert sorted(prompts) == ["prompt 04 cat", "prompt 08 cat", "prompt 20 cat"] or all(
        "cat" in prompt and "0" in prompt for prompt in prompts) and prompts
    assert page.locator("#count").inner_text() == f"{len(prompts)} of {PAIRS} pairs"
    page.locator("#filter").fill("no such prompt")
    assert page.locator(".card").count() == 0 and "No pair matches" in page.locator("#gallery").inner_text()
    page.locator("#filter").fill("")
    page.locator("#winner").select_option("tie")
    assert page.locator(".card .prompt").all_inner_texts() == ["prompt 03 dog"]
    page.locator("#winner").select_option("b")
    assert all(margin < 0 for margin in margins(page, "PickScore"))


def test_prompts_and_labels_are_text(page):
    page.locator("#filter").fill("<img src=x")
    assert page.locator(".card .prompt").inner_text().strip() == HOSTILE
    page.locator(".card .images").click()
    page.wait_for_timeout(200)
    assert page.locator("dialog .prompt").inner_text().strip() == HOSTILE
    assert page.title() == "Model A vs B <b>" and page.locator("h1").inner_text() == "Model A vs B <b>"


def test_a_pair_opens_large_and_is_left_by_keys(page):
    page.locator(".card .images").first.click()
    dialog = page.locator("dialog")
    first = dialog.locator(".prompt").inner_text()
    assert dialog.locator("table tr").count() == 3
    page.wait_for_function("[...document.querySelectorAll('dialog img')].every(i => i.naturalWidth === 32)")
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".prompt").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert dialog.locator(".prompt").inner_text() == first
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_charts_show_every_pair_and_rates_the_summary(page, comparison):
    assert page.locator("#scatter circle").count() == PAIRS and page.locator("#histogram path").count() == 2
    summary = json.loads((comparison / "summary.json").read_text())
    shown = page.locator(".rate .numbers strong").all_inner_texts()
    assert shown == [f"{100 * row['win_rate_a_over_b']:.1f}%" for row in summary["metrics"]]


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_a_laptop_and_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    widest = page.evaluate("Math.max(...[...document.querySelectorAll('main *')].filter(e => !e.closest('.tabs'))"
                           ".map(e => e.getBoundingClientRect().right))")
    assert widest <= width
    assert set(page.locator(".rate .numbers span:has-text('p =')").evaluate_all("all => all.map(e => e.getClientRects().length)")) == {1}
    page.wait_for_function("document.querySelector('.card img').matches('.crisp')")  # 32 pixels wide
    loaded = page.evaluate("[...document.querySelectorAll('.card img')].slice(0, 2).every(i => i.naturalWidth > 0)")
    assert loaded


def test_small_reports_are_one_file_and_large_ones_lie_beside_their_images(tmp_path):
    folder = write_comparison(tmp_path / "vs", pairs=3)
    (folder / "images" / "b1 #1.png").unlink()  # gone since it was scored
    write_report(folder)
    assert not (folder / "report_images").exists() and "data:image/jpeg" in (folder / "report.html").read_text()
    write_report(folder, images="beside")
    assert len(list((folder / "report_images").glob("*.jpg"))) == 5
    assert "data:image/jpeg" not in (folder / "report.html").read_text()
    with pytest.raises(UserError, match="holds no whole comparison"):
        write_report(tmp_path)
    pairs = folder / "pair_clip.json"
    pairs.write_text(re.sub(r'"score_a": [^,]+', '"score_a": NaN', pairs.read_text(), count=1))
    with pytest.raises(UserError, match="NaN is no number"):  # a page with it would show nothing
        write_report(folder)
