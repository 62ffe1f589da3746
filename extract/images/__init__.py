"""Images as they are given: listed, read, hashed and decoded."""

from mrmae.extract.images.bands import decoded_as
from mrmae.extract.images.decode import MAX_PIXELS, decoded
from mrmae.extract.images.digest import OF_NOTHING, digest_images, remember_hashes
from mrmae.extract.images.list import Sources, list_sources, matches, read_image
from mrmae.extract.images.names import BAND_SUFFIXES, SUFFIXES
from mrmae.extract.images.patience import Unreadable
from mrmae.extract.images.tar_images import KeptIndices

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
