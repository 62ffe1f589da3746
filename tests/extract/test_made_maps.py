"""Maps that are computed from a teacher's stored tokens: what their values are, and that they are columns like any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

from mrmae.extract.inspect.cli import main
from mrmae.extract.made_maps import fit_kmeans, is_made, parse_made
from mrmae.shards.cache import open_cache
from mrmae.shards.format import load_plan

VIT = "vit=timm:test_vit/random"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["a red square", "the sky above a field"]
Extract = Any


def inspect(*words: str | Path) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def photos(folder: Path, first: int, n: int) -> Path:
    """n smooth random images more."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A whole CLIP of open_clip, tiny, with random weights: the --teacher that names it, and the model."""
    root = tmp_path_factory.mktemp("tiny-clip")
    (root / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(root / "tiny-clip.json")
    torch.manual_seed(5)
    model = open_clip.model.CLIP(TINY["embed_dim"], TINY["vision_cfg"], TINY["text_cfg"]).eval()
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "clip.safetensors")
    return f"clip=open_clip:tiny-clip@{root / 'clip.safetensors'}?activation=gelu", model


@pytest.fixture(scope="module")
def made(
    extract: Extract, tiny_clip: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder: `images`, `prompts.txt` and `c`, a cache of 12 of them in 2 views with the maps `say` and `parts`; and how it was made."""
    root = tmp_path_factory.mktemp("made")
    (root / "prompts.txt").write_text("\n".join([PROMPTS[0], "", f"  {PROMPTS[1]} "]))
    how = {"maps": [f"say=text:clip:{root / 'prompts.txt'}", "parts=kmeans:clip:5"], "views": 2, "shard_samples": 8}
    extract(photos(root / "images", 0, 12), root / "c", tiny_clip[0], **how)
    return root, how


def values(path: Path, column: str, view: int) -> np.ndarray[Any, Any]:
    cache = open_cache(path)
    found = cache.read_column(column, cache.numbers, cache.numbers * 0 + view, ("map",))["map"].numpy()
    return np.asarray(found)


def test_text_is_the_largest_cosine_of_projected_tokens_with_the_prompts(
    made: tuple[Path, dict[str, Any]], tiny_clip: tuple[str, Any]
) -> None:
    cache = open_cache(made[0] / "c")
    with torch.no_grad():
        texts = tiny_clip[1].encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS)).double()
    for view in (0, 1):
        tokens = cache.read_tokens("clip.projected", cache.numbers, cache.numbers * 0 + view).double()
        norms = tokens.norm(dim=-1)[..., None] * texts.norm(dim=-1)
        cosine = (torch.einsum("bld,pd->blp", tokens, texts) / norms).amax(-1).numpy()
        said = values(made[0] / "c", "say.map", view)
        assert said.dtype == np.float16 and np.abs(said - cosine).max() < 1e-3 and cosine.std() > 0.01


def test_kmeans_is_the_nearest_centroid_of_the_codebook_for_tokens_as_they_are_read(
    made: tuple[Path, dict[str, Any]],
) -> None:
    cache = open_cache(made[0] / "c")
    centroids = np.load(made[0] / "c" / "codebooks" / "parts.npy").astype(np.float64)
    for view in (0, 1):
        tokens = cache.read_tokens("clip.pre_tail", cache.numbers, cache.numbers * 0 + view).numpy()
        apart = ((tokens[:, :, None].astype(np.float64) - centroids) ** 2).sum(-1)
        assert np.array_equal(values(made[0] / "c", "parts.map", view), apart.argmin(-1))
    assert len(np.unique(values(made[0] / "c", "parts.map", 0))) == 5


def test_fewer_different_tokens_than_centroids_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the 200 tokens of the first images are only 2 different ones; expected at least 3"
    ):
        fit_kmeans(torch.tensor([[0.0], [1.0]]).repeat(100, 1), 3, "here")


def test_parts_a_kill_and_a_map_that_is_added_later_give_the_same_bytes(
    made: tuple[Path, dict[str, Any]], extract: Extract, tiny_clip: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    root, how = made
    whole, shared, later = root / "c", tmp_path / "shared", tmp_path / "later"
    for part in ("0/2", "1/2"):
        extract(root / "images", shared, tiny_clip[0], **how, shards=part)
    shutil.rmtree(shared / "commits" / "1" / "say.map")  # as if a kill had come before
    (shared / "commits" / "0" / "clip.pre_tail" / "000001.json").unlink()
    (shared / "commits" / "0" / "parts.map" / "000001.json").unlink()
    extract(root / "images", shared, tiny_clip[0], **how)
    extract(root / "images", later, tiny_clip[0], **{**how, "maps": []})
    monkeypatch.setattr(
        "mrmae.extract.asked_teachers.build_teacher", lambda *_, **__: pytest.fail("no teacher is needed")
    )
    extract(root / "images", later, tiny_clip[0], **how)
    manifests = {path: (path / "manifest.json").read_bytes() for path in (whole, shared, later)}
    assert len(set(manifests.values())) == 1
    assert inspect("verify", later, "--full").exit_code == 0


def test_appended_images_get_ids_of_the_same_centroids(
    made: tuple[Path, dict[str, Any]], extract: Extract, tiny_clip: tuple[str, Any], tmp_path: Path
) -> None:
    root, how = made
    images = tmp_path / "images"
    shutil.copytree(root / "images", images)
    shutil.copytree(root / "c", tmp_path / "c")
    before = [(tmp_path / "c" / "codebooks" / name).read_bytes() for name in ("say.npy", "parts.npy")]
    extract(photos(images, 12, 5), tmp_path / "c", tiny_clip[0], **how, append=True)
    cache = open_cache(tmp_path / "c")
    assert len(cache.numbers) == 17
    assert [(tmp_path / "c" / "codebooks" / name).read_bytes() for name in ("say.npy", "parts.npy")] == before
    tokens = cache.read_tokens("clip.pre_tail", cache.numbers, cache.numbers * 0)
    centroids = torch.from_numpy(np.load(tmp_path / "c" / "codebooks" / "parts.npy"))
    apart = (tokens[:, :, None] - centroids).square().sum(-1)
    assert np.array_equal(values(tmp_path / "c", "parts.map", 0), apart.argmin(-1).numpy())
    assert inspect("verify", tmp_path / "c", "--full").exit_code == 0


def test_a_computed_map_is_shown_verified_repaired_converted_and_dropped(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    cache = tmp_path / "c"
    shutil.copytree(made[0] / "c", cache)
    told = " ".join(inspect("show", cache).output.split())
    assert "nearest of 5 centroids of clip.pre_tail" in told and "cosine of clip.projected" in told
    ids = open_cache(cache).ids
    for words in (["--format", "webdataset"], ["--dtype", "float16"]):
        assert inspect("convert", cache, tmp_path / words[1], *words).exit_code == 0
        assert inspect("verify", tmp_path / words[1], "--full").exit_code == 0
        for column in ("say.map", "parts.map"):
            assert open_cache(tmp_path / words[1]).ids[column] == ids[column]
            assert np.array_equal(values(tmp_path / words[1], column, 1), values(cache, column, 1))
    manifest = (cache / "manifest.json").read_bytes()
    for name in ("say", "parts"):
        book = cache / "codebooks" / f"{name}.npy"
        content = bytearray(book.read_bytes())
        content[-1] ^= 1
        book.write_bytes(content)
    damaged = inspect("verify", cache, "--full")
    assert damaged.exit_code == 1 and "codebooks/say.npy" in damaged.output and "codebooks/parts.npy" in damaged.output
    (cache / "commits" / "0" / "parts.map" / "000000.json").write_text("damaged")
    repaired = inspect("repair", cache, "--run", "--yes")
    assert repaired.exit_code == 0, repaired.output
    assert (cache / "manifest.json").read_bytes() == manifest and inspect("verify", cache, "--full").exit_code == 0
    assert inspect("drop", cache, "parts", "--yes").exit_code == 0
    assert [file.name for file in (cache / "codebooks").iterdir()] == ["say.npy"]
    gone = inspect("drop", cache, "clip.pre_tail", "--yes")
    assert (
        gone.exit_code == 0
        and "say.map was computed from clip.pre_tail and stays as it is; without that" in gone.output
    )
    assert inspect("verify", cache, "--full").exit_code == 0
    left = inspect("convert", tmp_path / "float16", tmp_path / "less", "--drop", "clip")
    assert left.exit_code == 0 and "parts.map was computed from clip.pre_tail and stays" in left.output


def test_another_codebook_than_the_plans_is_refused(
    made: tuple[Path, dict[str, Any]], extract: Extract, tiny_clip: tuple[str, Any], tmp_path: Path
) -> None:
    root, how = made
    cache = tmp_path / "c"
    shutil.copytree(root / "c", cache)
    (tmp_path / "other.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"model_options\.prompts is .* there and \['a cat'\] in this command"):
        extract(
            root / "images",
            cache,
            tiny_clip[0],
            **{**how, "maps": [f"say=text:clip:{tmp_path}/other.txt", how["maps"][1]]},
        )
    with pytest.raises(ValueError, match=r"model_options\.k is 5 there and 6 in this command"):
        extract(root / "images", cache, tiny_clip[0], **{**how, "maps": [how["maps"][0], "parts=kmeans:clip:6"]})
    plan = (cache / "plan.json").read_text()
    sha256 = load_plan(cache).quantisers["parts.map"].codebook["sha256"]  # type: ignore[index]
    (cache / "manifest.json").unlink()
    (cache / "codebooks" / "parts.npy").unlink()
    (cache / "plan.json").write_text(plan.replace(sha256, "0" * 64))
    with pytest.raises(
        ValueError, match=r"codebooks/parts\.npy: is lost or damaged, and what is computed now is not what map parts"
    ):
        extract(root / "images", cache, tiny_clip[0], **how)


def test_what_cannot_be_a_computed_map_is_said_before_anything_slow(
    made: tuple[Path, dict[str, Any]], extract: Extract, tiny_clip: tuple[str, Any], tmp_path: Path
) -> None:
    root, prompts, clip = made[0], made[0] / "prompts.txt", tiny_clip[0]
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "long.txt").write_text("a very " * 30 + "long prompt")
    weights = safetensors.torch.load_file(clip.partition("@")[2].partition("?")[0])
    visual = tmp_path / "visual.safetensors"
    safetensors.torch.save_file({k: v for k, v in weights.items() if k.startswith("visual.")}, visual)
    alone = f"clip=open_clip:tiny-clip@{visual}?activation=gelu"
    nobody = "no=timm:such_model"
    for teachers, text, said in (
        ([nobody], f"m=text:no:{tmp_path}/absent.txt", r"absent\.txt cannot be read"),
        ([nobody], f"m=text:no:{tmp_path}/empty.txt", r"empty\.txt has 0 prompts; expected 1 to 4096"),
        ([nobody], "m=kmeans:no:193", r"K is 193; .* the first 12 images, which have 192 tokens"),
        ([nobody], "m=kmeans:no:65537", r"K is 65537; expected a whole number of 2 to 65536"),
        ([nobody], "m=kmeans:no:many", r"K is many"),
        ([nobody], "m=kmeans:5", r"expected NAME=text:TEACHER:PROMPTS\.txt or"),
        ([nobody], "m=kmeans:vit:5", r"vit is not asked for; expected a teacher of this command, no"),
        ([nobody], f"m=text:no:{prompts}", r"no=timm:such_model has no text tower"),
        ([nobody], "no=kmeans:no:5", r"a teacher has that name"),
        ([nobody], "m=attention:no", r"holds its teacher's attention of each patch already; .*mask\.source=no"),
        ([nobody], "m=norm:no", r"mask\.source=norm:no"),
        ([VIT], "m=kmeans:vit.block_9:5", r"vit\.block_9 is not asked for; it has vit\.pre_tail, vit\.post_ln"),
        ([f"{VIT}?tap=block_1,block_2"], "m=kmeans:vit:5", r"vit has 2 columns; expected one of them by its name; it has vit\.block_1"),
        ([f"{clip}&tap=block_1"], f"m=text:clip:{prompts}", r"clip has no projection"),
        ([alone], f"m=text:clip:{prompts}", r"hold an image tower alone"),
        ([clip], f"m=text:clip:{tmp_path}/long.txt", r"the prompt 'a very .* has 64 tokens; its text tower reads 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            extract(root / "images", tmp_path / "c", *teachers, maps=[text])
        assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="m is given twice"):
        extract(root / "images", tmp_path / "c", nobody, maps=["m=kmeans:no:5", "m=kmeans:no:6"])
    assert (
        not is_made("m=text/kmeans.npz") and parse_made("m=kmeans:a.block_1:7", images=9, grid=4).teacher == "a.block_1"
    )
