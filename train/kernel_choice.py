"""Who computes the kernels of a run: as asked, as it began, as is remembered for this device and these shapes, or measured now.

`--kernels auto` on a CUDA device tries each kernel before the first step (kernels/choose.py). What was found is kept in the user's
cache folder, a file per device, versions and shapes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mrmae.common.files import publish, users_folder
from mrmae.common.versions import versions
from mrmae.kernels.calls import Calls
from mrmae.kernels.choose import Choice, kernels_hash, key_of, tried_on
from mrmae.kernels.dispatch import TRITON_INSTALLED
from mrmae.train.feed import feed_of
from mrmae.train.method import evaluating
from mrmae.train.online import with_targets
from mrmae.train.ranks import agree_on
from mrmae.train.run import Run

KERNELS = ("gather_patches", "embed_tokens", "pixel_loss", "mimic_loss", "decode_codes")
FORMAT = "mrmae kernel choice 1"
Tell = Callable[[str], None]


def device_name(device: torch.device) -> str:
    """The model of a GPU; `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def settle_kernels(run: Run, *, warn: Tell, keep: bool = True) -> None:
    """Fix who computes the kernels, the same on every rank: rank 0 decides. `run.choice` is what the run began with, if it began.

    warn: hears what went wrong. keep: remember what was measured.
    """
    choice = choice_of(run, warn=warn, keep=keep) if run.ranks.rank == 0 else None
    run.choice = agree_on(choice, run.ranks)
    if run.setup.kernels == "auto":
        run.model.kernels = run.choice.chosen


def choice_of(run: Run, *, warn: Tell, keep: bool) -> Choice:
    """The choice, on rank 0."""
    name, asked = device_name(run.device), run.setup.kernels
    if asked != "auto":
        return Choice(name, dict.fromkeys(KERNELS, asked), {"all": f"--kernels {asked}"})
    if run.choice is not None and run.choice.device == name:
        return replace(run.choice, why={"all": "as this run began"}, failed=())
    if run.finished:
        return run.choice or Choice(name, dict.fromkeys(KERNELS, "torch"), {"all": "nothing is left to train"})
    if run.choice is not None:
        run.notes.append(f"kernels: this run began on {run.choice.device} and goes on on {name}: they are chosen anew, and its numbers may"
                         " differ in their last bits")  # fmt: skip
    if run.device.type != "cuda" or not TRITON_INSTALLED:
        why = "no CUDA device" if run.device.type != "cuda" else "triton is not installed"
        return Choice(name, dict.fromkeys(KERNELS, "torch"), {"all": why})
    return measured_or_remembered(run, name, warn=warn, keep=keep)


def measured_or_remembered(run: Run, name: str, *, warn: Tell, keep: bool) -> Choice:
    """What is remembered for this run's calls on this device; else measured now and, with `keep`, remembered."""
    calls, compiled = calls_of(run), run.setup.compile
    about = {"device": name, "compiled": compiled, "kernels": kernels_hash(), **versions()}
    path = memory_path(key_of(calls, about))
    if path is not None and (known := kept_choice(path, about, warn)) is not None:
        return known
    choice = tried_on(calls, str(run.device), compiled=compiled, name=name)
    for kernel in choice.failed:  # not remembered: it may be the machine's fault, and is said again next time
        warn(f"kernels: {kernel} is not right on {name}: {choice.why[kernel]}; the reference computes it")
    if keep and path is not None and not choice.failed:
        keep_choice(path, about, choice, warn)
    return choice


def calls_of(run: Run) -> Calls:
    """Every call of a kernel in a forward pass over the run's next micro-batch, in evaluation: nothing of the run changes."""
    calls, before = Calls(), run.model.kernels
    with feed_of(run) as feed, evaluating(run.model):
        batch, masks = with_targets(next(feed), run.online, run.needed, model=run.model)
        run.model.kernels = calls
        try:
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                run.model(batch, masks)
        finally:
            run.model.kernels = before
    if run.device.type == "cuda":
        torch.cuda.empty_cache()  # for the process that tries them
    return calls


def memory_path(key: str) -> Path | None:
    """Where a choice is remembered; None where nothing can be."""
    folder = users_folder()
    return folder and folder / "kernels" / f"{key[:32]}.json"


def kept_choice(path: Path, about: dict[str, object], warn: Tell) -> Choice | None:
    """The choice in this file; None where there is none, or (said aloud) where the file is another's or damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        warn(f"{path}: cannot be read ({error}); what it remembered of kernels is measured again")
        return None
    try:
        found = json.loads(text)
        if found["format"] != FORMAT or found["about"] != about:
            raise ValueError("it is of another device, version or format")
        kept = found["choice"]
        chosen, why = dict(kept["chosen"]), dict(kept["why"])
        if (
            not set(chosen) <= set(KERNELS)
            or not set(chosen.values()) <= {"triton", "torch"}
            or set(why) != set(chosen)
        ):
            raise ValueError("it names other kernels, or other words than triton and torch")
        return Choice(str(kept["device"]), chosen, {k: f"{v} (remembered)" for k, v in why.items()}, ())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warn(
            f"{path}: does not say which kernels to take ({type(error).__name__}: {error}); it is ignored, and they are measured again"
        )
        return None


def keep_choice(path: Path, about: dict[str, object], choice: Choice, warn: Tell) -> None:
    """Keep the choice for the next run; where that cannot be, it is said."""
    try:
        publish(
            path,
            (json.dumps({"format": FORMAT, "about": about, "choice": asdict(choice)}, indent=2) + "\n").encode(),
            replace=True,
        )
    except OSError as error:
        warn(f"{path}: cannot be written ({error}); the next run measures its kernels again")


def state_of_choice(choice: Choice | None) -> dict[str, object] | None:
    """What a checkpoint keeps of it."""
    return None if choice is None else {"device": choice.device, "chosen": choice.chosen}


def choice_of_state(state: dict[str, Any] | None, device: torch.device) -> Choice:
    """What a checkpoint keeps; one that says nothing is of a time when the reference computed every run that did not ask otherwise."""
    if state is None:
        return Choice(device_name(device), dict.fromkeys(KERNELS, "torch"))
    return Choice(state["device"], state["chosen"])


def choice_words(choice: Choice) -> str:
    """The plan's line: who computes what, and why."""
    parts = [f"{kernel} {who} ({choice.why[kernel]})" for kernel, who in choice.chosen.items() if kernel in choice.why]
    return (
        "; ".join(parts) or f"{', '.join(sorted(set(choice.chosen.values())))} ({choice.why.get('all', 'as chosen')})"
    )
