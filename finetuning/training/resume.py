"""Where a run begins: afresh, at a checkpoint, or with the weights of a run that is finished; never in another run's folder."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from ..arguments import RecipeArguments
from ..data.dataset import ConversationDataset
from ..data.fingerprint import Fingerprints
from ..errors import InputError
from .checkpoint import (
    FINAL_FILES,
    MANIFEST,
    check_checkpoint,
    final_files,
    find_checkpoints,
    find_damage,
    read_manifest,
)
from .identity import (
    ROWS,
    RUN,
    describe_rows,
    describe_settings,
    digest_rows,
    read_rows,
    read_run,
    settings_of,
    spread_of,
    time_of,
    write_run,
)

LOCK = ".lock"
BAD_ROWS = "bad_rows.jsonl"
# All that a run writes into its folder.
WRITTEN = (
    *("checkpoint-*", "damaged-checkpoint-*", *FINAL_FILES, MANIFEST, RUN, ROWS, BAD_ROWS, "predictions.jsonl"),
    *("eval_*.json", "curves.png", "confusion.png", "report.html", "README.md", "*.part", "runs"),
)
MOST_DIFFERENCES = 4

T = TypeVar("T")
# Held until the process ends, however it ends.
_lock_file = None


@dataclass
class _FolderState:
    """What the first rank has found in the output folder.

    Args:
        record (dict): what this run is known by, for run.json.
        earlier (dict, optional): the run that the folder holds already.
        candidates (list[str]): where the run could begin, the best first; each must be held against its manifest.
    """

    record: dict[str, Any]
    earlier: dict[str, Any] | None
    candidates: list[str]


def begin_or_resume(
    args: RecipeArguments, train_dataset: ConversationDataset, eval_dataset: ConversationDataset
) -> bool:
    """Settles where the run begins; `args.resume_from_checkpoint` then names it, None for a fresh start.

    The same command started again on the same --output_dir goes on from its newest whole checkpoint. A run that trains
    something else (other conversations or settings, another script) is refused, unless nothing of the earlier one would be lost.

    Args:
        args (RecipeArguments): output_dir, resume_from_checkpoint, overwrite_output_dir and all that the run is known by.
        train_dataset, eval_dataset (ConversationDataset): as `build_dataset` gives them.

    Returns:
        bool: whether the folder holds this very run, finished: `args.resume_from_checkpoint` is then the folder itself.

    Raises:
        InputError: on every rank, if the folder is another run's, is in use, or its checkpoint cannot be used.
    """
    output = Path(args.output_dir)
    found = _on_first_rank(args, lambda: _inspect_folder(args, train_dataset, eval_dataset))
    damaged, chosen = [], None
    for candidate in found.candidates:
        damage = find_damage(Path(candidate), found.record["identity"])
        if damage is None:
            chosen = candidate
            break
        damaged.append((candidate, damage))
    finished = chosen == str(output)
    args.resume_from_checkpoint = _on_first_rank(
        args, lambda: _mark_folder(args, found, chosen, damaged, train_dataset, eval_dataset)
    )
    return finished


def _on_first_rank(args: RecipeArguments, decide: Callable[[], T]) -> T:
    """What `decide` gives on the first rank, on all of them: on a shared file system the others might see another state."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[1] = decide()
        except InputError as error:
            outcome[0] = str(error)
        except OSError as error:
            outcome[0] = f"--output_dir {args.output_dir}: expected a folder to work in, found: {error}"
    fault, value = broadcast_object_list(outcome) if args.world_size > 1 else outcome
    if fault:
        raise InputError(fault)
    return value


def _inspect_folder(args: RecipeArguments, train: ConversationDataset, evaluation: ConversationDataset) -> _FolderState:
    output = Path(args.output_dir)
    _lock(output)
    if args.overwrite_output_dir and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        clear_output(output)
    settings, spread, earlier = settings_of(args), spread_of(args), read_run(output)
    rows = {"train": digest_rows(train.fingerprints), "eval": digest_rows(evaluation.fingerprints)}
    if earlier and not args.do_train:
        # Rows to train on are not even read then.
        rows["train"] = earlier["rows"]["train"]
    record: dict[str, Any] = {
        "script": os.path.basename(sys.argv[0]),
        "started": datetime.now().isoformat(timespec="seconds"),
        "settings": settings,
        "spread": spread,
        "rows": rows,
    }
    record["identity"] = _identity(record)
    checkpoints, final = find_checkpoints(output), read_manifest(output)
    if earlier is None and not checkpoints and final_files(output):
        raise InputError(
            f"--output_dir {output}: expected an empty folder or that of a run, found {final_files(output)[0].name} of "
            "something else; choose another one"
        )
    named = args.resume_from_checkpoint not in (None, "True")
    if named:
        path = Path(str(args.resume_from_checkpoint))
        _compare_named(path, record, train)
        return _FolderState(record, earlier, [str(path)])
    if earlier is None and checkpoints:
        raise InputError(
            f"--output_dir {output}: expected {RUN} beside {checkpoints[0].name}, found none, so that nothing tells what was "
            "trained there; choose another --output_dir, or start afresh with --overwrite_output_dir"
        )
    if earlier is None:
        return _FolderState(record, None, [])
    kind = "finished" if final else "half-done"
    differences = _differences(record, earlier, train, output)
    if differences and (final or checkpoints):
        raise InputError(_refusal(f"--output_dir {output}", kind, record, earlier, differences))
    if differences:
        print(
            f"starting afresh: the earlier run in {output} left no checkpoint, and differs: {'; '.join(differences)}",
            flush=True,
        )
        return _FolderState(record, earlier, [])
    same_spread = not checkpoints or final or not settings["deepspeed"] or spread == earlier["spread"]
    if not same_spread and spread["processes"] != earlier["spread"]["processes"]:
        raise InputError(
            f"{checkpoints[0]}: expected {earlier['spread']['processes']} processes, since DeepSpeed keeps a share of the "
            f"optimizer's states for each, found {spread['processes']}; restore it, choose another --output_dir, or start afresh "
            "with --overwrite_output_dir"
        )
    for name in spread:
        if spread[name] != earlier["spread"].get(name):
            print(f"changed: {name} {spread[name]} instead of {earlier['spread'].get(name)}", flush=True)
    candidates = [*([output] if final else []), *checkpoints]
    return _FolderState(record, earlier, [str(path) for path in candidates])


def _mark_folder(
    args: RecipeArguments,
    found: _FolderState,
    chosen: str | None,
    damaged: list[tuple[str, str]],
    train: ConversationDataset,
    evaluation: ConversationDataset,
) -> str | None:
    """Clears what does not hold any more, marks the folder as this run's, and returns where the run begins."""
    output = Path(args.output_dir)
    if chosen is None and damaged and args.resume_from_checkpoint not in (None, "True"):
        raise InputError(f"{damaged[0][0]}: expected a whole checkpoint, but {damaged[0][1]}")
    finished = chosen == str(output)
    if chosen and not finished:
        check_checkpoint(Path(chosen), args.use_lora)
    for path, damage in damaged:
        print(_put_aside(Path(path), output, damage), flush=True)
    if chosen is None and args.resume_from_checkpoint == "True":
        raise InputError(f"--resume_from_checkpoint: expected a whole checkpoint-N in {output}, found none")
    if not finished:
        for name in (MANIFEST, "report.html", "eval_after.json"):
            (output / name).unlink(missing_ok=True)
    record = found.record
    if found.earlier and chosen:
        record = {**found.earlier, **record, "started": found.earlier["started"]}
    trained_on = train.fingerprints if args.do_train else read_rows(output, "train") or Fingerprints.of([])
    known = {"train": trained_on, "eval": evaluation.fingerprints}
    same_rows = found.earlier is not None and found.earlier["rows"] == record["rows"] and (output / ROWS).exists()
    if not same_rows or found.earlier != record:
        write_run(output, record, None if same_rows else known)
    bad = [*train.bad_rows, *evaluation.bad_rows]
    if bad:
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad]
        (output / BAD_ROWS).write_text("".join(lines), encoding="utf-8")
    if chosen and not finished:
        print(f"going on from {chosen}", flush=True)
    return chosen


def _put_aside(path: Path, output: Path, damage: str) -> str:
    if path == output:
        (output / MANIFEST).unlink(missing_ok=True)
        return f"the final weights in {output} cannot be used: {damage}"
    # Out of the way of --save_total_limit, which counts by name.
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return f"skipped {path}: {damage}; it is now {aside.name}"


def _identity(record: dict[str, Any]) -> str:
    known = json.dumps([record["script"], record["settings"], record["rows"]["train"]], sort_keys=True)
    return hashlib.sha256(known.encode(errors="surrogatepass")).hexdigest()[:16]


def _differences(record, earlier, train: ConversationDataset, folder: Path) -> list[str]:
    found = []
    if record["rows"]["train"] != earlier["rows"]["train"]:
        # Read only here: of a million rows they are seconds and 100 MB.
        rows = read_rows(folder, "train")
        found.append(describe_rows(train.fingerprints, rows, "to train on") or "other rows to train on")
    found += describe_settings(record["settings"], earlier["settings"])
    if len(found) > MOST_DIFFERENCES:
        found = [*found[:MOST_DIFFERENCES], f"{len(found) - MOST_DIFFERENCES} more differences"]
    if record["script"] != earlier["script"] and not found:
        found.append("the same rows and settings, but by another script")
    return found


def _compare_named(path: Path, record: dict[str, Any], train: ConversationDataset) -> None:
    """Refuses a checkpoint that was named on the command line, if it is another run's."""
    earlier = read_run(path)
    if earlier is None:
        raise InputError(f"{path}: expected a checkpoint that a run of these recipes has written, found no {RUN} in it")
    differences = _differences(record, earlier, train, path.parent)
    if differences:
        raise InputError(_refusal(str(path), "half-done", record, earlier, differences))


def _refusal(where: str, kind: str, record: dict[str, Any], earlier: dict[str, Any], differences: list[str]) -> str:
    script = earlier["script"] if record["script"] != earlier["script"] else f"this script ({earlier['script']})"
    return (
        f"{where} holds a {kind} run of {script} of {time_of(earlier['started'])} with {'; '.join(differences)}; choose another "
        "--output_dir, or start afresh with --overwrite_output_dir"
    )


def clear_output(folder: Path) -> None:
    """Removes all that a run has written into a folder, and nothing else."""
    if not (folder / RUN).exists() and not find_checkpoints(folder):
        return
    for path in sorted({path for pattern in WRITTEN for path in folder.glob(pattern)}):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _lock(folder: Path) -> None:
    """Refuses a folder into which another process writes."""
    global _lock_file
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, held until the process ends
    try:
        # Not flock, which the workers that a process has forked would go on holding after its death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(
            f"--output_dir {folder}: expected no other run at work in it, found {file.read().strip() or 'one'}; wait for its "
            "end, or choose another --output_dir"
        ) from None
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it", flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _lock_file = file
