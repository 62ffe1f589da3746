"""Weight files from the Hugging Face hub or a URL; without a network, one clear error within five seconds.

The libraries' own downloaders retry for most of a minute and print pages. So: the local caches first, then one short
look at the host, and only then the download.
"""

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

PROBE_SECONDS = 2.0


def fetch_weights(
    where: str, *, repository: str | None, names: Sequence[str], url: str | None, local_hint: str
) -> Path:
    """Path of the first of `names` in a hub repository (`owner/name[@revision]`), or of the file behind `url`.

    where, local_hint: how the message names the teacher, and how it is given a local file instead.
    Raises ValueError where no host answers, the file is not there, or access is refused.
    """
    if cached := find_cached(repository, names, url):
        return cached
    instead = f"pass a local file instead: {local_hint}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError(f"{where}: the weights are not in the local cache and HF_HUB_OFFLINE is set; {instead}")
    hosts = ([huggingface_hub.constants.ENDPOINT] if repository else []) + ([url] if url else [])
    up = [host for host, answers in zip(hosts, reachable(hosts)) if answers]
    if not up:
        raise ValueError(
            f"{where}: the weights are not in the local cache, and {' and '.join(hosts)} did not answer within "
            f"{PROBE_SECONDS:.0f} s; expected a network for the first download; {instead}"
        )
    try:
        return download_from_hub(repository, names) if repository and up[0] != url else download_url(str(url))
    except (OSError, HfHubHTTPError) as error:  # the network went away, or the hub said no
        reason = refusal(error) or (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where}: the download from {repository or url} failed ({reason}); {instead}") from None


def find_cached(repository: str | None, names: Sequence[str], url: str | None) -> Path | None:
    if repository:
        owner_name, _, revision = repository.partition("@")
        for name in names:
            found = huggingface_hub.try_to_load_from_cache(owner_name, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    return url_target(url) if url and url_target(url).is_file() else None


def reachable(urls: Sequence[str]) -> list[bool]:
    """For each address, whether its host says anything at all within `PROBE_SECONDS` (proxies are honoured)."""
    answers = [False] * len(urls)

    def ask(i: int) -> None:
        request = urllib.request.Request(urls[i], method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answers[i] = True
        except urllib.error.HTTPError:
            answers[i] = True
        except OSError:
            pass

    # Looking up a name has no timeout of its own, hence daemon threads that may be left behind.
    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(urls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_SECONDS)
    return answers


def download_from_hub(repository: str, names: Sequence[str]) -> Path:
    owner_name, _, revision = repository.partition("@")
    for name in names[:-1]:
        try:
            return Path(huggingface_hub.hf_hub_download(owner_name, name, revision=revision or None))
        except LocalEntryNotFoundError:  # not "no such file" but "no network"
            raise
        except EntryNotFoundError:
            continue
    return Path(huggingface_hub.hf_hub_download(owner_name, names[-1], revision=revision or None))


def url_target(url: str) -> Path:
    """Where torch.hub keeps the file behind `url`, so that earlier downloads of timm and torchvision are found."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download_url(url: str) -> Path:
    target = url_target(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = torch.hub.HASH_REGEX.search(target.name)  # torchvision's and timm's names end with part of a sha256
    torch.hub.download_url_to_file(url, str(target), digest.group(1) if digest else None)
    return target


def refusal(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "access must be granted on its page first, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    return "there is no such file" if absent else ""
