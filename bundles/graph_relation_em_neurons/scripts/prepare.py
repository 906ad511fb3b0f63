# SPDX-License-Identifier: Apache-2.0
"""Turn the published files of CREMI or AC3/AC4 into what this bundle reads: NIfTI of sections first, a datalist.json.

    python -m scripts.prepare cremi SAMPLE.hdf [SAMPLE.hdf ...] OUTPUT
    python -m scripts.prepare ac3ac4 AC4_IMAGE AC4_LABEL AC3_IMAGE AC3_LABEL OUTPUT [--reverse_labels]

The lists are those of the paper's code. Spacings are in nm, which NIfTI has no unit for. Sources stay as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

__all__ = ["main", "prepare_ac3ac4", "prepare_cremi"]

Array = NDArray[Any]
Ranges = Mapping[str, tuple[int, int]]                             # list -> first section and the one behind the last
logger = logging.getLogger(__name__)

CREMI: Ranges = {"training": (0, 50), "validation": (100, 125), "test": (50, 100)}
AC4: Ranges = {"training": (0, 80), "validation": (80, 100)}
AC3: Ranges = {"test": (0, 100)}
_CHANNELS = (2, 3, 4)                                              # gray or colors, with or without alpha
_HDF5, _TIFF, _SECTIONS = (".h5", ".hdf", ".hdf5"), (".tif", ".tiff"), (".png", ".tif", ".tiff")


class _Volume(NamedTuple):
    """Image and instance numbers, arrays or datasets of an open file, read by slabs; sections, rows, columns."""

    name: str
    image: Any
    label: Any
    spacing: tuple[float, ...] = (30.0, 6.0, 6.0)                  # nm
    corner: tuple[int, ...] = (0, 0, 0)                            # of the label in the image, voxels


def prepare_cremi(sources: Sequence[str | Path], output: str | Path) -> Path:
    """Write the slabs of samples of CREMI: sections 0-49 for training, 100-124 for validation, 50-99 for the test.

    Args:
        sources: HDF5 files with `volumes/raw` and `volumes/labels/neuron_ids`, cropped or padded. Without the attribute
            `resolution` voxels have 40 x 4 x 4 nm. The attribute `offset` of the labels is in nm.
        output: folder to fill with images/, labels/ and datalist.json.

    Returns:
        Path of the datalist.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a source is not HDF5, lacks a dataset or sections, its shapes do not fit, or two have one name.
        ImportError: h5py is not installed.
    """
    paths, output = [Path(source) for source in sources], Path(output)
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"`sources` must have names of their own, got {', '.join(names)}; rename a file.")
    for path in paths:
        _check_source(path, output)
    lists: dict[str, list[dict[str, str]]] = {name: [] for name in CREMI}
    for path in paths:
        with _open_hdf5(path) as file:
            volume = _cremi_volume(file, path)
            _check_volume(volume, CREMI)
            _write_slabs(volume, CREMI, output, lists)
    return _write_datalist(output, lists)


def _cremi_volume(file: Any, path: Path) -> _Volume:
    image = _dataset(file, path, "volumes/raw")
    label = _dataset(file, path, "volumes/labels/neuron_ids")
    spacing = np.asarray(label.attrs.get("resolution", (40.0, 4.0, 4.0)), np.float64)
    start = np.asarray(label.attrs.get("offset", (0, 0, 0))) - np.asarray(image.attrs.get("offset", (0, 0, 0)))
    corner = np.rint(start / spacing).astype(int)
    return _Volume(path.stem, image, label, tuple(spacing.tolist()), tuple(corner.tolist()))


def prepare_ac3ac4(
    ac4_image: str | Path,
    ac4_label: str | Path,
    ac3_image: str | Path,
    ac3_label: str | Path,
    output: str | Path,
    reverse_labels: bool = False,
) -> Path:
    """Write the slabs of AC4, sections 0-79 for training and 80-99 for validation, and of AC3, 0-99 for the test.

    Each source is a TIFF of many pages, HDF5 with a dataset `main` or `data`, or a folder of sections as PNG or TIFF,
    counted in the order of their names. Labels in color are numbered by color; images may be stored in colors, but must
    be gray. An axis of one channel, anywhere, and alpha are left out. Voxels have 30 x 6 x 6 nm.

    Args:
        ac4_image: gray values of 8 bits.
        ac4_label: instance numbers, 0 background.
        ac3_image: the same of AC3.
        ac3_label: the same of AC3.
        output: folder to fill with images/, labels/ and datalist.json.
        reverse_labels: the last section of the labels belongs to the first of the images, as in AC3AC4Package.zip.

    Returns:
        Path of the datalist.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a source cannot be read, lacks sections, shapes do not fit, or the labels run the wrong way.
        ImportError: h5py is needed and not installed.
    """
    output = Path(output)
    pairs = {"AC4": (Path(ac4_image), Path(ac4_label), AC4), "AC3": (Path(ac3_image), Path(ac3_label), AC3)}
    for image, label, _ in pairs.values():
        _check_source(image, output)
        _check_source(label, output)
    lists: dict[str, list[dict[str, str]]] = {name: [] for name in (*AC4, *AC3)}
    for name, (image_path, label_path, ranges) in pairs.items():
        image, label = _read_stack(image_path), _read_stack(label_path, is_label=True)
        volume = _Volume(name, image, label[::-1] if reverse_labels else label)
        _check_volume(volume, ranges)
        _check_order(volume, reverse_labels)
        _write_slabs(volume, ranges, output, lists)
    return _write_datalist(output, lists)


def _check_source(path: Path, output: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"`source` must be a file or a folder, got {str(path)!r}, which does not exist.")
    inside = output.resolve().is_relative_to(path.resolve())
    if inside or any(path.resolve().is_relative_to((output / name).resolve()) for name in ("images", "labels")):
        raise ValueError(f"`output` must lie outside {path}, which stays as it is, got {str(output)!r}.")


@contextmanager
def _open_hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py  # no dependency of the bundle
    except ImportError as error:
        raise ImportError(f"{path} needs h5py, which is not installed; run `pip install h5py`.") from error
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} must be an HDF5 file, got another or a damaged one; copy it again.")
    with h5py.File(path, "r") as file:
        yield file


def _dataset(file: Any, path: Path, *names: str) -> Any:
    """The first of the named datasets that there is."""
    there: list[str] = []
    file.visititems(lambda name, item: there.append(name) if hasattr(item, "shape") else None)
    found = [name for name in names if name in there]
    if not found:
        wanted = " or ".join(map(repr, names))
        raise ValueError(f"{path} must have a dataset {wanted}, got {', '.join(there) or 'none'}.")
    return file[found[0]]


def _read_stack(path: Path, is_label: bool = False) -> Array:
    """Read a whole volume: sections, rows, columns. Colors of a label become numbers, an image must be gray."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in _SECTIONS and file.name[0] != "."]
        files.sort(key=lambda file: (len(file.name), file.name))   # 2.png before 10.png
        if not files:
            raise ValueError(f"{path} must hold sections as PNG or TIFF, got none.")
        sections = [_read_section(file, is_label) for file in tqdm(files, f"reading {path.name}")]
        if odd := [file for file, section in zip(files, sections, strict=True) if section.shape != sections[0].shape]:
            raise ValueError(f"{path} must hold sections of one size, got another one in {odd[0].name}.")
        return np.stack(sections)
    if path.suffix.lower() in _HDF5:
        with _open_hdf5(path) as file:
            return _three_axes(np.asarray(_dataset(file, path, "main", "data")), path, is_label)
    if path.suffix.lower() in _TIFF:
        return _three_axes(_read_tiff(path, is_label), path, is_label)
    raise ValueError(f"{path} must be a TIFF, HDF5 ({', '.join(_HDF5)}) or a folder of sections, got {path.suffix!r}.")


def _read_tiff(path: Path, is_label: bool) -> Array:
    """Pages as they are stored, but an image whose gray values are indices or inverted: as they are meant."""
    import tifffile  # comes with scikit-image, which the bundle lists

    try:
        with tifffile.TiffFile(path) as file:
            stack: Array = file.series[0].asarray()
            kind, palette = file.pages[0].photometric, file.pages[0].colormap
    except (tifffile.TiffFileError, IndexError, struct.error) as error:
        raise ValueError(f"{path} must be a TIFF, got a file that cannot be read ({error}); copy it again.") from error
    if is_label:
        return stack
    if palette is not None:
        return np.moveaxis((palette >> 8).astype(np.uint8)[:, stack], 0, -1)
    return np.invert(stack) if kind == tifffile.PHOTOMETRIC.MINISWHITE and stack.dtype.kind in "bu" else stack


def _read_section(path: Path, is_label: bool) -> Array:
    with Image.open(path) as section:
        if getattr(section, "n_frames", 1) > 1:
            raise ValueError(f"{path} must be one section, got {section.n_frames} pages; give the file itself.")
        kept = section.mode in ("L", "LA", "RGB", "RGBA", "F") or section.mode.startswith("I")
        plain = section if kept else section.convert("L" if section.mode == "1" else "RGB")
        picture = np.asarray(plain)
    return _without_channels(picture, path, is_label) if picture.ndim == 3 else picture


def _three_axes(stack: Array, path: Path, is_label: bool) -> Array:
    """Take away what is no axis of sections, rows or columns: axes of length 1, and channels behind or before them."""
    shape = stack.shape
    for axis in (-1, 1, 0, 0):
        if stack.ndim > 3 and stack.shape[axis] == 1:
            stack = stack.squeeze(axis)
    if stack.ndim == 4 and stack.shape[-1] not in _CHANNELS and stack.shape[1] in _CHANNELS:
        stack = np.moveaxis(stack, 1, -1)                          # planes of colors in each page
    if stack.ndim == 4 and stack.shape[-1] in _CHANNELS:
        stack = _without_channels(stack, path, is_label)
    if stack.ndim > 3:
        raise ValueError(f"{path} must have sections, rows and columns, got {shape}; save one channel of one time.")
    return stack


def _without_channels(picture: Array, path: Path, is_label: bool) -> Array:
    """Gray values of an image that is stored in colors; one number for each color of a label. Alpha says nothing."""
    colors = picture[..., :1] if picture.shape[-1] < 3 else picture[..., :3]
    first = colors[..., 0]
    is_gray = (colors == first[..., None]).all(-1)                 # red, green and blue are equal
    if is_label:
        red, green, blue = (colors[..., min(place, colors.shape[-1] - 1)].astype(np.int64) for place in range(3))
        return np.where(is_gray, first, 1 << 48 | red << 32 | green << 16 | blue)
    if not is_gray.all():
        raise ValueError(f"{path} must be gray, got colors; save it with one channel.")
    return first


def _check_volume(volume: _Volume, ranges: Ranges) -> None:
    name, image, label = volume.name, volume.image, volume.label
    if image.ndim != 3 or label.ndim != 3:
        raise ValueError(f"{name} must have three axes, got {image.shape} for the image, {label.shape} for the label.")
    if image.dtype != np.uint8 or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"{name} must have uint8 as image and integers as label, got {image.dtype} and {label.dtype}.")
    if not any(volume.corner) and image.shape != label.shape:
        raise ValueError(f"{name} must have a label of its image's shape, {image.shape}, got {label.shape}.")
    if min(volume.corner) < 0 or np.any(np.add(volume.corner, label.shape) > image.shape):
        raise ValueError(
            f"{name} must have its label inside its image of {image.shape}, got {label.shape} from {volume.corner} on."
        )
    last = max(stop for _, stop in ranges.values())
    if len(label) < last:
        raise ValueError(f"{name} must have at least {last} sections, got {len(label)}; give the whole volume.")


def _check_order(volume: _Volume, reverse_labels: bool) -> None:
    """Raise if the labels fit the dark membranes better the other way round."""
    sample = slice(None, None, max(1, len(volume.image) // 16))
    here, reversed_ = (_contrast(volume.image[sample], ids[sample]) for ids in (volume.label, volume.label[::-1]))
    if reversed_ > here:
        raise ValueError(
            f"{volume.name} must have labels whose borders are dark in the image, got {here:.1f} gray levels below the "
            f"rest, and {reversed_:.1f} in reverse order; {'drop' if reverse_labels else 'add'} --reverse_labels."
        )


def _contrast(image: Array, ids: Array) -> float:
    """Gray levels by which borders between neighbors in a row are darker than the rest."""
    border = ids[:, :, 1:] != ids[:, :, :-1]
    values = image[:, :, 1:]
    return float(values[~border].mean() - values[border].mean()) if border.any() and not border.all() else 0.0


def _write_slabs(volume: _Volume, ranges: Ranges, output: Path, lists: dict[str, list[dict[str, str]]]) -> None:
    for folder in ("images", "labels"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    z, y, x = volume.corner
    rows, columns = volume.label.shape[1:]
    for name, (start, stop) in tqdm(ranges.items(), f"writing {volume.name}", unit="slab"):
        file = f"{volume.name}_{start:03d}_{stop:03d}.nii.gz"
        image = volume.image[z + start : z + stop, y : y + rows, x : x + columns]
        _save(output / "images" / file, image, volume.spacing, start)
        _save(output / "labels" / file, _renumber(volume.label[start:stop]), volume.spacing, start)
        lists[name].append({"image": f"images/{file}", "label": f"labels/{file}"})


def _renumber(ids: Array) -> Array:
    """Number instances from 1 on, int32, section by section as a slab has 80 million voxels.

    What is negative as int64 becomes 0: the highest numbers of uint64 are reserved, 0xfffffffffffffffd for what lies
    outside the annotated region, the two above it for transparent and invalid voxels.
    """
    signed = [np.maximum(section.astype(np.int64), 0) for section in ids]
    known = np.unique(np.concatenate([[0], *(np.unique(section) for section in signed)]))
    return np.stack([np.searchsorted(known, section).astype(np.int32) for section in signed])


def _save(path: Path, voxels: Array, spacing: Sequence[float], start: int) -> None:
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = start * spacing[0]                              # where the slab lies in its volume
    nib.save(nib.Nifti1Image(voxels, affine), path)


def _write_datalist(output: Path, lists: Mapping[str, Sequence[Mapping[str, str]]]) -> Path:
    path = output / "datalist.json"
    path.write_text(json.dumps({**lists, "unlabeled": [], "labels": {}}, indent=2) + "\n", encoding="utf-8")
    logger.info("Wrote %s: %s.", path, ", ".join(f"{len(items)} {name}" for name, items in lists.items()))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error ends it with status 2 and one line."""
    parser = argparse.ArgumentParser(
        "python -m scripts.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="SET")
    cremi = commands.add_parser("cremi", help="CREMI, Drosophila, 40 x 4 x 4 nm")
    cremi.add_argument("sources", nargs="+", metavar="SAMPLE", help="HDF5 file, such as sample_A_20160501.hdf")
    cremi.set_defaults(run=prepare_cremi)
    ac3ac4 = commands.add_parser("ac3ac4", help="AC4 and AC3, mouse cortex, 30 x 6 x 6 nm")
    for name in ("ac4_image", "ac4_label", "ac3_image", "ac3_label"):
        ac3ac4.add_argument(name, help="TIFF, HDF5 with `main` or `data`, or a folder of sections")
    ac3ac4.add_argument("--reverse_labels", action="store_true", help="last section of labels, first of images")
    ac3ac4.set_defaults(run=prepare_ac3ac4)
    for command in (cremi, ac3ac4):
        command.add_argument("output", help="folder to fill with images/, labels/ and datalist.json")
    options = vars(parser.parse_args(arguments))
    run: Callable[..., Path] = options.pop("run")
    try:
        run(**options)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
