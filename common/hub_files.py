"""Files of the Hugging Face Hub, hf://datasets/OWNER/REPO[@REVISION]/PATH: what obstore offers for reading, through the Hub's own file system."""

import contextlib
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

JOINED_BYTES = 1 << 20  # ranges with no more than this between them are one request, as obstore has it
RANGES_AT_ONCE = 8


class HubError(Exception):
    """What the Hub, or the way there, had to say."""


class Content(NamedTuple):
    """A file's content, or a part of it, and what the Hub says of it."""

    content: bytes
    meta: dict[str, Any]

    def bytes(self) -> bytes:
        return self.content


def hub_file_system() -> Any:
    """huggingface_hub's, with the token of the environment (HF_TOKEN) or of `hf auth login`."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


class HubFiles:
    """The names that are asked of obstore, each with a store and a key, for what lies below `root`, such as hf://datasets.

    All but FileNotFoundError is raised as HubError.
    """

    exceptions = types.SimpleNamespace(BaseError=HubError)

    def __init__(self, root: str) -> None:
        self.prefix = root.partition("://")[2] + "/"
        with told_by_the_hub():
            self.files = hub_file_system()

    def head(self, _store: object, key: str) -> dict[str, Any]:
        """Size and version of a file, as of now."""
        with told_by_the_hub():
            info = self.files.info(self.prefix + key, refresh=True)
        if info["type"] == "directory":
            raise FileNotFoundError(key)
        return self.meta(info)

    def list(self, _store: object, folder: str) -> Iterator[Sequence[dict[str, Any]]]:
        """Every file below a folder, as of now; none where there is no such folder."""
        with told_by_the_hub():
            try:
                found = self.files.find(self.prefix + folder, detail=True, refresh=True)
            except FileNotFoundError:
                found = {}
        yield [self.meta(info) for info in found.values()]

    def get(self, store: object, key: str, options: Any = None) -> Content:
        """A file, or its bytes in the range of `options`, fewer where it ends."""
        meta = self.head(store, key)
        start, end = (options or {}).get("range", (0, meta["size"]))
        return Content(self.part(key, start, min(end, meta["size"])), meta)

    def get_ranges(self, _store: object, key: str, starts: Sequence[int], ends: Sequence[int]) -> Sequence[bytes]:
        """The bytes from each start to each end, fewer where the file ends. ValueError for what is no range of it."""
        with told_by_the_hub():
            size = self.files.info(self.prefix + key)["size"]
        if wrong := [(a, b) for a, b in zip(starts, ends) if not 0 <= a < min(b, size)]:
            raise ValueError(f"bytes {wrong[0][0]} to {wrong[0][1]} of a file of {size}")
        pieces = joined_ranges(starts, ends, size)
        with ThreadPoolExecutor(min(RANGES_AT_ONCE, max(1, len(pieces)))) as pool:
            parts = dict(zip(pieces, pool.map(lambda piece: self.part(key, *piece), pieces)))
        return [next(part[a - start : b - start] for (start, end), part in parts.items() if start <= a < end) for a, b in zip(starts, ends)]  # fmt: skip

    def part(self, key: str, start: int, end: int) -> bytes:
        """These bytes of a file, in one request."""
        if start >= end:
            return b""
        with told_by_the_hub(), self.files.open(self.prefix + key, "rb", cache_type="none") as file:
            file.seek(start)
            return bytes(file.read(end - start))

    def meta(self, info: Any) -> dict[str, Any]:
        """What obstore would say of a file. Its version: of what is in it, where the Hub tells."""
        version = (
            (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or info.get("xet_hash") or info.get("mtime")
        )
        return {
            "path": info["name"].removeprefix(self.prefix),
            "size": info["size"],
            "e_tag": str(version),
            "last_modified": version,
        }


def joined_ranges(starts: Sequence[int], ends: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The requests that bring all of these ranges of a file of `size` bytes."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts, ends)):
        if found and start - found[-1][1] <= JOINED_BYTES:
            found[-1] = (found[-1][0], max(found[-1][1], min(end, size)))
        else:
            found.append((start, min(end, size)))
    return found


@contextlib.contextmanager
def told_by_the_hub() -> Iterator[None]:
    """What the Hub's client raises as FileNotFoundError or HubError: it has dozens of kinds, of several libraries."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise HubError(f"{type(error).__name__}: {error}") from error
