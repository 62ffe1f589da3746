"""Image-text retrieval: which captions an image finds, and which images a caption finds."""

import functools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from braceexpand import braceexpand
from jaxtyping import Float, Int64
from torch import Tensor

from mrmae.common.progress import counted
from mrmae.common.tables import IMAGE_COLUMNS, column_of, keys_by_name, read_beside
from mrmae.probe import report
from mrmae.probe.job import Outcome, Probing, headline
from mrmae.probe.settings import Retrieval

CAPTION_COLUMNS = ("title", "caption", "captions", "text", "TEXT", "sentence")
QUERY_ROWS = 256  # per chunk of similarities
CAPTION_BYTES = 100_000
Captions = list[list[str]]  # of every test image


def run_retrieval(job: Probing, name: str) -> Outcome:
    """R@k both ways over the test images and their captions."""
    from mrmae.probe.clip import images_and_texts  # open_clip takes seconds to import

    settings, captions = job.options.settings.retrieval, captions_of(job)
    texts, owned = grouped(captions)
    images, encode = images_and_texts(job, settings.text)
    vectors = encode(texts)
    found = {
        "image to text": places(images, vectors, owned),
        "text to image": places(vectors, images, inverted(owned, len(texts))),
    }
    rows = [
        report.share_row(f"{way}, R@{k}", at < k, seed=job.options.seed)
        for way, at in found.items()
        for k in settings.ks
    ]
    given = sum(map(len, captions))
    notes = [f"{counted(given, 'caption')}, of which {counted(len(texts), 'text is', 'texts are')} different: equal ones are one, and every image that "
             "has it is right"] * (given != len(texts))  # fmt: skip
    measures = [{"way": way, "median place": float(at.double().median() + 1), "queries": len(at), "among": n}
                for (way, at), n in zip(found.items(), (len(texts), len(images)))]  # fmt: skip
    return {"rows": rows, "measures": measures, "notes": notes, "n_train": 0, **headline(rows[0])}, None


def grouped(captions: Captions) -> tuple[list[str], list[list[int]]]:
    """The different captions in the order they come, and which of them every image has. Case and white space make no difference."""
    index: dict[str, int] = {}
    texts: list[str] = []
    owned: list[list[int]] = []
    for own in captions:
        for text in own:
            if index.setdefault(" ".join(text.split()).casefold(), len(texts)) == len(texts):
                texts.append(" ".join(text.split()))
        owned.append(sorted({index[" ".join(text.split()).casefold()] for text in own}))
    return texts, owned


def inverted(owned: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """Which images have each of n texts."""
    owners: list[list[int]] = [[] for _ in range(n)]
    for i, own in enumerate(owned):
        for text in own:
            owners[text].append(i)
    return owners


def places(
    queries: Float[Tensor, "n d"], gallery: Float[Tensor, "m d"], right: Sequence[Sequence[int]]
) -> Int64[Tensor, "n"]:
    """How many wrong ones are at least as near as the nearest right one, for every query; 0 is the first place.

    Ties count against it: where everything is alike, nothing is found.
    """
    queries, gallery, found = F.normalize(queries, dim=1), F.normalize(gallery, dim=1), []
    for first in range(0, len(queries), QUERY_ROWS):
        cosine = queries[first : first + QUERY_ROWS] @ gallery.T
        wanted = torch.zeros(cosine.shape, dtype=torch.bool)
        for row, own in zip(wanted, right[first : first + QUERY_ROWS]):
            row[list(own)] = True
        best = cosine.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
        found.append(((cosine >= best) & ~wanted).sum(1))
    return torch.cat(found)


# --- where captions are


def captions_of(job: Probing) -> Captions:
    """The captions of every test image. ValueError where an image has none, and where one has no image."""
    settings, keys = job.options.settings.retrieval, [row.key for row in job.data.test.rows]
    if settings.captions:
        told = by_key(
            list_captions(settings),
            [row.key for part in (job.data.train, job.data.test) for row in part.rows],
            settings.captions,
        )
        where = f"--set retrieval.captions={settings.captions}"
    else:
        told, where = captions_beside(job.options.data[-1], keys), f"DATA {job.options.data[-1]}"
    if bare := [key for key in keys if not told.get(key)]:
        raise ValueError(f"{where}: {len(bare)} of {len(keys)} test images have no caption, first {bare[0]!r}; expected one for every image: NAME.txt beside "
                         "NAME.jpg, or a table by --set retrieval.captions=FILE; choose images that have one with --test-include")  # fmt: skip
    return [told[key] for key in keys]


def list_captions(settings: Retrieval) -> list[tuple[str, str]]:
    """(image, caption) of every row of a table. ValueError where it cannot be read, is empty or lacks a column."""
    where = f"--set retrieval.captions={settings.captions}"
    rows = read_beside(Path(settings.captions), where)
    image = column_of(rows[0], settings.image_column, IMAGE_COLUMNS, where, "an image (retrieval.image_column)")
    caption = column_of(
        rows[0], settings.caption_column, CAPTION_COLUMNS, where, "a caption (retrieval.caption_column)"
    )
    pairs = [
        (str(row[image]), text)
        for row in rows
        for text in (row[caption] if isinstance(row[caption], list) else [row[caption]])
    ]
    if bad := [name for name, text in pairs if not isinstance(text, str) or not text.strip()]:
        raise ValueError(
            f"{where}: the caption of {bad[0]!r} is empty; expected words; write them, or leave the row out"
        )
    return pairs


def by_key(pairs: Sequence[tuple[str, str]], keys: Sequence[str], where: str) -> dict[str, list[str]]:
    """The captions of every image's key. ValueError for a name that is no image's, or that of several."""
    told: dict[str, list[str]] = {}
    for key, (_, text) in zip(keys_by_name([name for name, _ in pairs], keys, where), pairs):
        told.setdefault(key, []).append(text)
    return told


def captions_beside(data: str, keys: Sequence[str]) -> dict[str, list[str]]:
    """The text of NAME.txt beside NAME.jpg, in a folder or in tars (as webdataset groups them, by the first dot, too)."""
    if Path(data).is_dir():
        read = functools.partial(text_file, Path(data))
    else:
        tars = [Path(path) for path in ([data] if Path(data).exists() else braceexpand(data))]
        if not all(path.is_file() and tarfile.is_tarfile(path) for path in tars):
            return {}
        inside = {name: text for path in tars for name, text in texts_of_tar(path)}
        read = inside.get  # type: ignore[assignment]
    found = {key: [text for stem in stems(key) if (text := read(f"{stem}.txt"))][:1] for key in keys}
    return {key: texts for key, texts in found.items() if texts}


def stems(key: str) -> list[str]:
    """A key's name without what follows its last dot, and its first."""
    folder, slash, name = key.rpartition("/")
    return list(
        dict.fromkeys([f"{folder}{slash}{name.rpartition('.')[0]}", f"{folder}{slash}{name.partition('.')[0]}"])
    )


def text_file(root: Path, name: str) -> str | None:
    path = root / name
    return path.read_bytes()[:CAPTION_BYTES].decode("utf-8", "replace").strip() if path.is_file() else None


def texts_of_tar(path: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every .txt member."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".txt") and (file := tar.extractfile(member)):
                yield member.name.removeprefix("./"), file.read(CAPTION_BYTES).decode("utf-8", "replace").strip()
