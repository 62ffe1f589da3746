"""Zero-shot classification: classes by what they are called, with the text tower of a teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float
from torch import Tensor

from mrmae.common.suggest import did_you_mean
from mrmae.probe import report
from mrmae.probe.job import Outcome, Probing, headline
from mrmae.probe.settings import ZeroShot

LOGIT_SCALE = 100.0
SEVERAL = 5  # of the most likely classes, where there are more


def run_zero_shot(job: Probing, name: str) -> Outcome:
    """Top-1 and top-5 accuracy on the test images; no train image is read."""
    from mrmae.probe.clip import images_and_texts  # open_clip takes seconds to import

    prompts, truth = prompts_of(job), job.labels[1]
    images, encode = images_and_texts(job, job.options.settings.zero_shot.text)
    likely = class_probabilities(
        images,
        class_texts(encode([text for texts in prompts.values() for text in texts]), [*map(len, prompts.values())]),
    )
    order = likely.argsort(dim=1, descending=True, stable=True)
    rows = [report.row("zero-shot, top-1", order[:, 0], truth, seed=job.options.seed)]
    if len(prompts) > SEVERAL:
        hit = (order[:, :SEVERAL] == truth[:, None]).any(1)
        rows.append(report.share_row(f"zero-shot, top-{SEVERAL}", hit, seed=job.options.seed))
    true = likely.gather(1, truth[:, None])
    measures = [{"mean probability of the true class": float(true.mean()), "of the answer": float(likely.amax(1).mean()),
                 "prompts of a class": len(next(iter(prompts.values()))), "classes": len(prompts)}]  # fmt: skip
    return {"rows": rows, "measures": measures, "prompts": {name: texts[0] for name, texts in prompts.items()}, "n_train": 0,
            **headline(rows[0])}, order[:, 0].contiguous()  # fmt: skip


def class_texts(texts: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "c d"]:
    """A unit vector per class: the mean of its prompts' unit vectors, made one again (CLIP, arXiv 2103.00020, 3.1.4)."""
    return torch.stack(
        [F.normalize(F.normalize(some, dim=1).mean(0), dim=0) for some in torch.split(texts, list(counts))]
    )


def class_probabilities(images: Float[Tensor, "n d"], classes: Float[Tensor, "c d"]) -> Float[Tensor, "n c"]:
    """softmax(100 cos) over the classes."""
    return (LOGIT_SCALE * F.normalize(images, dim=1) @ F.normalize(classes, dim=1).T).softmax(1)


def prompts_of(job: Probing) -> dict[str, list[str]]:
    """The prompts of every class of DATA, in their order."""
    return prompts_from(job.options.settings.zero_shot, job.data.classes)


def prompts_from(settings: ZeroShot, classes: Sequence[str]) -> dict[str, list[str]]:
    """The prompts of every class. ValueError for a file that is missing or empty, lacks a class, or has a template without {}."""
    if not settings.prompts:
        return filled(settings.templates, classes, "--set zero_shot.templates")
    path, where = Path(settings.prompts), f"--set zero_shot.prompts={settings.prompts}"
    if not path.is_file():
        raise ValueError(
            f"{where}: there is no such file; expected templates, one per line, or a .yaml or .json of prompts by class; correct the path"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: is not UTF-8 text ({error.reason} at byte {error.start}); it was expected; save it as UTF-8"
        ) from None
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        return filled([line.strip() for line in text.splitlines() if line.strip()], classes, where)
    try:
        told = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{where}: cannot be read ({' '.join(str(error).split())}); expected a mapping from class to prompts; correct it"
        ) from None
    if not isinstance(told, dict) or not told:
        raise ValueError(
            f"{where}: is empty or no mapping; expected CLASS: PROMPT, or a list of prompts, for every class; write one"
        )
    return {name: prompts_for(told, name, where) for name in classes}


def prompts_for(told: dict[object, object], name: str, where: str) -> list[str]:
    """One class's prompts in a mapping."""
    if name not in told:
        raise ValueError(
            f"{where}: has no prompt for class {name!r}; {did_you_mean(name, [str(key) for key in told])}; every class needs one"
        )
    given = told[name]
    prompts = given if isinstance(given, list) else [given]
    if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
        raise ValueError(
            f"{where}: class {name!r} has {given!r}; a prompt or a list of them was expected; write what it looks like"
        )
    return [str(text).replace("{}", spoken_class(name)) for text in prompts]


def filled(templates: Sequence[str], classes: Sequence[str], where: str) -> dict[str, list[str]]:
    """Every template with every class's name."""
    if not templates:
        raise ValueError(
            f"{where}: holds no prompt; expected one template per line, such as 'a photo of a {{}}.'; write one"
        )
    if bad := [text for text in templates if "{}" not in text]:
        raise ValueError(f"{where}: {bad[0]!r} has no {{}} for the class's name, so it would say the same of every class; put {{}} in it, or "
                         "give a .yaml of prompts by class")  # fmt: skip
    return {name: [text.replace("{}", spoken_class(name)) for text in templates] for name in classes}


def spoken_class(name: str) -> str:
    """A folder's name as one would say it."""
    return name.replace("_", " ").strip()
