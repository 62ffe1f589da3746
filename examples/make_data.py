"""What the demo carries, from where it came: labelled EuroSAT tiles as one tar, and a small teacher in half precision.

    python examples/make_data.py eurosat-rgb.tar galileo_nano_s2rgb_p8.safetensors    # writes examples/data

The same inputs give the same bytes. Which tiles are taken is decided by the hash of their names, and by nothing else.
"""

import hashlib
import io
import tarfile
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import safetensors.numpy

DATA = Path(__file__).parent / "data"
TILES, TEACHER = "eurosat.tar", "galileo_nano.safetensors"
PER_CLASS = {"train": 60, "test": 40}


def chosen_tiles(names: list[str]) -> list[str]:
    """Of `PART/CLASS/NAME.jpg` the first of every part and class, by the SHA-256 of the name, in the names' order."""
    groups = defaultdict(list)
    for name in names:
        part, label, _ = name.split("/")
        groups[part, label].append(name)
    ranked = {
        group: sorted(found, key=lambda n: hashlib.sha256(n.encode()).digest()) for group, found in groups.items()
    }
    return sorted(name for (part, _), found in ranked.items() for name in found[: PER_CLASS[part]])


def tiles_tar(source: Path) -> bytes:
    """A tar of the chosen members of `source`, their bytes as they are; owner and times left out."""
    made = io.BytesIO()
    with tarfile.open(source) as old, tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as new:
        members = {member.name: member for member in old if member.isfile()}
        for name in chosen_tiles(list(members)):
            info = tarfile.TarInfo(name)
            info.size = members[name].size
            new.addfile(info, old.extractfile(members[name]))
    return made.getvalue()


def half_weights(source: Path) -> bytes:
    """The tensors of a safetensors file in float16, without its notes. ValueError where one leaves float16's range."""
    halves = {name: value.astype(np.float16) for name, value in safetensors.numpy.load_file(source).items()}
    for name, value in halves.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{source}: {name} is outside float16's range; keep the file in float32")
    return safetensors.numpy.save(halves)


@click.command()
@click.argument("tiles", type=click.Path(exists=True, path_type=Path))
@click.argument("weights", type=click.Path(exists=True, path_type=Path))
@click.option("--out", default=DATA, type=click.Path(path_type=Path), show_default="examples/data")
def main(tiles: Path, weights: Path, out: Path) -> None:
    """Write OUT/eurosat.tar and OUT/galileo_nano.safetensors from the whole data set and the fp32 weights."""
    out.mkdir(parents=True, exist_ok=True)
    for name, data in ((TILES, tiles_tar(tiles)), (TEACHER, half_weights(weights))):
        (out / name).write_bytes(data)
        click.echo(f"{out / name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
