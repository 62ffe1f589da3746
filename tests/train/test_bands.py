"""A student of views with any number of bands: what is measured of them, that it trains on all of them, and what teachers see of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import train_quietly

from mrmae.extract.run import Options, extract_features
from mrmae.extract.teachers import build_teacher, parse_teacher
from mrmae.probe.sources import student_source
from mrmae.shards.cache import open_cache
from mrmae.shards.format.spec import ViewRecipe, encoding_of
from mrmae.train import export, fit
from mrmae.train.method import Batch, CacheInfo, Masks, build_model
from mrmae.train.method.recipe import load_recipe
from mrmae.train.ranks import Ranks
from mrmae.train.run import build_run
from mrmae.train.setup import Setup

BANDS, SIDE = 14, 32
SMALL = ["student.model=test_vit", "student.decoder={depth: 1, width: 32, heads: 4}", "optim.batch_size=4", "optim.epochs=2", "optim.warmup_epochs=1",
         "optim.lr_per_256=0.1"]  # fmt: skip


def scenes(n: int) -> dict[str, np.ndarray[Any, Any]]:
    """14 bands of 16 bits whose means, spreads and contents differ; band 9 does not vary."""
    draw, found = np.random.default_rng(5), {}
    for i in range(n):
        coarse = np.kron(draw.random((4, 4, BANDS)), np.ones((SIDE // 4, SIDE // 4, 1)))
        values = 300 * np.arange(1, BANDS + 1) + coarse * 100 * np.arange(1, BANDS + 1)
        values[..., 8] = 777
        found[f"{i}.npy"] = values.astype(np.uint16)
    return found


@pytest.fixture(scope="module")
def bands_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bands")
    for key, array in scenes(12).items():
        with open(folder / key, "wb") as file:
            np.save(file, array)
    recipe = ViewRecipe(SIDE, crop_scale=(1, 1), encoding=f"npy:{BANDS}xuint16")
    options = Options([folder], folder.parent / "bands.cache", recipe, teachers=("vit=timm:test_vit/random?bands=4,3,2&levels=0,6000",), grid=4,
                      device="cpu", workers=2, batch_size=4, shard_samples=4, dtype="float16")  # fmt: skip
    extract_features(options, say=lambda line: None)
    return folder.parent / "bands.cache"


def test_a_teacher_sees_its_bands_as_an_rgb_view_of_them(bands_cache: Path) -> None:
    cache = open_cache(bands_cache)
    column = cache.columns["vit.pre_tail"]
    assert (column.spec.bands, column.spec.levels) == ((4, 3, 2), (0.0, 6000.0))
    pixels = cache.read_pixels(range(4), [0] * 4)
    rgb = pixels.double()[..., [3, 2, 1]] / 6000 * 255
    plain = build_teacher(
        parse_teacher("vit=timm:test_vit/random"), grid=4, view_size=SIDE, device="cpu", precision="fp32"
    )
    expected = plain.forward(rgb.float()).tokens
    assert plain.spec.bands is None
    stored = cache.read_tokens("vit.pre_tail", range(4), [0] * 4)
    assert torch.allclose(stored, expected, rtol=2e-3, atol=2e-3)  # float16
    other = plain.forward(pixels.double()[..., [1, 2, 3]].float() / 6000 * 255).tokens
    assert not torch.allclose(stored, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "query, views, bands, levels",
    [
        ("", "jpeg95", None, None),
        ("", "png16", (1, 1, 1), (0.0, 65535.0)),
        ("", "npy:3xfloat32", (1, 2, 3), (0.0, 1.0)),
        ("?levels=200,310.5", "npy:1xfloat32", (1, 1, 1), (200.0, 310.5)),
        ("?bands=3,2,1", "npy:14xuint8", (3, 2, 1), (0.0, 255.0)),
        ("?bands=3,2,1", "png", (3, 2, 1), (0.0, 255.0)),
    ],
)
def test_what_a_teacher_sees_is_said(query: str, views: str, bands: Any, levels: Any) -> None:
    asked = parse_teacher(f"a=timm:test_vit/random{query}")
    spec = build_teacher(asked, grid=4, view_size=SIDE, device="cpu", precision="fp32", views=encoding_of(views)).spec
    assert (spec.bands, spec.levels) == (bands, levels)


@pytest.mark.parametrize(
    "query, views, said",
    [
        ("", "npy:14xuint16", r"a=timm:test_vit.random: sees red, green and blue, and the views have 14 bands of uint16; .* add \?bands=3,2,1"),
        ("?bands=15,2,1", "npy:14xuint16", "asks for band 15, and the views have 14 bands"),
        ("?bands=4,2,1", "jpeg95", "asks for band 4"),
        ("?bands=3,2", "png", r"\?bands=3,2: expected 3 numbers of bands, from 1 to 32"),
        ("?bands=0,1,2", "png", "expected 3 numbers of bands"),
        ("?levels=5,5", "png", r"\?levels=5,5: expected two numbers, the lower first"),
        ("?levels=nan,5", "png", "expected two numbers"),
    ],
)  # fmt: skip
def test_bands_that_cannot_be_seen_are_refused(query: str, views: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked = parse_teacher(f"a=timm:test_vit/random{query}")
        build_teacher(asked, grid=4, view_size=SIDE, device="cpu", precision="fp32", views=encoding_of(views))


def test_mean_and_std_of_every_band_are_measured_and_kept(bands_cache: Path, tmp_path: Path) -> None:
    cache = open_cache(bands_cache)
    recipe, (told,) = fit.fitted_bands(load_recipe("mae"), cache, cache.numbers)
    every = np.stack(list(scenes(12).values())).astype(np.float64) / 65535
    std = every.std((0, 1, 2))
    std[8] = 1
    assert np.allclose(recipe.prepare.mean, every.mean((0, 1, 2)), rtol=1e-5)
    assert (
        np.allclose(recipe.prepare.std, std, rtol=1e-5) and "14 bands of uint16" in told and "count 65535 as 1" in told
    )
    run = build_run(bands_cache, tmp_path / "run", load_recipe("mae", SMALL), Ranks(), Setup(device="cpu"))
    assert run.recipe.prepare.mean == recipe.prepare.mean and not run.recipe.fit
    seen = run.model.patches_at(cache.read_pixels(cache.numbers, cache.numbers * 0), torch.arange(16).expand(12, -1))
    by_band = seen.unflatten(2, (BANDS, -1)).transpose(1, 2).flatten(2).transpose(0, 1).flatten(1)
    others = [band for band in range(BANDS) if band != 8]
    assert by_band.mean(1).abs().max() < 1e-3 and (by_band.std(1)[others] - 1).abs().max() < 1e-2


def test_numbers_of_three_channels_do_not_fit_fourteen(bands_cache: Path, tmp_path: Path) -> None:
    recipe = load_recipe("mae", [*SMALL, "prepare.mean=[0.5, 0.5, 0.5]"])
    with pytest.raises(
        ValueError,
        match=r"prepare.mean has 3 numbers; the cache's images have 14 channels; .* fit: \[prepare.mean, prepare.std\]",
    ):
        build_run(bands_cache, tmp_path / "run", recipe, Ranks(), Setup(device="cpu"))


def test_a_student_trains_on_all_bands_and_is_exported_with_them(bands_cache: Path, tmp_path: Path) -> None:
    said = train_quietly(bands_cache, tmp_path / "run", load_recipe("mr-mae", SMALL), panels_every=2)
    assert np.isfinite(said["loss"]) and list((tmp_path / "run" / "panels").glob("*.png"))
    student = export.load_student(tmp_path / "run" / "student")
    assert student.patch_embed.proj.in_channels == BANDS and len(student.pretrained_cfg["mean"]) == BANDS
    card = (tmp_path / "run" / "student" / export.CARD).read_text()
    assert "14 bands, whose numbers are divided by 65535" in card
    with pytest.raises(ValueError, match="reads 14 bands; one that reads RGB"):
        student_source(tmp_path / "run", size=0, device="cpu", precision="fp32")


@pytest.mark.parametrize("channels, unit", [(14, 65535), (1, 65535), (5, 1)])
def test_mcmae_reads_any_number_of_bands_in_any_dtype(channels: int, unit: int) -> None:
    about = CacheInfo(32, (2, 2), channels=channels, unit=unit)
    recipe = load_recipe("mae", ["student.model=test_mcmae", "student.decoder={depth: 1, width: 32, heads: 4}", "mask.n_keep=2",
                                 f"prepare.mean={[0.5] * channels}", f"prepare.std={[0.25] * channels}"])  # fmt: skip
    model = build_model(recipe, about)
    numbers = torch.rand(2, 32, 32, channels) * unit
    pixels = numbers if unit == 1 else numbers.round().to(torch.uint16)
    masks = Masks(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2], [0, 3]]))
    loss, _ = model(Batch(torch.arange(2), pixels, {}), masks)
    loss.backward()
    same, _ = model(Batch(torch.arange(2), pixels.float(), {}), masks)
    assert torch.equal(loss, same) and model.student.patch_embed1.proj.weight.grad.shape[1] == channels
    patches = (pixels.float() / unit - 0.5) / 0.25
    patches = patches.view(2, 2, 16, 2, 16, channels).permute(0, 1, 3, 5, 2, 4).flatten(1, 2).flatten(2)
    assert torch.allclose(model.patches_at(pixels, masks.ids_keep)[0], patches[0, [0, 3]], atol=1e-5)
