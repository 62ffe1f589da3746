"""Every command of README and docs runs, on tiny data, or stands here with the reason why not; links and options exist."""

import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from training import train_quietly

from mrmae.extract.cli import main as extract_features
from mrmae.extract.inspect.cli import main as inspect_cache
from mrmae.extract.run import Options
from mrmae.extract.run import extract_features as extract
from mrmae.probe.cli import main as probe_features
from mrmae.probe.show_cli import main as show_features
from mrmae.shards import commit
from mrmae.shards.cache import open_cache
from mrmae.shards.format import ViewRecipe, load_plan
from mrmae.shards.format.tail import read_tail, write_tail
from mrmae.train.cli import main as train_mrmae
from mrmae.train.method import load_recipe, recipe_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, click.Command] = {
    "extract-features": extract_features, "train-mrmae": train_mrmae, "inspect-cache": inspect_cache, "probe-features": probe_features,
    "show-features": show_features,
}  # fmt: skip
WRITTEN_BY_A_PROGRAM = {"evidence-commands.md": "test_study.py parses every command of the study"}
NOT_RUN = {
    "make demo": "minutes; its steps are these commands",
    "make test": "this suite",
    "pip install 'mrmae[bands]'": "changes what is installed; this suite has all extras but wandb",
    "pip install 'mrmae[ray]'": "changes what is installed; this suite has all extras but wandb",
    "extract-features photos photos.cache --engine ray --ray-workers 8 --ray-gpus 1": "needs 8 GPUs; test_ray_engine.py runs a pool without",
    "extract-features scenes scenes.cache --encoding npy:14xuint16 --crop-scale 1 1 "
    "--teacher 'dino=timm:vit_base_patch16_224.dino?bands=4,3,2&levels=0,3000'": "test_bands.py extracts files of 14 bands",
    "extract-features photos own.cache --teacher 'own=python:mymodels:pathology_encoder?depth=12' --allow-code": "test_custom.py makes such a module",
    "train-mrmae s3://bucket/photos.cache runs/far --recipe mr-mae --local-cache /scratch/shards --local-cache-bytes 200GB": "needs a bucket; test_caches.py trains so from a server of its own",
    "python benchmarks/study_mimic.py": "hours; test_study.py tests its parts",
    "python benchmarks/study_mimic.py --report": "writes these very pages; test_study.py tests it on other ones",
}
# What a command of the docs becomes, so that it takes a second: other values for these options, and more options.
SMALL_VALUES = {"--size": "32", "--grid": "4", "--epochs": "2", "--student": "test_vit", "--workers": "2", "--batch-size": "8",
                "--warmup-epochs": "1", "--shard-samples": "8", "--hold-out": "0.2", "--patch": "3,2"}  # fmt: skip
SMALL_SETTINGS = {"optim.epochs": "2", "optim.batch_size": "8", "finetune.epochs": "1", "finetune.batch_size": "8", "finetune.warmup_epochs": "0",
                  "linear.epochs": "2", "attentive.epochs": "1", "fusion.other": "timm:test_vit/random",
                  **{f"{key}.epochs": "1" for key in ("low_shot.linear", "fusion.linear", "fusion.head", "region.linear", "region.head", "segment.linear")}}  # fmt: skip
PARTS = {False: {"--train-include": "train/*", "--test-include": "test/*", "--include": "train/*"},
         True: {"--include": "train/*", "--train-include": "*-[0-3].png", "--test-include": "*-[45].png"}}  # fmt: skip
BOXES = "student.boxes={most: 2, cells: 4, hide: 8, crop: [8, 8], depth: 1, behind: 1, width: 16, heads: 2}"
DECODER = "student.decoder={depth: 1, width: 16, heads: 2, mlp_ratio: 2.0}"
ADDED: dict[str, dict[str, str]] = {
    "extract-features": {"--size": "32", "--grid": "4", "--device": "cpu", "--shard-samples": "8"},
    "train-mrmae": {"--student": "test_vit", "--epochs": "2", "--batch-size": "8", "--device": "cpu", "--panels-every": "0"},
    "probe-features": {"--device": "cpu", "--workers": "2"},
    "show-features": {"--device": "cpu"},
}  # fmt: skip
CNN = re.compile(r"resnet|mobilenet|efficientnet|convnext|swin")


class Command(NamedTuple):
    """A command in a fenced block: its page, its line there, and its text without continuations and comments."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text}"


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's `sh` blocks."""
    found, inside, pending, begun = [], False, "", 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = line.strip() in ("```sh", "```bash")
        elif inside:
            begun, pending = (begun, pending) if pending else (number, "")
            pending += " " + line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                words = shlex.split(pending, comments=True)
                found += [Command(page, begun, shlex.join(words))] if words else []
                pending = ""
    return found


def test_commands_stand_in_fenced_blocks_where_this_test_sees_them() -> None:
    stray = [f"{page.name}:{number}: {line}" for page in PAGES for number, line in enumerate(page.read_text().splitlines(), 1)
             if re.match(rf" {{4}}({'|'.join(PROGRAMS)}|torchrun|python|make|pip)\b", line)]  # fmt: skip
    assert not stray, "put these into ```sh blocks"
    assert len([command for page in PAGES for command in commands_of(page)]) > 20


def test_what_is_not_run_is_still_there() -> None:
    every = {command.text for page in PAGES for command in commands_of(page)}
    assert not (stale := NOT_RUN.keys() - every), f"no page has these commands any more: {sorted(stale)}"


def test_options_named_in_the_text_exist() -> None:
    for page in (page for page in PAGES if page.name not in WRITTEN_BY_A_PROGRAM):
        for span in re.findall(r"`((?:" + "|".join(PROGRAMS) + r")[^`\n]*)`", page.read_text()):
            program, *words = span.split()
            command = PROGRAMS[program]
            if isinstance(command, click.Group) and words and words[0] in command.commands:
                command = command.commands[words[0]]
            known = {name for option in command.params for name in [*option.opts, *option.secondary_opts]} | {"--help"}
            strange = [word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word) and word not in known]
            assert not strange, f"{page.name}: `{span}`: there is no {strange[0]}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#: ]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target} is not there"
    index = (ROOT / "docs/README.md").read_text()
    assert not [page.name for page in PAGES[1:] if page.name != "README.md" and page.name not in index], (
        "docs/README.md lists every page"
    )


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny stand-ins for what the pages begin with: labelled images, a tar of them, a cache, a finished run."""
    root, draw = tmp_path_factory.mktemp("templates"), torch.Generator().manual_seed(0)
    for part, n in (("train", 6), ("test", 2)):
        for at, name in enumerate(("cats", "dogs", "owls")):
            for i in range(n):
                path = root / "images" / part / name / f"{name}-{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = torch.randint(0, 120, (40 + i, 44, 3), generator=draw, dtype=torch.uint8)
                noise[..., at] += 100
                Image.fromarray(noise.numpy()).save(path)
    for name, parts in (("images.tar", ("train", "test")), ("train.tar", ("train",)), ("test.tar", ("test",))):
        with tarfile.open(root / name, "w") as tar:
            for part in parts:
                tar.add(root / "images" / part, part)
    teachers = {"clip": "test_vit", "dino": "test_vit", "cnn": "test_efficientnet"}
    cache = root / "cache"
    recipe, texts = ViewRecipe(32), [f"{name}=timm:{model}/random" for name, model in teachers.items()]
    extract(
        Options([root / "images/train"], cache, recipe, texts, grid=4, shard_samples=8, device="cpu"),
        say=lambda line: None,
    )
    tail = read_tail(cache, "clip")
    (cache / "manifest.json").unlink()
    write_tail(cache, "clip", {**tail, "proj.weight": torch.eye(64)[:5].contiguous()})
    commit.finalise(cache, load_plan(cache))
    short = ("student.model=test_vit", DECODER, "optim.epochs=1", "optim.warmup_epochs=0.5", "optim.batch_size=8")
    train_quietly(cache, root / "run", load_recipe("mr-mae", short))
    found = {name: root / name for name in ("images", "images.tar", "train.tar", "test.tar", "cache", "run")}
    return found | {"image": next(found["images"].rglob("*.png"))}


def provide(word: str, kind: str, templates: dict[str, Path]) -> None:
    """What a command wants to find at a path, where it is not there yet."""
    place = Path(word.partition("#")[0])
    if place.exists() or word.startswith(("timm:", "untrained:timm:")) or word == "pixels":
        return
    place = Path(str(place).removeprefix("untrained:"))
    if place.suffix == ".tar":
        kind = place.name if place.name in templates else "images.tar"
    elif place.suffix == ".cache" and kind == "images":
        kind = "cache"
    place.parent.mkdir(parents=True, exist_ok=True)
    source = templates[kind]
    if not place.exists():
        shutil.copytree(source, place) if source.is_dir() else shutil.copy(source, place)


def provide_all(program: str, paths: list[str], named: dict[str, list[str]], templates: dict[str, Path]) -> None:
    """The images, caches and runs that a command reads. paths: its words that are no options; named: options' values."""
    reads: dict[str, Any] = {
        "extract-features": [(word, "images") for word in paths[:-1]],
        "train-mrmae": [(word, "cache") for word in paths[:1]],
        "inspect-cache": [(word, "cache") for word in paths[1 : 3 if paths[:1] == ["diff"] else 2]],
        "probe-features": [
            (word, "cache" if "#" in word else "run") for word in (paths if "--data" in named else paths[:1])
        ]
        + [(word, "images") for word in ([] if "--data" in named else paths[1:])],
        "show-features": [(word, "image") for word in paths] + [(word, "run") for word in named.get("--student", [])],
    }
    for recipe in (name for name in named.get("--recipe", []) if name.endswith(".yaml")):
        Path(recipe).write_text(recipe_text("mr-mae"))
    for file in named.get("--boxes", []):
        columns = {"key": (keys := open_cache(templates["cache"]).keys), "x0": [2] * len(keys), "y0": [3] * len(keys)}
        pq.write_table(pa.table(columns | {"x1": [30] * len(keys), "y1": [28] * len(keys)}), file)
    for file in named.get("--labels", []):
        rows = [f"{key},{key.partition('/')[0]}\n" for key in open_cache(templates["cache"]).keys]
        Path(file).write_text("key,label\n" + "".join(rows))
    for word, kind in [*reads[program], *((word, "images") for word in named.get("--data", []))]:
        provide(word, kind, templates)


def small_model(address: str) -> str:
    """timm's test model of the same kind."""
    return "test_efficientnet" if CNN.search(address) else "test_vit"


def small_teacher(text: str) -> str:
    """The same teacher, tiny and with random weights; of its options only the tap is kept."""
    name, _, address = (
        text.rpartition("=") if re.match(r"[\w-]+=(timm|open_clip):", text) is None else text.partition("=")
    )
    model = small_model(address)
    tap = re.search(r"tap=[\w,]+", address)
    taps = re.sub(r"block_(\d+)", lambda found: f"block_{(int(found[1]) - 1) % 6 + 1}", tap[0]) if tap else ""
    return f"{name}=timm:{model}/random" + (f"?{taps}" if tap and model == "test_vit" else "")


def small(words: list[str]) -> tuple[str, list[str], list[str], dict[str, list[str]]]:
    """(program, the words to call it with, its arguments, the values of its options) of a command of the docs, made small."""
    if words[0] == "torchrun":  # the rest of the command is what a single process is given
        module = words[words.index("-m") + 1]
        words = [
            {"mrmae.extract.cli": "extract-features", "mrmae.train.cli": "train-mrmae"}[module],
            *words[words.index("-m") + 2 :],
        ]
    program, *rest = words
    command, named, paths, told = PROGRAMS[program], dict[str, list[str]](), list[str](), list[str]()
    if isinstance(command, click.Group) and rest:
        command = command.commands[rest[0]]
    of_a_cache = any(word.endswith(".cache") for word in rest)
    counts = {
        name: 0 if getattr(option, "is_flag", False) else option.nargs
        for option in command.params
        for name in option.opts
    }
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            values = [rest.pop(0) for _ in range(counts[word])]
            key, equals, _ = values[0].partition("=") if word == "--set" else ("", "", "")
            values = [SMALL_VALUES[word]] if word in SMALL_VALUES else values
            values = [PARTS[of_a_cache][word]] if word in PARTS[of_a_cache] else values
            values = [f"{key}={SMALL_SETTINGS[key]}"] if key in SMALL_SETTINGS else values
            values = [small_teacher(value) for value in values] if word == "--teacher" else values
            named.setdefault(word, []).extend(values)
            told += [word, *values] * (word != "--compile")  # minutes
        else:
            # Absolute places of the docs lie in the test's folder.
            word = re.sub(
                r"^(untrained:)?(timm:.*)",
                lambda found: f"{found[1] or ''}timm:{small_model(found[2])}/random",
                word.removeprefix("/"),
            )
            paths.append(word)
            told.append(word)
    if paths:
        told += [word for name, value in ADDED.get(program, {}).items() if name not in named for word in (name, value)]
    if program == "extract-features" and "--teacher" not in named:
        told += [word for name in ("clip", "dino") for word in ("--teacher", f"{name}=timm:test_vit/random")]
    if (
        program == "train-mrmae"
        and paths
        and not any(value.startswith("student.decoder") for value in named.get("--set", []))
    ):
        told += ["--set", DECODER] * (named.get("--recipe", [""])[-1] not in ("mimic-only", "maskalign", "mom"))
        told += ["--set", BOXES] * ("--boxes" in named)
    if program == "probe-features":
        given = " ".join(named.get("--set", []))
        told += [
            word
            for key, value in SMALL_SETTINGS.items()
            if "optim" not in key and key not in given
            for word in ("--set", f"{key}={value}")
        ]
    return program, told, paths, named


def python_blocks(page: Path) -> list[str]:
    """The `python` blocks of a page of docs/. README's are tested where their functions are."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if page.parent == ROOT / "docs" else []


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, templates: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the page's order and in one folder, so that a command finds what those before it made."""
    if page.name in WRITTEN_BY_A_PROGRAM:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    for command in commands_of(page):
        if command.text in NOT_RUN:
            continue
        words = shlex.split(command.text)
        assert words[0] in (*PROGRAMS, "torchrun"), f"{command}: run it here, or say in NOT_RUN why not"
        program, told, paths, named = small(words)
        provide_all(program, paths, named, templates)
        result = CliRunner().invoke(PROGRAMS[program], told)
        assert result.exit_code == 0, (
            f"{command}\nran as: {program} {shlex.join(told)}\n{result.output[-2000:]}\n{result.exception!r}"
        )
        assert os.getcwd() == str(tmp_path)
    shutil.copy(templates["image"], "shirt.jpg")
    for block in python_blocks(page):
        exec(compile(block.replace("cache, 64,", "cache, 4,"), page.name, "exec"), {})
