# SPDX-License-Identifier: Apache-2.0
"""Slides and pictures; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from PIL import Image

from bundle_runs import refused

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from scripts.networks import FieldClassifier
from scripts.slides import LoadSlided, SaveSlideClassesd, TileInferer, class_map, tissue_mask

Array = NDArray[Any]
Run = Callable[..., Path]
RED, GREEN, BLUE = (230, 90, 90), (90, 230, 90), (90, 90, 230)
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def slide(blocks: Sequence[tuple[int, int, tuple[int, int, int]]], cells: tuple[int, int], cell: int = 192) -> Array:
    """White glass with cells of one color each: (row, column, color)."""
    pixels = np.full((cells[0] * cell, cells[1] * cell, 3), 245, np.uint8)
    for row, column, color in blocks:
        pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = color
    return pixels


def write(path: Path, pixels: Array, mpp: float | None = 1.0, levels: Sequence[int] = (1,)) -> None:
    """A TIFF with a page per level, as scanners without sub-directories write it."""
    with tifffile.TiffWriter(path) as file:
        for level in levels:
            shape = pixels.shape[0] // level, level, pixels.shape[1] // level, level, 3
            part = pixels.reshape(shape).mean((1, 3)).round().astype(np.uint8)
            unit: dict[str, Any] = {}
            if mpp is not None:
                unit = {"resolution": (1e4 / (mpp * level),) * 2, "resolutionunit": "CENTIMETER"}
            file.write(part, photometric="rgb", tile=(256, 256), subfiletype=int(level > 1), **unit)


def save_color_network(path: Path) -> dict[str, Any]:
    """A student that tells the strongest color; its definition."""
    network = FieldClassifier(3, [3], [1])
    with torch.no_grad():
        for block in network.features:
            block.conv.weight.zero_()
            block.conv.weight[range(3), range(3), 1, 1] = 1.0
        network.head.weight.copy_(20 * torch.eye(3))
        network.head.bias.zero_()
    torch.save(network.state_dict(), path)
    return {"_target_": "scripts.networks.FieldClassifier", "out_channels": 3, "filters": [3], "strides": [1]}


def infer(run: Run, folder: Path, names: Sequence[str], *configs: str, **options: Any) -> Path:
    network = save_color_network(folder / "color.pt")
    content = {"test": [{"image": name} for name in names], "labels": {"0": "red", "1": "green", "2": "blue"}}
    (folder / "datalist.json").write_text(json.dumps(content))
    options |= {"network_def": network, "ckpt_path": str(folder / "color.pt"), "dataset_dir": str(folder)}
    run("evaluating", "inference", *configs, into=folder, **options)
    return folder / "eval"


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


BLOCKS = [(0, 1, RED), (0, 2, RED), (1, 1, BLUE), (2, 3, GREEN), (3, 0, RED)]


@quiet
@pytest.mark.parametrize(
    ("mpp", "levels"), [(1.0, (1,)), (1.0, (1, 4)), (0.5, (1, 2)), (0.96, (1, 4, 8)), (4.0, (1,))]
)
def test_a_slide_becomes_a_map_and_shares_at_the_resolution_of_the_student(
    run: Run, tmp_path: Path, mpp: float, levels: tuple[int, ...]
) -> None:
    cell = round(192 / mpp)
    write(tmp_path / "a.tif", slide(BLOCKS, (4, 5), cell), mpp, levels)
    out = infer(run, tmp_path, ["a.tif"], "inference_slide", slide={
        "mpp": 1.0, "file_mpp": None, "backend": "tifffile", "tissue": 0.25})
    found = np.asarray(Image.open(out / "a_classes.png"))
    expected = np.zeros((4, 5), np.uint8)
    for row, column, color in BLOCKS:
        expected[row, column] = 1 + [RED, GREEN, BLUE].index(color)
    np.testing.assert_array_equal(found[:4, :5], expected)
    assert not found[4:].any()
    assert not found[:, 5:].any()
    (row,) = table(out / "slides.csv")
    assert (row["cells"], row["microns_per_cell"]) == ("5", "192")
    assert [float(row[f"{name} %"]) for name in ("red", "green", "blue")] == [60.0, 20.0, 20.0]


@quiet
def test_two_slides_have_a_row_each_and_one_of_glass_has_no_shares(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "a.tif", slide(BLOCKS, (4, 5)))
    write(tmp_path / "b.tif", slide([], (2, 2)))
    out = infer(run, tmp_path, ["a.tif", "b.tif"], "inference_slide", **{
        "slide#mpp": 1.0, "slide#backend": "tifffile", "overlap": 0.5})
    rows = table(out / "slides.csv")
    assert [row["cells"] for row in rows] == ["20", "0"]            # half a tile: four times as many
    assert rows[0]["microns_per_cell"] == "96"
    assert [rows[0][f"{name} %"] for name in ("red", "green", "blue")] == ["60.00", "20.00", "20.00"]
    assert rows[1]["red %"] == ""


@quiet
def test_slides_of_one_name_have_a_map_each(run: Run, tmp_path: Path) -> None:
    for folder, blocks in (("p1", BLOCKS), ("p2", BLOCKS[:1])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.tif", slide(blocks, (4, 5)))
    out = infer(run, tmp_path, ["p1/a.tif", "p2/a.tif"], "inference_slide", **{
        "slide#mpp": 1.0, "slide#backend": "tifffile"})
    rows = table(out / "slides.csv")
    assert [row["map"] for row in rows] == ["a_classes.png", "a_2_classes.png"]
    for row in rows:
        found = np.asarray(Image.open(out / row["map"]))
        assert str((found > 0).sum()) == row["cells"]


@quiet
@pytest.mark.parametrize(
    ("options", "mpp", "message"),
    [
        ({}, 1.0, r"`mpp` must be microns per pixel, above 0, got None; .* such as --slide#mpp 1.0"),
        ({"slide#mpp": 1.0}, None, r"a.tif must say its microns per pixel, got none .*give them as --slide#file_mpp"),
        ({"slide#mpp": 1.0}, 8.0, r"a.tif must have 4 microns per pixel or less, got 8 at its finest"),
        ({"slide#mpp": 1.0, "slide#backend": "pillow"}, 1.0, "`backend` must be one of openslide, cucim, tifffile"),
        ({"slide#mpp": 1.0, "overlap": 0.3}, 1.0, "`overlap` must be 0, 0.5 or 0.75, of tiles that .*, got 0.3"),
        ({"slide#mpp": 1.0, "slide#tissue": 2.0}, 1.0, "`tissue` must be a share of a tile, 0 to 1, got 2.0"),
    ],
)
def test_slides_that_cannot_be_read_at_the_resolution_are_refused(
    run: Run, tmp_path: Path, options: dict[str, Any], mpp: float | None, message: str
) -> None:
    write(tmp_path / "a.tif", slide(BLOCKS, (4, 5)), mpp)
    with refused(message):
        infer(run, tmp_path, ["a.tif"], "inference_slide", **{"slide#backend": "tifffile", **options})


def test_a_backend_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.tif", slide(BLOCKS, (4, 5)))
    for name in ("openslide", "cucim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="a.tif needs cucim, which is not installed; pip install cucim-cu12, or give"):
        LoadSlided("image", 1.0, backend="cucim")({"image": str(tmp_path / "a.tif")})


def test_the_resolution_of_a_file_can_be_given(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", slide(BLOCKS, (4, 4)), None)
    found = LoadSlided("image", 1.0, 4, "tifffile", file_mpp=0.5)({"image": str(tmp_path / "a.tif")})["image"]
    assert found.shape == (3, 96, 96)                                  # of 768 x 768


def test_areas_are_averaged_where_the_step_is_no_whole_number(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 255, (300, 270, 3), np.uint8)
    write(tmp_path / "a.tif", pixels, 1.0)
    found = LoadSlided("image", 3.0, 1, "tifffile")({"image": str(tmp_path / "a.tif")})["image"]
    expected = pixels.reshape(100, 3, 90, 3, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.51)
    odd = LoadSlided("image", 2.7, 1, "tifffile")({"image": str(tmp_path / "a.tif")})["image"]
    assert odd.shape == (3, 111, 100)
    assert float(odd.float().mean()) == pytest.approx(pixels.mean(), abs=0.6)
    assert odd.affine[0, 0] == pytest.approx(0.0027)


def test_a_cell_has_the_mean_of_the_tiles_that_cover_it() -> None:
    """Each tile tells its own mean of red: compared with a loop over cells."""
    draws = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 64, 48, generator=draws)
    picture[2] *= 0.2                                                  # colored everywhere

    def network(tiles: torch.Tensor) -> torch.Tensor:
        red = tiles[:, 0].mean((1, 2))
        return torch.stack([red, 1 - red], 1).clamp(min=1e-6).log()

    found = TileInferer((16, 16), 0.5, 0.0, batch_size=5)(picture[None], network)[0]
    for row in range(8):
        for column in range(6):
            tiles = [
                picture[0, y * 8 : y * 8 + 16, x * 8 : x * 8 + 16].mean()
                for y in range(max(row - 1, 0), min(row, 6) + 1) for x in range(max(column - 1, 0), min(column, 4) + 1)
            ]
            assert float(found[0, row, column]) == pytest.approx(float(torch.stack(tiles).mean()), abs=1e-5)


def test_a_slide_smaller_than_a_tile_is_one_tile() -> None:
    picture = torch.full((1, 3, 20, 10), 0.5)
    picture[:, 0] = 0.9
    found = TileInferer((48, 48), 0.0, 0.0)(picture, lambda tiles: tiles.new_zeros(len(tiles), 2))
    assert found.shape == (1, 2, 1, 1)


def test_tissue_is_what_has_color_and_glass_has_none() -> None:
    assert not tissue_mask(torch.full((3, 40, 40), 0.9)).any()
    even = torch.full((3, 40, 40), 0.8)
    even[1] = 0.4
    assert tissue_mask(even).all()


def test_cells_without_tissue_have_class_0() -> None:
    probabilities = torch.tensor([[[0.0, 0.3]], [[0.0, 0.7]]])
    assert class_map(probabilities).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="`class_names` must name 2 classes, got a"):
        SaveSlideClassesd("pred", "nowhere", ["a"], 1.0)({"pred": probabilities, "image": MetaTensor(torch.ones(1))})


# ---- pictures ------------------------------------------------------------------------------------------------------


@quiet
def test_a_folder_of_pictures_becomes_a_table_of_probabilities(run: Run, tmp_path: Path) -> None:
    """Of any size, in color or gray, with and without transparency; the odd one fills its last block."""
    for name, color, size in (("a.png", RED, (192, 192)), ("b.png", BLUE, (101, 47)), ("c.png", GREEN, (9, 5))):
        Image.fromarray(np.full((*size, 3), color, np.uint8)).save(tmp_path / name)
    Image.fromarray(np.full((30, 30), 90, np.uint8)).save(tmp_path / "d.png")
    Image.fromarray(np.full((30, 30, 4), (*GREEN, 255), np.uint8)).save(tmp_path / "e.png")
    rows = table(infer(run, tmp_path, ["a.png", "b.png", "c.png", "d.png", "e.png"]) / "predictions.csv")
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert [row["class"] for row in rows if "d.png" not in row["image"]] == ["red", "blue", "green", "green"]
    values = [[float(row[name]) for name in ("red", "green", "blue")] for row in rows]
    np.testing.assert_allclose(np.sum(values, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(values[3], 1 / 3, atol=1e-5)
    np.testing.assert_allclose(values[0], torch.tensor(RED).div(255 / 20).softmax(0).numpy(), atol=1e-3)


@quiet
def test_a_file_of_low_resolution_is_seen_as_it_is_with_scale_1(run: Run, tmp_path: Path) -> None:
    Image.fromarray(np.full((48, 48, 3), RED, np.uint8)).save(tmp_path / "a.png")
    (row,) = table(infer(run, tmp_path, ["a.png"], scale=1, rim=0) / "predictions.csv")
    assert row["class"] == "red"
