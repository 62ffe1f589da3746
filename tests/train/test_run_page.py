"""OUT/report.html: drawn from the files of a run, whatever is written in them, and shown by a browser."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training import train_quietly

from mrmae.train.run_page import probe_names, run_page, share_interval, thinned, write_run_page

HOSTILE = "<script>window.hit=1</script><img src=x onerror=window.hit=1>"
Open = Callable[..., AbstractContextManager[Any]]


def write_out(out: Path, *, name: str = "run", epochs: int = 3, held: bool = True, probes: bool = True) -> Path:
    """What a run leaves, by hand. name: used wherever a user or a cache may choose a text."""
    term = f"mimic/{name}"
    start = {"command": f"train-mrmae {name}", "folder": "/somewhere", "started": "2026-01-01T00:00:00+00:00", "from_step": 0, "device": "cpu",
             "precision": "fp32", "ranks": 1, "notes": [name], "versions": {"torch": "2"}, "git": None}  # fmt: skip
    run = {"recipe": name, "student": "vit", "images": 64, "held_out": 8, "cache": f"/caches/{name}", "cache_ids": {name: "sha256:0"},
           "teachers": {name: {"model": f"timm:{name}", "weights": "random", "tap": "pre_tail"}}, "teachers_run": "once, cached",
           "warning": f"RANDOM WEIGHTS: {name}", "updates_per_epoch": 4, "baselines": {term: {"zero": 0.9, "position": 0.7, "images": 64}}, "load": f'timm.create_model("{name}")', "starts": [start],
           "costs": {"parameters": 12_345, "encoder_flops": 2e9, "forward_flops": 1e9, "teacher_flops": 0, "step_flops": 3e9,
                     "feature_bytes": 9000, "view_bytes": 30_000.0, "state_bytes": 1, "saved_bytes": 1}}  # fmt: skip
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps(run))
    (out / "recipe.yaml").write_text(
        f"name: '{name}'\nseed: 0\noptim: {{batch_size: 16, epochs: 3, warmup_epochs: 1, lr_per_256: 0.0016, lr_scale: 1.0}}\n"
    )
    rows = [{"kind": "step", "step": s, "epoch": (s - 1) // 4 + 1, "loss": 1 / s, "terms": {term: 1 / s, "pixels": None if s == 2 else 2 / s},
             "lr": 1e-4 * s, "images_per_s": 50.0 + s, "stall": 0.01, "memory_mib": 300.0} for s in range(1, 4 * epochs + 1)]  # fmt: skip
    rows += [{"kind": "epoch", "step": 4 * e, "epoch": e, "loss": 1 / e, "terms": {term: 1 / e, "pixels": 2 / e}, "seconds": 61.0,
              **({"held_out": {"loss": 1.5 / e, term: 1.5 / e, "pixels": 2.5 / e}, "knn_top1": 0.5 + e / 10, "knn": {"k": 20, "bank": 64, "queries": 8}, "rankme": 9.5, "rank": {"images": 64, "channels": 16}} if held else {})}
             for e in range(1, epochs + 1)]  # fmt: skip
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for epoch in range(1, epochs + 1):
        (out / "panels").mkdir(exist_ok=True)
        Image.new("RGB", (300, 200), (80 * epoch, 0, 0)).save(out / "panels" / f"epoch-{epoch:04d}.png")
    if probes:
        (out / "probes" / "results").mkdir(parents=True)
        found = {"probe": "knn", "source": f"runs/{name}", "id": "sha256:0", "headline": "20-NN, mean", "accuracy": 0.8125, "interval": [0.79, 0.83], "n_train": 100, "n_test": 50,
                 "n_classes": 3, "data": name}  # fmt: skip
        (out / "probes" / "results" / "knn-0.json").write_text(json.dumps(found))
        (out / "probes" / "results" / "dense-0.json").write_text(json.dumps({**found, "accuracy": None}))
    return out


def test_it_says_what_was_trained_on_what(tmp_path: Path) -> None:
    text = run_page(write_out(tmp_path / "out"))
    for said in ("RANDOM weights, it knows nothing", "RANDOM WEIGHTS: run", "cd /somewhere\ntrain-mrmae run", "batch 16, learning rate up to 0.0001, warm-up 1 epoch, seed 0", "one per position", "0.7000", "20-NN top-1 of 8 images held out, by the labels of 64", "RankMe of 64 images trained on, at most 16", "/caches/run", "sha256:0", "64, and 8 held out",
                 "3 epochs on 64 images, 3 min 03 s of training", "0.812 [0.790, 0.830]", "100 / 50 / 3", "1.0000", "0.3333", "0.5000",
                 "500 MMAC", "1.5 GMAC", "288 GMAC", "whole run, 192 images", "9 kB", "1.73 MB", "12,345", "timm.create_model"):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"held": False, "probes": False}, {"epochs": 1}])
def test_what_is_not_there_is_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = run_page(write_out(tmp_path / "out", **changes))
    assert ("probe-features OUT DATA" in text) == ("probes" in changes)
    assert ("No epoch was ended." in text) == (changes.get("epochs") == 0)


def test_a_run_that_was_stopped_says_so_and_how_it_goes_on_and_where_it_was_continued(tmp_path: Path) -> None:
    out = write_out(tmp_path / "out", epochs=2)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows[-1]["resumed"] = [1, 3]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = run_page(out)
    assert "UNFINISHED: 2 of 3 epochs are done; there is no student yet" in text and "when the run is finished" in text
    assert (
        text.index("<h2>Continue</h2>")
        < text.index("cd /somewhere\ntrain-mrmae run")
        < text.index("<h2>What was trained on what</h2>")
    )
    assert "Stopped and continued within epoch 2 (after update 1, 3)" in text
    assert '"name": "pixels, mean of a continued epoch"' in text and '"symbol": "diamond-open"' in text
    whole = run_page(write_out(tmp_path / "whole"))
    assert (
        "UNFINISHED" not in whole
        and "<h2>Continue</h2>" not in whole
        and "diamond-open" not in whole.partition("<script>")[0]
    )


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert share_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = share_interval(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)


def test_probes_are_told_apart_by_what_differs() -> None:
    one = {"source": "runs/a", "headline": "20-NN", "data": "/a/x.tar", "id": "sha256:123456789"}
    assert probe_names([one, {**one, "source": "untrained:runs/a"}]) == ["20-NN", "untrained weights, 20-NN"]
    assert probe_names([one, {**one, "data": "/a/y.tar"}]) == ["20-NN, x.tar", "20-NN, y.tar"]
    assert probe_names([one, {**one, "id": "sha256:987654321"}]) == ["20-NN, 123456", "20-NN, 987654"]


def test_a_long_curve_becomes_means_of_neighbours() -> None:
    xs, ys = thinned(range(1, 2001), [None if i % 2 else 1.0 * i for i in range(2000)])
    assert len(xs) == len(ys) == 500 and xs[0] == 4 and xs[-1] == 2000 and ys[0] == 1.0
    assert thinned([1, 2], [None, float("nan")]) == ([1, 2], [None, None])
    assert thinned([], []) == ([], [])


def test_names_in_a_run_never_become_markup_and_its_slider_goes_through_the_epochs(
    open_page: Open, tmp_path: Path
) -> None:
    with open_page(write_run_page(write_out(tmp_path / "out", name=HOSTILE))) as page:
        assert page.evaluate("window.hit") is None
        assert page.locator("h1").inner_text() == f"{HOSTILE}: vit"
        assert page.evaluate("document.querySelectorAll('.plot svg.main-svg').length") >= 6
        shown = "[...document.querySelectorAll('.slider img')].findIndex((i) => i.checkVisibility())"
        assert page.evaluate(shown) == 2
        page.locator(".slider input").press("Home")
        assert page.evaluate(shown) == 0 and page.locator(".slider output").inner_text() == "epoch 1"


@pytest.mark.drawn
def test_a_real_run_ends_with_its_page(open_page: Open, tiny_cache: Path, tiny_recipe: Any, tmp_path: Path) -> None:
    train_quietly(tiny_cache, tmp_path / "out", tiny_recipe("mr-mae", "optim={epochs: 2, batch_size: 8, warmup_epochs: 1}"), page=True,
                  panels_every=1, hold_out=0.2, log_every=1)  # fmt: skip
    with open_page(tmp_path / "out" / "report.html") as page:
        text = page.locator("main").inner_text()
        assert "RANDOM WEIGHTS" in text and "2 epochs on" in text and "MAC" in text and "local-dir:" in text
        assert page.locator(".slider img").count() == 2
