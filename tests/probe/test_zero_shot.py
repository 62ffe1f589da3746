"""Zero-shot classes and image-text retrieval: planted embeddings, and a tiny open_clip model against its own functions."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from PIL import Image

from mrmae.extract.run import Options, extract_features
from mrmae.probe.compare import compare_sources
from mrmae.probe.data import open_data
from mrmae.probe.job import ProbeOptions
from mrmae.probe.retrieval import by_key, captions_beside, grouped, inverted, list_captions, places
from mrmae.probe.run import probe_features
from mrmae.probe.settings import Retrieval, ZeroShot, settings_from
from mrmae.probe.sources import column_features, open_source
from mrmae.probe.zero_shot import class_probabilities, class_texts, prompts_from
from mrmae.shards.format.spec import ViewRecipe

VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
NAME = "ViT-B-16-quickgelu"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A tiny CLIP with random weights, made by open_clip, and its address."""
    torch.manual_seed(0)
    model = open_clip.create_model(NAME, vision_cfg=VISION, text_cfg=TEXT, embed_dim=8).eval()
    file = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    options = {
        **VISION,
        "embed_dim": 8,
        "activation": "quickgelu",
        **{f"text_{key}": value for key, value in TEXT.items()},
    }
    return model, f"open_clip:{NAME}@{file}?" + "&".join(f"{key}={value}" for key, value in options.items())


def test_probabilities_are_softmax_of_a_hundred_cosines() -> None:
    images, classes = torch.tensor([[2.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    found = class_probabilities(images, classes)
    assert found[0].tolist() == pytest.approx([1, 0], abs=1e-12)
    assert float(found[1, 1]) == pytest.approx(1 / (1 + np.exp(60 - 80)), abs=1e-6)
    both = class_texts(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 5.0]]), [2, 1])
    assert torch.allclose(both, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_places_of_planted_embeddings_and_ties_count_against() -> None:
    texts, owned = grouped([["A cat."], ["a  CAT.", "two dogs"], ["an owl"]])
    assert texts == ["A cat.", "two dogs", "an owl"] and owned == [[0], [0, 1], [2]]
    assert inverted(owned, 3) == [[0, 1], [1], [2]]
    e = torch.eye(3)
    images = torch.stack([e[0], e[1] + 0.1 * e[0], e[0] + 0.5 * e[2]])
    assert places(images, e, owned).tolist() == [0, 0, 1]
    assert places(e, images, inverted(owned, 3)).tolist() == [0, 0, 0]
    same = torch.ones(4, 3)
    assert places(same, same, [[0], [1], [2], [3]]).tolist() == [3, 3, 3, 3], "where all is alike nothing is found"


def options(source: str, data: Path, out: Path, *sets: str, probes: tuple[str, ...] = ("zero-shot",)) -> ProbeOptions:
    return ProbeOptions(source, [str(data)], probes, settings_from(list(sets)), out=out, workers=2, batch_size=8)


def test_a_tiny_clip_is_scored_as_its_own_functions_would(clip: tuple[Any, str], images: Path, tmp_path: Path) -> None:
    model, source = clip
    for path in images.rglob("test/*/*.png"):
        (tmp_path / "data" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path.parent.name / path.name).write_bytes(path.read_bytes())
        (tmp_path / "data" / path.parent.name / path.with_suffix(".txt").name).write_text(
            f"{path.parent.name} {path.stem[-1]}"
        )
    (tmp_path / "prompts.txt").write_text("a photo of {}.\n\n{} up close\n")
    sets = (f"zero_shot.prompts={tmp_path / 'prompts.txt'}", "retrieval.ks=[1, 3]")
    zero, found, nn = probe_features(
        options(source, tmp_path / "data", tmp_path / "out", *sets, probes=("zero-shot", "retrieval", "rank")),
        say=lambda _: None,
    )

    keys = sorted(path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(view(tmp_path / "data" / key)) for key in keys]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    tokenizer = open_clip.get_tokenizer(NAME, context_length=12)
    with torch.no_grad():
        shown = model.encode_image((pixels - mean) / std, normalize=True)
        names = sorted({key.partition("/")[0] for key in keys})
        prompts = [
            model.encode_text(tokenizer([f"a photo of {n}.", f"{n} up close"]), normalize=True).mean(0) for n in names
        ]
        captions = model.encode_text(
            tokenizer([f"{key.partition('/')[0]} {Path(key).stem[-1]}" for key in keys]), normalize=True
        )
    logits = shown @ torch.nn.functional.normalize(torch.stack(prompts), dim=1).T
    truth = torch.tensor([names.index(key.partition("/")[0]) for key in keys])
    assert zero["accuracy"] == pytest.approx(float((logits.argmax(1) == truth).double().mean()))
    wanted = float((100 * logits).softmax(1).gather(1, truth[:, None]).mean())
    assert (
        zero["measures"][0]["mean probability of the true class"] == pytest.approx(wanted, abs=1e-4)
        and zero["n_train"] == 0
    )
    ranks = [int((row > row[i]).sum()) for i, row in enumerate(shown @ captions.T)]
    assert [row["accuracy"] for row in found["rows"][:2]] == pytest.approx(
        [np.mean(np.array(ranks) < k) for k in (1, 3)]
    )
    assert nn["measures"][0]["channels"] == 32, "other probes read the image tower's tokens"


@pytest.mark.soak
def test_two_activations_of_one_file_are_told_apart_on_the_same_images(
    clip: tuple[Any, str], images: Path, tmp_path: Path
) -> None:
    ours = clip[1].replace(NAME, NAME.removesuffix("-quickgelu"))  # a name that says nothing of the activation
    other = ours.replace("activation=quickgelu", "activation=gelu")
    found = compare_sources([ours, other], options("", images, tmp_path))["probes"]["zero-shot"]
    assert [row["source"] for row in found["rows"]] == [ours, other] and found["rows"][0]["id"] != found["rows"][1][
        "id"
    ]
    (pair,) = found["differences"]
    assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]


def test_a_column_of_projected_tokens_meets_the_texts_of_the_model_that_made_it(
    clip: tuple[Any, str], images: Path, tmp_path: Path
) -> None:
    model, source = clip
    address = source.partition("&text_")[0]
    made = Options(
        [images], tmp_path / "cache", ViewRecipe(32), [f"clip={address}&tap=projected"], grid=2, device="cpu", workers=2
    )
    extract_features(made, say=lambda _: None)
    cache = str(tmp_path / "cache")
    asked = options(f"{cache}#clip.projected", tmp_path / "cache", tmp_path / "out", f"zero_shot.text={source}")
    found = probe_features(asked, say=lambda _: None)[0]
    part = open_data([cache], tmp_path).test
    _, cls = column_features(open_source(f"{cache}#clip.projected"), part.numbers)
    tokenizer, names = open_clip.get_tokenizer(NAME, context_length=12), ["azure", "brick", "moss"]
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in names]))
    assert cls is not None
    answers = torch.nn.functional.cosine_similarity(cls[:, None].float(), texts[None], dim=-1).argmax(1)
    truth = torch.tensor([names.index(str(row.label)) for row in part.rows])
    assert found["accuracy"] == pytest.approx(float((answers == truth).double().mean()))
    other = {k: v + 1e-3 if k == "visual.proj" else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file({k: v.contiguous() for k, v in other.items()}, tmp_path / "o.safetensors")
    file = source.partition("@")[2].partition("?")[0]
    for text, told in ((source.replace(file, str(tmp_path / "o.safetensors")), "its image tower has other weights"),
                       ("", "a column does not keep its text tower")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            probe_features(
                options(asked.source, tmp_path / "cache", tmp_path / "no", f"zero_shot.text='{text}'"),
                say=lambda _: None,
            )


def view(path: Path) -> Any:
    from mrmae.probe.data import eval_view

    return eval_view(np.asarray(Image.open(path).convert("RGB")), 224, "bicubic")


def test_sources_without_texts_are_refused(trained: Path, images: Path, tiny_cache: Path, tmp_path: Path) -> None:
    for source, data in ((str(trained), images), (f"{tiny_cache}#a", tiny_cache)):
        with pytest.raises(
            ValueError, match="its features are not in a space with texts; expected open_clip:MODEL/TAG"
        ):
            probe_features(options(source, data, tmp_path), say=lambda _: None)


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", "a photo of a cat", "has no {} for the class's name"),
        ("p.yaml", "", "is empty or no mapping"),
        ("p.yaml", "cat: a cat", "has no prompt for class 'big_dog'"),
        ("p.json", '{"cat": "a {}", "big_dog": []}', "class 'big_dog' has \\[\\]"),
        ("p.yaml", "{", "cannot be read"),
        (None, "", "there is no such file"),
    ],
)
def test_prompts_that_cannot_be_are_refused(tmp_path: Path, name: str | None, text: str, told: str) -> None:
    path = tmp_path / (name or "none.txt")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=told):
        prompts_from(ZeroShot(prompts=str(path)), ["big_dog", "cat"])


def test_prompts_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("ein Foto einer Straße: {}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"p.txt: is not UTF-8 text \(invalid .* at byte 19\)"):
        prompts_from(ZeroShot(prompts=str(tmp_path / "p.txt")), ["a"])


def test_prompts_by_class(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("cat: ['a {}', 'small {}']\nbig_dog: a {}\nother: x\n")
    assert prompts_from(ZeroShot(prompts=str(tmp_path / "p.yaml")), ["big_dog", "cat"]) == {
        "big_dog": ["a big dog"],
        "cat": ["a cat", "small cat"],
    }


def test_captions_of_tables_find_their_images(tmp_path: Path) -> None:
    keys = ["train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg"]
    (tmp_path / "c.csv").write_text(
        "filepath\ttitle\n/data/train/a/1.jpg\tone, two\ntrain/b/1\tthree\n2.jpg\tfour\n2.jpg\tfive\n"
    )
    told = by_key(list_captions(Retrieval(captions=str(tmp_path / "c.csv"))), keys, "c.csv")
    assert told == {"train/a/1.jpg": ["one, two"], "train/b/1.jpg": ["three"], "test/a/2.jpg": ["four", "five"]}
    pyarrow.parquet.write_table(pyarrow.table({"key": ["2"], "caption": [["x", "y"]]}), tmp_path / "c.parquet")
    assert list_captions(Retrieval(captions=str(tmp_path / "c.parquet"))) == [("2", "x"), ("2", "y")]
    with pytest.raises(ValueError, match="'1.jpg' is the name of 2 images"):
        by_key([("1.jpg", "x")], keys, "c.csv")
    with pytest.raises(ValueError, match="'9.jpg' is no image of DATA, whose keys look like 'train/a/1.jpg'"):
        by_key([("9.jpg", "x")], keys, "c.csv")


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "holds no row"),
        ("a,b\n1,2\n", "has none of the columns filepath"),
        ("filepath,title\n1.jpg,\n", "the caption of '1.jpg' is empty"),
    ],
)
def test_tables_that_hold_no_captions_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        list_captions(Retrieval(captions=str(tmp_path / "c.csv")))


def test_captions_beside_images_in_folders_and_tars(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text(" a cat\n")
    assert captions_beside(str(tmp_path), ["a/1.jpg", "a/2.jpg"]) == {"a/1.jpg": ["a cat"]}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        data = b"a dog"
        member = tarfile.TarInfo("7.txt")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    assert captions_beside(str(tmp_path / "x.tar"), ["7.seg.png", "8.png"]) == {"7.seg.png": ["a dog"]}


def test_images_without_a_caption_are_told(clip: tuple[Any, str], images: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="12 of 12 test images have no caption, first 'test/azure/test-0.png'; .* NAME.txt beside NAME.jpg",
    ):
        probe_features(options(clip[1], images, tmp_path, probes=("retrieval",)), say=lambda _: None)


def test_an_image_tower_alone_has_no_texts_and_open_clip_models_are_not_fine_tuned(
    clip: tuple[Any, str], images: Path, tmp_path: Path
) -> None:
    model, source = clip
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in model.visual.state_dict().items()}, tmp_path / "v.safetensors"
    )
    alone = source.replace(source.partition("@")[2].partition("?")[0], str(tmp_path / "v.safetensors"))
    with pytest.raises(ValueError, match="hold an image tower alone"):
        probe_features(options(alone, images, tmp_path), say=lambda _: None)
    with pytest.raises(ValueError, match="image towers of open_clip are not fine-tuned here"):
        probe_features(options(source, images, tmp_path, probes=("finetune",)), say=lambda _: None)
