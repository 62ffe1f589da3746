"""What OUT says about itself: recipe.yaml, run.json, README.md, and the plan printed before the first step."""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from mrmae.common.files import publish
from mrmae.common.progress import counted, human_bytes, human_time
from mrmae.common.versions import versions
from mrmae.shards.near import NearFolder
from mrmae.train import optim
from mrmae.train.baselines import no_baseline
from mrmae.train.elsewhere import EXPORTS
from mrmae.train.kernel_choice import choice_words
from mrmae.train.method import MAP, MaskedConvViT, Optim, partner_targets, reads_saliency, to_dict
from mrmae.train.run import Run, cache_ids, maps_read, random_teachers, teacher_specs

OPTIMISERS = {
    "muon": "Muon for the matrices of blocks, AdamW for the rest",
    "schedule-free": "schedule-free AdamW; evaluated and exported are averaged weights",
}


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    publish(path, text.encode(), replace=True)


def write_run_files(run: Run, *, command: str, how: Mapping[str, Any]) -> None:
    """Write recipe.yaml (resolved), run.json (one entry in `starts` per start) and README.md.

    command: what continues the run. how: what to note of this start beside the run's setup.
    """
    write_text(run.out / "recipe.yaml", yaml.safe_dump(to_dict(run.recipe), sort_keys=False))
    path, starts = run.out / "run.json", []
    with contextlib.suppress(OSError, ValueError, KeyError):
        starts = json.loads(path.read_text())["starts"]
    start = {
        "command": command,
        "folder": os.getcwd(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": run.step,
        **asdict(run.setup),
        "device": str(run.device),
        "precision": run.precision,
        **how,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "notes": run.notes,
    }
    warning = random_line(run)
    facts = {
        **({"warning": warning} if warning else {}),
        **source_of(run),
        "updates_per_epoch": run.updates,
        "baselines": run.baselines,
        "load": how_to_load(run),
        "starts": [*starts, start],
    }
    write_text(path, json.dumps(facts, indent=2) + "\n")
    write_text(run.out / "README.md", readme(run, command))


def add_facts(run: Run, **facts: Any) -> None:
    """Note more in run.json: `costs` of a step, or by what and where the run was `stopped`; a next start begins without them."""
    path = run.out / "run.json"
    write_text(path, json.dumps({**json.loads(path.read_text()), **facts}, indent=2) + "\n")


def source_of(run: Run) -> dict[str, Any]:
    """Where the student comes from, in plain values: recipe, cache and its ids, every teacher with its weights."""
    teachers, specs = {}, teacher_specs(run)
    for teacher in teachers_read(run):
        spec = specs[teacher]
        teachers[teacher] = {
            "model": f"{spec.library}:{spec.model}" + (f"/{spec.tag}" if spec.tag else ""),
            "weights": spec.weights,
            "tap": spec.tap,
        }
    return {
        "recipe": run.recipe.name,
        "student": run.recipe.student.model,
        "cache": str(run.cache.path),
        "cache_ids": cache_ids(run),
        **({"unfinished_cache": run.cache.unfinished} if run.cache.unfinished else {}),
        "images": len(run.numbers),
        "held_out": len(run.held_out),
        **({"classes": run.labels.classes} if run.labels is not None else {}),
        "teachers": teachers,
        "teachers_run": "in the step" if run.online else "once, cached",
    }


def teachers_read(run: Run) -> list[str]:
    """The target names of all that training reads but maps, in order."""
    return sorted(target for target in run.needed if not target.startswith(MAP))


def card_source(run: Run) -> dict[str, Any]:
    """`source_of` for the student's model card, which may be published: without paths of this machine."""
    facts = {name: value for name, value in source_of(run).items() if name != "cache"}
    warning = random_line(run)
    return {**({"warning": warning} if warning else {}), **facts, "epochs": run.recipe.optim.epochs}


def random_line(run: Run) -> str | None:
    """The sentence every report carries where a teacher's weights are random."""
    names = [name for name in random_teachers(run) if name in run.needed]
    names += [f"map {name}" for name, spec in maps_read(run).items() if spec.weights == "random"]
    if not names:
        return None
    return f"RANDOM WEIGHTS: the features of {', '.join(names)} come from untrained teachers; what mimics them is a test, not a model"


def plan_lines(run: Run, costs: Mapping[str, str] | None = None) -> list[str]:
    """The resolved plan, a line per fact: what is trained, on what, how long, at which learning rate, and what it costs."""
    o, share = run.recipe.optim, run.share
    described = run.model.describe()
    split = (
        f" = {counted(share.ranks, 'process', 'processes')} x {counted(share.accum, 'micro-batch', 'micro-batches')} x {share.micro_size}"
        if share.batch_size != share.micro_size
        else ""
    )
    facts = {
        "recipe": f"{run.recipe.name} (seed {run.recipe.seed})",
        "cache": f"{run.cache.path}: {counted(len(run.cache.numbers), 'image')} x {counted(run.cache.n_views, 'view')}, {run.info.size} px",
        **({"kept near": near_words(run.cache.local.near)} if run.cache.local is not None else {}),
        **(
            {"UNFINISHED": f"the cache holds {run.cache.unfinished} so far; only these are trained on"}
            if run.cache.unfinished
            else {}
        ),
        **({"held out": f"{len(run.held_out):,} of them, by their keys' hashes"} if len(run.held_out) else {}),
        **{("online " if run.online else "column ") + t: teacher_words(run, t) for t in teachers_read(run)},
        **{f"map {name}": map_words(run, name) for name in maps_read(run)},
        **({"labels": labels_words(run)} if run.labels is not None else {}),
        **({"not read": "; ".join(f"{what}: {why}" for what, why in run.unread.items())} if run.unread else {}),
        **({"partner": partner_words(run)} if run.recipe.prepare.pair else {}),
        **described,
        "tokens": token_words(run),
        "features read": f"{feature_bytes(run) / 1024:.1f} KiB per image{blocks_words(run)}, and its stored view",
        "batch": f"{counted(o.batch_size, 'image')} per update{split}; {counted(run.updates, 'update')} per epoch, {run.total:,} in"
        f" {counted(o.epochs, 'epoch')}; {left_out(len(run.numbers) - run.updates * o.batch_size)}",
        **({"optimiser": OPTIMISERS[o.name]} if o.name in OPTIMISERS else {}),
        "learning rate": f"{optim.base_lr(o.lr_per_256, o.batch_size, o.lr_scale, o.lr_rule):.3g} = {o.lr_per_256:g} x {batches_words(o)}{scale_words(o)},"
        f" warm-up {counted(o.warmup_epochs, 'epoch')}, {'then constant' if o.name == 'schedule-free' else f'cosine to {o.min_lr:g}'}",
        "device": f"{run.device}, {run.precision}",
        **({"kernels": choice_words(run.choice)} if run.choice is not None and run.device.type == "cuda" else {}),
        **{f"baseline {name}": baseline_words(run, name) for name in run.baselines},
        **{f"baseline {term.name}": f"none: {why}" for term in run.model.terms if (why := no_baseline(term.recipe))},
        **(costs or {}),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {text}" for name, text in facts.items()]
    warning = random_line(run)
    return [*lines, *([warning] if warning else []), *run.notes, *progress_words(run)]


def near_words(near: NearFolder) -> str:
    """Where whole shards are kept."""
    return f"whole shards in {near.folder}, at most {human_bytes(near.most_bytes)}; the least recently used go first"


def labels_words(run: Run) -> str:
    """Where labels come from, and how many classes there are."""
    assert run.labels is not None
    classes, source = run.labels.classes, run.setup.labels or f"{run.cache.path}, the images' folders"
    several = f", {len(run.labels.members) / len(run.cache.numbers):.3g} of them per image"
    return f"{source}: {counted(len(classes), 'class', 'classes')}, {classes[0]} to {classes[-1]}{several}"


def token_words(run: Run) -> str:
    """How many tokens encoder and decoder compute per image (per mask, where it has several), and how many others a decoder reads."""
    model, l, cls, m = run.model, run.info.n_patches, int(run.model.student.num_prefix_tokens), run.model.n_predict
    seen = cls + (model.n_keep if model.mask_token is None else l)
    kind = "" if model.decoder is None or run.recipe.student.decoder is None else run.recipe.student.decoder.kind
    other = cls + (model.n_keep if run.recipe.mask.sampler == "pair_disjoint" else l)
    computed = {"": "no", "self": str(seen + m), "taps": str(seen + m), "pair": str(seen + m)}.get(kind, str(m))
    read = {"cross": seen, "prompt": seen + m, "regressor": seen - cls + m, "pair": other}
    looks = f", which look at {read[kind]}," if kind in read else ""
    each = "mask" if run.recipe.mask.masks_per_image > 1 else "image"
    partner = f" + {other} of the partner" * model.reads_partner
    return f"{seen}{partner} encoder, {computed} decoder{looks} per {each}, of {l + cls}"


def progress_words(run: Run) -> list[str]:
    """How far a run is that was begun before; nothing of one at its beginning."""
    if run.finished:
        return [
            f"this run is finished: all {counted(run.recipe.optim.epochs, 'epoch')} are done, nothing is left to train"
        ]
    if run.step == 0:
        return []
    return [
        f"continuing from epoch {run.epoch + 1}, update {run.update} of {run.updates} ({run.step:,} of {run.total:,} are done)"
    ]


def batches_words(o: Optim) -> str:
    """What the learning rate of 256 images is multiplied by."""
    return f"sqrt({o.batch_size} / 256)" if o.lr_rule == "sqrt" else f"{o.batch_size} / 256"


def scale_words(o: Optim) -> str:
    """A method's own factor of the learning rate."""
    return "" if o.lr_scale == 1 else f" x {o.lr_scale:g}"


def partner_words(run: Run) -> str:
    """What stands beside each image."""
    if run.pairs is None:
        return "another stored view of each image"
    return f"{counted(len(run.pairs.first), 'pair')} of {run.setup.pairs}, whose first images are trained on"


def left_out(n: int) -> str:
    """What happens to the images of the last partial batch."""
    return f"{counted(n, 'image')} left out per epoch, others each time" if n else "every image in every epoch"


def teacher_words(run: Run, teacher: str) -> str:
    """One teacher, and the arrays that training reads from its column or asks of it in the step."""
    spec, arrays = teacher_specs(run)[teacher], ", ".join(sorted(run.needed[teacher]))
    how = f"in the step, {spec.precision}; gives" if run.online else f"{run.cache.dtype}; reads"
    what = f"{spec.library}:{spec.model}, {spec.weights} weights, {spec.tap}, width {spec.width}, {how} {arrays}"
    return f"{what}, for {asking_words(run, teacher)}"


def map_words(run: Run, name: str) -> str:
    """A map, and what of the recipe reads it."""
    asking = [f"mask.sampler {run.recipe.mask.sampler}"] if reads_saliency(run.recipe.mask) else []
    asking += [f"terms.{key}.focus" for key, term in run.recipe.terms.items() if term.focus]
    source = run.recipe.mask.source
    told = [f"{', '.join(asking)} (mask.source {source})"] if source == f"{MAP}{name}" else []
    told += [f"terms.{key}" for key, term in run.recipe.terms.items() if term.map == name]
    dtype, many = run.info.maps.get(name, "float16"), run.info.vectors.get(name)
    what = "scores" if dtype == "float16" else "ids or bits"
    return f"{f'{many} numbers, float16,' if many else f'{what}, a {dtype}'} per patch, for {', '.join(told)}"


def asking_words(run: Run, teacher: str) -> str:
    """Which parts of the recipe read a teacher, and whether they name it."""
    asking = {}
    for term in run.model.terms:
        if term.teacher is not None and teacher in (term.teacher, run.info.target(term.teacher).source):
            named = " names it" if term.recipe.teachers else " names no teacher: all there are"
            asking[f"terms.{term.name.partition('/')[0]}"] = named
    return (
        ", ".join(f"{key} ({words.strip()})" for key, words in asking.items())
        or f"mask.source {run.recipe.mask.source}"
    )


def baseline_words(run: Run, name: str) -> str:
    """What predictions that never see an image cost in a term: a loss above them has learned nothing from images."""
    costs = run.baselines[name]
    known = {
        "zero": "zero",
        "constant": "one constant",
        "position": "one per position",
        "patch_mean": "each patch's own mean",
    }
    told = ", ".join(f"{known[kind]} {costs[kind]:.4g}" for kind in known if kind in costs)
    some = f" (about: from {costs['images']:,.0f} images)" if costs["images"] < len(run.cache.numbers) else ""
    key, recipe = name.partition("/")[0], run.recipe.terms[name.partition("/")[0]]
    shared = (
        recipe.target == "teachers"
        and costs["position"] < costs["zero"] / 2
        and not recipe.transform.startswith("position")
    )
    advice = (
        f"; most of it is the same in every image: --set terms.{key}.transform=position leaves that out"
        if shared
        else ""
    )
    return told + some + advice


def blocks_words(run: Run) -> str:
    """Which of a cache's token blocks are read, and what that costs; nothing where no tokens are read in blocks."""
    rule = run.info.blocks
    if run.online or rule is None or not any("tokens" in arrays for arrays in run.needed.values()):
        return ""
    if run.recipe.mask.sampler == "stored_block":
        return f" (one of {rule.blocks} token blocks)"
    return f" (all {rule.blocks} token blocks, put in order: {rule.blocks} x the tokens that mask.sampler=stored_block reads)"


def feature_bytes(run: Run) -> int:
    """Bytes of cached features and maps read per image and epoch; only maps where the teachers run in the step."""
    l = run.info.n_patches
    both = partner_targets(run.recipe)
    total = 2 * l * sum(spec.width for spec in maps_read(run).values()) * (1 + both)
    if run.online:
        return total
    rows = l // run.info.blocks.blocks if run.info.blocks and run.recipe.mask.sampler == "stored_block" else l
    for teacher in teachers_read(run):
        column = run.cache.columns[run.info.teachers[teacher].column]
        width = column.spec.width
        for n in (rows, l) if both else (rows,):
            sizes = {"tokens": n * column.quantiser.stored.token_bytes(width), "scale": 2 * n, "cls": 2 * width}
            total += sum(sizes.get(name, 2 * l) for name in run.needed[teacher])
    return total


def closing_lines(run: Run, summary: Mapping[str, Any], command: str) -> list[str]:
    """The last lines after a start: what to open, or how to continue."""
    warning = random_line(run)
    if summary["finished"]:
        lines = [
            f"finished: {counted(run.recipe.optim.epochs, 'epoch')}, "
            + (f"{human_time(summary['seconds'])} since this start" if summary["updates"] else "before this start"),
            f"report    {run.out / 'report.html'}",
            f"pictures  {run.out / 'curves.png'}" + f", {run.out / 'panels'}" * (run.out / "panels").is_dir(),
            f"student   {how_to_load(run)}",
            *(
                [f"exports   {', '.join(str(run.out / EXPORTS[kind][0]) for kind in run.setup.export)}"]
                if run.setup.export
                else []
            ),
        ]
        return [*lines, *fetched_words(run), *([warning] if warning else [])]
    return [*fetched_words(run), f"{stopped_words(run, summary['stopped'])}, saved; to continue:", f"    {command}"]


def fetched_words(run: Run) -> list[str]:
    """What this process had to fetch of the shards that are kept near; nothing where none are."""
    if (local := run.cache.local) is None:
        return []
    return [f"kept near  {counted(local.fetched, 'shard')} fetched by this process, {human_bytes(local.fetched_bytes)}"]


def stopped_words(run: Run, by: str) -> str:
    """By what a run was stopped, and where."""
    return f"stopped by {by} after update {run.step:,} of {run.total:,} (epoch {run.epoch + 1} of {run.recipe.optim.epochs})"


def how_to_load(run: Run) -> str:
    """The line of Python that loads the exported student: timm's, or ours where timm has no such model."""
    folder = run.out / "student"
    if isinstance(run.model.student, MaskedConvViT):
        return f'mrmae.train.export.load_mcmae("{folder}")'
    return f'timm.create_model("local-dir:{folder}", pretrained=True)'


def readme(run: Run, command: str) -> str:
    """OUT/README.md: what this is, how to go on, how to load the student."""
    warning = random_line(run)
    return "\n".join(
        [
            f"# {run.recipe.name}: {run.recipe.student.model}",
            *(["", f"**{warning}.**"] if warning else []),
            "",
            "Continue after a stop or a kill, or see that it is finished: the same command again.",
            "",
            f"    {command}",
            "",
            "Load the finished student:",
            "",
            f"    {how_to_load(run)}",
            "",
            "| file | holds |",
            "| --- | --- |",
            "| `report.html` | the run, finished or stopped, as one page: open it, or send it |",
            "| `student/` | the encoder as timm loads it |",
            "| `published.pth` | with `--export mae`: what MAE's (for its student MCMAE's) fine-tuning scripts load |",
            "| `transformers/` | with `--export transformers`: what `ViTModel.from_pretrained` loads |",
            "| `student.onnx` | with `--export onnx`: normalised images to tokens |",
            "| `recipe.yaml` | everything that decides the result, resolved |",
            "| `run.json` | cache ids, teachers, and per start: command, device, versions, git state |",
            "| `log.jsonl`, `tensorboard/` | losses per term, speed, learning rate |",
            "| `panels/`, `curves.png` | pictures |",
            "| `checkpoints/` | the whole training state, readable with `torch.load(weights_only=True)` |",
            "",
        ]
    )


def git_state(folder: Path) -> str | None:
    """Commit of the checkout `folder` lies in, with `+changes` where it was edited; None outside a checkout."""
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, check=True, capture_output=True, timeout=10, env=os.environ)
        return subprocess.run(ask, check=True, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
