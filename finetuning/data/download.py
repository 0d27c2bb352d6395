"""Downloads from the hub: the cache first, one process of a machine, an end within a minute when nothing comes."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import logging
from tqdm import tqdm

from ..errors import InputError

T = TypeVar("T")

# For a connection and for each read, in seconds. The libraries wait up to 100, or without a limit, in some calls.
REQUEST_SECONDS = 10
# A download that brings less than MIN_RATE bytes/s over STALL_SECONDS has stalled: 8 GB would take three months.
STALL_SECONDS, MIN_RATE = 35, 1000
# Waits before the second, third and fourth attempt, beside the libraries' own retries of a single request.
RETRY_AFTER = (1, 3, 6)
# Seconds until the first line about a download that goes well, and from one to the next.
FIRST_LINE, NEXT_LINE = 20, 60
# Seconds between two looks at the download, and between two exchanges of its state between ranks.
POLL = 0.5


class Stopped(Exception):
    """The download was given up; raised in its thread."""


class Progress:
    """What a download has brought so far; counts of all of its threads.

    `received` counts bytes of answers, `written` bytes of files; Xet, which has a client of its own, is only seen in the
    latter. `answers` are requests that were answered: for a repository of many small files these are the progress.
    """

    def __init__(self) -> None:
        self.received = self.answers = 0
        self.written: float = 0
        self.files: tqdm | None = None
        # Off while a data set is written as Arrow: that takes minutes and needs no network.
        self.downloading = True
        self.stopped = False
        # Of a request, in words: libraries retry, and hide causes behind errors of their own.
        self.last_fault = ""
        self._of_hub = False

    def note_fault(self, url: str, fault: str) -> None:
        """Keeps the last fault. That of another host hides none of the hub's own: the client is the whole process', threads of
        other libraries use it too."""
        of_hub = url.startswith(constants.ENDPOINT)
        if of_hub or not self._of_hub:
            self.last_fault, self._of_hub = fault, of_hub

    @property
    def brought(self) -> float:
        """What tells a download that goes on from one that does not, in bytes or their like."""
        return self.received + self.written + 4096 * self.answers

    def bar(self) -> type[tqdm]:
        """A progress bar for `snapshot_download(tqdm_class=...)` that counts here and shows nothing."""
        progress = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any):
                # `snapshot_download` has one bar for bytes of files, one for bytes from the network, one for files.
                self.of_files = str(kwargs.get("desc", "")).startswith("Reconstructing")
                super().__init__(*args, **{**kwargs, "disable": True})
                self.total = kwargs.get("total") or 0
                if self.of_files:
                    progress.files = self

            def update(self, n: float | None = 1) -> bool | None:
                if self.of_files:
                    progress.written += n or 0
                return None

        return Bar


class _Body(httpx2.SyncByteStream):
    """A response's body that counts what it brings, ends with the download, and breaks in a way that is resumed."""

    def __init__(self, stream: httpx2.SyncByteStream, progress: Progress):
        self.stream, self.progress = stream, progress

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                if self.progress.stopped:
                    raise Stopped
                self.progress.received += len(chunk)
                yield chunk
        except httpx2.ReadError as error:
            # A TCP reset. huggingface_hub resumes a body that ends early, but not one that ends in this way.
            raise httpx2.RemoteProtocolError(f"connection reset ({error})") from error

    def close(self) -> None:
        self.stream.close()


class _Client(httpx2.Client):
    """The hub's client with a limit of time on every request, for one download."""

    def __init__(self, progress: Progress):
        super().__init__(follow_redirects=True)
        self.progress = progress

    def send(self, request: httpx2.Request, *, stream: bool = False, **kwargs: Any) -> httpx2.Response:
        if self.progress.stopped:
            raise Stopped
        if huggingface_hub.is_offline_mode():
            raise OfflineModeIsEnabled(f"Cannot reach {request.url}: HF_HUB_OFFLINE is set")
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            part: min(limits.get(part) or REQUEST_SECONDS, REQUEST_SECONDS)
            for part in ("connect", "read", "write", "pool")
        }
        try:
            response = super().send(request, stream=True, **kwargs)
            response.stream = _Body(response.stream, self.progress)  # type: ignore[arg-type]
            if not stream:
                response.read()
        except httpx2.TransportError as error:
            if not self.progress.stopped:
                self.progress.note_fault(str(request.url), _cause(error)[0])
            raise
        if response.status_code < 400:
            self.progress.answers += 1
        elif response.status_code != 404:  # Optional files are asked for, too.
            self.progress.note_fault(str(request.url), _status_in_words(response.status_code)[0])
        return response


class _Download:
    """A download in a thread of its own, so that it can be given up whatever it waits for."""

    last: "_Download | None" = None

    def __init__(self, what: str, work: Callable[[Progress], None], cure: str):
        self.progress = Progress()
        self.what, self.work, self.cure = what, work, cure
        self.start, self.line_after = time.monotonic(), FIRST_LINE
        self.seen: deque[tuple[float, float]] = deque([(self.start, 0)])
        self.done = threading.Event()
        self.error: BaseException | None = None
        _Download.last = self
        huggingface_hub.set_client_factory(lambda: _Client(self.progress))
        threading.Thread(target=self._run, daemon=True, name=f"fetch {what}").start()

    def _run(self) -> None:
        try:
            for wait in (*RETRY_AFTER, None):
                try:
                    self.work(self.progress)
                    return
                except Exception as error:
                    if wait is None or not _is_transient(error) or self.progress.stopped:
                        raise
                    time.sleep(wait)
        except BaseException as error:
            self.error = error
        finally:
            if _Download.last is self:
                # The client is one for the whole process: whatever else uses it does not end with this download.
                huggingface_hub.set_client_factory(lambda: _Client(Progress()))
            self.done.set()

    def outcome(self) -> str | None:
        """None while it runs, "" once all is there, else one line on why it is not; waits a moment."""
        if self.done.wait(POLL):
            return _refusal(self.what, self.error, self.cure, self.progress.last_fault) if self.error else ""
        now, progress = time.monotonic(), self.progress
        if now - self.start >= self.line_after:
            self._say()
            self.line_after += NEXT_LINE
        if not progress.downloading:
            self.seen.clear()
        self.seen.append((now, progress.brought))
        while len(self.seen) > 1 and self.seen[1][0] <= now - STALL_SECONDS:
            self.seen.popleft()
        then, before = self.seen[0]
        if now - then >= STALL_SECONDS and progress.brought - before < STALL_SECONDS * MIN_RATE:
            progress.stopped = True
            huggingface_hub.close_session()
            self.done.wait(2)  # So that it removes the file that it was writing.
            gained = progress.brought - before
            found = f"{f'at most {gained:.0f} bytes' if gained else 'nothing'} in {now - then:.0f} s"
            if progress.last_fault:
                found += f" ({progress.last_fault})"
            return _line(self.what, found, f"{UNREACHABLE}; {self.cure}")
        return None

    def _say(self) -> None:
        """That it takes long, for whoever watches."""
        progress, seconds = self.progress, time.monotonic() - self.start
        if not progress.downloading:
            print(f"{self.what}: writing the data set's cache", file=sys.stderr, flush=True)
            return
        size = max(progress.received, progress.written) / 1e6
        total = f" of {progress.files.total / 1e6:.2f}" if progress.files else ""
        print(
            f"{self.what}: {size:.2f}{total} MB from {constants.ENDPOINT} in {seconds:.0f} s, {size / seconds:.2f} MB/s",
            file=sys.stderr,
            flush=True,
        )


UNREACHABLE = "check the network and HF_ENDPOINT, or use what is in the cache (HF_HOME) with HF_HUB_OFFLINE=1"


def fetch(
    what: str, cached: Callable[[], T | None], work: Callable[[Progress], None], cure: str, fetches: bool = True
) -> T:
    """What `cached` finds on this machine; where it finds nothing, `work` downloads it first.

    In a run of several processes the first of each machine downloads and the others wait, however long it takes; all of
    them must call this. When a download fails, all of them raise the same error at once.

    Args:
        what (str): what is fetched, as the error names it.
        cached (Callable): gives what is there, or None unless it is complete. Must not use the network.
        work (Callable): downloads into the cache, in a thread of its own; counts on the `Progress` that it is given.
        cure (str): what the user can give instead, as the end of the error.
        fetches (bool): whether this process is the one of its machine that downloads.

    Raises:
        InputError: if it is not there and cannot be fetched, within about 40 s after the last byte has come.
    """
    found, download, outcome = cached(), None, ""
    if found is None and fetches:
        if huggingface_hub.is_offline_mode():
            outcome = _refusal(what, OfflineModeIsEnabled(), cure)
        else:
            level = logging.get_verbosity()
            logging.set_verbosity_error()  # Each retry is a warning of two lines.
            download = _Download(what, work, cure)
    try:
        while True:
            state = download.outcome() if download else outcome
            # Never one long wait: a collective operation ends with an error after --ddp_timeout.
            states = _all_ranks(state)
            if fault := next(filter(None, states), ""):
                raise InputError(fault)
            if None not in states:
                break
    finally:
        if download:
            logging.set_verbosity(level)
    if found is None:
        found = cached()
    if found is None:
        raise InputError(_line(what, f"nothing complete in {constants.HF_HOME} after the download", cure))
    return found


def _all_ranks(state: str | None) -> list[str | None]:
    # Not imported here: the converter needs no torch.
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what led to it; libraries hide the latter from tracebacks."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return response.status_code if isinstance(error, HfHubHTTPError) and response is not None else None


def _is_transient(error: BaseException) -> bool:
    for each in _chain(error):
        if isinstance(each, Stopped | GatedRepoError | RepositoryNotFoundError | RemoteEntryNotFoundError):
            return False
        status = _status(each)
        if status is not None:
            return status in (408, 429) or status >= 500
        if isinstance(each, httpx2.TransportError) or "Consistency check failed" in str(each):
            return True
    return False


def _cause(error: BaseException) -> tuple[str, str]:
    """Why nothing came, in words, and what to do about it."""
    chain = _chain(error)
    for each in chain:
        status = _status(each)
        if isinstance(each, RepositoryNotFoundError) and not isinstance(each, GatedRepoError):
            return f"{status} no such repository, or a private one", f"check its name, or {_token()}"
        if isinstance(each, RemoteEntryNotFoundError):
            return "404 no such file", "check its name"
        if status is not None:
            return _status_in_words(status)
    for each in chain:
        text = _first_line(each)
        if isinstance(each, httpx2.ConnectTimeout | httpx2.ReadTimeout | httpx2.PoolTimeout | httpx2.WriteTimeout):
            return f"no answer in {REQUEST_SECONDS} s", UNREACHABLE
        if isinstance(each, httpx2.ProxyError):
            return f"the proxy refuses: {text}", "check HTTPS_PROXY and NO_PROXY"
        if isinstance(each, httpx2.ConnectError):
            if "certificate" in text.lower():
                return f"its certificate is not trusted: {text}", "check SSL_CERT_FILE"
            if "Errno -" in text or "resolve" in text.lower():
                return f"its name has no address: {text}", UNREACHABLE
            return f"connection refused: {text}", UNREACHABLE
        if isinstance(each, httpx2.TransportError):
            return f"the connection broke off: {text}", UNREACHABLE
        if isinstance(each, OfflineModeIsEnabled):
            return (
                f"HF_HUB_OFFLINE is set and it is not, or not whole, in the cache {constants.HF_HOME}",
                "unset HF_HUB_OFFLINE, or set HF_HOME to a cache that holds it",
            )
        if "Consistency check failed" in text:
            return f"files cut short: {text.removeprefix('Consistency check failed: ')}", UNREACHABLE
        if isinstance(each, OSError) and each.errno is not None:
            return f"{each.strerror or text}", "free some space, or set HF_HOME to another disk"
    deepest = next((each for each in chain if not isinstance(each, LocalEntryNotFoundError)), chain[0])
    return f"{type(deepest).__name__}: {_first_line(deepest)}", ""


def _token() -> str:
    return f"set HF_TOKEN (made at {constants.ENDPOINT}/settings/tokens)"


def _status_in_words(status: int) -> tuple[str, str]:
    if status in (401, 403):
        return f"{status} it is gated or private", f"accept its terms on its page there and {_token()}"
    if status == 429:
        return "429 too many requests", f"wait, or {_token()}"
    return f"{status} the hub has a fault", UNREACHABLE


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")


def _refusal(what: str, error: BaseException, cure: str, last_fault: str = "") -> str:
    found, what_to_do = _cause(error)
    if not what_to_do:
        # An error of a library's own making, with a text of its own.
        found += f" (last answer: {last_fault})" if last_fault else ""
        gated = last_fault[:3] in ("401", "403")
        what_to_do = _status_in_words(int(last_fault[:3]))[1] if gated else "check the name, configuration and split"
    return _line(what, found, f"{what_to_do}; {cure}")


def _line(what: str, found: str, what_to_do: str) -> str:
    return f"{what}: expected it from {constants.ENDPOINT}, found: {found}; {what_to_do}"
