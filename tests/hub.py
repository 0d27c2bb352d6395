"""A small hub on the loopback: what huggingface_hub, datasets and transformers ask for, with faults on demand.

    with Hub() as hub:
        hub.put("datasets/nielsr/docvqa_1200_examples", docvqa())
        hub.fault = Fault("silent", on="/resolve/")
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}

It serves repositories of one branch, `main`: repository info, the file tree, files (HEAD, GET with Range), and takes uploads
(create a repository, preupload, LFS objects, commit) of those that hold a token, if `hub.token` is set. Everything asked of it
is in `hub.requests`.
"""

import base64
import contextlib
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pyarrow.parquet
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

FILE = re.compile(r"/(?P<repo>(datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<call>[^/]+)/(?P<revision>[^/]+)(?P<path>/.*)?)?"
)
# As on the hub: large files are LFS objects, whose ETag is their SHA-256; of the others it is the git blob's id.
LFS_FROM = 10_000


@dataclass
class Fault:
    """What goes wrong.

    Args:
        kind (str): silent (takes the request and never answers), drip (a byte each half second), slow (a body in 40 parts
            over `Hub.seconds`), cut (closes the connection
            in the middle of a body), reset (the same, by a TCP reset), short (half the body as if it were all), no_etag,
            or a status: 401 (gated), 403 (gated, terms not accepted), 404 (no such repository), 500.
        on (str): part of the path that is asked for.
        times (int): requests that it hits; afterwards all is well.
    """

    kind: str
    on: str = "/"
    times: int = 10**9


class Repository:
    """Files of a repository at its newest commit."""

    def __init__(self, files: dict[str, bytes], private: bool = False):
        self.files, self.private = dict(files), private

    @property
    def commit(self) -> str:
        listing = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(self.files.items())})
        return hashlib.sha1(listing.encode()).hexdigest()

    def etag(self, path: str) -> str:
        data = self.files[path]
        if len(data) >= LFS_FROM:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict:
        size = len(self.files[path])
        found = {"type": "file", "path": path, "size": size, "oid": self.etag(path)[:40]}
        if size >= LFS_FROM:
            found["lfs"] = {"oid": self.etag(path), "size": size, "pointerSize": 134}
        return found

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(self.files) if path.startswith(prefix)]
        folders = {
            prefix + "/".join(parts[:depth])
            for parts in (path.removeprefix(prefix).split("/") for path in inside)
            for depth in range(1, len(parts) if recursive else min(len(parts), 2))
        }
        files = [self.entry(path) for path in inside if recursive or "/" not in path.removeprefix(prefix)]
        return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)] + files


class Hub:
    """The hub; a context manager. `endpoint` is its address, `fault` what goes wrong now, `requests` what was asked."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.fault: Fault | None = None
        self.requests: list[str] = []
        # The only token that may write; None: none is asked for.
        self.token: str | None = None
        # LFS objects by their SHA-256, and the messages of all commits.
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        # Bytes of bodies that were sent, and how long a slow one takes.
        self.sent, self.seconds = 0, 4.0
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, repo: str, files: dict[str, bytes]) -> None:
        """Adds a repository: `owner/name` of a model, `datasets/owner/name` of a data set."""
        self.repositories[repo] = Repository(files)

    def take_fault(self, path: str) -> str | None:
        with self.lock:
            fault = self.fault
            if fault is None or fault.times <= 0 or fault.on not in path:
                return None
            fault.times -= 1
            return fault.kind

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def use(endpoint: str, home: Path, monkeypatch) -> Path:
    """Makes a hub the endpoint, with an empty cache in `home`; both are read at import, so they are set afterwards."""
    for name, value in (("ENDPOINT", endpoint), ("HF_HOME", str(home)), ("HF_HUB_CACHE", str(home / "hub"))):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
    huggingface_hub.close_session()
    return home


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.serve()

    def do_GET(self):
        self.serve()

    def do_POST(self):
        self.serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"PUT {path}")
        self.fault = self.hub.take_fault(path)
        if self.fault and self.fault.isdigit():
            self.answer(int(self.fault), b"", {})
        else:
            self.hub.objects[path.rsplit("/", 1)[1]] = data
            self.answer(200, b"", {})

    def may_write(self) -> bool:
        if self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.answer(401, b'{"error": "Invalid username or password."}', {})
        return False

    def serve(self, sent: bytes = b""):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        self.fault = self.hub.take_fault(path)
        if self.fault == "silent":
            self.hub.closing.wait()
            self.close_connection = True
            return
        if self.fault and self.fault.isdigit():
            code = {"401": "GatedRepo", "403": "GatedRepo", "404": "RepoNotFound"}.get(self.fault, "")
            self.answer(int(self.fault), b'{"error": "as the test wants it"}', {"X-Error-Code": code} if code else {})
            return
        if file := FILE.fullmatch(path):
            self.send_repository_file(**file.groupdict())
        elif api := API.fullmatch(path):
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            self.call(api, query, sent)
        elif path == "/api/repos/create":
            if self.may_write():
                self.create(json.loads(sent))
        elif path.endswith(".git/info/lfs/objects/batch"):
            if self.may_write():
                wanted = json.loads(sent)["objects"]
                self.answer_json(
                    {"transfer": "basic", "objects": [self.lfs(found["oid"], found["size"]) for found in wanted]}
                )
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif path == "/api/whoami-v2":
            self.answer_json({"name": "me", "type": "user", "orgs": []})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def create(self, wanted: dict):
        owner = wanted.get("organization") or "me"
        name = wanted["name"] if "/" in wanted["name"] else f"{owner}/{wanted['name']}"
        repo = f"datasets/{name}" if wanted.get("type") == "dataset" else name
        self.hub.repositories.setdefault(repo, Repository({}, wanted.get("visibility") == "private"))
        self.answer_json({"url": f"{self.hub.endpoint}/{name}", "id": name})

    def lfs(self, oid: str, size: int) -> dict:
        found = {"oid": oid, "size": size}
        # As there: of an object that is there already nothing is to be done.
        return (
            found
            if oid in self.hub.objects
            else {**found, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{oid}"}}}
        )

    def find(self, repo: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repository.commit):
            self.answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def call(self, api: re.Match, query: dict, sent: bytes):
        kind, name, call, revision, path = api.group("kind", "name", "call", "revision", "path")
        repository = self.find(f"datasets/{name}" if kind == "datasets" else name, revision or "main")
        if repository is None:
            return
        if call in (None, "revision"):
            info = {"id": name, "sha": repository.commit, "private": repository.private, "tags": [], "downloads": 0}
            self.answer_json({**info, "siblings": [{"rfilename": path} for path in repository.files]})
        elif call == "tree":
            recursive = query.get("recursive", "").lower() in ("true", "1")
            found = repository.tree((path or "").strip("/"), recursive)
            if path and not found:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self.answer_json(found)
        elif call == "paths-info":
            wanted = json.loads(sent)["paths"] if sent[:1] == b"{" else parse_qs(sent.decode())["paths"]
            entries = [repository.entry(path) for path in wanted if path in repository.files]
            folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in repository.files)]
            self.answer_json(entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])
        elif call == "preupload":
            files = json.loads(sent)["files"]
            modes = [{**file, "uploadMode": "lfs" if file["size"] >= LFS_FROM else "regular"} for file in files]
            self.answer_json({"files": [{**file, "shouldIgnore": False} for file in modes]})
        elif call == "commit" and self.may_write():
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    repository.files.pop(value["path"], None)
            url = f"{self.hub.endpoint}/{name}/commit/{repository.commit}"
            self.answer_json({"commitUrl": url, "commitOid": repository.commit, "success": True})
        elif call != "commit":
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_repository_file(self, repo: str, revision: str, path: str):
        repository = self.find(repo, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if path not in repository.files:
            self.answer(404, b"Entry not found", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = repository.files[path]
        if self.fault != "no_etag":
            headers["ETag"] = f'"{repository.etag(path)}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.answer(206, data[start : end + 1], headers)
        else:
            self.answer(200, data, headers)

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        if self.fault == "short" and self.command == "GET":
            body = body[: len(body) // 2]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.send_body(body)

    def send_body(self, body: bytes):
        self.hub.sent += len(body) // 2 if self.fault in ("cut", "reset") else len(body)
        if self.fault == "slow":
            part = -(-len(body) // 40)
            for start in range(0, len(body), part):
                self.wfile.write(body[start : start + part])
                self.hub.closing.wait(self.hub.seconds / 40)
        elif self.fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.hub.closing.wait(0.5):
                    break
        elif self.fault in ("cut", "reset"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(0.1)  # So that the first half is read before a reset discards it.
            self.close_connection = True
            if self.fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body)


# What is on the hub, in its true schemas, with few rows and tiny pictures.


def png(number: int, size: tuple[int, int] = (1, 1)) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (number % 256, number // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(rows: Iterable[dict], features: Features) -> bytes:
    """A Parquet file with the features in its metadata, as `push_to_hub` writes it."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(Dataset.from_list(list(rows), features=features).data.table, buffer)
    return buffer.getvalue()


def card(configs: list[dict]) -> bytes:
    """README.md that names the files of each configuration and split."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config['name']}", "  data_files:"]
        for split, pattern in config["files"].items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", ""]).encode()


# Source: https://huggingface.co/datasets/nielsr/docvqa_1200_examples (dataset_info of README.md)
DOCVQA = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "query": {language: Value("string") for language in ("de", "en", "es", "fr", "it")},
        "answers": List(Value("string")),
        "words": List(Value("string")),
        "bounding_boxes": List(List(Value("float32"), length=4)),
        "answer": {"match_score": Value("float64"), "matched_text": Value("string"), "start": Value("int64"), "text": Value("string")},
    }
)  # fmt: skip


def docvqa(train: int = 6, test: int = 3, side: int = 40) -> dict[str, bytes]:
    """nielsr/docvqa_1200_examples: 1,000 rows to train and 200 to test there."""

    def rows(split: str, count: int) -> list[dict]:
        return [
            {
                "id": f"{split}_{number}",
                "image": {"bytes": png(number, (side, side)), "path": None},
                "query": {language: f"Question {number} of {split}?" for language in ("de", "en", "es", "fr", "it")},
                "answers": [f"{split} {number}", f"{number}"],
                "words": ["a"],
                "bounding_boxes": [[0.0, 0.0, 1.0, 1.0]],
                "answer": {"match_score": 1.0, "matched_text": "a", "start": 0, "text": "a"},
            }
            for number in range(count)
        ]

    return {
        "README.md": card([{"name": "default", "files": {"train": "data/train-*", "test": "data/test-*"}}]),
        "data/train-00000-of-00001.parquet": parquet(rows("train", train), DOCVQA),
        "data/test-00000-of-00001.parquet": parquet(rows("test", test), DOCVQA),
    }


# Source: https://huggingface.co/datasets/HuggingFaceM4/the_cauldron (dataset_info of README.md; the same in all configurations)
CAULDRON = Features(
    {
        "images": List(Image()),
        "texts": [{"user": Value("string"), "assistant": Value("string"), "source": Value("string")}],
    }
)
TEXTS = {
    "docvqa": (1, [("What is page {n}?\nGive a very brief answer.", "Page {n}."), ("Who wrote {n}?\nAnswer briefly.", "Nobody.")]),
    "hateful_memes": (1, [('Is the meme {n} hateful?\nAnswer yes or no.', "No.")]),
    "nlvr2": (2, [("Is statement {n} true?\nAnswer yes or no.", "Yes."), ("And {n} and a half?\nAnswer yes or no.", "No.")]),
}  # fmt: skip


def cauldron(counts: dict[str, int]) -> dict[str, bytes]:
    """HuggingFaceM4/the_cauldron with some of its configurations.

    Args:
        counts (dict[str, int]): rows of each configuration: docvqa, hateful_memes, nlvr2.
    """
    files = {"README.md": card([{"name": name, "files": {"train": f"{name}/train-*"}} for name in counts])}
    for name, count in counts.items():
        images, texts = TEXTS[name]
        rows = [
            {
                "images": [{"bytes": png(number), "path": None}] * images,
                "texts": [
                    {"user": user.format(n=number), "assistant": answer.format(n=number), "source": name}
                    for user, answer in texts
                ],
            }
            for number in range(count)
        ]
        # As there: a configuration comes in several files.
        half = count // 2
        for part, share in enumerate([rows[:half], rows[half:]]):
            files[f"{name}/train-0000{part}-of-00002.parquet"] = parquet(share, CAULDRON)
    return files


def folder_files(folder: Path) -> dict[str, bytes]:
    """Files of a model folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
