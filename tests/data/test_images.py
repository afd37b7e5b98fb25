"""From an image to the VAE's input."""

import torch

from data.images import cut_square, scale_pixels
from tests.data.tables import stripes


def to_pixels(image, resolution, **how):
    return scale_pixels(cut_square(image, resolution, **how))


def test_pixels_are_resized_cropped_flipped_and_scaled():
    pixels = to_pixels(stripes(128, 64), 64)
    assert pixels.shape == (3, 64, 64) and pixels.min() == -1 and pixels.max() == 1
    assert (pixels[:, :, 0] == -1).all() and (pixels[:, :, -1] == 1).all(), "the centre is kept"
    assert (to_pixels(stripes(128, 64), 64, crop=torch.tensor([0.0, 0.0])) == -1).all(), "the left end"
    assert (to_pixels(stripes(128, 64), 64, crop=torch.tensor([0.0, 0.999])) == 1).all(), "the right end"
    assert torch.equal(to_pixels(stripes(128, 64), 64, flip=True), pixels.flip(2))
    assert to_pixels(stripes(640, 1000), 64).shape == (3, 64, 64)
