"""Uploads a run to the Hugging Face hub: weights or adapter, processor, card and report, and nothing of the rows or this machine.

A public repository never gets rows of one's own data: report.html shows them, so it goes along only where the data is on the
hub already, or where the repository is private. Checkpoints hold the paths of this machine, and go to private ones only.
"""

import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from ..arguments import RecipeArguments
from ..data.download import Progress, fetch
from ..data.shown import printable
from ..errors import InputError, RunError
from .checkpoint import FINAL_FILES, read_manifest
from .identity import RUN, read_run

# Of the final weights' files; the first holds settings as a pickle, the second the paths of checkpoints.
KEPT_HERE = {"training_args.bin", "trainer_state.json"}
SHOWING_ROWS = ("report.html", "confusion.png")
# Texts in which a library or the recipe may have written a path.
WITH_PATHS = {"report.html", "config.json", "adapter_config.json", "tokenizer_config.json"}
# What `find_saved` needs of a run.
SETTINGS = ("use_lora", "use_qlora", "vision", "projector", "language", "bf16", "fp16")
# Of the two clients, the second in Rust.
UPLOAD_ERRORS = (OSError, httpx2.HTTPError, HfHubHTTPError, ValueError, RuntimeError)
SECONDS = 120  # for one answer of the hub, which may be long in writing a commit


def check_upload(args: RecipeArguments) -> None:
    """Creates the repository, or finds it, before anything expensive; settles `args.upload_to` and `args.upload_private`.

    All ranks call it together; the first one asks, and it alone knows afterwards.

    Raises:
        InputError: without a login, connection or right to write there, or if a public repository would get checkpoints.
    """
    name = str(args.upload_to)
    first = args.process_index == 0
    if first and huggingface_hub.get_token() is None:
        raise InputError(
            f"--push_to_hub: expected a login, found no token; run `hf auth login` or set HF_TOKEN (a token that may write, "
            f"made at {constants.ENDPOINT}/settings/tokens)"
        )
    if first and huggingface_hub.is_offline_mode():
        raise InputError(
            "--push_to_hub: expected a connection, found HF_HUB_OFFLINE set; unset it, or leave the flag out"
        )
    found: list[tuple[str, bool] | InputError] = []

    def work(_: Progress) -> None:
        try:
            name_there = HfApi().create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
            info = HfApi().model_info(name_there, revision=args.hub_revision)
            found.append((name_there, bool(info.private)))
        except HFValidationError as error:
            found.append(
                InputError(f"--hub_model_id {printable(name)}: expected OWNER/NAME, found: {printable(str(error))}")
            )
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403, 404):
                raise
            text = printable(str(error).strip().splitlines()[-1])
            found.append(
                InputError(
                    f"--push_to_hub: expected a token that may write to {printable(name)} on {constants.ENDPOINT}, and a branch "
                    f"that is there, found: {error.response.status_code} {text}; check HF_TOKEN, --hub_model_id, --hub_revision"
                )
            )

    outcome: Any = fetch(
        f"--push_to_hub to {printable(name)}",
        lambda: (found[0] if found else None) if first else (name, False),
        work,
        "leave --push_to_hub out: `hf upload` sends the folder later",
        first,
    )
    if isinstance(outcome, InputError):
        raise outcome
    args.upload_to, args.upload_private = outcome
    to_be_private = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if first and to_be_private and not args.upload_private:
        raise InputError(
            f"--hub_strategy {HubStrategy(args.hub_strategy).value}: expected a private repository, since checkpoints hold paths of this "
            f"machine, found the public {args.upload_to}; give --hub_private_repo and a new --hub_model_id, or another strategy"
        )


def upload_run(args: RecipeArguments) -> None:
    """Uploads a finished run; a run that is not, or one without --push_to_hub, stays here. Called by the first rank.

    Raises:
        RunError: if that fails; the same command started again only uploads.
    """
    folder = Path(args.output_dir)
    if read_manifest(folder) is None or not args.upload_to:
        return
    run = read_run(folder) or {}
    attempts = run.get("attempts") or [{}]
    if attempts[-1].get("state") != "finished":
        return
    shows_rows = args.upload_private or not args.data_dir
    try:
        url = _commit(
            args, [*run_files(args, folder, shows_rows), _public_run(run)], "Fine-tuned model, card and report"
        )
    except UPLOAD_ERRORS as error:
        raise RunError(
            f"the upload to {args.upload_to} failed: {_first_line(error)}; all is in {folder}, and the same command started "
            "again uploads it"
        ) from error
    left = (
        "" if shows_rows else "; report.html stays here, since it shows rows of --data_dir and the repository is public"
    )
    print(f"uploaded -> {url}{left}", flush=True)
    if args.use_lora and os.path.isdir(args.model_name_or_path):
        name = Path(args.model_name_or_path).resolve().name
        print(
            f"note: the adapter's base is a folder of this machine; there it is called {name}, and must be given",
            flush=True,
        )


class UploadCheckpoint(TrainerCallback):
    """Uploads as --hub_strategy says while training goes on: the weights of each checkpoint, and maybe the checkpoint itself.

    One at a time: while one is under way, others are left out unless --hub_always_push. A failure is a line, and no more.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, "upload")
        self._running: Future | None = None

    def on_save(self, args, state, control, **kwargs):
        busy = self._running is not None and not self._running.done()
        if (
            not state.is_world_process_zero
            or args.hub_strategy == HubStrategy.END
            or (busy and not args.hub_always_push)
        ):
            return
        # Later the Trainer or --save_total_limit may change them.
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._running = self._pool.submit(self._upload, args, folder)

    def on_train_end(self, args, state, control, **kwargs):
        self._pool.shutdown()

    def _upload(self, args, folder: Path) -> None:
        try:
            _commit(args, run_files(args, folder, False), f"Weights of {folder.name}")
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                latest = args.hub_strategy == HubStrategy.CHECKPOINT
                HfApi().upload_folder(
                    repo_id=args.upload_to,
                    folder_path=folder,
                    path_in_repo="last-checkpoint" if latest else folder.name,
                    # Of the one before, what this one has not.
                    delete_patterns="*" if latest else None,
                    commit_message=folder.name,
                    revision=args.hub_revision,
                )
        except UPLOAD_ERRORS as error:
            print(f"warning: {folder.name} was not uploaded: {_first_line(error)}; training goes on", flush=True)


def run_files(args: RecipeArguments, folder: Path, shows_rows: bool) -> list[CommitOperationAdd]:
    """What is uploaded of a folder: weights, processor, card, curves, and the report if it may show rows."""
    wanted = [*FINAL_FILES, "README.md", "curves.png", *(SHOWING_ROWS if shows_rows else ())]
    found = {path for pattern in wanted for path in folder.glob(pattern) if path.is_file()}
    operations = []
    for path in sorted(path for path in found if path.name not in KEPT_HERE and path.suffix != ".part"):
        content: Any = path
        if path.name in WITH_PATHS:
            content = without_paths(path.read_text(encoding="utf-8"), args).encode()
        operations.append(CommitOperationAdd(path.name, content))
    return operations


def without_paths(text: str, args: RecipeArguments) -> str:
    """A text in which the folders of the run are called by their own names, and the working and home folder by `.` and `~`."""
    folders = {os.getcwd(): ".", os.path.expanduser("~"): "~"}
    for given in (args.output_dir, *args.data_paths, args.model_name_or_path):
        if given and os.path.exists(given):
            own_name = Path(given).resolve().name
            folders |= {
                path: own_name for path in (given, os.path.abspath(given), os.path.realpath(given)) if "/" in path
            }
    for path, name in sorted(folders.items(), key=lambda item: -len(item[0])):
        if len(path) > 1:
            # Not in the middle of a picture in base64.
            parts = re.split(rf"(?<![\w+/=.-]){re.escape(path.rstrip('/'))}(?![\w+=-])", text)
            text = name.join(parts)
    return text


def _public_run(run: dict[str, Any]) -> CommitOperationAdd:
    """run.json as others need it: the precision and kind of the adapter, and the facts of the card."""
    kept = {
        "script": run["script"],
        "started": run["started"],
        "spread": {},
        "rows": {},
        "settings": {name: run["settings"].get(name) for name in SETTINGS},
        "card": run.get("card"),
    }
    return CommitOperationAdd(RUN, (json.dumps(kept, indent=1) + "\n").encode())


def _commit(args: RecipeArguments, operations: list[CommitOperationAdd], message: str) -> str:
    # The client of a download gives up after seconds.
    huggingface_hub.set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=SECONDS))
    return (
        HfApi()
        .create_commit(str(args.upload_to), operations, commit_message=message, revision=args.hub_revision)
        .repo_url.url
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0] if lines else type(error).__name__).rstrip(".")
    # The library names the file, and hides what went wrong with it.
    return f"{text} ({_first_line(error.__cause__)})" if error.__cause__ else text
