"""Sizes, prompts, captions, contact sheets."""

import numpy as np
import pytest
from PIL import Image

from wan5b.extras import files
from wan5b.extras.files import read_prompts

# ------------------------------------------------------------------------------------------- sizes


def test_parse_size():
    assert files.parse_size("704x1280") == (704, 1280)
    assert files.parse_size("32X64") == (32, 64)
    for text, valid in {"70x96": "64 or 96 by 96$", "0x90": "32 or 64 by 64 or 96$"}.items():
        says = f"size {text} is not HEIGHTxWIDTH .* of 32; nearest valid: {valid}"
        with pytest.raises(ValueError, match=says):
            files.parse_size(text)
    for text in ("64", "64x-96", "axb", "32x32x32", "64 x 96", ""):
        says = f"size {text} is not HEIGHTxWIDTH in multiples of 32; give one like 704x1280"
        with pytest.raises(ValueError, match=says):
            files.parse_size(text)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # (height, width) both; by hand from area 901120
        ((704, 1280), (704, 1280)),
        # Width first: 1265.7 -> 1248 x 704, 1.773. Height first: 1280 x 704, 1.818.
        ((720, 1280), (704, 1248)),
        # Height first: 704 x 1248, 0.564. Width first: 704 x 1280, 0.55.
        ((1280, 720), (1248, 704)),
        ((1000, 1500), (768, 1152)),
        ((500, 500), (928, 960)),  # 928 x 960 or 960 x 928, equally near: height first
        ((1, 100000), (32, 28160)),  # 32 high at least, and still not above the area
        ((100000, 1), (28160, 32)),
    ],
)
def test_fitting_size(shape, expected):
    assert files.fitting_size(*shape) == expected


def test_fitting_size_never_exceeds_the_area():
    for height, width in np.random.default_rng(0).integers(1, 5000, (500, 2)).tolist():
        for area in (704 * 1280, 64 * 96):
            h, w = files.fitting_size(height, width, area)
            assert h % 32 == w % 32 == 0 < h * w <= area, (height, width)


# ------------------------------------------------------------------------------- prompts, captions


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox \r\n\r\n  \n红色\u2028的\nlast".encode())
    assert read_prompts(path) == ["a fox", "红色\u2028的", "last"]
    with pytest.raises(ValueError, match="cannot read .*nothing"):
        read_prompts(tmp_path / "nothing")
    path.write_bytes("für".encode("latin1"))
    with pytest.raises(ValueError, match="cannot read .*prompts.txt.*utf-8"):
        read_prompts(path)
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)


def test_caption_files(tmp_path):
    """A folder's name has no suffix."""
    for name in ("scene.01", "scene"):
        (tmp_path / name).mkdir()
    expected = {
        "scene.01": "scene.01.txt",
        "scene": "scene.txt",
        "fox.mp4": "fox.txt",
        "fox.1.mp4": "fox.1.txt",
        "fox": "fox.txt",
    }
    for name, caption in expected.items():
        assert files.caption_file(tmp_path / name) == tmp_path / caption
        assert files.caption_file(str(tmp_path / name)) == tmp_path / caption


# ------------------------------------------------------------------------------------------- sheets


def test_sheet_indices():
    assert files.sheet_indices(1) == {0}
    assert files.sheet_indices(5) == set(range(5))
    indices = sorted(files.sheet_indices(81))
    assert len(indices) == 16
    assert (indices[0], indices[-1]) == (0, 80)
    assert set(np.diff(indices)) == {5, 6}


@pytest.mark.parametrize(("width", "tile"), [(640, (32, 320)), (128, (64, 128))])
def test_sheet_is_a_grid_in_order(tmp_path, width, tile):
    levels = [10, 50, 90, 130, 170, 210]
    files.write_sheet(
        tmp_path / "a.png", [np.full((64, width, 3), level, np.uint8) for level in levels]
    )
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    h, w = tile
    assert sheet.shape == (2 * h, 4 * w, 3)
    tiles = sheet.reshape(2, h, 4, w, 3).transpose(0, 2, 1, 3, 4).reshape(8, -1)
    assert (tiles == np.array([*levels, 0, 0])[:, None]).all()


def test_a_sheet_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    frames = [np.zeros((64, 64, 3), np.uint8)]
    files.write_sheet(tmp_path / "a.png", frames)
    before = (tmp_path / "a.png").read_bytes()

    def full(image, path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_sheet(tmp_path / "a.png", frames)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
