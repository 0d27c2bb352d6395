"""What a browser gets of the server behind the page: the page, the files that were uploaded to it, and nothing else."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

# Gradio would also fetch URLs for whoever asks, pass requests on to other servers, edit its own source and tell how it is used.
PAGE = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json")
FILES = ("/assets/", "/static/", "/svelte/")
API = "/gradio_api/"
CALLS = {
    "app_id",
    "startup-events",
    "theme.css",
    "upload",
    "upload_progress",
    "queue/join",
    "queue/data",
    "run/predict",
    "cancel",
    "reset",
}
UPLOADED = f"{API}file="
LARGEST_CALL = 2**20  # bytes, of a request that is no upload
# Nothing is loaded from elsewhere, whatever a text on the page were to become. Gradio compiles its templates in the browser.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Guard:
    """ASGI middleware that answers 404 to all but the page's own requests, and forbids the browser to load anything else.

    Args:
        app: the server behind it.
        uploads (Path): the only folder that files are served from.
        hosts (set[str], optional): names that a request may call this server by, without the port: with others a page
            elsewhere could have its own name lead here. None: any.
        largest_upload (int): bytes of one request that uploads files.
    """

    def __init__(self, app, uploads: Path, hosts: set[str] | None, largest_upload: int):
        self.app, self.uploads, self.hosts, self.largest_upload = app, uploads, hosts, largest_upload

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        headers = dict(scope.get("headers", []))
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1"))
        length = headers.get(b"content-length", b"0").decode("latin-1")
        most = self.largest_upload if scope["path"] == f"{API}upload" else LARGEST_CALL
        if not self._is_own(scope["path"]) or (self.hosts and host not in self.hosts):
            await _refuse(send, 404, b"Not found")
        elif not length.isdecimal() or int(length) > most or b"transfer-encoding" in headers:
            await _refuse(send, 413, f"Expected a request of at most {most} bytes".encode())
        else:

            async def send_with_headers(message):
                if message["type"] == "http.response.start":
                    kept = [pair for pair in message["headers"] if pair[0].lower() not in HEADERS]
                    message = {**message, "headers": [*kept, *HEADERS.items()]}
                await send(message)

            await self.app(scope, receive, send_with_headers)

    def _is_own(self, path: str) -> bool:
        if path.startswith(UPLOADED):
            # Once more, for what was encoded twice.
            asked = unquote(path.removeprefix(UPLOADED))
            return "\0" not in asked and Path(os.path.realpath(asked)).is_relative_to(os.path.realpath(self.uploads))
        name = path.removeprefix(API)
        if name != path:
            return name in CALLS or (name.startswith("heartbeat/") and name.count("/") == 1)
        return ".." not in path and (path in PAGE or path.startswith(FILES))


async def _refuse(send, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
