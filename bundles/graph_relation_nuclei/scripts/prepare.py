# SPDX-License-Identifier: Apache-2.0
"""Turn the published files of BBBC039, CVPPP A1 or BBBC010 into what this bundle reads: PNG and a datalist.json.

    python -m scripts.prepare bbbc039 SOURCE OUTPUT          nuclei; SOURCE holds images/, masks/ and metadata/
    python -m scripts.prepare cvppp TRAINING OUTPUT [--test FOLDER]        leaves; folders A1 of both archives
    python -m scripts.prepare celegans IMAGES MASKS OUTPUT                 worms; a folder per archive

Pictures become 8-bit, those of 16 bits from their darkest to their brightest pixel; labels are 16-bit instance numbers,
or TIFF of 32 bits where there are more.
The lists are those of the paper's code where it has them. Sources stay as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label as connected_components
from tqdm import tqdm

__all__ = ["main", "prepare_bbbc039", "prepare_celegans", "prepare_cvppp"]

Array = NDArray[Any]
Lists = Mapping[str, Sequence[str]]                                # list -> cases
Read = Callable[[str], tuple[Array, Array | None]]                 # case -> picture, instance numbers if there are any
logger = logging.getLogger(__name__)

CVPPP_VALIDATION = (
    "002", "016", "029", "037", "045", "046", "055", "061", "072", "080",
    "088", "099", "104", "108", "115", "127", "130", "142", "148", "159",
)
_PLAIN = {                                                         # mode of Pillow -> the one that means the same
    "1": "L", "LA": "L", "La": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB",
    "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB",
}
_PICTURE = re.compile(r"[^.].*_(?P<well>[A-P]\d\d)_w(?P<channel>[12])_.*\.tiff?", re.IGNORECASE)
_WORM = re.compile(r"(?P<well>[A-P]\d\d)_(?P<number>\d+)_ground_truth\.png", re.IGNORECASE)


def prepare_bbbc039(source: str | Path, output: str | Path, min_size: int = 25) -> Path:
    """Write BBBC039v1, 200 fluorescence pictures of nuclei, with its published lists of 100, 50 and 50.

    Args:
        source: folder of the three unpacked archives, with images/*.tif, masks/*.png and metadata/training.txt and so
            on. Connected pixels of one value in the first channel of a mask are a nucleus.
        output: folder to fill with images/, labels/ and datalist.json.
        min_size: nuclei of fewer pixels, such as micronuclei, become background; 25 as in the code that the paper's
            builds on, 0 keeps all.

    Returns:
        Path of the datalist.

    Raises:
        FileNotFoundError: a list, or the picture or mask of one of its names, is missing.
        ValueError: a mask has another shape than its picture, or `output` lies in `source`.
    """
    source, output = Path(source), Path(output)
    _check_sources([source], output)
    lists = {name: _read_names(source / "metadata" / f"{name}.txt") for name in ("training", "validation", "test")}

    def read(name: str) -> tuple[Array, Array]:
        mask = _read(source / "masks" / f"{name}.png")             # colors of which the first tells, or numbers
        mask = mask[..., 0] if mask.ndim == 3 else mask
        nuclei = connected_components(mask, background=0)
        sizes = np.bincount(nuclei.ravel())
        return _read(source / "images" / f"{name}.tif"), np.where(sizes[nuclei] < min_size, 0, nuclei)

    return _write(output, lists, read)


def _read_names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"`source` must hold metadata/{path.name}, got no {path}; unpack metadata.zip.")
    return [Path(line.strip()).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prepare_cvppp(training: str | Path, output: str | Path, test: str | Path | None = None) -> Path:
    """Write CVPPP A1, 128 color pictures of rosettes, 20 of them for validation as in the paper's code.

    Args:
        training: folder A1 of the training archive, with plant001_rgb.png, plant001_label.png and so on; the masks
            plant001_fg.png are not needed.
        output: folder to fill with images/, labels/ and datalist.json.
        test: folder A1 of the test archive; plants without a label, as published, become `unlabeled`.

    Returns:
        Path of the datalist.

    Raises:
        FileNotFoundError: there is no such folder, a plant of the validation list, or a label for training.
        ValueError: a label has another shape than its picture or several channels, both folders have a plant of one
            name, or `output` lies in a source.
    """
    output, folders = Path(output), [Path(folder) for folder in (training, test) if folder is not None]
    _check_sources(folders, output)
    plants = [sorted(path.name[:-8] for path in folder.glob("*_rgb.png")) for folder in folders]
    held_out = [f"plant{number}" for number in CVPPP_VALIDATION]
    if missing := sorted(set(held_out) - set(plants[0])):
        raise FileNotFoundError(f"{folders[0]} must hold the plants for validation, got none of {', '.join(missing)}.")
    home = {name: folder for folder, names in zip(folders, plants, strict=True) for name in names}
    if len(home) < sum(map(len, plants)):
        raise ValueError(f"{folders[-1]} must have other plants than {folders[0]}, got some of the same name.")

    def label_path(name: str) -> Path:
        return home[name] / f"{name}_label.png"

    tested = [name for names in plants[1:] for name in names]
    lists = {
        "training": [name for name in plants[0] if name not in held_out],
        "validation": held_out,
        "test": [name for name in tested if label_path(name).is_file()],
        "unlabeled": [name for name in tested if not label_path(name).is_file()],
    }

    def read(name: str) -> tuple[Array, Array | None]:
        picture = _read(home[name] / f"{name}_rgb.png", "RGB")
        return picture, None if name in lists["unlabeled"] else _read_numbers(label_path(name))

    return _write(output, lists, read)


def prepare_celegans(images: str | Path, masks: str | Path, output: str | Path, channel: int = 2) -> Path:
    """Write BBBC010, 100 pictures of worms: wells in order, the first half for training, the second for the test.

    Every tenth well of the first half is for validation: 45, 5 and 50 of 100. The paper's lists are not published.
    Where worms cross, the pixels belong to the one of the higher number. Wells without a mask become `unlabeled`.

    Args:
        images: folder of the unpacked BBBC010_v2_images.zip (or v1), with ..._A01_w1_....tif and ..._A01_w2_....tif.
        masks: folder of the unpacked BBBC010_v1_foreground_eachworm.zip, with A01_01_ground_truth.png and so on.
        output: folder to fill with images/, labels/ and datalist.json.
        channel: 2 for bright field, 1 for fluorescence.

    Returns:
        Path of the datalist.

    Raises:
        FileNotFoundError: there is no such folder, or the well of a mask has no picture.
        ValueError: a folder has no such files, a mask has another shape than its picture, or `output` lies in a source.
    """
    images, masks, output = Path(images), Path(masks), Path(output)
    _check_sources([images, masks], output)
    found = [(match, path) for path in sorted(images.iterdir()) if (match := _PICTURE.fullmatch(path.name))]
    pictures = {match["well"].upper(): path for match, path in found if int(match["channel"]) == channel}
    worms: dict[str, list[Path]] = {}
    for path in sorted(masks.iterdir(), key=lambda path: (len(path.name), path.name)):
        if match := _WORM.fullmatch(path.name):
            worms.setdefault(match["well"].upper(), []).append(path)
    if not pictures or not worms:
        raise ValueError(
            f"`images` must hold ..._A01_w{channel}_....tif and `masks` A01_01_ground_truth.png, got {len(pictures)} "
            f"wells in {images} and {len(worms)} in {masks}; give the folders that hold the files themselves."
        )
    if missing := sorted(worms.keys() - pictures.keys()):
        raise FileNotFoundError(
            f"{images} must hold a picture of each well with masks, got none of {', '.join(missing)}."
        )
    wells = sorted(worms)                                          # A01 ... A24, B01 ...
    half = wells[: len(wells) // 2]
    lists = {
        "training": [well for number, well in enumerate(half, 1) if number % 10],
        "validation": half[9::10],
        "test": wells[len(half) :],
        "unlabeled": sorted(pictures.keys() - worms.keys()),
    }

    def read(well: str) -> tuple[Array, Array | None]:
        picture = _read(pictures[well])
        return picture, _stack_masks(worms[well], picture.shape[:2]) if well in worms else None

    return _write(output, lists, read)


def _stack_masks(paths: Iterable[Path], shape: tuple[int, ...]) -> Array:
    result = np.zeros(shape, np.int32)
    for number, path in enumerate(paths, 1):
        mask = _read(path, "L")
        if mask.shape != shape:
            raise ValueError(f"{path} must have the shape of its picture, {shape}, got {mask.shape}.")
        result[mask > 0] = number
    return result


def _check_sources(sources: Iterable[Path], output: Path) -> None:
    for source in sources:
        if not source.is_dir():
            raise FileNotFoundError(f"`source` must be a folder, got {str(source)!r}; unpack the archive.")
        inside = output.resolve().is_relative_to(source.resolve())
        if inside or any(source.resolve().is_relative_to((output / name).resolve()) for name in ("images", "labels")):
            raise ValueError(f"`output` must lie outside {source}, which stays as it is, got {str(output)!r}.")


def _read(path: Path, mode: str | None = None) -> Array:
    """Pixels of a picture, in a mode of Pillow if one is named, else in gray or red, green and blue, as it is meant."""
    with _open(path) as picture:
        plain = _PLAIN.get(picture.mode, picture.mode) if mode is None else mode
        return np.asarray(picture if picture.mode == plain else picture.convert(plain))


def _read_numbers(path: Path) -> Array:
    """Numbers of a label: the indices of a palette, or gray values, also where those are stored in colors."""
    with _open(path) as picture:
        numbers = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    if numbers.ndim == 3:
        colors = numbers[..., : 1 if numbers.shape[-1] < 3 else 3]
        return colors[..., 0] if (colors == colors[..., :1]).all() else colors
    return numbers


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """One picture; Pillow would read the first one of several pages, and say nothing."""
    if not path.is_file():
        raise FileNotFoundError(f"`source` must hold {path.name}, got no {path}.")
    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"{path} must be one picture, got {picture.n_frames} pages; save them as files.")
        yield picture


def _write(output: Path, lists: Lists, read: Read) -> Path:
    """Write the cases of all lists, and the datalist once all is there."""
    content: dict[str, list[dict[str, str]]] = {key: [] for key in ("training", "validation", "test", "unlabeled")}
    for folder in ("images", "labels"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    with tqdm(total=sum(map(len, lists.values())), desc="writing", unit="picture") as bar:
        for key, names in lists.items():
            for name in names:
                content[key].append(_write_case(output, name, *read(name)))
                bar.update()
    path = output / "datalist.json"
    path.write_text(json.dumps({**content, "labels": {}}, indent=2) + "\n", encoding="utf-8")
    logger.info("Wrote %s: %s.", path, ", ".join(f"{len(items)} {key}" for key, items in content.items()))
    return path


def _write_case(output: Path, name: str, picture: Array, label: Array | None) -> dict[str, str]:
    item = {"image": f"images/{name}.png"}
    Image.fromarray(_to_8_bits(picture)).save(output / item["image"])
    if label is not None:
        if label.shape != picture.shape[:2]:
            raise ValueError(
                f"The label of {name} must have one channel and the shape of its picture, {picture.shape[:2]}, got "
                f"{label.shape}."
            )
        item["label"] = f"labels/{name}.png"
        known = np.unique(np.append(label, 0))                     # 0 stays 0, also where nothing is background
        numbers = np.searchsorted(known, label)
        if len(known) <= 2**16:
            Image.fromarray(numbers.astype(np.uint16)).save(output / item["label"])
        else:                                                      # more than PNG holds
            item["label"] = f"labels/{name}.tif"
            Image.fromarray(numbers.astype(np.int32)).save(output / item["label"])
    return item


def _to_8_bits(picture: Array) -> Array:
    if picture.dtype == np.uint8:
        return picture
    low, high = float(picture.min()), float(picture.max())
    return np.rint((picture - low) * (255 / max(high - low, 1.0))).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error ends it with status 2 and one line."""
    parser = argparse.ArgumentParser(
        "python -m scripts.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="SET")
    bbbc039 = commands.add_parser("bbbc039", help="BBBC039v1, nuclei in fluorescence")
    bbbc039.add_argument("source", help="folder with images/, masks/ and metadata/")
    bbbc039.add_argument("--min_size", type=int, default=25, help="pixels of the smallest nucleus kept; default 25")
    bbbc039.set_defaults(run=prepare_bbbc039)
    cvppp = commands.add_parser("cvppp", help="CVPPP A1, leaves in color")
    cvppp.add_argument("training", help="folder A1 of the training archive")
    cvppp.add_argument("--test", help="folder A1 of the test archive")
    cvppp.set_defaults(run=prepare_cvppp)
    celegans = commands.add_parser("celegans", help="BBBC010, worms in bright field")
    celegans.add_argument("images", help="folder of BBBC010_v2_images.zip")
    celegans.add_argument("masks", help="folder of BBBC010_v1_foreground_eachworm.zip")
    celegans.add_argument("--channel", type=int, choices=(1, 2), default=2, help="2 bright field, 1 fluorescence")
    celegans.set_defaults(run=prepare_celegans)
    for command in (bbbc039, cvppp, celegans):
        command.add_argument("output", help="folder to fill with images/, labels/ and datalist.json")
    options = vars(parser.parse_args(arguments))
    run: Callable[..., Path] = options.pop("run")
    try:
        run(**options)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
