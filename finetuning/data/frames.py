"""Evenly spread frames of a video file, decoded by PyAV: for convert_ucf101.py and for clips in rows.

Light to import, apart from PyAV: each process that converts clips does it.
"""

import io
from typing import Any

import av
from PIL import Image

# Counterclockwise, as PyAV gives a frame's rotation.
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def frame_indices(count: int, num_frames: int) -> list[int]:
    """Which of `count` frames to take: the first of each of `num_frames` equal parts; repeated in a shorter clip."""
    return [index * count // num_frames for index in range(num_frames)]


def read_frames(path: str, num_frames: int, quality: int) -> tuple[list[bytes], str]:
    """JPEGs of evenly spread frames of a clip, upright, and what is to be said about it, mostly nothing.

    Args:
        path (str): the file.
        num_frames (int): how many frames to take; a shorter clip gives some of them several times.
        quality (int): of the JPEGs, 1 to 100.

    Raises:
        Exception: of many kinds, if nothing decodes; `describe_failure` says it.
    """
    kept, count, broken = decode(path, num_frames, None)
    indices = frame_indices(count, num_frames)
    if not kept.keys() >= set(indices):  # The header's count was wrong: now it is known.
        kept, count, broken = decode(path, num_frames, count)
    jpegs = {index: to_jpeg(kept[index], quality) for index in set(indices)}
    notes = [f"packets that did not decode: {broken}"] if broken else []
    if count < num_frames:
        notes.append(f"only {count} of {num_frames} frames, so some are repeated")
    return [jpegs[index] for index in indices], "; ".join(notes)


def describe_failure(error: Exception) -> str:
    """Why a clip could not be decoded."""
    return f"{getattr(error, 'strerror', None) or error or type(error).__name__}"


def decode(path: str, num_frames: int, count: int | None) -> tuple[dict[int, av.VideoFrame], int, int]:
    """Decodes a clip to its end, keeping the frames to take from a clip of `count` frames (None: what the header says).

    Returns:
        The kept frames by index, how many frames decoded, and how many packets did not.
    """
    kept: dict[int, av.VideoFrame] = {}
    decoded, broken = 0, 0
    with av.open(path, metadata_errors="ignore") as container:
        stream = _video_stream(container)
        wanted = set(frame_indices(stream.frames if count is None else count, num_frames))
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                broken += 1
                continue
            for frame in frames:
                if decoded in wanted:
                    kept[decoded] = frame
                decoded += 1
    if not decoded:
        raise ValueError("no frame decodes")
    return kept, decoded, broken


def upright_size(path: str) -> tuple[int, int]:
    """Width and height in pixels of a clip's first frame that decodes, upright: only a frame tells how the clip is turned.

    Raises:
        Exception: of many kinds, if nothing decodes; `describe_failure` says it.
    """
    with av.open(path, metadata_errors="ignore") as container:
        stream = _video_stream(container)
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                continue
            for frame in frames:
                lying = _turn(frame) in (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
                return (frame.height, frame.width) if lying else (frame.width, frame.height)
    raise ValueError("no frame decodes")


def _video_stream(container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("no video stream")
    stream.thread_type = "NONE"  # There is one process for each core.
    return stream


def to_jpeg(frame: av.VideoFrame, quality: int) -> bytes:
    """JPEG of a frame, upright."""
    image, buffer = frame.to_image(threads=1), io.BytesIO()
    turn = _turn(frame)
    if turn is not None:
        image = image.transpose(turn)
    # Colours at full resolution: at 4:2:0 a sharp coloured edge loses up to 18 dB here.
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """What turns a frame upright; PyAV gives its rotation in degrees."""
    return TURNS.get(round(frame.rotation / 90) * 90 % 360)
