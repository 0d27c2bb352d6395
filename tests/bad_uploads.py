"""Ten files that are not what they seem, or too much, as somebody may put them into the page."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def _bomb(path: Path) -> None:
    """A PNG of 30,000 x 30,000 pixels in 1 kB: nothing decodes it before its header is read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def _cut(path: Path) -> None:
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def _wide(path: Path) -> None:
    Image.new("L", (8000, 7000)).save(path)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
# name of the file -> what writes it, and a part of the line that it gets
BAD_UPLOADS: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes.png": (lambda path: path.write_text("no picture"), "found another format or a damaged header"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "found another format or a damaged header"),
    "script.png": (
        lambda path: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>window.hurt=1</script></svg>'),
        "found another format or a damaged header",
    ),
    "page.gif": (lambda path: path.write_text("<html><script>window.hurt=1</script></html>"), "found another format"),
    "print.jpg": (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "found another format"),
    "cut.png": (_cut, "expected a whole image"),
    "bomb.png": (_bomb, "expected at most 50000000 pixels"),
    "wide.png": (_wide, "expected at most 50000000 pixels"),
    "list.mp4": (lambda path: path.write_bytes(PLAYLIST), "expected an MP4, MOV, WebM, MKV or AVI video"),
    "broken.mp4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(400)), "expected a video of which frames decode"),
}  # fmt: skip
