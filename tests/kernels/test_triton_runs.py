"""Which images are read as words of runs; that the kernels are right is in `parity.py`, what they compile to in `test_gate.py`."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mrmae.kernels.triton_runs import words_of


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
