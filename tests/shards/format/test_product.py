"""Product codes: what a code stands for, which groups are chosen, and that a codebook is a function of the tokens alone."""

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import zarr
from torch import Tensor

from mrmae.common.kmeans import fit_centroids
from mrmae.shards import check, drop, repair
from mrmae.shards.cache import open_cache
from mrmae.shards.format.plan import load_plan
from mrmae.shards.format.product import (
    ENTRIES,
    UNWRITTEN,
    ProductCodebook,
    costs_of_runs,
    fit_product,
    principal_components,
    product_codes,
    product_values,
    runs_of_components,
)
from mrmae.shards.format.quantiser import Quantiser, calibrate, dequantise, quality, quantise

Make = Callable[..., Path]


def steep(n: int = 64, l: int = 16, d: int = 24, *, fall: float = 0.7, seed: int = 0) -> Tensor:
    """Tokens about a mean, whose channels are mixtures of independent ones of falling size."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(9)))[0]
    sizes = fall ** torch.arange(d, dtype=torch.float32)
    return torch.randn(n, l, d, generator=draw) * sizes @ mixing + torch.linspace(-3, 3, d)


def test_a_value_is_the_written_formula_and_the_sentinel_no_number() -> None:
    book = fit_product([steep()], 4)
    codes = product_codes(steep(2, seed=1), book)
    assert codes.shape == (2, 16, 4) and codes.dtype == torch.uint8 and int(codes.max()) < UNWRITTEN
    values = product_values(codes, book)
    for token in (0, 7):
        components = torch.stack([book.entries[codes[1, token, g].long(), k] for k, g in enumerate(book.group)])
        expected = book.mean + (components[:, None] * book.basis).sum(0)
        torch.testing.assert_close(values[1, token], expected)
    codes[0, 3, 2] = UNWRITTEN
    assert product_values(codes, book)[0, 3].isnan().all() and not product_values(codes, book)[1].isnan().any()
    assert product_values(codes[:0], book).shape == (0, 16, 24)


def test_every_group_s_code_is_the_nearest_entry() -> None:
    tokens, book = steep(4, seed=1), fit_product([steep()], 6)
    components = (tokens - book.mean) @ book.basis.T
    for code, run in enumerate(book.runs):
        apart = (components[..., None, run] - book.entries[:ENTRIES, run]).square().sum(-1)
        chosen = apart.gather(-1, product_codes(tokens, book)[..., code, None].long())[..., 0]
        torch.testing.assert_close(chosen, apart.amin(-1), rtol=1e-4, atol=1e-6)


def test_few_different_tokens_come_back_as_they_were() -> None:
    tokens = steep(10, 12)
    book = fit_product([tokens], 3)
    torch.testing.assert_close(product_values(product_codes(tokens, book), book), tokens, rtol=1e-4, atol=1e-4)
    assert book.entries[:ENTRIES].isfinite().all() and book.entries[UNWRITTEN].isnan().all()
    nothing = torch.zeros(2, 4, 8)
    q = calibrate(nothing, dtype="pq")
    assert (dequantise(*quantise(nothing, q), q) == 0).all()


def test_bytes_go_where_the_variance_is() -> None:
    """Against the same number of bytes for as many channels each, without a rotation."""
    tokens, held_out = steep(64, fall=0.8), steep(16, fall=0.8, seed=1)
    adapted, plain = fit_product([tokens], 6), equal_groups(tokens, 6)
    sizes = [run.stop - run.start for run in adapted.runs]
    assert sizes == sorted(sizes) and sizes[0] < 4 < sizes[-1] and plain.n_codes == adapted.n_codes == 6
    lost = {
        name: float((product_values(product_codes(held_out, book), book) - held_out).square().mean())
        for name, book in (("adapted", adapted), ("plain", plain))
    }
    assert 3 * lost["adapted"] < lost["plain"], lost


def equal_groups(tokens: Tensor, n_codes: int) -> ProductCodebook:
    """A codebook of equal groups of channels."""
    d = tokens.shape[-1]
    size, flat, book = d // n_codes, tokens.flatten(0, 1), fit_product([tokens], n_codes)
    mean = flat.mean(0)
    entries = torch.full((256, d), torch.nan)
    for start in range(0, d, size):
        columns = slice(start, start + size)
        entries[:ENTRIES, columns] = fit_centroids((flat - mean)[:, columns].contiguous(), ENTRIES, rounds=10)
    return dataclasses.replace(book, entries=entries, group=torch.arange(d) // size, basis=torch.eye(d), mean=mean)


@pytest.mark.parametrize("fall", [1.0, 0.8, 0.3])
def test_no_other_cut_into_groups_leaves_less_error(fall: float) -> None:
    d, m = 9, 3
    w = (fall ** torch.arange(d, dtype=torch.float64)).square()
    cost = costs_of_runs(w.clamp(min=1e-9).numpy())

    def left(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts)
        return float(sum(cost[a, b] for a, b in zip(ends, cuts)) + w[cuts[-1] :].sum())

    runs = runs_of_components(w, m)
    assert [a for a, _ in runs] == [0, *(b for _, b in runs[:-1])] and len(runs) == m
    best = min(left(cuts) for cuts in itertools.combinations(range(1, d + 1), m))
    assert left(tuple(end for _, end in runs)) == pytest.approx(best)
    if fall == 1.0:
        assert [b - a for a, b in runs] == [3, 3, 3]


def test_components_are_orthonormal_and_in_the_order_of_their_variance() -> None:
    tokens = steep().flatten(0, 1)
    mean, basis, variances = principal_components(tokens)
    torch.testing.assert_close(basis @ basis.T, torch.eye(24), atol=1e-5, rtol=0)
    found = ((tokens - mean) @ basis.T).double().var(dim=0, unbiased=False).float()
    torch.testing.assert_close(found, variances, rtol=1e-3, atol=1e-9)
    assert (variances.diff() <= 0).all()


def test_threads_and_batches_change_no_byte() -> None:
    tokens, before = steep(40, 16, 64, fall=0.9), torch.get_num_threads()
    whole = fit_product([tokens], 8).to_bytes()
    try:
        torch.set_num_threads(3)
        assert fit_product(list(torch.split(tokens, 7)), 8).to_bytes() == whole
        assert torch.get_num_threads() == 3, "as it was"
    finally:
        torch.set_num_threads(before)
    assert fit_product([tokens * 1.001], 8).to_bytes() != whole


def test_more_bytes_keep_more() -> None:
    tokens, held_out = steep(48, fall=0.9), steep(16, seed=1, fall=0.9)
    snr = []
    for dtype in ("pq16", "pq", "pq4", "int8"):
        q = calibrate(tokens, dtype=dtype)
        codes, scale = quantise(held_out, q)
        assert codes.shape[-1] == q.stored.codes(24) == {"pq16": 2, "pq": 3, "pq4": 6, "int8": 24}[dtype]
        assert (scale is None) == q.stored.product
        snr.append(quality(held_out, codes, scale, q)["snr_db"])
    assert snr == sorted(snr) and snr[0] > 1 and snr[2] > 8 and snr[3] > 40, snr


@pytest.mark.parametrize("value", [math.nan, math.inf, 7e4])
def test_what_no_code_stands_for_is_refused(value: float) -> None:
    q, tokens = calibrate(steep(), dtype="pq"), steep()
    tokens[2, 3, 4] = value
    with pytest.raises(ValueError, match=r"the first at \[2, 3, 4\]" if value != 7e4 else "a token value is 7e.04"):
        quantise(tokens, q)


def test_the_quantiser_tells_its_codebook_by_its_sha256() -> None:
    q = calibrate(steep(), dtype="pq")
    told = json.loads(json.dumps(q.to_json()))
    assert told["codebook"] == {"sha256": q.product.told()["sha256"], "bytes": len(q.product.to_bytes())}
    assert Quantiser.from_json(told).to_json() == q.to_json() and Quantiser.from_json(told).fitted is None
    for wrong in (None, {"sha256": "0"}, {**told["codebook"], "of": "x"}):
        with pytest.raises(ValueError, match="expected sha256 and bytes of its file"):
            Quantiser.from_json({**told, "codebook": wrong})


@pytest.fixture(scope="module")
def stored(make_cache: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("product") / "c", dtype="pq4", n=6, size=16, grid=2, n_views=1)


def test_a_cache_keeps_its_codebook_and_its_id_is_of_it(stored: Path) -> None:
    cache, plan = open_cache(stored), load_plan(stored)
    assert sorted(file.name for file in (stored / "codebooks").iterdir()) == [f"{t}.pre_tail.safetensors" for t in "ab"]
    quantiser = plan.quantisers["a.pre_tail"]
    assert quantiser.product.to_bytes() == (stored / "codebooks/a.pre_tail.safetensors").read_bytes()
    raw = cache.read_column("a.pre_tail", [1], [0])
    assert raw.keys() == {"tokens"} and raw["tokens"].shape == (1, 4, 2)
    assert torch.equal(cache.read_tokens("a.pre_tail", [1], [0]), product_values(raw["tokens"], quantiser.product))
    other = dataclasses.replace(quantiser, codebook={"sha256": "0" * 64, "bytes": 1})
    changed = dataclasses.replace(plan, quantisers={**plan.quantisers, "a.pre_tail": other})
    assert changed.ids["a.pre_tail"] != plan.ids["a.pre_tail"] and changed.ids["b.pre_tail"] == plan.ids["b.pre_tail"]


def test_plain_numpy_and_zarr_decode_as_docs_python_md_says(stored: Path) -> None:
    book = safetensors.numpy.load_file(stored / "codebooks/a.pre_tail.safetensors")
    group = zarr.open_group(stored / "views/0/a.pre_tail.zarr", mode="r")
    codes = np.asarray(group["tokens"][:])  # type: ignore[index]
    values = book["entries"][codes[..., book["group"]], np.arange(len(book["group"]))] @ book["basis"] + book["mean"]
    numbers = open_cache(stored).numbers
    expected = open_cache(stored).read_tokens("a.pre_tail", numbers, numbers * 0).numpy()
    np.testing.assert_allclose(values[numbers], expected, rtol=1e-5, atol=1e-5)
    told = group.attrs["value"]
    assert (
        told
        == "mean + entries[tokens[sample, patch, group], component] @ basis, of codebooks/<teacher>.<tap>.safetensors"
    )


def test_a_codebook_that_is_lost_or_altered_is_found_before_it_is_used(stored: Path, tmp_path: Path) -> None:
    path = shutil.copytree(stored, tmp_path / "c")
    file = path / "codebooks/a.pre_tail.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4] + bytes(4))
    assert [str(problem) for problem in check.find_problems(path)] == []
    (altered,) = check.find_problems(path, full=True)
    assert (
        str(altered) == "codebooks/a.pre_tail.safetensors: its sha256 is not that of what was written, says plan.json"
    )
    with pytest.raises(ValueError, match="a.pre_tail.safetensors: damaged, its sha256 is not that of the plan"):
        open_cache(path).read_tokens("a.pre_tail", [0], [0])
    for change in (lambda: file.write_bytes(data[:-4]), file.unlink):
        change()
        (found,) = check.find_problems(path)
        assert found.file == "codebooks/a.pre_tail.safetensors" and found.what.endswith(", says plan.json")
        with pytest.raises(ValueError, match=r"(?s)cannot be trusted.*codebooks/a\.pre_tail\.safetensors"):
            open_cache(path)
    with pytest.raises(ValueError, match=r"no command writes it again; .*inspect-cache drop .* a\.pre_tail"):
        repair.prepare_repair(path, check.find_problems(path))
    assert (path / "manifest.json").exists() and drop.drop_column(path, "a.pre_tail") == ["b.pre_tail"]
    assert check.find_problems(path, full=True) == []
