"""Weight files from the Hugging Face hub or a URL; without a network, one clear line within seconds.

A look at the file comes before its download: hf_hub_download alone tries again for 23 s, and torch.hub waits without end.
"""

import urllib.request
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError

LOOK_SECONDS = 3.0


def fetch_weights(
    where: str, *, repository: str | None, names: Sequence[str], url: str | None, local_hint: str
) -> Path:
    """Path of the first of `names` in a hub repository (`owner/name[@revision]`), else of the file behind `url`.

    where, local_hint: how the message names the teacher, and how it is given a local file instead.
    Raises ValueError, with what each source said, where none gives the file.
    """
    if cached := find_cached(repository, names, url):
        return cached
    instead = f"pass a local file instead: {local_hint}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"{where}: the weights are not in the local cache and HF_HUB_OFFLINE is set; {instead}")
    said: list[str] = []
    for source in filter(None, (repository, url)):
        try:
            return from_hub(source, names) if source == repository else from_url(source)
        except Exception as error:  # those of the hub's HTTP library, which changes with its version, are no OSErrors
            said.append(f"{source}: {one_line(error)}")
    raise ValueError(f"{where}: the weights are not in the local cache and cannot be downloaded ({'; '.join(said)}); "
                     f"expected a network for the first download; {instead}")  # fmt: skip


def find_cached(repository: str | None, names: Sequence[str], url: str | None) -> Path | None:
    if repository:
        owner_name, _, revision = repository.partition("@")
        for name in names:
            found = huggingface_hub.try_to_load_from_cache(owner_name, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    return url_target(url) if url and url_target(url).is_file() else None


def from_hub(repository: str, names: Sequence[str]) -> Path:
    owner_name, _, revision = repository.partition("@")
    for name in names:
        address = huggingface_hub.hf_hub_url(owner_name, name, revision=revision or None)
        try:
            huggingface_hub.get_hf_file_metadata(address, timeout=LOOK_SECONDS)
        except EntryNotFoundError:
            if name == names[-1]:
                raise
        else:
            break
    return Path(huggingface_hub.hf_hub_download(owner_name, name, revision=revision or None))


def url_target(url: str) -> Path:
    """Where torch.hub keeps the file behind `url`, so that earlier downloads of timm and torchvision are found."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def from_url(url: str) -> Path:
    urllib.request.urlopen(url, timeout=LOOK_SECONDS).close()
    target = url_target(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = torch.hub.HASH_REGEX.search(target.name)  # torchvision's and timm's names end with part of a sha256
    torch.hub.download_url_to_file(url, str(target), digest.group(1) if digest else None)
    return target


def one_line(error: Exception) -> str:
    """What an error says, without the status line of the hub's."""
    return " ".join(str(error).split("\n\n", 1)[-1].split()) or type(error).__name__
