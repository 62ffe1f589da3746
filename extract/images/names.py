"""What images are called: suffixes, hidden names, keys and labels, and what of a listing is passed over."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from mrmae.common.progress import counted

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".tif", ".tiff", ".gif", ".bmp", ".ppm",
            ".pgm", ".pbm", ".pnm")  # fmt: skip
BAND_SUFFIXES = (*SUFFIXES, ".npy")  # where views keep a file's bands
FRAMES = (".gif", ".apng", ".webp", ".avif", ".tif", ".tiff")  # may hold several frames or pages
NAMES_SHOWN = 3  # names in a note


@dataclasses.dataclass
class LeftOut:
    """What lies among the images and is not used, or not as one may think.

    suffixes: files that are no images, by suffix. special: FIFOs, sockets and devices with an image's name, never opened.
    Of tars: labels that no image takes, images without one, with several that differ, and with one that others take too.
    """

    suffixes: Counter[str] = dataclasses.field(default_factory=Counter)
    special: list[str] = dataclasses.field(default_factory=list)
    labels: list[str] = dataclasses.field(default_factory=list)
    unlabelled: list[str] = dataclasses.field(default_factory=list)
    unclear: list[str] = dataclasses.field(default_factory=list)
    shared: list[str] = dataclasses.field(default_factory=list)

    def note_other(self, name: str) -> None:
        """Count a file that is no image."""
        self.suffixes[PurePosixPath(name).suffix.lower() or name] += 1

    def add(self, other: "LeftOut") -> None:
        """Keep what was kept of another part, too."""
        self.suffixes.update(other.suffixes)
        for field in dataclasses.fields(self)[1:]:
            getattr(self, field.name).extend(getattr(other, field.name))

    def note_labels(self, labels: Sequence[str], texts: Mapping[str, Mapping[str, str]]) -> None:
        """Keep what is odd about a tar's `.cls` members. texts: by image, those that fit its name, the taken one first."""
        taken = {name: next(iter(fit)) for name, fit in texts.items() if fit}
        users = Counter(taken.values())
        fitting = {cls for fit in texts.values() for cls in fit}
        self.labels += [name for name in labels if name not in fitting]
        self.unlabelled += [name for name in texts if labels and name not in taken]
        self.unclear += [name for name, fit in texts.items() if len(set(fit.values())) > 1]
        self.shared += [name for name, cls in taken.items() if users[cls] > 1]

    def notes(self) -> list[str]:
        """What a person should hear about it, line by line."""
        others = counted(self.suffixes.total(), "file that is no image was", "files that are no images were")
        notes = [f"{others} passed over ({' '.join(sorted(self.suffixes))})"] if self.suffixes else []
        for names, one, many, what in (
            (self.special, "name of an image that is no regular file was", "names of images that are no regular files were",
             "passed over, unopened"),
            (self.labels, "label (.cls) is empty or belongs to", "labels (.cls) are empty or belong to", "no image of its tar"),
            (self.unlabelled, "image has", "images have",
             "no label (.cls) in a tar that has some; the folder's name is taken, where there is one"),
            (self.unclear, "image has", "images have",
             "several labels (.cls) that differ; that of the longest name is taken"),
            (self.shared, "image shares its", "images share their",
             "label (.cls) with another image, as webdataset groups names at the first dot"),
        ):  # fmt: skip
            notes += [f"{counted(len(names), one, many)} {what}: {some(names)}"] if names else []
        return notes


def visible(key: str) -> bool:
    """False for hidden files and folders (.DS_Store, ._photo.jpg, .git/…) and macOS's resource copies."""
    if not key.startswith(".") and "/." not in key and "__MACOSX" not in key:
        return True
    hidden = (part.startswith(".") and part not in (".", "..") for part in key.split("/"))
    return not any(hidden) and "__MACOSX" not in key.split("/")


def wanted(key: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a member of a tar is taken for an image."""
    return is_image(key, suffixes) and visible(key)


def is_image(key: str, suffixes: tuple[str, ...]) -> bool:
    return key.lower().endswith(suffixes)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def parent_label(key: str) -> str | None:
    return name_of_folder(key.rpartition("/")[0])


@functools.lru_cache(maxsize=1 << 16)
def name_of_folder(folder: str) -> str | None:
    return PurePosixPath(folder).name or None


def checked_key(key: str, where: object) -> str:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: the name {os.fsencode(key)!r} is not valid UTF-8; keys are UTF-8; rename the file"
        ) from None
    return key
