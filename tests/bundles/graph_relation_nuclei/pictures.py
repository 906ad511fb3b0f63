# SPDX-License-Identifier: Apache-2.0
"""Pictures in the bundle's configs; run by `test_contract.py` in a process of its own, as `scripts` is shared."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from monai.transforms import Compose
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from bundle_runs import parsed
from scripts import instances as decoding

Array = NDArray[Any]
Run = Callable[..., None]
OFFSETS = [[-1, 0], [0, -1]]
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
pytestmark = pytest.mark.usefixtures("one_thread")


def nuclei() -> Array:
    """Numbers of squares in a picture without any symmetry (rows, columns); two nearly touch."""
    label = np.zeros((50, 70), np.int64)
    label[3:13, 5:25] = 1
    label[14:30, 5:17] = 2
    label[20:45, 40:47] = 3
    label[33:47, 49:66] = 4
    return label


def write(path: Path, kind: str, label: Array) -> None:
    gray = np.where(label > 0, 200, 30).astype(np.uint8)
    alpha = np.full_like(gray, 255)
    planes = {"L": [gray], "LA": [gray, alpha], "RGB": [gray] * 3, "RGBA": [gray] * 3 + [alpha]}[kind]
    Image.fromarray(planes[0] if len(planes) == 1 else np.stack(planes, axis=-1)).save(path)


def infer(run_bundle: Run, folder: Path, *pictures: str) -> Path:
    """Run inference with a network that joins neighbors that are both bright, and finds what is bright."""
    weight, bias = torch.zeros(3, 3, 3, 3), torch.tensor([-1.0, -1.0, 0.0])
    weight[:, 0, 1, 1] = 1.0
    weight[0, 0, 0, 1] = weight[1, 0, 1, 0] = 1.0                    # the previous row and column, as MONAI has them
    torch.save({"weight": weight, "bias": bias}, folder / "seen.pt")
    network = {"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 3, "kernel_size": 3, "padding": 1}
    (folder / "datalist.json").write_text(json.dumps({"test": [{"image": name} for name in pictures]}))
    run_bundle(
        "evaluating", "inference", dataset_dir=str(folder), output_dir=str(folder / "eval"), network_def=network,
        ckpt_path=str(folder / "seen.pt"), offsets=OFFSETS, window_size=[32, 40],
    )
    return folder / "eval"


@quiet
@pytest.mark.parametrize("kind", ["L", "LA", "RGB", "RGBA"])
def test_instances_of_a_picture_lie_on_it_pixel_by_pixel(run_bundle: Run, tmp_path: Path, kind: str) -> None:
    write(tmp_path / "case.png", kind, nuclei())
    pred = Image.open(infer(run_bundle, tmp_path, "case.png") / "case_seg.png")
    assert pred.mode == "I;16"
    found = np.asarray(pred)
    pairs = set(zip(found.ravel().tolist(), nuclei().ravel().tolist(), strict=True))
    assert len(pairs) == 5
    assert (0, 0) in pairs
    assert {number for number, _ in pairs} == {0, 1, 2, 3, 4}


@quiet
@pytest.mark.filterwarnings("ignore:Divide by zero:Warning")
def test_black_picture_has_no_instance(run_bundle: Run, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((50, 70), np.uint8)).save(tmp_path / "black.png")
    assert not np.asarray(Image.open(infer(run_bundle, tmp_path, "black.png") / "black_seg.png")).any()


@quiet
def test_pictures_of_several_sizes_are_taken_one_by_one(run_bundle: Run, tmp_path: Path) -> None:
    write(tmp_path / "whole.png", "L", nuclei())
    write(tmp_path / "part.png", "RGB", nuclei()[:20, :30])
    folder = infer(run_bundle, tmp_path, "whole.png", "part.png")
    assert Image.open(folder / "whole_seg.png").size == (70, 50)
    found = np.asarray(Image.open(folder / "part_seg.png"))
    assert np.array_equal(found > 0, nuclei()[:20, :30] > 0)


@quiet
def test_inference_without_the_package_saves_affinities_and_tells_what_to_install(
    run_bundle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    write(tmp_path / "case.png", "L", nuclei())
    file = nib.load(infer(run_bundle, tmp_path, "case.png") / "case_seg.nii.gz")
    assert capsys.readouterr().out.count("pip install mwatershed") == 1
    assert file.get_data_dtype() == np.float32
    maps = np.asarray(file.dataobj).reshape(70, 50, 3)                # columns first, as NIfTI has pictures
    np.testing.assert_allclose(maps[..., 2], nuclei().T > 0, atol=1e-6)


def inverted(path: Path) -> None:
    gray = np.where(nuclei() > 0, 200, 30).astype(np.uint8)
    tifffile.imwrite(path, 255 - gray, photometric="miniswhite")


def palette(path: Path) -> None:
    picture = Image.fromarray((nuclei() == 0).astype(np.uint8), "P")
    picture.putpalette([200, 200, 200, 30, 30, 30])
    picture.save(path)


def ink(path: Path) -> None:
    black = Image.fromarray(np.where(nuclei() > 0, 55, 225).astype(np.uint8))
    Image.merge("CMYK", [Image.new("L", black.size)] * 3 + [black]).save(path, quality=100)


def one_bit(path: Path) -> None:
    Image.fromarray(nuclei() > 0).save(path)


def framed(path: Path) -> None:
    gray = np.where(nuclei() > 0, 200, 30) + np.random.default_rng(0).integers(-9, 9, nuclei().shape)
    gray[:, -3:] = 255                                             # of a stitched picture
    Image.fromarray(gray.astype(np.uint8)).save(path)


def volume(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.where(nuclei() > 0, 200, 30).astype(np.uint8).T[..., None], np.eye(4)), path)


@quiet
@pytest.mark.parametrize(
    ("name", "save"),
    [("a.tif", inverted), ("a.png", palette), ("a.jpg", ink), ("a.png", one_bit), ("a.png", framed),
     ("a.nii.gz", volume)],
)
def test_a_picture_is_segmented_as_it_looks(
    run_bundle: Run, tmp_path: Path, name: str, save: Callable[[Path], None]
) -> None:
    save(tmp_path / name)
    folder = infer(run_bundle, tmp_path, name)
    if name.endswith(".gz"):
        file = nib.load(folder / "a_seg.nii.gz")
        assert file.shape == (*nuclei().T.shape, 1)
        found = np.asarray(file.dataobj)[..., 0].T
    else:
        found = np.asarray(Image.open(folder / "a_seg.png"))
    pairs = set(zip(found.ravel().tolist(), nuclei().ravel().tolist(), strict=True))
    assert len(pairs) == 5
    assert (0, 0) in pairs


def test_labels_of_64_bits_and_of_a_palette_are_read_with_their_picture(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bundle))
    steps = Compose(parsed(bundle, "train").get_parsed_content("train#deterministic_transforms"))
    write(tmp_path / "image.png", "L", nuclei())
    tifffile.imwrite(tmp_path / "image.tif", np.where(nuclei() > 0, 200, 30).astype(np.uint8))
    tifffile.imwrite(tmp_path / "label.tif", nuclei() * 2**40)
    colors = Image.fromarray(nuclei().astype(np.uint8), "P")
    colors.putpalette([9, 9, 9] * 5)
    colors.save(tmp_path / "label.png")
    for kind in ("tif", "png"):
        case = steps({key: str(tmp_path / f"{key}.{kind}") for key in ("image", "label")})
        assert np.array_equal(case["label"][0].numpy().T, nuclei())
        assert case["image"].shape == (3, *case["label"].shape[1:])
