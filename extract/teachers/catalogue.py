"""Which teachers there are: every model and tag that timm and open_clip know weights of, and what each gives for a grid."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from mrmae.common.device import without_numbers
from mrmae.extract.teachers.address import parse_teacher

MOST_MEASURED = 40  # models that are built (without memory, about a twentieth of a second each) to tell their size


def list_teachers(pattern: str, *, grid: int) -> Iterator[str]:
    """A line per teacher whose name matches the glob `pattern` (anywhere in it, where it has no *), as --teacher takes it.

    Up to MOST_MEASURED of them with patch, input size and tokens for a student of grid x grid. ValueError where nothing matches.
    """
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [name for name in known_teachers() if fnmatchcase(name.lower(), glob.lower())]
    if not found:
        raise ValueError(f"--list-teachers {pattern}: neither timm nor open_clip knows weights of that name; expected a part of one, or "
                         "a glob such as 'timm:*dinov2*' or 'open_clip:*/datacomp*'")  # fmt: skip
    wide = max(map(len, found))
    for name in found:
        told = f"  {what_it_gives(name, grid)}" if len(found) <= MOST_MEASURED else ""
        yield f"{name:{wide if told else 0}}{told}"
    if len(found) > MOST_MEASURED:
        yield f"{len(found)} teachers; with a pattern that at most {MOST_MEASURED} match, also what each gives: --list-teachers 'timm:*dino*'"


def known_teachers() -> list[str]:
    """LIBRARY:MODEL/TAG (timm: MODEL.TAG) of everything with published weights."""
    import open_clip
    import timm

    return [f"timm:{name}" for name in timm.list_pretrained()] + [
        f"open_clip:{model}/{tag}" for model, tag in open_clip.list_pretrained()
    ]


def what_it_gives(name: str, grid: int) -> str:
    """What a teacher gives for a student of grid x grid, in words; the model is built without memory for its weights."""
    from mrmae.extract.teachers import open_clip, timm

    request = parse_teacher(f"teacher={name}")
    try:
        with without_numbers():
            told = (timm.shape_of_timm if request.library == "timm" else open_clip.shape_of_open_clip)(request, grid)
    except Exception as error:  # of libraries' hundreds of models some cannot be built so
        return f"cannot be built without its weights ({type(error).__name__})"
    side, (height, width) = told["input"], told["map"]
    resampled = "" if (height, width) == (grid, grid) else f", resampled to {grid} x {grid}"
    what = f"patch {told['patch']}" if told["patch"] else "feature map"
    licence = f", {told['licence']}" if told["licence"] else ""
    return f"{what}, runs at {side} px: {height} x {width} tokens of {told['width']}{resampled}{licence}"
