"""The judging page, driven by headless Chromium, and what the program puts into it."""

import random

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.votes import read_votes
from eval import judge
from tests.votes import page_content

HOSTILE = "<img src=x onerror=\"document.title='executed'\"><script>document.title='executed'</script> & </script>"
PROMPTS = [HOSTILE, "naïve café in 東京", "a dog\nin two lines", "a house", "a \"quoted\" cat"]


@pytest.fixture
def html(make_manifest, tmp_path):
    """A page of five pairs by two models and one repeat."""
    a, b = make_manifest("model a", PROMPTS), make_manifest("<b>b", PROMPTS, seed=1)
    judge.main(["--manifests", a, b, "--output", tmp_path / "judge.html", "--repeat", "--seed", 3])
    return tmp_path / "judge.html"


def opened(context, html, width=1280, height=800):
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http") and page.faults.append(request.url))
    page.goto(html.as_uri())
    return page


def count(page) -> str:
    return page.locator("#count").inner_text()


def test_judged_by_keys_and_touch_closed_opened_again_and_saved(chromium, html, tmp_path):
    profile = tmp_path / "profile"
    context = chromium(profile, has_touch=True)
    page = opened(context, html)
    assert count(page) == "1 / 6" and page.locator("#save").is_disabled()
    for key in ("ArrowLeft", "ArrowDown", "ArrowUp", "z", "ArrowRight"):
        page.keyboard.press(key)
    assert count(page) == "4 / 6" and page.locator("#progress").evaluate("bar => bar.value") == 3
    page.locator("#name").fill("zoë z")  # no letter of it is a key
    assert count(page) == "4 / 6" and page.faults == []
    context.close()  # the whole browser

    context = chromium(profile, has_touch=True)
    page = opened(context, html, 390, 844)
    assert count(page) == "4 / 6" and page.locator("#name").input_value() == "zoë z"
    page.locator("#right-figure").tap()
    page.wait_for_timeout(300)
    page.locator("#undo").tap()
    page.wait_for_timeout(300)
    page.locator("#right-figure").evaluate("figure => { figure.click(); figure.click() }")  # a double tap is one vote
    page.wait_for_timeout(300)
    page.locator("#bad").tap()
    page.wait_for_timeout(300)
    page.locator("#undo").tap()
    assert count(page) == "5 / 6"
    page.locator("#tie").tap()
    page.wait_for_timeout(300)
    page.locator("#left").tap()
    assert page.locator("#done").is_visible() and "Of 1 pair shown twice you judged" in page.locator("#summary").inner_text()
    with page.expect_download() as download:
        page.locator("#save-all").tap()
    assert download.value.suggested_filename == "votes.json" and page.faults == []
    download.value.save_as(tmp_path / "votes.json")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#anew").tap()
    assert count(page) == "1 / 6"
    context.close()

    [ballot] = read_votes([tmp_path / "votes.json"])
    assert ballot.name == "zoë z" and [vote.choice for vote in ballot.votes] == ["left", "tie", "right", "right", "tie", "left"]
    assert sorted({vote.prompt for vote in ballot.votes}) == sorted(PROMPTS) and len(ballot.repeated()) == 1
    assert {vote.left.model for vote in ballot.votes} == {"model a", "<b>b"}


def test_hostile_prompt_is_text_and_the_page_is_blind(browser, html):
    page = opened(browser, html)
    for _ in range(6):
        if page.locator("#prompt").inner_text().startswith("<img"):
            break
        page.keyboard.press("ArrowDown")
    assert page.locator("#prompt").inner_text() == HOSTILE and page.title() == "Which image is better?"
    shown = page.locator("main").evaluate("main => main.outerHTML")
    assert "model a" not in shown and "&lt;b&gt;b" not in shown and ".png" not in shown
    assert page.faults == []
    page.close()


def test_a_closer_look_and_what_a_screen_reader_says(browser, html):
    page = opened(browser, html)
    page.keyboard.press("c")
    assert page.locator("#which").inner_text() == "Left image"
    page.keyboard.press("ArrowRight")  # no vote meanwhile
    page.keyboard.press("c")
    assert page.locator("#which").inner_text() == "Right image"
    page.locator("#pane").click(position={"x": 900, "y": 300})
    assert page.locator("#pane").evaluate("pane => pane.scrollLeft > 0 && pane.scrollWidth > 2 * pane.clientWidth")
    page.keyboard.press("Escape")
    assert count(page) == "1 / 6" and not page.locator("dialog").is_visible()
    page.get_by_role("button", name="Left is better").focus()
    page.keyboard.press("Enter")
    said = page.get_by_role("status").inner_text()
    assert said.startswith("Left. Pair 2 of 6: ") and page.get_by_role("progressbar", name="Pairs judged").is_visible()
    assert page.get_by_role("img", name="Left image").is_visible() and page.faults == []
    page.close()


@pytest.mark.parametrize("width, height", [(1280, 800), (1024, 600), (390, 844), (360, 640)])
def test_all_of_it_is_in_view(browser, html, width, height):
    page = opened(browser, html, width, height)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("h1", "#left", "#right", "#tie", "#bad", "#left-figure", "#right-figure", "#prompt"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= height, name
    page.wait_for_function("[...document.querySelectorAll('.two img')].every(image => image.naturalWidth === 64)")
    assert page.locator(".two img.crisp").count() == 2 and page.locator("h1").inner_text() == "Which image is better?"
    if width < 400:  # the images share the whole width
        assert page.locator("#left-image").bounding_box()["width"] >= (width - 4) / 2
    page.close()


def test_what_to_do_next_is_said(make_manifest, tmp_path, capsys):
    a, b, c = (make_manifest(name, PROMPTS, seed) for seed, name in enumerate(("a", "b", "c c")))
    page, out = tmp_path / "page.html", ["--output", tmp_path / "page.html"]
    first = f'next: open {page} in a browser, choose, press "Save votes"; then\n  python -m data.votes votes.json --output my_pairs\n'
    for manifests, last in (([a, b], f"eval.compare --json_a {a} --json_b {b} --label_a a --label_b b --votes votes.json\n"),
                            ([a, b, c], f"eval.leaderboard --manifests {a} {b} '{c}' --labels a b 'c c' --votes votes.json\n")):
        judge.main(["--manifests", *manifests, *out])
        assert capsys.readouterr().out.endswith(f"{first}  python -m {last}")


def test_a_damaged_store_begins_anew(browser, html):
    page = opened(browser, html)
    page.evaluate("localStorage.setItem(`judge ${page}`, '{\"judge\": 1, \"answers\": [\"north\"]}')")
    page.reload()
    assert count(page) == "1 / 6" and page.faults == []
    page.close()


def candidates(per_prompt: dict[tuple[str, str], int]) -> list[judge.Candidate]:
    return [judge.Candidate(model, prompt, f"{model}{prompt}{k}") for (model, prompt), n in per_prompt.items() for k in range(n)]


def test_which_pairs_are_shown():
    rng = random.Random(0)
    several = judge.choose_pairs(candidates({("a", "x"): 2, ("b", "x"): 2, ("c", "x"): 1, ("a", "y"): 1}), rng, None)
    assert {frozenset(one.path for one in pair) for pair in several} == {
        frozenset(pair) for pair in (("ax0", "bx0"), ("ax0", "cx0"), ("bx0", "cx0"), ("ax1", "bx1"))}
    one_model = candidates({("a", "x"): 4, ("a", "y"): 3, ("a", "z"): 1})
    assert len(judge.choose_pairs(one_model, rng, None)) == 6 + 3
    limited = judge.choose_pairs(one_model, rng, 4)
    assert sorted(pair[0].prompt for pair in limited) == ["x", "x", "y", "y"]
    with pytest.raises(UserError, match="no prompt has two images"):
        judge.choose_pairs(candidates({("a", "x"): 1, ("b", "y"): 1}), rng, None)


def test_the_seed_draws_sides_and_order(make_manifest, tmp_path):
    manifests = [make_manifest(name, [f"p{k}" for k in range(40)], seed=seed) for seed, name in enumerate("ab")]
    plans = []
    for seed in (0, 0, 1):
        judge.main(["--manifests", *manifests, "--output", tmp_path / "page.html", "--seed", seed, "--image_size", 64, "--repeat"])
        plans.append(page_content(tmp_path / "page.html")["plan"])
    assert plans[0] == plans[1] != plans[2]
    left = [plans[0]["images"][pair["left"]]["model"] for pair in plans[0]["pairs"]]
    assert 10 < left.count("a") < 32 and [pair["prompt"] for pair in plans[0]["pairs"]][:5] != [f"p{k}" for k in range(5)]
    repeats = [(k, pair) for k, pair in enumerate(plans[0]["pairs"]) if "repeat_of" in pair]
    assert len(repeats) == 2
    for k, pair in repeats:
        first = plans[0]["pairs"][pair["repeat_of"]]
        assert (pair["left"], pair["right"], pair["prompt"]) == (first["right"], first["left"], first["prompt"]) and k >= 20


def test_a_folder_of_candidates(tmp_path, capsys):
    from eval.folders import write_image
    folder = tmp_path / "cand <i>"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        image = Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))
        if k < 3:
            write_image(image, HOSTILE, folder / f"{k}.png")  # as eval.generate does
        else:
            image.save(folder / "own.jpg")
    with pytest.raises(UserError, match=r"own.jpg has no prompt: write it into own.txt"):
        judge.main(["--candidates", folder, "--output", tmp_path / "page.html"])
    (folder / "own.txt").write_text(HOSTILE + "\n")
    judge.main(["--candidates", folder, "--output", tmp_path / "page.html"])
    plan = page_content(tmp_path / "page.html")["plan"]
    assert len(plan["pairs"]) == 6 and {pair["prompt"] for pair in plan["pairs"]} == {HOSTILE}
    assert "6 pairs of 4 images" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cand <i>", "page.html"]


def test_bad_input_is_one_line(make_manifest, tmp_path, capsys):
    a, b = make_manifest("a", PROMPTS), make_manifest("b", PROMPTS, seed=1)
    out = ["--output", tmp_path / "page.html"]
    for flags, why in (([], "either --manifests or --candidates"), (["--candidates", tmp_path / "none"], "no such folder"),
                       (["--manifests", a, b, "--labels", "one"], "names 1 models for 2 manifests"),
                       (["--manifests", a, b, "--labels", "one", " "], "none of them empty"),
                       (["--manifests", a, tmp_path / "no.json"], "no manifest at")):
        with pytest.raises(UserError, match=why):
            judge.main([*flags, *out])
    image = next(a.parent.glob("*cfg/1_*.png"))
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 10 images cannot be read .*--skip_missing"):
        judge.main(["--manifests", a, b, *out])
    judge.main(["--manifests", a, b, *out, "--skip_missing"])
    image.write_bytes(next(b.parent.glob("*cfg/1_*.png")).read_bytes())
    judge.main(["--manifests", a, b, *out])
    told = capsys.readouterr()
    assert "1 of 5 pairs have an image that cannot be read" in told.err
    assert "1 of 5 pairs show the same image twice" in told.err and "4 pairs" in told.out
