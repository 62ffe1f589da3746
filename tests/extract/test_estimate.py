"""The dry run's estimate: measured rates, the slowest stage, the time, the verdict."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrmae.common.backend import files_below, locate
from mrmae.extract import estimate, pipeline
from mrmae.extract.estimate import Rates
from mrmae.extract.options import Options
from mrmae.extract.run import extract_features
from mrmae.extract.workers import ProcessPart
from mrmae.shards.format.spec import TeacherSpec, ViewRecipe

VIT = "vit=timm:test_vit/random"
SPEC = TeacherSpec(
    name="vit", library="timm", model="test_vit", weights="random", tag=None, weights_sha256="0", activation="gelu",
    input_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", antialias=True,
    tap="pre_tail", prefix_tokens=1, native_grid=(4, 4), grid=(4, 4), resample="none", width=64, has_cls=True,
    has_attention=True, precision="fp32", attention_backend="sdpa",
)  # fmt: skip


def options(images: Path, cache: Path) -> Options:
    return Options(images=[images], cache=cache, teachers=(VIT,), recipe=ViewRecipe(32), grid=4, batch_size=4,
                   device="cpu", workers=2)  # fmt: skip


def test_an_extraction_says_after_ten_batches_how_long_all_that_are_left_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: now[0])
    job: Any = SimpleNamespace(options=SimpleNamespace(part=ProcessPart(1, 3)))
    progress: Any = SimpleNamespace(say=said.append, left=lambda: 600.0)
    batches: list[Any] = [
        SimpleNamespace(
            samples=[0] * 4,
            planned=SimpleNamespace(turn=SimpleNamespace(ends=(0, 1))),
            features={"vit": 1} if i < 2 else {},
        )
        for i in range(16)
    ]
    for i, _ in enumerate(pipeline.timed(job, batches, progress)):
        now[0] += 100.0 if i < 3 else 2.0  # calibration's, and the first, which warms up
        assert len(said) == (i > 2 + pipeline.TIMED_BATCHES)
    assert len(said) == 1
    assert said[0].startswith(
        "80 views took 20 s: about 2 min 30 s for the 600 that are left of part 1/3, in this one process, until "
    )
    assert said[0].endswith("all 3 parts: as long where they run at once, about 7 min 30 s one after the other")
    shared = estimate.time_left(ProcessPart(ranks=4), views=1, seconds=1, left=120)
    assert "about 30 s for the 120 that are left, with 4 processes like this one" in shared and "part" not in shared


def test_a_dry_run_measures_every_stage_and_leaves_nothing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "PROBE_BYTES", 1 << 20)
    said: list[str] = []
    assert extract_features(options(photo_folder, tmp_path / "c"), dry_run=True, say=said.append) == {}
    for word in ("decoding", "vit.pre_tail", "disk", "estimate:", "20 views, limited by", "verdict:"):
        assert word in said[-1], word
    assert "1.06 kB per image of int8 tokens, and 264 B with --token-layout blocks" in "\n".join(said)  # 16 x (64 + 2)
    assert "1 for up to 25 epochs, 2 for up to 100 epochs, 4 for more" in "\n".join(said)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_share_the_time(tmp_path: Path) -> None:
    one = options(tmp_path, tmp_path / "c")
    text = [estimate.estimate_text(Rates(0.01, {"vit.pre_tail": 0.09}, 1e9), [SPEC], each.resolved(), 1000)
            for each in (one, dataclasses.replace(one, shards="3/4"))]  # fmt: skip
    assert "1 min 40 s for 1,000 views, limited by the teachers, in this one process; with N like it" in text[0]
    assert "25 s for 1,000 views, limited by the teachers, with 4 processes like this one" in text[1]


@pytest.mark.parametrize(
    ("rates", "limit", "time", "verdict"),
    [(Rates(0.01, {"vit.pre_tail": 0.09}, 1e9), "the teachers", "1 min 40 s", "worth it for more than one epoch"),
     (Rates(0.01, {"vit.pre_tail": 0.001}, 1e3), "the disk", "1 h", "DO NOT CACHE here"),
     (Rates(0.1, {}, 1e9), "decoding", "1 min 40 s", "complete already")],
)  # fmt: skip
def test_the_slowest_stage_decides(tmp_path: Path, rates: Rates, limit: str, time: str, verdict: str) -> None:
    """1,000 views; on a CPU decoding and teachers add up."""
    text = estimate.estimate_text(rates, [SPEC], options(tmp_path, tmp_path / "c").resolved(), 1000)
    assert f"limited by {limit}" in text and verdict in text and (time in text or limit == "the disk")


def test_a_dry_run_to_a_url_speaks_of_a_store(s3: Any, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PROBE_BYTES", 1 << 20)
    s3.ask("PUT", "dry")
    said: list[str] = []
    url = locate("s3://dry/c")
    assert extract_features(options(photo_folder, url), dry_run=True, say=said.append) == {} and not files_below(url)
    assert "free space at a URL is not known" in said[0] and "          store " in said[-1]
    slow = estimate.estimate_text(
        Rates(0.01, {"vit.pre_tail": 0.001}, 1e3), [SPEC], options(photo_folder, url).resolved(), 1000
    )
    assert "limited by the store" in slow and "this store feeds" in slow and "train from it with --local-cache" in slow
    assert "disk" not in "".join(said) + slow


def test_unreadable_images_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the first 32 images can be read"):
        extract_features(options(tmp_path, tmp_path / "c"), dry_run=True, say=lambda line: None)


def test_the_probe_is_removed_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, chunks: Any) -> Any:
        path.write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(estimate, "write_durably", full)
    with pytest.raises(OSError, match="No space"):
        estimate.written_bytes_per_s(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
