"""Files that somebody has put into the page: ten that are refused, and what a clip becomes."""

import av
import numpy as np
import pytest
import tiny
from bad_uploads import BAD_UPLOADS

from finetuning.environment import limit_pixels
from finetuning.errors import InputError
from finetuning.results.uploads import MOST_FILES, NUM_FRAMES, first_pictures, shown_pictures


@pytest.fixture(autouse=True)
def limits(monkeypatch, tmp_path):
    monkeypatch.setenv("PHI3V_MAX_IMAGE_PIXELS", "1")  # so that it is put back
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    limit_pixels(50_000_000)


def write_clip(path, frames=12, size=(64, 48)):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 * number, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_file_gets_one_line_with_its_name_and_no_folder(tmp_path, name):
    write, says = BAD_UPLOADS[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError) as caught:
        shown_pictures([str(path)])
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_and_clips_are_shown_in_their_order(tmp_path):
    tiny.picture(40, 30).save(tmp_path / "a.png")
    write_clip(tmp_path / "b.mp4")
    paths = [str(tmp_path / name) for name in ("a.png", "b.mp4", "a.png")]
    pictures = shown_pictures(paths)
    assert pictures[0] == pictures[-1] == paths[0]
    assert [frame.number for frame in pictures[1:-1]] == list(range(NUM_FRAMES))
    assert first_pictures(pictures) == [paths[0], pictures[1], paths[2]]
    assert shown_pictures([]) == []


def test_a_clip_of_too_many_pixels_is_refused_before_its_frames_are_made(tmp_path):
    write_clip(tmp_path / "b.mp4")
    limit_pixels(1000)
    with pytest.raises(InputError, match="b.mp4.*expected at most 1000 pixels"):
        shown_pictures([str(tmp_path / "b.mp4")])
    assert not (tmp_path / "cache").exists()


def test_too_many_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=f"expected at most {MOST_FILES} files"):
        shown_pictures([str(tmp_path / "a.png")] * (MOST_FILES + 1))
