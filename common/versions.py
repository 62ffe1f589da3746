"""What the numbers may depend on: Python and the packages that compute."""

import contextlib
import functools
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mrmae", "torch", "timm", "open_clip_torch", "numpy", "pillow", "triton")


@functools.cache
def versions() -> dict[str, str]:
    """Version by name of Python and of what is installed of PACKAGES, found without importing them: some take seconds."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
