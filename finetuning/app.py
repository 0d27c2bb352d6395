"""A page in the browser to ask models, several side by side: whole ones, adapters, a run's output folder or a checkpoint-N.

    python -m finetuning.app output/docvqa
    python -m finetuning.app microsoft/Phi-3.5-vision-instruct output/docvqa output/other

Drop pictures or a clip, ask, read the answers while they are written; go on with more questions and pictures. Of a base that several
folders need, one copy is in memory. Rows that a run got wrong are listed below, to click and ask again.

Only this machine reaches the page, at http://127.0.0.1:7860, unless --host says otherwise: whoever reaches it may ask.
Needs gradio: pip install -r requirements-app.txt, in an environment of its own (docs/app.md).
"""

import errno
import io
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from transformers.utils import logging

from .arguments import check_model_name, read_flags
from .ask import DTYPES, TIMEOUT
from .command_line import CommandParser
from .data.shown import printable
from .environment import prepare_process, runs_on_cpu
from .errors import InputError, run_script
from .results.examples import Example, join_examples, wrong_rows
from .results.side_by_side import Answering, SideBySide
from .results.uploads import MOST_FILES
from .task_script import ROOT, load_script
from .training.identity import RUN
from .training.loading import trained_dtype
from .training.saved import SavedModel, find_saved
from .training.several import Loading, Opened, open_several

LOCAL = ("127.0.0.1", "localhost", "::1")
PORTS = range(7860, 7960)
MOST_FOLDERS = 4
MB = 10**6


@dataclass
class AppArguments:
    """What the command line says; the help texts say what each is."""

    folders: list[str]
    base: str | None
    dtype: str | None
    quantize: str | None
    max_new_tokens: int
    host: str
    port: int | None
    max_upload_mb: int
    max_image_pixels: int


def parse_args(argv: list[str] | None = None) -> AppArguments:
    """The arguments, checked as far as that needs no model.

    Raises:
        InputError: for a wrong call.
    """
    parser = CommandParser("app", __doc__)
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="model, adapter, output folder or checkpoint-N; or ORGANISATION/NAME on the hub",
    )
    add("--base", help="base model of the adapters, if it is not where their adapter_config.json says")
    add("--dtype", choices=DTYPES, help="precision of all (default: as trained, or as the weights are)")
    add("--quantize", choices=("none", "nf4"), help="weights of all in 4 bits (default: as trained)")
    add("--max_new_tokens", type=int, default=256, help="longest answer at first, in tokens (default: %(default)s)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all of this machine's (default: %(default)s)",
    )
    add("--port", type=int, help=f"port to listen on (default: the first free one from {PORTS[0]})")
    add("--max_upload_mb", type=int, default=20, help="largest file, in MB (default: %(default)s)")
    add("--max_image_pixels", type=int, default=50_000_000, help="largest picture, in pixels (default: %(default)s)")
    args = AppArguments(**vars(parser.parse_args(argv)))
    for name, least, most in (
        *(("max_new_tokens", 1, 2048), ("port", 1, 65535)),
        *(("max_upload_mb", 1, 1000), ("max_image_pixels", 1, 10**9)),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: expected {least} to {most}")
    if len(args.folders) > MOST_FOLDERS:
        raise InputError(f"expected 1 to {MOST_FOLDERS} folders, found {len(args.folders)}")
    for folder in args.folders:
        check_model_name(folder, "FOLDER")
    return args


def main() -> None:
    """Serves the page until it is interrupted."""
    args = parse_args()
    # Read when gradio is imported, or first used.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError(
            "finetuning.app: expected gradio, found none; pip install -r requirements-app.txt, best in an environment of its own (docs/app.md)"
        ) from None
    port = find_port(args.host, args.port)
    logging.disable_progress_bar()
    on_cpu = runs_on_cpu()
    prepare_process(on_cpu, None, TIMEOUT, args.max_image_pixels)
    device = PartialState(cpu=on_cpu).device
    saved = [find_saved(folder, args.base if _is_adapter(folder) else None) for folder in args.folders]
    names = names_of(args.folders)
    opened = open_several(how_to_load(args, saved, device), device)
    copies = len({item.copy for item in opened})
    print(f"{', '.join(names)}: {copies} cop{'y' if copies == 1 else 'ies'} of a base in memory", flush=True)
    titles = [(name, describe(item)) for name, item in zip(names, opened, strict=True)]
    serve(args, port, SideBySide(opened), titles, find_examples(args.folders))


def _is_adapter(folder: str) -> bool:
    return not os.path.isfile(os.path.join(folder, "config.json"))


def names_of(folders: Sequence[str]) -> list[str]:
    """What each folder is called: its last part, or all of it where that would not tell it from another."""
    short = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    return [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]


def how_to_load(args: AppArguments, saved: Sequence[SavedModel], device: torch.device) -> list[Loading]:
    """Each model as it was trained, or as the flags say; a base without a run of its own as the first adapter over it here."""
    found = []
    for item in saved:
        over = next((other for other in saved if other.adapter and _same_base(other, item)), item)
        trained = over if not item.settings else item
        dtype = DTYPES[args.dtype] if args.dtype else trained_dtype(trained, device)
        in_4_bits = args.quantize == "nf4" or (args.quantize is None and trained.in_4_bits)
        found.append(Loading(item, dtype, in_4_bits))
    return found


def _same_base(one: SavedModel, other: SavedModel) -> bool:
    return os.path.realpath(one.folder) == os.path.realpath(other.folder)


def describe(item: Opened) -> str:
    """What a model is, in a few words."""
    kind = f"adapter over {os.path.basename(os.path.normpath(item.saved.base))}" if item.adapter else "whole model"
    crops = item.processor.image_processor.num_crops
    precision = f"4 bits, {item.dtype}" if getattr(item.model, "is_loaded_in_4bit", False) else str(item.dtype)
    return f"{kind} · {precision.replace('torch.', '')} · up to {crops} crop{'s' * (crops != 1)}"


def find_examples(folders: Sequence[str]) -> list[Example]:
    """Rows that the runs got wrong, of those whose report and data are on this machine; a line says why there are none."""
    found = []
    for folder in map(Path, folders):
        if not (folder / RUN).is_file():
            continue
        try:
            found.append(wrong_rows(folder, answered_rows))
        except Exception as error:  # a script or data of somebody's own; the page works without
            print(f"{printable(str(folder))}: no rows to click: {printable(str(error) or repr(error))}", flush=True)
    return join_examples(found)


def answered_rows(run: dict[str, Any]) -> tuple[Sequence, Callable]:
    """The rows that a run has answered, read again by its own script from its data folder, and the script's to_conversation.

    Args:
        run (dict): content of run.json.

    Raises:
        InputError: if the script is none of this repository, or the data are elsewhere by now.
    """
    attempt, name = run["attempts"][-1], os.path.basename(run["script"])
    script = ROOT / name
    if not script.is_file() or not name.startswith("finetune_hf_trainer_"):
        raise InputError(f"expected a run of a script of {ROOT}, found one of {printable(name)}")
    module, words = load_script(str(script)), attempt["command"]
    flags = words[next(place for place, word in enumerate(words) if os.path.basename(word) == name) + 1 :]
    args = read_flags(flags, get_type_hints(module.load_splits)["args"])
    if not args.data_dir:
        raise InputError("expected a run on a data folder (--data_dir), found one on a data set of the hub")
    args.do_train = False
    # What a script says of its rows was said when they were trained.
    with redirect_stdout(io.StringIO()):
        return module.load_splits(args)[1], module.to_conversation


def find_port(host: str, wanted: int | None) -> int:
    """A port that is free.

    Raises:
        InputError: if the one that is wanted is not, or the host is none of this machine.
    """
    for port in [wanted] if wanted else PORTS:
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return port
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)
            # Not strerror: socket puts the address into it once more.
            found = error.strerror if unknown or not error.errno else os.strerror(error.errno)
            if wanted or unknown or error.errno == errno.EADDRNOTAVAIL:
                raise InputError(
                    f"--host {printable(host)}: expected an address to listen on, port {port}, found: {found}; choose another"
                ) from None
    raise InputError(f"expected a free port from {PORTS[0]} to {PORTS[-1]}, found none; give --port")


def serve(
    args: AppArguments, port: int, models: SideBySide, titles: Sequence[tuple[str, str]], examples: Sequence[Example]
) -> None:
    """Serves the page until SIGINT or SIGTERM; uploaded files lie in a folder of this process alone, which goes with it."""
    import gradio
    from starlette.middleware import Middleware

    from .results.chat_page import STYLE, Page
    from .results.guard import Guard

    with tempfile.TemporaryDirectory(prefix="phi3v-app-", ignore_cleanup_errors=True) as folder:
        # Frames of uploaded clips too: gone with them, not in the user's own cache.
        os.environ["GRADIO_TEMP_DIR"] = os.environ["HF_ASSETS_CACHE"] = folder
        # Gradio asks its own server whether it answers: not by way of a proxy.
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), *LOCAL]))
        hosts = {"127.0.0.1", "localhost", "[::1]"} if args.host in LOCAL else None
        largest = args.max_upload_mb * MB
        guard = Middleware(Guard, uploads=Path(folder), hosts=hosts, largest_upload=MOST_FILES * largest)
        page = Page(models, titles, examples, Answering(max_new_tokens=args.max_new_tokens), Path(folder)).build()
        page.queue(max_size=32, api_open=False)
        # First, so that a signal while it starts is not lost.
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        page.launch(
            server_name=args.host,
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=largest,
            allowed_paths=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            footer_links=[],
            css_paths=[STYLE],
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
        )
        print(
            f"http://{'[' + args.host + ']' if ':' in args.host else args.host}:{port}   (Ctrl-C ends it)", flush=True
        )
        ended.wait()
        page.close(verbose=False)


if __name__ == "__main__":
    run_script(main)
