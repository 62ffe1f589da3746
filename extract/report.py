"""How an extraction ended: what was made, and which images cannot be read."""

from collections.abc import Mapping

from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.extract.made_maps import made_in_words
from mrmae.extract.pipeline import ExtractJob
from mrmae.shards import commit as commits
from mrmae.shards.cache import Cache, open_cache
from mrmae.shards.manifest import Manifest
from mrmae.shards.stats import SHARED_IMAGES, shared_energy

SHOWN_BAD = 100
LEAST_IMAGES = 50  # to tell what they share


class TooManyBad(ValueError):
    """More images are unreadable than --max-bad allows; everything is committed, no manifest was written."""


def refuse_too_many_bad(job: ExtractJob) -> None:
    """TooManyBad, listing them, when more images are bad than allowed."""
    bad = commits.bad_images(job.path, job.plan)
    if len(bad) == job.plan.n_images:
        raise ValueError(
            f"{job.path}: none of the {len(bad)} images can be read; expected photographs; check IMAGES:\n{bad_list(job, bad)}"
        )
    allowed = job.options.max_bad if job.options.max_bad >= 0 else max(3, job.plan.n_images // 1000)
    if len(bad) > allowed:
        commits.withdraw_manifest(job.path, job.plan)
        raise TooManyBad(
            f"{job.path}: {len(bad)} of {job.plan.n_images} images cannot be read; at most {allowed} may; everything "
            f"else is committed: mend nothing and raise --max-bad to {len(bad)} to finish without running again, or "
            f"leave them out in a new cache:\n{bad_list(job, bad)}"
        )


def bad_list(job: ExtractJob, bad: Mapping[int, str]) -> str:
    """The bad images and their reasons, one per line; past a hundred, how many more."""
    lines = [f"  {job.images.rows[number].key}: {bad[number]}" for number in sorted(bad)]
    more = [f"  ... and {len(lines) - SHOWN_BAD} more (commits/0/pixels/*.json holds all)"] * (len(lines) > SHOWN_BAD)
    return "\n".join(lines[:SHOWN_BAD] + more)


def summary(job: ExtractJob, manifest: Manifest, seconds: float, *, nothing_done: bool) -> str:
    """What was made, how large it is, and how faithful the stored features are."""
    size = sum(int(table.arrays["bytes"].sum()) for table in manifest.tables())
    held = f"{counted(manifest['n_valid'], 'image')}, {counted(job.plan.n_views, 'view')}"
    head = f"{job.path}: {held}, {human_bytes(size)}"
    lines = [head + (", complete before; nothing was left to do" if nothing_done else f", {human_time(seconds)}")]
    for column in manifest["columns"]:
        quality, teacher = column["quality"], column["teacher"]
        if teacher["library"] == "map":
            spec = job.plan.teacher(column["name"])
            many = f"{spec.width} " * (spec.width > 1)
            how = made_in_words(spec) if spec.made else "as given"
            lines.append(f"  {spec.column}: {many}{spec.model} per patch, {how}")
            continue
        weights = ", RANDOM weights: these features know nothing" if teacher["weights"] == "random" else ""
        made = ", requantised from another column by inspect-cache convert" if column["quantiser"].get("source") else ""
        lines.append(f"  {column['name']}: SNR {quality['snr_db']:.1f} dB in the worst shard, "
                     f"p99.9 of 1 - cos {quality['p999_one_minus_cos']:.2g}{made}{weights}")  # fmt: skip
    if manifest["n_valid"] >= LEAST_IMAGES and not nothing_done:
        cache = open_cache(job.path)
        lines += [line for column in cache.columns if (line := shared_line(cache, column))]
    bad = commits.bad_images(job.path, job.plan)
    if bad:
        lines.append(
            f"{counted(len(bad), 'image')} cannot be read; every row is kept and flagged:\n{bad_list(job, bad)}"
        )
    return "\n".join(lines)


def shared_line(cache: Cache, column: str) -> str | None:
    """A line where most of a teacher's tokens is the same in every image, and what to do; None where it is not."""
    constant, position = shared_energy(cache, column)
    if position <= 0.5:
        return None
    n = min(SHARED_IMAGES, len(cache.numbers))
    return (
        f"  {column}: {position:.0%} of its layer-normalised energy is the same in every image ({constant:.0%} one constant, the rest one"
        f" more per position; {n:,} images), which a student can predict without looking; inspect-cache stats {cache.path}, then"
        " train-mrmae --set terms.mimic.transform=position leaves it out (better from the ViTs of our study, level or worse from its CNN)"
    )
