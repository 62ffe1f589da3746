"""What a person writes: NAME=LIBRARY:MODEL[/TAG][@FILE][?key=value&...]."""

import pytest

from mrmae.extract.teachers.address import OUR_KEYS, parse_teacher
from mrmae.extract.teachers.teacher import DEFAULT_TEACHERS


def test_the_forms_of_a_request():
    clip, dino = (parse_teacher(text) for text in DEFAULT_TEACHERS)
    assert (clip.name, clip.library, clip.model, clip.tag) == ("clip", "open_clip", "ViT-B-16-quickgelu", "openai")
    assert (dino.library, dino.model, dino.tag, dino.weights) == ("timm", "vit_base_patch16_224", "dino", "hub")
    assert dino.where == "dino=timm:vit_base_patch16_224.dino"
    cnn = parse_teacher("cnn=timm:mobilenetv2_100@/a b/x?y@z.pt?pad_type=same&mean=0.5&depth=2&x=(1,2)&y=true&tap=LAST")
    assert (cnn.file, cnn.weights, cnn.tap, cnn.mean) == ("/a b/x?y@z.pt", "file", "last", (0.5, 0.5, 0.5))
    assert cnn.options == {"pad_type": "same", "depth": 2, "x": (1, 2), "y": True}
    assert parse_teacher("a=timm:m@what?.pth").file == "what?.pth"
    random = parse_teacher("a=timm:vit_base_patch16_224.dino/random")
    assert (random.weights, random.tag, random.where) == ("random", "dino", "a=timm:vit_base_patch16_224/random")
    assert parse_teacher("a=open_clip:M/t@f").tag == "t"
    assert set(OUR_KEYS) == {"tap", "mean", "std", "interpolation", "input_size", "activation", "bands", "levels"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("vit_base_patch16_224", "has no name or no library; expected NAME=LIBRARY:MODEL"),
        ("a=vit", "has no name or no library"),
        ("a.b=timm:vit", "'a.b' cannot name a teacher"),
        ("pixels=timm:vit", "'pixels' cannot name a teacher"),
        ("a=tim:vit", "unknown library 'tim'; expected open_clip, timm or python"),
        ("a=timm:@f", "has no model or an empty @FILE"),
        ("a=timm:vit@", "has no model or an empty @FILE"),
        ("a=timm:hf-hub:x/y", "has no model or an empty @FILE"),
        ("a=timm:vit/random@f", "random weights and for a file"),
        ("a=timm:vit?mean=0.5,0.5", r"\?mean=0.5,0.5: has 2 numbers"),
        ("a=timm:vit?std=0", "a standard deviation must be above zero"),
        ("a=timm:vit?mean=x", "could not convert"),
        ("a=timm:vit?input_size=big", "a whole number above zero"),
        ("a=timm:vit?interpolation=lanczos", "expected bilinear, bicubic, nearest"),
        ("a=timm:vit?x=1&x=2", "'x=2' is not key=value, or the key stands twice"),
        ("a=timm:vit?x=1&y", "'y' is not key=value"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_teacher(text)
