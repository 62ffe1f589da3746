"""Reading again where a disk or a network stumbles; what an image is that cannot be read at all."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from mrmae.common.backend import Unreachable

# What an image that cannot be read is; any other error is the disk's or the network's, and may pass.
FACTS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
WAITS_SECONDS = (0.2, 1.0)  # before something is read for the second and for the third time

WhatIsRead = TypeVar("WhatIsRead")


class Unreadable(OSError):
    """An image that is not there, that this user may not read, or that is no regular file."""


def patiently(read: Callable[[], WhatIsRead], where: Callable[[], str]) -> WhatIsRead:
    """What `read` gives, tried again where the disk or the network stumbled.

    Raises Unreadable for what is not there or may not be read; for an error that stays OSError, naming it, or Unreachable.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return read()
        except Unreadable:
            raise
        except Unreachable:  # and the store was asked several times for each
            if wait is None:
                raise
        except OSError as error:
            if error.errno in FACTS:
                raise Unreadable(*error.args, error.filename) from None
            if wait is None:
                raise could_not_read(where(), error) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def could_not_read(where: str, error: OSError) -> OSError:
    """The same kind of error, saying which image could not be read and what to do."""
    return type(error)(error.errno, f"{where}: could not be read, {1 + len(WAITS_SECONDS)} times: {error.strerror or error}; everything done so "
                       "far is kept; check the disk or the network, then run the same command again")  # fmt: skip
