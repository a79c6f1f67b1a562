"""The folder of a run, OUT: its lock and its rows, replacing folders whole, whether it is finished.

OUT/metrics.jsonl     a row for each step and each evaluation
OUT/run.json          the settings, as --config takes them
OUT/checkpoints/      step-N: the whole training state (run/saving.py)
OUT/model, OUT/best   Hugging Face folders
OUT/adapters          with --lora-adapters, in peft's form, and the tokenizer
OUT/tensorboard       of tools/follow.py
OUT/finished          the last step, written after everything else
OUT/.lock             while a process works in it
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from datetime import date
from pathlib import Path

from formats.files import NotWritten, reason_of, whole_file
from run.flags import (
    LENGTHS,
    SETTINGS,
    TrainConfig,
    read_settings,
    refuse_other_settings,
    settings_of,
)
from run.processes import barrier, max_over_processes, rank, world_size


@contextlib.contextmanager
def replaced(folder: Path):
    """Yields an empty folder to write to, which takes the place of `folder` when all went well.

    Whatever happens, `folder` is never half written. Raises NotWritten.
    """
    tidy(folder)
    new, old = _beside(folder)
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except OSError as error:
        # Only the reason: a path that it names is that of the folder beside.
        raise NotWritten(folder, reason_of(error)) from None
    finally:
        tidy(folder)


def tidy(folder: Path):
    """Clears up after `replaced`, also where its process was killed."""
    new, old = _beside(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for left in (new, old):
        remove(left)


def remove(path: Path):
    """A file, a link (and not what it points to) or a folder, where there is one. What cannot be
    removed is said and stays; who depends on its absence must look."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        print(f"train.py: {path}: cannot be removed: {reason_of(error)}", file=sys.stderr)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.unfinished"), folder.with_name(f".{folder.name}.old")


LOCK = ".lock"
FINISHED = "finished"  # a file with the last step
FOLDERS = ("checkpoints", "model", "best", "adapters")


@contextlib.contextmanager
def locked(out: Path):
    """Makes the folder, and keeps every other process out of it, also those of other machines where
    the file system supports that. It is a lock of the kernel, so it ends with this process in any
    case. Folders that were made for it and are still empty are removed. Raises ValueError."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(f.fileno()).st_nlink == 0  # its owner has just removed it
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        if taken:
            raise ValueError(f"--out {out}: another process is running in this folder")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            for folder in made:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest first. Other names are other people's."""
    found = (out / "checkpoints").glob("step-*")
    ours = (path for path in found if re.fullmatch(r"step-\d{8}", path.name) and path.is_dir())
    return sorted(ours, reverse=True)


def way_on(out) -> str:
    """What to do after a run that failed or was stopped. out: None where it writes no folder."""
    if out is not None and checkpoints(Path(out)):
        return "continue with --resume"
    rows = out is not None and holds_run(Path(out))  # which a new run replaces only when told to
    return f"start again{' with --overwrite' if rows else ''}, as there is no checkpoint"


def not_ours(out: Path) -> list[str]:
    """What bears a name of ours in a folder in which no run was."""
    if read_settings(out) is not None or read_rows(out):
        return []
    names = (*FOLDERS, SETTINGS, "metrics.jsonl", FINISHED)
    return [name for name in names if os.path.lexists(out / name)]


@contextlib.contextmanager
def claim_folder(config: TrainConfig):
    """--out as a path that only this run has: no file, no other run's folder, no other process.

    Raises ValueError.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file; a folder is needed")
    above = existing_parent(out)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out {out}: cannot be made, as {above} is not a folder to write to")
    model = Path(config.model).resolve()
    if model == out.resolve():
        raise ValueError(f"--out {out}: is the folder of --model; name another one")
    for name in FOLDERS:
        if (out / name).resolve() in (model, *model.parents):
            raise ValueError(f"--out {out}: its {name}/ would replace --model; name another folder")
    if found := not_ours(out):
        problem = f"holds {' and '.join(found)}, which no run has made; name another folder"
        raise ValueError(f"--out {out}: {problem}")
    with locked(out) if rank() == 0 else contextlib.nullcontext():
        refuse_unshared(out)
        if holds_run(out) and not (config.resume or config.overwrite):
            problem = "holds a run; add --resume or --overwrite, or name another folder"
            raise ValueError(f"--out {out}: {problem}")
        yield out


def refuse_unshared(out: Path, seconds: float = 90):
    """Raises ValueError in a process that has another folder under this name than process 0, as on
    machines without a common file system: a checkpoint would be scattered over them.

    Waits up to `seconds` for the folder, because NFS may answer for a minute that there is none.
    """
    if world_size() == 1:
        return
    marker = out / f".seen-{max_over_processes(time.time_ns())}"
    try:
        if rank() == 0:
            marker.touch()
        barrier()
        end = time.monotonic() + seconds
        while not (seen := marker.exists()) and time.monotonic() < end:
            time.sleep(1)
        barrier()
    finally:
        if rank() == 0:
            marker.unlink(missing_ok=True)
    if not seen:
        raise ValueError(
            f"--out {out}: this folder is not shared by all machines; name one that is"
        )


def existing_parent(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def holds_run(out: Path) -> bool:
    """Whether a run is there, which may have checkpoints before it has a row."""
    begun = (out / FINISHED).exists() or bool(checkpoints(out))
    return begun or any("loss" in row for row in read_rows(out))


def begin_folder(out: Path, start: int, config: TrainConfig):
    """Removes what --overwrite replaces, and the rows after the step from which a run is resumed;
    writes the settings, as --config takes them to do the same again from any folder."""
    barrier()  # until every process has seen whether a run is there
    if rank() > 0:
        return
    if config.overwrite and not config.resume and holds_run(out):
        # The rows last: as long as they are there, whoever is killed here has a run to overwrite.
        for name in (*FOLDERS, "tensorboard", FINISHED, SETTINGS, "metrics.jsonl"):
            remove(out / name)
            if os.path.lexists(out / name):  # a later --resume would take what is left of it
                raise ValueError(f"--overwrite: {out / name} cannot be removed; name another --out")
    for name in ("model", "best", "adapters"):
        tidy(out / name)
    if start == 0 and read_best(out):  # of an evaluation whose row is cut
        remove(out / "best")
    kept = [row for row in read_rows(out) if row["step"] <= start and start > 0]
    (out / FINISHED).unlink(missing_ok=True)
    rows = "".join(json.dumps(row) + "\n" for row in kept)
    settings = json.dumps(settings_of(config), indent=2) + "\n"
    for name, text in ((SETTINGS, settings), ("metrics.jsonl", rows)):
        with whole_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_row(out: Path | None, row: dict):
    """One JSON object a line, flushed at once. Raises NotWritten."""
    if out is not None and rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "metrics.jsonl"
        try:
            with open(file, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            raise NotWritten(file, error.strerror, f"fix this, then {way_on(out)}") from None


def read_rows(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a last one that was half written."""
    file, rows = out / "metrics.jsonl", []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def read_best(out: Path) -> dict:
    """The evaluation of OUT/best; {} where there is none."""
    file = out / "best" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def is_evaluated(out: Path, step: int) -> bool:
    """Whether there is a row of the evaluation after this step, for all processes alike."""
    rows = read_rows(out) if rank() == 0 else []
    return bool(max_over_processes(sum("eval_loss" in x and x["step"] == step for x in rows)))


def print_best(out: Path):
    if best := read_best(out):
        text = f"wrote {out}/best, the model of step {best['step']}: "
        text += f"the lowest eval_loss, {best['eval_loss']:.4f}"
        untrained = [row["eval_loss"] for row in read_rows(out) if row["step"] == 0]
        if untrained and untrained[0] <= best["eval_loss"]:
            text += f" (but {untrained[0]:.4f} before training)"
        print(text)


def print_changes(out: Path, n_steps: int):
    """The evaluation before and after, side by side, from the rows that were written."""
    evaluations = {row["step"]: row for row in read_rows(out) if "eval_loss" in row}
    if 0 in evaluations and n_steps in evaluations:
        print(f"\n{'held out':<28}{'before':>10}{'after':>10}")
        for name in evaluations[0]:
            if name != "step":
                before, after = evaluations[0][name], evaluations[n_steps][name]
                print(f"{name:<28}{before:>10.4f}{after:>10.4f}")


def settings_before(out: Path) -> tuple[dict, Path] | None:
    """The settings of a run's newest checkpoint, or of its folder, and where they were found."""
    for folder in (*checkpoints(out), *([out] if holds_run(out) else [])):
        if (settings := read_settings(folder)) is not None:
            return settings, folder
    return None


def date_of_run(config: TrainConfig) -> str:
    """The day that a chat template writes, YYYY-MM-DD, for every start of a run and every process:
    --date, else that of the run which is resumed, else today."""
    then = {}
    if config.resume:
        then, _ = settings_before(Path(config.out)) or ({}, None)
    today = max_over_processes(date.today().toordinal())  # clocks and time zones may differ
    return config.date or then.get("date") or date.fromordinal(today).isoformat()


def is_finished(out: Path, config: TrainConfig) -> bool:
    """Whether a run that is resumed has nothing left to do. Compares its flags, before anything is
    loaded. Raises ValueError."""
    found = settings_before(out)
    if found is None:
        return False
    then, where = found
    restorable = bool(checkpoints(out))
    may_move = restorable and not (out / FINISHED).exists()
    refuse_other_settings(config, then, where, may_move)
    if not (out / FINISHED).exists() or (restorable and not (out / "model").is_dir()):
        return False
    longer = any(getattr(config, name) != then.get(name) for name in LENGTHS)
    if longer and not restorable:
        raise ValueError(
            f"--resume: {out} is finished and has no checkpoint; train longer by a new run "
            f"with --model {out / 'model'}"
        )
    adapters = config.lora_adapters and not (out / "adapters").is_dir()
    if adapters and not restorable:
        raise ValueError(f"--lora-adapters: {out} is finished, and no checkpoint has them")
    return not (longer or adapters)
