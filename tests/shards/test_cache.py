"""Reading: exact values by number, key or batch, from every thread and process; damage is always named."""

import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from mrmae.extract.images.decode import decode_rgb
from mrmae.shards import check
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.format import commit_path
from mrmae.shards.format.quantiser import Quantiser
from mrmae.shards.format.spec import key_hash
from mrmae.shards.format.views import draw_view, encode_view, render
from mrmae.shards.order import view_of

Make = Callable[..., Path]


def stored(path: Path, view: int, name: str) -> Any:
    """An array of teacher a's column, as plain zarr reads it."""
    return np.asarray(zarr.open_group(path / f"views/{view}/a.pre_tail.zarr", mode="r")[name][:])  # type: ignore[index]


def test_batches_hold_exactly_what_plain_zarr_reads(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    numbers, views = np.array([5, 23, 0, 8, 16, 5, 9]), np.array([0, 1, 1, 0, 1, 1, 0])
    names = ("tokens", "scale", "cls", "attention", "norm")
    batch = cache.read_column("a.pre_tail", numbers, views, names)
    assert set(batch) == set(names) and batch["tokens"].dtype == torch.int8
    for name in names:
        expected = np.stack([stored(tiny_cache, view, name)[number] for number, view in zip(numbers, views)])
        assert np.array_equal(batch[name].numpy(), expected), name


def test_dequantised_tokens_are_the_teachers_within_int8(tiny_cache: Path, make_cache: Make, tmp_path: Path) -> None:
    exact = open_cache(make_cache(tmp_path / "f16", dtype="float16"))
    cache = open_cache(tiny_cache)
    zeros = np.zeros(24, np.int64)
    x, y = exact.read_tokens("b.pre_tail", range(24), zeros), cache.read_tokens("b.pre_tail", range(24), zeros)
    assert torch.nn.functional.cosine_similarity(x, y, dim=-1).min() > 0.9998
    assert set(exact.read_column("b.pre_tail", [0], [0])) == {"tokens"}, "float16 has no scale"


def test_a_sample_by_number_and_by_key(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    assert len(cache) == 24 and cache.size == 32 and cache.grid == (4, 4) and cache.n_views == 2
    assert cache.teachers == {"a": "a.pre_tail", "b": "b.pre_tail"} and cache.columns["a.pre_tail"].spec.width == 8
    sample = cache[7]
    assert cache[sample.key].number == 7 == cache[-17].number and sample.valid and sample.reason is None
    assert sample.label == sample.key.split("/")[0]
    for number, view in enumerate(sample.views):
        assert torch.equal(view["pixels"], cache.read_pixels([7], [number])[0])
        assert view["pixels"].shape == (32, 32, 3) and view["pixels"].dtype == torch.uint8
        assert {name: tuple(t.shape) for name, t in view["a"].items()} == {
            "tokens": (16, 8), "cls": (8,), "attention": (16,), "norm": (16,)}  # fmt: skip
        assert set(view["b"]) == {"tokens", "norm"}
        assert torch.allclose(view["a"]["tokens"].norm(dim=-1), view["a"]["norm"], rtol=0.02)
    with pytest.raises(IndexError):
        cache[24]
    with pytest.raises(KeyError):
        cache["no such key"]


def test_recorded_views_replay_bit_for_bit(tiny_cache: Path, tiny_images: dict[str, bytes]) -> None:
    """From the original image, the drawn box and the recipe, to the stored bytes."""
    cache = open_cache(tiny_cache)
    for number in (0, 11, 23):
        for view in range(2):
            image = decode_rgb(tiny_images[cache.keys[number]])
            crop = cache.read_crop(number, view)
            assert crop == draw_view(key_hash(cache.keys[number]), view, *image.shape[:2], cache.plan.recipe)
            pixels = render(image, crop, cache.plan.recipe)
            tar = (tiny_cache / f"views/{view}/pixels/{number // 8:06d}.tar").read_bytes()
            assert encode_view(pixels, cache.encoding) in tar
            assert np.abs(cache.read_pixels([number], [view])[0].numpy().astype(int) - pixels).max() < 40


def test_samples_are_in_canonical_order_with_signed_hashes(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    hashes = [key_hash(key) for key in cache.keys]
    assert hashes == sorted(hashes)
    assert cache.hashes.dtype == torch.int64 and [h % 2**64 for h in cache.hashes.tolist()] == hashes
    assert cache.number_of[cache.keys[3]] == 3
    assert view_of(cache.hashes.numpy(), 4, 2).tolist() == [(4 + h) % 2 for h in hashes]


def test_buffers_are_filled_in_place(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    out = {"tokens": torch.zeros(2, 16, 8, dtype=torch.int8), "scale": torch.zeros(2, 16, dtype=torch.float16)}
    assert cache.read_pixels([1, 9], [0, 1], out=pixels) is pixels
    got = cache.read_column("a.pre_tail", [1, 9], [0, 1], out=out)
    assert got["tokens"] is out["tokens"] and out["tokens"].any() and pixels.any()


def test_an_empty_batch_is_empty(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    assert cache.read_pixels([], []).shape == (0, 32, 32, 3)
    assert cache.read_column("a.pre_tail", [], [])["tokens"].shape == (0, 16, 8)


def test_an_opened_cache_can_be_sent_to_a_spawned_process(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    before = cache.read_pixels(cache.numbers, cache.numbers * 0)  # its threads and indices are in use
    again: Cache = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.read_pixels(cache.numbers, cache.numbers * 0), before)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(cache.read_tokens, "a.pre_tail", [3], [1]).result().shape == (1, 16, 8)


def test_wrong_requests_are_refused_by_name(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    requests: list[tuple[Callable[[], Any], str]] = [
        (lambda: cache.read_pixels([24], [0]), "sample 24 is not in the cache; it has 24"),
        (lambda: cache.read_pixels([0], [2]), "view 2 is not in the cache; it has 2"),
        (lambda: cache.read_pixels([0, 1], [0]), "expected one view per number"),
        (lambda: cache.read_column("c.pre_tail", [0], [0]), r"no column 'c.pre_tail'; it holds \['a.pre_tail'"),
        (lambda: cache.read_column("b.pre_tail", [0], [0], ("cls",)), "b.pre_tail has no cls; it holds"),
        (lambda: cache.tail("c"), "no tail for teacher c"),
    ]
    for request, message in requests:
        with pytest.raises(ValueError, match=message):
            request()
    assert set(cache.tail("a")) == {"norm.weight", "norm.bias"}


def test_bad_images_keep_their_row_and_are_not_read(make_cache: Make, tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path / "c", n=10, bad=(0, 7), n_views=1))
    assert len(cache) == 10 and len(cache.numbers) == 8
    (first, second) = sorted(set(range(10)) - set(cache.numbers.tolist()))
    sample = cache[first]
    assert not sample.valid and sample.views == [] and "not an image" in str(sample.reason)
    with pytest.raises(ValueError, match=rf"sample {second} \('.*'\) cannot be read: not an image.*Cache.numbers"):
        cache.read_pixels([second], [0])
    tokens = stored(cache.path, 0, "tokens")
    assert (tokens[[first, second]] == -128).all() and (tokens[cache.numbers] > -128).all()
    zeros = np.zeros(8, np.int64)
    assert torch.isfinite(cache.read_tokens("a.pre_tail", cache.numbers, zeros)).all()


def test_a_shard_of_bad_images_only_is_possible(make_cache: Make, tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path / "c", n=2, bad=(0,), n_views=1, shard_samples=1))
    assert len(cache.numbers) == 1 and cache[int(cache.numbers[0])].valid


def test_unlabelled_caches_have_no_labels(make_cache: Make, tmp_path: Path) -> None:
    assert open_cache(make_cache(tmp_path / "c", n=3, n_views=1, labels=False)).labels == [None] * 3


def test_an_unfinished_cache_opens_with_what_is_whole(make_cache: Make, tmp_path: Path) -> None:
    path = make_cache(tmp_path / "c", finalise=False, bad=(0,))
    commit_path(path, 1, "b.pre_tail", 1).unlink()
    with pytest.raises(ValueError, match="17 of 18 shards are committed"):
        open_cache(path)
    cache = open_cache(path, allow_partial=True)
    bad = cache.reasons.index("not an image in a known format; first bytes b'not an i'")
    assert set(cache.numbers.tolist()) == {*range(8), *range(16, 24)} - {bad}
    assert cache.read_tokens("a.pre_tail", cache.numbers, np.ones_like(cache.numbers)).isfinite().all()
    with pytest.raises(ValueError, match="not extracted yet" if bad != 9 else "."):
        cache.read_pixels([9], [0])


@pytest.fixture
def copy(tiny_cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_cache, tmp_path / "copy")
    return tmp_path / "copy"


def test_all_problems_are_reported_at_once(copy: Path) -> None:
    (copy / "views/0/pixels/000001.tar").unlink()
    with open(copy / "views/1/a.pre_tail.zarr/tokens/c/0/0/0", "ab") as file:
        file.write(b"x")
    (copy / "views/1/b.pre_tail.zarr/norm/zarr.json").unlink()
    (copy / "tail/a.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        open_cache(copy)
    second = open_cache(copy, files=False)  # another process of the machine has looked
    assert second.numbers.tolist() and second.read_pixels([0], [0]).shape[0] == 1
    text = str(caught.value)
    assert "4 problems" in text and "run the same extract-features command again" in text
    for line in ("views/0/pixels/000001.tar: No such file", "tokens/c/0/0/0: 1", "norm/zarr.json: missing metadata",
                 "tail/a.safetensors: No such file"):  # fmt: skip
        assert line in text


def test_edited_or_exchanged_metadata_are_refused(copy: Path, make_cache: Make, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    more = make_cache(tmp_path / "more", n=25, n_views=1)
    manifest = (copy / "manifest.json").read_text()
    cases: list[tuple[str, bytes, str]] = [
        ("manifest.json", manifest.replace('"n_valid": 24', '"n_valid": 23').encode(), "does not match its own id"),
        ("manifest.json", manifest[:-100].encode(), "damaged"),
        ("manifest.json", (other / "manifest.json").read_bytes(), "plan.json: its ids are not those of manifest"),
        ("plan.json", (other / "plan.json").read_bytes(), "plan.json: its ids are not those of manifest"),
        ("samples.arrow", (more / "samples.arrow").read_bytes(), "samples.arrow: its rows are not those"),
        ("samples.arrow", (copy / "samples.arrow").read_bytes()[:-20], "samples.arrow: cannot be read"),
    ]
    for name, content, message in cases:
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_cache(copy)
        (copy / name).write_bytes(before)
    open_cache(copy)


def test_attributes_are_enough_to_dequantise_with_plain_zarr(tiny_cache: Path) -> None:
    group = zarr.open_group(tiny_cache / "views/1/a.pre_tail.zarr", mode="r")
    q: Any = group.attrs["quantiser"]
    mean, std = (0.0, 1.0) if q["channel_mean"] is None else (np.array(q["channel_mean"]), np.array(q["channel_std"]))
    tokens = mean + std * stored(tiny_cache, 1, "scale")[..., None].astype(np.float32) * stored(tiny_cache, 1, "tokens")
    cache = open_cache(tiny_cache)
    got = cache.read_tokens("a.pre_tail", cache.numbers, np.ones_like(cache.numbers)).numpy()
    assert np.allclose(got, tokens, atol=1e-6) and Quantiser.from_json(q).dtype == "int8"
    assert group.attrs["column_id"] == cache.ids["a.pre_tail"]


def test_a_cache_of_an_earlier_version_must_be_extracted_anew(copy: Path) -> None:
    for name in ("plan.json", "manifest.json"):
        (copy / name).write_text((copy / name).read_text().replace('"format_version": 4', '"format_version": 3'))
    for attempt in (open_cache, check.find_problems):
        with pytest.raises(ValueError, match="format version 3; this mrmae reads 4; extract the cache anew"):
            attempt(copy)


def test_a_path_without_a_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cache here .no plan.json.; run extract-features first"):
        open_cache(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        open_cache(tmp_path)
    (tmp_path / "plan.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99; this mrmae reads 4; extract the cache anew"):
        open_cache(tmp_path)
