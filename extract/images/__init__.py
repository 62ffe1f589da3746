"""Images as they are given: listed, read, hashed and decoded."""

from mrmae.extract.images.decode import MAX_PIXELS, decoded
from mrmae.extract.images.digest import digest_images
from mrmae.extract.images.list import Sources, Unreadable, list_sources, matches, read_image

__all__ = [
    "MAX_PIXELS",
    "Sources",
    "Unreadable",
    "decoded",
    "digest_images",
    "list_sources",
    "matches",
    "read_image",
]
