import random

import numpy as np
import pytest

from shapes.drawing import (COLOURS, FLAW_NAMES, KINDS, Drawing, Flaws, Shape, caption, parse, random_drawing,
                            random_flaws, render, wrong_colour, wrong_shape)


def test_every_caption_reads_back():
    rng = random.Random(0)
    for _ in range(500):
        drawing = random_drawing(rng)
        assert parse(caption(drawing)) == drawing


def test_a_caption_in_words():
    drawing = parse("A  large orange cross at the top left on a blue background")
    assert drawing == Drawing((Shape("cross", "orange", "large", "at the top left"),), "blue")
    assert caption(drawing) == "a large orange cross at the top left on a blue background"
    two = parse("a red circle on the left and an orange square on the right on a white background")
    assert [shape.position for shape in two.shapes] == ["on the left", "on the right"]


@pytest.mark.parametrize("text", ["", "a red circle", "a mauve circle on a blue background", "a dog on a red background",
                                  "a red circle on a blue background, please"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no caption of a drawing"):
        parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_one_size_cover_one_area_at_their_place(kind):
    image = np.asarray(render(Drawing((Shape(kind, "black", "medium", "at the top left"),), "white"), 64), float)
    ink = (COLOURS["white"][0] - image[..., 0]) / (COLOURS["white"][0] - COLOURS["black"][0])
    assert ink.mean() == pytest.approx(np.pi * 0.19**2, rel=0.06)
    rows, columns = np.indices(ink.shape)
    centre = (rows * ink).sum() / ink.sum() / 64, (columns * ink).sum() / ink.sum() / 64
    assert centre == pytest.approx((0.3, 0.3), abs=0.02)


@pytest.mark.parametrize("name", FLAW_NAMES)
def test_a_stronger_flaw_changes_more(name):
    drawing = parse("a red square on a white background")
    clean = np.asarray(render(drawing, 64), float)

    def change(strength):
        images = [render(drawing, 64, random_flaws(random.Random(seed), name, strength, strength)) for seed in range(20)]
        return np.mean([np.abs(np.asarray(image, float) - clean).mean() for image in images])

    assert 0.1 < change(0.3) < change(0.6) < change(1.0)


def test_wrong_drawings_differ_in_one_attribute():
    rng = random.Random(1)
    for _ in range(100):
        drawing = random_drawing(rng)
        for other, attribute in ((wrong_colour(drawing, rng), "colour"), (wrong_shape(drawing, rng), "kind")):
            differences = [name for old, new in zip(drawing.shapes, other.shapes)
                           for name in ("kind", "colour", "size", "position") if getattr(old, name) != getattr(new, name)]
            assert differences == [attribute] and other.background == drawing.background


def test_rendering_is_repeatable():
    flaws = Flaws(ragged=1.0, seed=3)
    drawing = parse("a red circle on a blue background")
    assert render(drawing, 64, flaws).tobytes() == render(drawing, 64, flaws).tobytes()
    assert render(drawing, 64, flaws).tobytes() != render(drawing, 64, Flaws(ragged=1.0, seed=4)).tobytes()
