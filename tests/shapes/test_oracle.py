import random

import numpy as np
import pytest
from PIL import Image

from eval.metrics import load_metric
from shapes.drawing import FLAW_NAMES, caption, parse, random_drawing, random_flaws, render, wrong_colour, wrong_shape
from shapes.oracle import judge
from common.errors import UserError

ATTRIBUTES = ("shape", "colour", "background", "position")


@pytest.mark.parametrize("resolution", (32, 64, 256))
def test_rendered_truth_is_right_in_at_least_99_percent(resolution):
    rng = random.Random(0)
    drawings = [random_drawing(rng) for _ in range(400)]
    judgements = [judge(render(drawing, resolution), caption(drawing)) for drawing in drawings]
    assert np.mean([judgement.all_right for judgement in judgements]) >= 0.99
    assert min(judgement.cleanliness for judgement in judgements) > 0.9


@pytest.mark.parametrize("name", FLAW_NAMES)
def test_the_score_falls_monotonically_with_each_degradation(name):
    rng = random.Random(1)
    drawings = [random_drawing(rng) for _ in range(80)]

    def mean_scores(strength):
        judgements = [judge(render(drawing, 32, random_flaws(random.Random(index), name, strength, strength)),
                            caption(drawing)) for index, drawing in enumerate(drawings)]
        return np.mean([(judgement.score, judgement.cleanliness) for judgement in judgements], axis=0)

    scores = np.array([mean_scores(strength) for strength in (0, 0.2, 0.4, 0.6, 0.8, 1.0)])
    assert (np.diff(scores, axis=0) < 0).all(), scores


def test_one_wrong_attribute_is_named():
    rng = random.Random(2)
    for _ in range(100):
        drawing = random_drawing(rng)
        for other, attribute in ((wrong_colour(drawing, rng), "colour"), (wrong_shape(drawing, rng), "shape")):
            judgement = judge(render(other, 64), caption(drawing))
            assert [name for name in ATTRIBUTES if not getattr(judgement, name)] == [attribute]


@pytest.mark.parametrize("drawn, wrong", [
    ("a red circle on a white background", ["background"]),
    ("a red circle at the top left on a blue background", ["position"]),
    ("a red square at the top left on a blue background", ["shape", "position"]),
])
def test_what_is_wrong_against_a_red_circle_on_blue(drawn, wrong):
    judgement = judge(render(parse(drawn), 64), "a red circle on a blue background")
    assert [name for name in ATTRIBUTES if not getattr(judgement, name)] == wrong


def test_images_without_a_drawing():
    prompt = "a red circle on a blue background"
    empty = judge(Image.new("RGB", (64, 64), (40, 80, 215)), prompt)
    noise = judge(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), prompt)
    assert empty.background and not (empty.shape or empty.colour or empty.position)
    assert not noise.shape and not noise.all_right
    assert noise.score < empty.score < judge(render(parse(prompt), 64), prompt).score == pytest.approx(1, abs=0.02)


def test_it_is_a_metric():
    prompts = ["a red circle on a blue background", "a red square on a blue background"]
    images = [render(parse(prompts[0]), 64).convert("RGBA")] * 2
    scores = load_metric("oracle").score(images, prompts)
    assert scores.shape == (2,) and scores[0] > 0.98 > 0.9 > scores[1]
    with pytest.raises(UserError, match="drawings only"):
        load_metric("oracle").score(images[:1], ["a photo of a cat"])
