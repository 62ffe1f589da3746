"""Another process that holds a lock of a cache."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def elsewhere(file: Path, *, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock until the end; killed then."""
    script = f"""
from pathlib import Path
from mrmae.shards import claims
claim = claims.take(Path({str(file)!r}), shared={shared})
print("holds", flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()
