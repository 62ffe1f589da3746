"""The whole product in a few minutes on two cores: images → a teacher's features → two students → one page that says what they are worth.

Without `--images` all it needs is here (examples/data): satellite images and a small teacher that was really pre-trained. `mr-mae`
and `mae` train equal students for equally many updates; k-NN tells what both, untrained weights, bare pixels and the teacher are
worth on images that no student saw. Stop it with Ctrl-C whenever you like: the same command goes on.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mrmae.common.files import publish

DATA = Path(os.path.relpath(Path(__file__).parent / "data"))
TILES = DATA / "eurosat.tar"
GALILEO = (
    f"galileo=timm:vit_tiny_patch16_224@{DATA / 'galileo_nano.safetensors'}?embed_dim=128&depth=4&num_heads=8&patch_size=8"
    "&class_token=False&global_pool=&fc_norm=False&mean=-0.306276,-0.177525,-0.160025&std=1.589351,1.328435,1.334842&input_size=64"
)
TEACHER = GALILEO.partition("=")[2]  # as a source of probes
HUB = ("clip=open_clip:ViT-B-16-quickgelu/openai", "dino=timm:vit_base_patch16_224.dino")
SMALL_VIEWS = ("--size", "64", "--grid", "8", "--views", "4")
SMALL_STUDENT = (
    "--student", "test_vit", "--set", "student.decoder.depth=1", "--set", "student.decoder.width=64",
    "--set", "student.decoder.heads=2", "--blr", "1e-2",
)  # fmt: skip
LARGE_STUDENT = (
    "--student", "vit_tiny_patch16_224", "--set", "student.decoder.depth=2", "--set", "student.decoder.width=192",
    "--set", "student.decoder.heads=3", "--blr", "4e-3",
)  # fmt: skip
EPOCHS, LARGE_EPOCHS, QUICK_EPOCHS = 80, 40, 2
SHOWN = ("Highway", "Industrial", "Residential", "River", "SeaLake")  # classes of the unseen images that are drawn
RECIPES = ("mr-mae", "mae")


@click.command()
@click.option("--images", type=click.Path(exists=True, path_type=Path), help="A folder of your own images instead.")
@click.option("--out", default="demo-output", type=click.Path(path_type=Path), show_default=True)
@click.option("--quick", is_flag=True, help="Two epochs: shows that everything runs, and teaches nothing.")
def main(images: Path | None, out: Path, quick: bool) -> None:
    """Run the product's commands one after the other, and say what to open."""
    state = begin(out, {"images": str(images) if images else None, "quick": quick})
    if images:
        on_photos(images, out, state)
    elif (page := out / "index.html").exists():
        click.echo(
            f"All is done: open {page}. To run it again, delete {out} first, or choose another folder (make demo OUT=...)."
        )
    else:
        on_tiles(out, state)


def begin(out: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What OUT remembers of this demo. ClickException where it holds one of other images or another length."""
    path = out / "demo.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {**wanted, "took": {}, "done": []}
    if changed := [name for name in wanted if state[name] != wanted[name]]:
        what = f"with {changed[0]} {json.dumps(state[changed[0]])}, not {json.dumps(wanted[changed[0]])}"
        raise click.ClickException(f"{out}: holds a demo {what}; expected the same; delete it, or choose another OUT")
    out.mkdir(parents=True, exist_ok=True)
    remember(out, state)
    return state


def remember(out: Path, state: Mapping[str, Any]) -> None:
    publish(out / "demo.json", (json.dumps(state, indent=1) + "\n").encode(), replace=True)


# --- the demo's own images


def on_tiles(out: Path, state: dict[str, Any]) -> None:
    """Extract, train, probe, and write the page."""
    import demo_page  # imports torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from a second one
    commands = tile_commands(out, unseen_tiles(out / "unseen"), epochs=QUICK_EPOCHS if state["quick"] else EPOCHS)
    for name, command in commands.items():
        run(command, name, out, state)
    page = demo_page.write(out, commands, state["took"], teacher=TEACHER)
    click.secho(f"\nOpen {page}", bold=True)


def unseen_tiles(folder: Path) -> list[Path]:
    """The first test image of each class that is drawn, as files."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(TILES) as tar:
        names = tar.getnames()
        for label in SHOWN:
            name = next(name for name in names if name.startswith(f"test/{label}/"))
            member = tar.extractfile(name)
            assert member
            publish(folder / Path(name).name, member.read(), replace=True)
    return sorted(folder.glob("*.jpg"))


def tile_commands(out: Path, shown: Sequence[Path], *, epochs: int) -> dict[str, list[str]]:
    """Every command by what it is for: a cache, two students, their k-NN beside the teacher's, a picture."""
    cache, length = (
        str(out / "cache"),
        ["--batch-size", "50", "--epochs", str(epochs), "--panels-every", str(max(1, epochs // 10))],
    )
    students = [str(out / recipe) for recipe in RECIPES]
    trained = {recipe: ["train-mrmae", cache, student, "--recipe", recipe, *SMALL_STUDENT, *length]
               for recipe, student in zip(RECIPES, students)}  # fmt: skip
    return {
        "features": ["extract-features", str(TILES), cache, "--include", "train/*", *SMALL_VIEWS, "--teacher", GALILEO],
        **trained,
        "k-NN": ["probe-features", *students, TEACHER, "--data", str(TILES), "--out", str(out / "probes")],
        "picture": ["show-features", *map(str, shown), "--teacher", GALILEO, "--student", students[0], "--out", str(out / "unseen.png")],
    }  # fmt: skip


# --- images of one's own


def on_photos(images: Path, out: Path, state: dict[str, Any]) -> None:
    """Extract and train `mr-mae` on a folder, with CLIP and DINO where they can be had, else with the demo's own teacher."""
    if "teachers" not in state:
        state["teachers"], state["reason"] = choose_teachers()
        remember(out, state)
    if state["reason"]:
        click.secho(NO_HUB.format(reason=state["reason"], out=out), fg="yellow", bold=True, err=True)
    for name, command in photo_commands(images, out, state["teachers"], quick=state["quick"]).items():
        run(command, name, out, state)
    click.secho(f"\nOpen {out / 'run' / 'report.html'}", bold=True)
    click.echo(f"and load the student: timm.create_model('local-dir:{out / 'run' / 'student'}', pretrained=True)")


NO_HUB = """
  !!  No CLIP and no DINO: {reason}
  !!  This goes on with the teacher that the demo carries, a small one that knows SATELLITE IMAGES only, at 64 px: it shows
  !!  that everything runs on your images. What the student learns of photographs is little.
  !!  With a network, delete {out} and run it again."""


def choose_teachers() -> tuple[list[str], str]:
    """CLIP and DINO where their weights are at hand or the hub answers, else the demo's own, and why."""
    from mrmae.extract.teachers import build_teacher, parse_teacher

    try:
        for text in HUB:
            build_teacher(parse_teacher(text), grid=14, view_size=224, device="cpu", precision="fp32")
    except (ValueError, OSError) as error:
        return [GALILEO], str(error)
    return list(HUB), ""


def photo_commands(images: Path, out: Path, teachers: Sequence[str], *, quick: bool) -> dict[str, list[str]]:
    """Two commands; views, student and epochs follow the teachers."""
    small = list(teachers) == [GALILEO]
    views, student, epochs = (SMALL_VIEWS, SMALL_STUDENT, EPOCHS) if small else ((), LARGE_STUDENT, LARGE_EPOCHS)
    named = [word for text in teachers for word in ("--teacher", text)]
    length = ["--epochs", str(QUICK_EPOCHS if quick else epochs)]
    return {
        "features": ["extract-features", str(images), str(out / "cache"), *views, *named],
        "mr-mae": ["train-mrmae", str(out / "cache"), str(out / "run"), *student, *length],
    }


# --- commands


def run(command: Sequence[str], name: str, out: Path, state: dict[str, Any]) -> None:
    """Print a command as one would type it and run it, unless it has ended well before; wall-clock and CPU seconds are added to `state`.

    If it fails, the demo ends with its exit code. Ctrl-C reaches the command too, which saves before it ends: wait for it.
    """
    if name in state["done"]:
        click.echo(f"done before: {name}")
        return
    click.secho("\n$ " + shlex.join(command), bold=True)
    sys.stdout.flush()
    before, stopped = clocks(), False
    process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]])
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            stopped = True
    earlier = state["took"].get(name, (0.0, 0.0))
    state["took"][name] = [total + now - then for total, now, then in zip(earlier, clocks(), before)]
    ended_well = not process.returncode and not stopped
    state["done"] += [name] * ended_well
    remember(out, state)
    if stopped:
        click.secho("\nstopped; the same command goes on from here", bold=True)
    if not ended_well:
        sys.exit(abs(process.returncode) or 130)


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of CPU time of the commands that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
