"""Images of any number of bands and more than 8 bits: into the cache and back, bit for bit; what cannot be kept so is said."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from mrmae.common.files import publish
from mrmae.extract.images.bands import decoded_as
from mrmae.extract.images.list import list_sources
from mrmae.extract.images.names import BAND_SUFFIXES
from mrmae.extract.inspect.cli import main as inspect_cli
from mrmae.extract.run import Options, extract_features
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format.spec import ViewRecipe, encoding_of
from mrmae.shards.format.views import BadImage, decode_view, draw_view, encode_view, render
from mrmae.shards.stats import read_stats

SIDE = 32
WHOLE: dict[str, Any] = {"size": SIDE, "crop_scale": (1, 1)}  # of square images: crop and flip, no resampling


def numbers(bands: int, dtype: str, seed: int = 0, side: int = SIDE) -> np.ndarray[Any, Any]:
    """Random numbers over the whole range of a dtype, [side, side, bands]."""
    draw = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (draw.standard_normal((side, side, bands)) * 300).astype(dtype)
    return draw.integers(0, np.iinfo(dtype).max, (side, side, bands), dtype, endpoint=True)


def tiff(array: np.ndarray[Any, Any], **how: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, metadata=None, **how)
    return out.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def png(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def extract(images: Path, cache: Path, encoding: str, teachers: tuple[str, ...] = (), **options: Any) -> Cache:
    recipe = {**WHOLE, **options.pop("recipe", {})}
    options = {"grid": 4, "device": "cpu", "workers": 2, "batch_size": 4, **options}
    if not cache.exists():
        options.setdefault("shard_samples", 4)
    chosen = Options([images], cache, ViewRecipe(**recipe, encoding=encoding), teachers=teachers, **options)
    extract_features(chosen, say=lambda line: None)
    return open_cache(cache)


@pytest.mark.parametrize(
    "encoding, name, save",
    [
        ("npy:14xuint16", "a.tif", lambda x: tiff(x, planarconfig="contig", photometric="minisblack")),
        ("npy:14xuint16", "a.tiff", lambda x: tiff(np.moveaxis(x, -1, 0), planarconfig="separate", photometric="minisblack",
                                                  compression="zlib", predictor=True)),
        ("npy:14xuint16", "a.tif", lambda x: tiff(np.moveaxis(x, -1, 0), photometric="minisblack", byteorder=">")),  # pages
        ("npy:14xfloat32", "a.npy", lambda x: npy(np.moveaxis(x, -1, 0))),
        ("npy:5xfloat16", "a.npy", npy),
        ("npy:4xuint8", "a.png", png),
        ("png16", "a.png", lambda x: png(x[..., 0])),
        ("png16", "a.npy", lambda x: npy(x[..., 0].astype(">u2"))),
        ("npy:1xuint16", "a.png", lambda x: png(x[..., 0])),
        ("png", "a.png", png),
    ],
)  # fmt: skip
def test_without_resampling_every_bit_comes_back(tmp_path: Path, encoding: str, name: str, save: Any) -> None:
    kind = encoding_of(encoding)
    images = {f"{i}-{name}": numbers(kind.bands, kind.dtype, seed=i) for i in range(3)}
    for key, array in images.items():
        publish(tmp_path / "images" / key, save(array))
    cache = extract(tmp_path / "images", tmp_path / "cache", encoding, views=2)
    flips = set()
    for key in images:
        for view in cache[key].views:
            flips.add(view["view"].flip)
            upright = view["pixels"].numpy()[:, ::-1] if view["view"].flip else view["pixels"].numpy()
            assert upright.dtype == kind.dtype and np.array_equal(upright, images[key])
    assert flips == {False, True}
    batch = cache.read_pixels(range(3), [0, 1, 0])
    assert batch.shape == (3, SIDE, SIDE, kind.bands) and str(batch.dtype) == f"torch.{kind.dtype}"


def triangles(n: int, out: int) -> np.ndarray[Any, Any]:
    """[out, n]: bilinear weights of n pixels for every one of `out`, widened where the image shrinks; rows sum to 1."""
    scale = max(n / out, 1)
    centres, pixels = (np.arange(out) + 0.5) * n / out, np.arange(n) + 0.5
    weights = (1 - np.abs(pixels - centres[:, None]) / scale).clip(0)
    return weights / weights.sum(1, keepdims=True)


def test_a_gradient_of_16_bits_keeps_its_depth_when_it_is_resampled() -> None:
    ramp = np.linspace(0, 65535, 128 * 128).reshape(128, 128).astype(np.uint16)[..., None]
    recipe = ViewRecipe(64, encoding="png16", interpolation="bilinear")
    view = draw_view(7, 0, 128, 128, recipe)
    found = render(ramp, view, recipe)
    assert found.dtype == np.uint16 and len(np.unique(found)) > 3000, "8 bits would leave 256 values"
    crop = ramp[view.top : view.top + view.height, view.left : view.left + view.width, 0].astype(np.float64)
    exact = triangles(view.height, 64) @ crop @ triangles(view.width, 64).T
    exact = exact[:, ::-1] if view.flip else exact
    assert np.abs(found[..., 0] - exact).max() <= 0.51  # rounded to the nearest
    edge = np.zeros((64, 64, 1), np.uint16)
    edge[:, 32:] = 65535
    assert set(np.unique(render(edge, draw_view(7, 0, 64, 64, ViewRecipe(63, (1, 1))), ViewRecipe(63, (1, 1), encoding="png16")))) >= {
        0, 65535}, "an overshoot is cut, and does not wrap"  # fmt: skip


@pytest.mark.parametrize("encoding", ["npy:3xuint16", "npy:32xfloat32", "png16", "npy:2xfloat16"])
def test_damaged_stored_views_do_not_decode(encoding: str) -> None:
    kind = encoding_of(encoding)
    pixels = numbers(kind.bands, kind.dtype)
    data = encode_view(pixels, kind)
    assert data == encode_view(pixels, kind) and np.array_equal(decode_view(data, kind, SIDE), pixels)
    for wrong, size in (
        (data[: len(data) // 2], SIDE),
        (data, SIDE + 1),
        (data, SIDE - 1),
        (b"", SIDE),
        (b"\x89PNG", SIDE),
    ):
        with pytest.raises(BadImage, match="stored view"):
            decode_view(wrong, kind, size)


@pytest.mark.parametrize(
    "encoding, data, reason",
    [
        ("npy:14xuint16", lambda: tiff(numbers(13, "uint16"), planarconfig="contig", photometric="minisblack"),
         r"has 13 x uint16 per pixel; 14 x uint16 were expected \(--encoding npy:14xuint16\)"),
        ("npy:3xuint16", lambda: png(numbers(3, "uint8")), "has 3 x uint8 per pixel; 3 x uint16 were expected"),
        ("png16", lambda: npy(numbers(1, "float32")), "has 1 x float32 per pixel; 1 x uint16"),
        ("npy:2xfloat32", lambda: npy(numbers(2, "float64")),
         r"has 2 x float64 per pixel"),
        ("npy:2xfloat32", lambda: npy(np.where(np.arange(2) == 1, np.float32("nan"), numbers(2, "float32"))),
         r"band 2 holds nan at row 0, column 0 \(1024 such numbers\)"),
        ("npy:2xfloat16", lambda: npy(np.full((8, 8, 2), np.inf, np.float16)), "band 1 holds inf"),
        ("npy:3xuint16", lambda: tiff(numbers(3, "uint16"), photometric="rgb")[:-500], "does not decode|has"),
        ("npy:3xuint8", lambda: npy(numbers(3, "uint8"))[:200], "does not decode"),
        ("npy:3xuint8", lambda: npy(np.zeros((2, 3, 4, 5), np.uint8)), r"holds an array \[2, 3, 4, 5\]"),
        ("npy:1xuint8", lambda: npy(np.array([[None]])), "has 1 x object per pixel"),
        ("npy:1xuint8", lambda: b"", "zero bytes"),
        ("npy:1xuint8", lambda: b"GIF87a nothing", "begins like GIF|not an image"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_says_what_it_is_and_what_was_expected(encoding: str, data: Any, reason: str) -> None:
    with pytest.raises(BadImage, match=reason), decoded_as(data(), encoding_of(encoding)):
        pass


def test_16_bit_colour_pngs_are_refused_where_pillow_would_drop_bits() -> None:
    import imagecodecs

    data = imagecodecs.png_encode(numbers(3, "uint16"))
    with pytest.raises(BadImage, match="16-bit PNG with colour"), decoded_as(data, encoding_of("npy:3xuint16")):
        pass


def test_floats_also_take_integers_that_they_hold_exactly() -> None:
    values = numbers(2, "uint16").astype(np.int16)
    with decoded_as(npy(values), encoding_of("npy:2xfloat32")) as found:
        assert found.dtype == np.float32 and np.array_equal(found, values)


def test_an_orientation_turns_bands_too() -> None:
    values = numbers(3, "uint16")[:20]
    data = tiff(values, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    with decoded_as(data, encoding_of("npy:3xuint16")) as found:
        assert np.array_equal(found, np.rot90(values, -1))


def test_without_tifffile_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    data = tiff(numbers(3, "uint16"), photometric="rgb")
    with pytest.raises(ValueError, match=r"x\.tif: is a TIFF.*pip install 'mrmae\[bands\]'") as error:
        with decoded_as(data, encoding_of("npy:3xuint16"), where="x.tif"):
            pass
    assert not isinstance(error.value, BadImage)


def test_too_many_pixels_are_refused_before_they_are_read() -> None:
    with pytest.raises(BadImage, match="refused before decoding: 32 x 32 pixels"):
        with decoded_as(npy(numbers(3, "uint8")), encoding_of("npy:3xuint8"), max_pixels=1000):
            pass


@pytest.mark.parametrize("name", ["png8", "npy:0xuint8", "npy:33xuint8", "npy:3xint16", "npy:3", "JPEG95", ""])
def test_unknown_encodings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="encoding: .* cannot be used; expected jpeg95, png, png16, or npy:NxDTYPE"):
        ViewRecipe(32, encoding=name)


def test_files_of_numbers_are_images_only_where_bands_are_kept(tmp_path: Path) -> None:
    publish(tmp_path / "a.npy", b""), publish(tmp_path / "b.png", b"")
    assert [image.key for image in list_sources([tmp_path])] == ["b.png"]
    assert [image.key for image in list_sources([tmp_path], (), BAND_SUFFIXES)] == ["a.npy", "b.png"]


def test_a_bad_image_among_good_ones_is_recorded_with_its_reason(tmp_path: Path) -> None:
    for i in range(4):
        publish(tmp_path / "images" / f"{i}.npy", npy(numbers(3 if i != 2 else 4, "float32", seed=i)))
    bad = numbers(3, "float32")
    bad[5, 6, 1] = np.nan
    publish(tmp_path / "images" / "nan.npy", npy(bad))
    cache = extract(tmp_path / "images", tmp_path / "cache", "npy:3xfloat32")
    assert len(cache.numbers) == 3 and "has 4 x float32" in str(cache["2.npy"].reason)
    assert "band 2 holds nan at row 5, column 6 (1 such numbers)" in str(cache["nan.npy"].reason)


def test_a_cache_of_bands_lives_as_any_other(tmp_path: Path) -> None:
    """Appended to, converted, damaged, repaired, measured, a column dropped, drawn, and compared with live teachers."""
    images, path = tmp_path / "images", tmp_path / "cache"
    arrays = {f"{i}.npy": numbers(5, "uint16", seed=i) for i in range(6)}
    for key in list(arrays)[:4]:
        publish(images / key, npy(arrays[key]))
    asked = {"teachers": tuple(f"{name}=timm:test_vit/random?bands=4,3,2" for name in ("vit", "b")), "shard_samples": 2}
    extract(images, path, "npy:5xuint16", **asked)
    for key in list(arrays)[4:]:
        publish(images / key, npy(arrays[key]))
    cache = extract(images, path, "npy:5xuint16", append=True, **asked)
    assert_holds(cache, arrays)
    with pytest.raises(ValueError, match="recipe.encoding is 'npy:5xuint16' there and 'png16' in this command"):
        extract(images, path, "png16", **asked)
    out = tmp_path / "tars"
    command = ["convert", str(path), str(out), "--format", "webdataset", "--dtype", "float16"]
    for words in (command, ["verify", str(path), "--full", "--live", "2"], ["stats", str(out), "--column", "vit.pre_tail"], ["drop", str(out), "b.pre_tail", "--yes"],
                  ["pictures", str(out), "--bands", "5", "--samples", "2"], ["verify", str(out), "--full"], ["report", str(out)]):  # fmt: skip
        result = CliRunner().invoke(inspect_cli, words)
        assert result.exit_code == 0, (words, result.output)
    converted = open_cache(out)
    assert_holds(converted, arrays)
    assert list(converted.columns) == ["vit.pre_tail"] and read_stats(converted, "vit.pre_tail").n == 6 * 16
    tar = path / "views/0/pixels/000001.tar"
    data = bytearray(tar.read_bytes())
    data[1024] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="000001.tar"):
        open_cache(path).read_pixels(cache.numbers, cache.numbers * 0)
    assert CliRunner().invoke(inspect_cli, ["verify", str(path), "--full"]).exit_code == 1
    assert CliRunner().invoke(inspect_cli, ["repair", str(path), "--yes"]).exit_code == 0
    assert_holds(extract(images, path, "npy:5xuint16", **asked), arrays)


def assert_holds(cache: Cache, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    for key, array in arrays.items():
        view = cache[key].views[0]
        pixels = view["pixels"].numpy()
        assert np.array_equal(pixels[:, ::-1] if view["view"].flip else pixels, array)
