"""What the server behind the page answers: its own requests, files that were uploaded, and 404 to all else."""

import asyncio
import os

import pytest

from finetuning.results.guard import LARGEST_CALL, Guard

LOCAL = {"127.0.0.1", "localhost", "[::1]"}


@pytest.fixture
def request_status(tmp_path):
    """(path, headers) -> the status and headers of the answer; 200 is that of the server behind the guard."""
    uploads = tmp_path / "uploads"
    (uploads / "a").mkdir(parents=True)
    (uploads / "a" / "page.png").write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "uploads-beside").mkdir()
    (tmp_path / "uploads-beside" / "x.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.txt", uploads / "link.png")

    async def server(_, __, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Content-Type-Options", b"other")]})
        await send({"type": "http.response.body", "body": b""})

    def call(path: str, hosts=LOCAL, kind="http", **headers: str):
        sent = []

        async def send(message):
            sent.append(message)

        given = {"host": "127.0.0.1:7860", **{name.replace("_", "-"): value for name, value in headers.items()}}
        encoded = [(name.encode(), value.encode()) for name, value in given.items()]
        guard = Guard(server, uploads, hosts, 10**6)
        asyncio.run(guard({"type": kind, "path": path, "headers": encoded}, None, send))
        return sent[0].get("status", sent[0]["type"]), dict(sent[0].get("headers", []))

    return call, uploads


def test_the_page_gets_what_it_needs_and_nothing_from_elsewhere(request_status):
    call, uploads = request_status
    for path in ("/", "/config", "/theme.css", "/assets/x.js", "/gradio_api/queue/join", "/gradio_api/heartbeat/abc"):
        status, headers = call(path)
        assert status == 200, path
        assert b"default-src 'self'" in headers[b"content-security-policy"]
        assert headers[b"x-content-type-options"] == b"nosniff"
    assert call(f"/gradio_api/file={uploads}/a/page.png")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=README.md", "/gradio_api/file=finetuning/app.py"),
        *("/gradio_api/file={uploads}/../secret.txt", "/gradio_api/file={uploads}/a/%2e%2e/%2e%2e/secret.txt"),
        *("/gradio_api/file={uploads}/link.png", "/gradio_api/file={uploads}-beside/x.png", "/gradio_api/file="),
        *("/gradio_api/file=http://127.0.0.1:1/x", "/gradio_api/file=https://example.invalid/x", "/gradio_api/file={uploads}\0"),
        *("/gradio_api/proxy=http://127.0.0.1:1/x", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/file/etc/passwd"),
        *("/gradio_api/vibe-code", "/gradio_api/vibe-edit", "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json"),
        *("/monitoring", "/monitoring/summary", "/docs", "/gradio_api/call/ask", "/gradio_api/heartbeat/a/b", "/login"),
        *("/assets/../../etc/passwd", "/static/..", "/gradio_api/component_server", "/gradio_api/process_recording"),
    ],
)  # fmt: skip
def test_all_else_is_not_found(request_status, path):
    call, uploads = request_status
    assert call(path.format(uploads=uploads))[0] == 404


def test_another_name_of_this_server_is_refused_unless_all_may_reach_it(request_status):
    call, _ = request_status
    assert call("/", host="evil.example")[0] == 404
    assert call("/", host="evil.example:7860")[0] == 404
    assert call("/", host="localhost:1")[0] == 200
    assert call("/", host="[::1]:7860")[0] == 200
    assert call("/", hosts=None, host="my-machine:7860")[0] == 200


def test_a_large_request_is_refused_before_it_is_read(request_status):
    call, _ = request_status
    assert call("/gradio_api/queue/join", content_length=str(LARGEST_CALL))[0] == 200
    assert call("/gradio_api/queue/join", content_length=str(LARGEST_CALL + 1))[0] == 413
    assert call("/gradio_api/upload", content_length=str(10**6))[0] == 200
    assert call("/gradio_api/upload", content_length=str(10**6 + 1))[0] == 413
    assert call("/gradio_api/upload", transfer_encoding="chunked")[0] == 413
    assert call("/", content_length="-1")[0] == 413
    assert call("/", kind="websocket")[0] == "websocket.close"
