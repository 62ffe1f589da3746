"""What to remove of a damaged cache, so that the same command writes it anew."""

from collections.abc import Iterable
from pathlib import Path

from mrmae.common.backend import exists
from mrmae.common.files import publish, remove
from mrmae.shards import claims
from mrmae.shards.check import Problem, plan_and_manifest, read_records, strangers
from mrmae.shards.format import Plan, commit_path, product_path, readable_json
from mrmae.shards.store import refuse_foreign_entries


def prepare_repair(path: Path, problems: Iterable[Problem]) -> list[Path]:
    """The files removed so that the same extract-features command writes anew exactly what is damaged.

    plan.json is written again from the manifest. ValueError where someone is at work on the cache.
    """
    problems = list(problems)
    with claims.alone(path):
        doomed = files_to_remove(path, problems)
        if any(problem.file == "plan.json" for problem in problems):
            publish(path / "plan.json", readable_json(plan_and_manifest(path)[0].to_json()), replace=True)
        for file in doomed:
            remove(file)
    return doomed


def files_to_remove(path: Path, problems: Iterable[Problem]) -> list[Path]:
    """What a repair removes: of a damaged shard its commit record, otherwise the damaged file itself.

    The manifest goes too where shards are damaged: nobody trains on them meanwhile. ValueError where something of the cache is a
    link, where it is the plan that was altered, and where a codebook of product codes is damaged.
    """
    refuse_foreign_entries(path)
    problems = list(problems)
    plan, manifest, _ = plan_and_manifest(path)
    if manifest is None:
        refuse_foreign_plan(path, plan)
    refuse_lost_codebook(path, plan, problems)
    doomed = [
        path / problem.file if problem.unit is None else commit_path(path, *problem.unit)
        for problem in problems
        if problem.file != "plan.json"
    ]
    if any(file.parent != path / "stats" for file in doomed):  # of moments the manifest tells nothing
        doomed.append(path / "manifest.json")
    return [file for file in dict.fromkeys(doomed) if exists(file)]


def refuse_lost_codebook(path: Path, plan: Plan, problems: Iterable[Problem]) -> None:
    """ValueError where a codebook of product codes is lost or damaged: no command writes that again."""
    damaged = {path / problem.file for problem in problems}
    for column, quantiser in plan.quantisers.items():
        if quantiser.stored.product and (file := product_path(path, column)) in damaged:
            raise ValueError(f"{file}: lost or damaged, and without it the codes of {column} mean nothing; no command writes it again; restore it from "
                             f"a copy, or run inspect-cache drop {path} {column} and extract it again (nothing was changed)")  # fmt: skip


def refuse_foreign_plan(path: Path, plan: Plan) -> None:
    """ValueError where plan.json, not the shards, is what was altered: all records of a column are of another plan."""
    records = read_records(path, plan)
    foreign = strangers(plan, records)
    ours = {column for _, column, _ in {*records} - {*foreign}}
    if any(column not in ours for _, column, _ in foreign):
        raise ValueError(f"{path / 'plan.json'}: {len(foreign)} of {len(records)} commit records are of another plan, and "
                         "there is no manifest to tell which is right; expected the plan that the shards were written "
                         "for; restore plan.json or manifest.json from a copy (nothing was changed)")  # fmt: skip


def damaged_shards(problems: Iterable[Problem]) -> dict[str, list[int]]:
    """Damaged shards by view and column, ascending."""
    found: dict[str, set[int]] = {}
    for problem in problems:
        if problem.unit is not None:
            found.setdefault(f"view {problem.unit[0]}, {problem.unit[1]}", set()).add(problem.unit[2])
    return {name: sorted(shards) for name, shards in found.items()}
