"""Clips whose frames show their own number as black and white columns."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

# Rows of the display matrix of an mp4, 16.16 fixed point, by clockwise turn in degrees.
MATRICES = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def numbered_frame(number: int, size: tuple[int, int]) -> av.VideoFrame:
    """A frame of 8 columns, column b white where bit b of the number is set."""
    width, height = size
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.repeat(np.array(bits, dtype=np.uint8), width // 8)
    return av.VideoFrame.from_ndarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy(), format="rgb24")


def make_clip(path: Path, count: int, size=(128, 64), codec: str = "mpeg4", gap=lambda _: 1) -> Path:
    """Writes a clip of `count` numbered frames; `gap` gives the time from a frame to the next one, in 1/25 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream(codec, rate=25, width=size[0], height=size[1], pix_fmt="yuv420p")
        time_now = 0
        for number in range(count):
            frame = numbered_frame(number, size)
            frame.pts, frame.time_base = time_now, Fraction(1, 25)
            time_now += gap(number)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_sound(path: Path) -> Path:
    """Writes an mp4 with a sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn_clip(path: Path, degrees: int) -> None:
    """Says in an mp4 that it is to be shown turned clockwise by so many degrees."""
    data = bytearray(path.read_bytes())
    a, b, c, d = MATRICES[degrees]
    fields = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *fields)
    path.write_bytes(data)


def number_in(image: Image.Image) -> int:
    """The number that a frame shows."""
    columns = np.asarray(image.convert("L"), dtype=float).mean(axis=0).reshape(8, -1).mean(axis=1)
    return sum(1 << bit for bit in range(8) if columns[bit] > 127)
