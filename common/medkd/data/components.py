# SPDX-License-Identifier: Apache-2.0
"""Make instances of masks: each connected part of a label gets a number of its own, in new files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from medkd.data.datalist import load_datalist, write_datalist
from medkd.data.headers import NIFTI, PICTURES, TIFF, ending
from medkd.data.naming import without_ending

__all__ = ["label_components"]

_FOLDER = "label_components"


def label_components(datalist: Path) -> Path:
    """Write labels with a number for each connected part beside a datalist, and name them in it.

    Parts touch by faces, edges or corners; parts of different numbers stay apart, and negative numbers, which mark
    voxels to ignore, stay as they are. The old labels are not touched.

    Args:
        datalist: the file; its lists are rewritten.

    Returns:
        Folder of the new labels.

    Raises:
        ValueError: a label is neither NIfTI nor a picture, or in color.
    """
    folder = datalist.parent.absolute() / _FOLDER
    content = json.loads(datalist.read_text(encoding="utf-8"))
    lists = {name: load_datalist(datalist, name) for name, value in content.items() if isinstance(value, list)}
    jobs = [(item, content[name][number]) for name, items in lists.items() for number, item in enumerate(items)]
    for item, entry in tqdm([job for job in jobs if "label" in job[0]], "labeling components", unit="label", delay=2):
        given = Path(entry["label"])
        inside = given if not given.is_absolute() else Path(item["label"]).relative_to(Path(item["label"]).anchor)
        target = folder / without_ending(inside.as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        entry["label"] = str(_write(Path(item["label"]), target))
    write_datalist(datalist, content)
    return folder


def _write(source: Path, target: Path) -> Path:
    kind = ending(str(source))
    if kind in NIFTI:
        file: Any = nib.load(source)
        numbers = _separate(np.asanyarray(file.dataobj))
        header = file.header.copy()
        header.set_data_dtype(np.int32)
        header.set_slope_inter(1.0, 0.0)
        nib.save(nib.Nifti1Image(numbers, file.affine, header), f"{target}.nii.gz")   # type: ignore[no-untyped-call]
        return Path(f"{target}.nii.gz")
    if kind not in PICTURES:
        raise ValueError(f"{source} must be NIfTI or a picture for --label_components, got {kind!r}; convert it.")
    return _write_picture(source, target)


def _write_picture(source: Path, target: Path) -> Path:
    from PIL import Image

    if ending(str(source)) in TIFF:
        import tifffile

        mask = tifffile.imread(source)
    else:
        with Image.open(source) as picture:
            mask = np.asarray(picture)
    if mask.ndim != 2:
        raise ValueError(f"{source} must be gray, one channel and one page, got the shape {mask.shape}; save it so.")
    numbers = _separate(mask)
    if numbers.max() <= np.iinfo(np.uint16).max and numbers.min() >= 0:
        Image.fromarray(numbers.astype(np.uint16)).save(f"{target}.png")
        return Path(f"{target}.png")
    import tifffile

    tifffile.imwrite(f"{target}.tif", numbers)
    return Path(f"{target}.tif")


def _separate(mask: NDArray[Any]) -> NDArray[np.int32]:
    """Number the connected parts of each value above 0."""
    from scipy import ndimage

    numbers = np.where(mask < 0, mask, 0).astype(np.int32)
    last = 0
    for value in np.unique(mask[mask > 0]):
        parts, count = ndimage.label(mask == value, np.ones((3,) * mask.ndim))
        numbers += np.where(parts > 0, parts + last, 0).astype(np.int32)
        last += int(count)
    return numbers
