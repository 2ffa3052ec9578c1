"""What lies in an output folder: nothing, this plan's work, finished or begun, or another's."""

from __future__ import annotations

from pathlib import Path

from v4quant.conversion.delivery import Delivery, LocalDelivery
from v4quant.conversion.journal import begun_plan, begun_stem, journal_files
from v4quant.conversion.plan import Plan, under_stem
from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.own_folders import FOLDER, make_home
from v4quant_formats.errors import OutputError


def check_folder(out: Path) -> None:
    """Create the output folder, or see that it is empty or has work to resume.

    Raises OutputError.
    """
    if not out.exists():
        make_home(out)
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder")
    entries = list(out.iterdir())
    for path in entries:
        if path.is_symlink():
            raise OutputError(
                f"{path}: is a symbolic link, which no conversion makes; choose another folder"
            )
    foreign = [p.name for p in entries if p.name != FOLDER]
    if foreign and not journal_files(out):
        raise OutputError(
            f"{out}: folder is not empty ({sorted(foreign)[0]}, ...) and holds no unfinished "
            "conversion to resume; choose a new folder (--overwrite replaces what v4quant made)"
        )


def complete_records(plan: Plan, out: Path, delivery: Delivery) -> list[TensorRecord] | None:
    """The records of a checkpoint that this plan made. Raises OutputError for another's folder."""
    found = None if journal_files(out) else delivery.manifest(out)
    if found is not None and found.get("plan") == plan.digest:
        return [record_from_dict(row) for row in found["tensors"]]
    check_folder(out)
    return None


def holds_anothers(plan: Plan, out: Path) -> bool:
    """Whether there is something in a folder that is not this plan's, finished or begun.

    Raises OutputError and what reading a manifest raises.
    """
    if not out.is_dir():
        return out.exists()
    if journal_files(out):
        return begun_plan(out) != plan.digest
    found = LocalDelivery().manifest(out)
    return any(out.iterdir()) if found is None else found.get("plan") != plan.digest


def holds_own(plan: Plan, out: Path) -> bool:
    """Whether a folder holds this plan's conversion, finished or begun."""
    return out.is_dir() and any(out.iterdir()) and not holds_anothers(plan, out)


def as_begun(plan: Plan, out: Path) -> Plan:
    """The plan under the names that this conversion has in `out`, if it was begun there.

    Its source may have been moved or renamed since. Raises OutputError for a damaged journal.
    """
    if not plan.stem:
        return plan
    stem = begun_stem(out, plan.recipe.scheme)
    if stem is None and (found := LocalDelivery().manifest(out)) is not None:
        tail = plan.shards[0].file.removeprefix(plan.stem)
        if found.get("plan") == plan.digest:
            stem = str(found["files"][0]["name"]).removesuffix(tail)
    return under_stem(plan, stem) if stem else plan
