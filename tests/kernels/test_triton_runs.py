"""Which images are read as words of runs; that the kernels are right is in `parity.py`, what they compile to in `test_gate.py`."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mrmae.kernels.triton_runs import in_pairs, words_of


def decoded(b: int = 2, h: int = 32, w: int = 48, c: int = 3, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Interleaved images as a [b, c, h, w] view."""
    return torch.arange(b * h * w * c).reshape(b, h, w, c).to(dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("c", "patch"), [(1, 8), (2, 16), (3, 16), (3, 32), (4, 8)])
def test_the_words_of_an_image_are_its_bytes(c: int, patch: int) -> None:
    image = decoded(c=c)
    words = words_of(image, patch)
    assert words is not None and words.shape == (2, 32, 48 * c // 8) and words.data_ptr() == image.data_ptr()
    low = (words[1, 5, 1] >> 8) & 255
    assert low == image.permute(0, 2, 3, 1)[1, 5].flatten()[9]
    inner = image[:, :, 2:, 8:]
    again = words_of(inner, patch)
    assert again is not None and (again[1, 0, 0] & 255) == image[1, 0, 2, 8], "a crop at a multiple of 8 bytes"


PAIRS = {
    "a row of 48 * 3 bytes": (decoded(), 16, True),
    "patches of 8, of 24 bytes a row": (decoded(), 8, False),
    "four channels, patches of 32 bytes a row": (decoded(c=4, w=40), 8, True),
    "a crop at 16 pixels": (decoded(w=64)[:, :, 2:, 16:], 16, True),
    "two channels": (decoded(c=2), 16, True),
    "four channels, a crop at 8 pixels": (decoded(c=4)[..., 8:24], 8, True),
    "one channel: a run is one word": (decoded(c=1), 16, False),
    "a crop at 8 pixels": (decoded(w=64)[..., 8:56], 16, False),
    "rows 56 pixels apart": (decoded(w=56)[..., :48], 16, False),
    "images an odd number of words apart": (
        torch.zeros(2 * 4616, dtype=torch.uint8).as_strided((2, 3, 32, 48), (4616, 1, 144, 3)),
        16,
        False,
    ),
}


@pytest.mark.parametrize("what", PAIRS)
def test_images_in_multiples_of_16_bytes_are_read_in_pairs_of_words(what: str) -> None:
    image, patch, expected = PAIRS[what]
    words = words_of(image, patch)
    assert words is not None and in_pairs(words, image.shape[1], patch) == expected


OTHER_ROADS = {
    "planar": (decoded().contiguous(), 16),
    "floats": (decoded(dtype=torch.float32), 16),
    "two bytes a value": (decoded(dtype=torch.uint16), 16),
    "many channels": (decoded(c=13), 8),
    "no whole runs": (decoded(h=28, w=56), 14),
    "rows off their alignment": (decoded(w=49)[..., :48], 16),
    "a beginning off its alignment": (decoded()[..., 1:33], 16),
    "every second pixel": (decoded(w=96)[..., ::2], 16),
    "channels left out": (decoded(c=4)[:, :3], 16),
}


@pytest.mark.parametrize("what", OTHER_ROADS)
def test_other_images_go_the_other_road(what: str) -> None:
    image, patch = OTHER_ROADS[what]
    assert words_of(image, patch) is None
