"""Images as they are given: listed, read, hashed and decoded."""

from mrmae.extract.images.bands import decoded_as
from mrmae.extract.images.decode import MAX_PIXELS, decoded
from mrmae.extract.images.digest import OF_NOTHING, digest_images, remember_hashes
from mrmae.extract.images.list import BAND_SUFFIXES, SUFFIXES, Sources, list_sources, matches, read_image
from mrmae.extract.images.objects import KeptIndices
from mrmae.extract.images.patience import Unreadable

__all__ = [
    "BAND_SUFFIXES",
    "MAX_PIXELS",
    "KeptIndices",
    "SUFFIXES",
    "Sources",
    "Unreadable",
    "decoded",
    "decoded_as",
    "OF_NOTHING",
    "digest_images",
    "list_sources",
    "matches",
    "read_image",
    "remember_hashes",
]
