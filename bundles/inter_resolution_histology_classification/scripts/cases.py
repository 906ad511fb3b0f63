# SPDX-License-Identifier: Apache-2.0
"""Cases of a list: one that fails is named, in inference the others go on, and no result overwrites another's."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from tempfile import TemporaryFile
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle.config_parser import ConfigParser
from monai.data.dataset import Dataset
from monai.data.decathlon_datalist import load_decathlon_datalist
from monai.data.folder_layout import FolderLayout
from monai.engines.evaluator import SupervisedEvaluator
from monai.transforms import Compose, SaveImage
from torch import Tensor, nn

__all__ = ["CaseCompose", "CaseDataset", "CaseError", "CaseEvaluator", "CaseGuard", "CasesFailedError", "case_names",
           "cases_to_predict", "reason", "told_cause"]

_FAILED = "failed_case"               # key of a batch that stands for a case which could not be read
_PLACE = re.compile(r"^\s*(\S+\.(c|cc|cpp|cxx|h|hxx|py):\d+|Traceback|File \"|ITK ERROR|During handling|[-=~^*\s]*$)")
_WRAPPERS = ("applying transform", "Failed to ")   # how MONAI's errors about another one begin
_MOST = 20                            # failures that the last message spells out
logger = logging.getLogger(__name__)


class CaseError(RuntimeError):
    """Something went wrong with a case, which the message names."""


class CasesFailedError(RuntimeError):
    """Some cases have no result; the message lists them with the reason for each."""


def told_cause(error: BaseException) -> BaseException:
    """The error that is behind those with which MONAI wraps it."""
    while error.__cause__ is not None and str(error).startswith(_WRAPPERS):
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """What went wrong, in one line: of the error that MONAI has wrapped, the first line that is no place in some code.

    Example:
        >>> reason(ValueError("itkTIFFImageIO.cxx:514:\\nITK ERROR: TIFFImageIO: 64 bits are not supported"))
        'ITK ERROR: TIFFImageIO: 64 bits are not supported'
    """
    error = told_cause(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if not _PLACE.match(line) or "ERROR:" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {told}" if len(told.split()) < 2 else told


class CaseCompose(Compose):
    """MONAI's `Compose` for cases of files: an error names the case, where MONAI's names a transform.

    Transforms that are a `Compose` themselves are taken apart: MONAI counts a `Compose` as random, and a `CacheDataset`
    keeps what stands before the first random transform, so with one in front it would read each file in each epoch.

    Arguments: those of `Compose`. What is called with a dict that has the path of an `image`, or an image with the name
    of its file, raises `CaseError`; all else raises what it did.
    """

    def __init__(self, transforms: Any = None, **options: Any) -> None:
        super().__init__(transforms, **options)
        self.transforms = self.flatten().transforms   # type: ignore[no-untyped-call]

    def __call__(self, input_: Any, *args: Any, **options: Any) -> Any:   # type: ignore[override]
        """Transform a case."""
        try:
            return super().__call__(input_, *args, **options)
        except CaseError:
            raise
        except Exception as error:
            name = case_names(input_)
            if not name:
                raise
            raise CaseError(f"{name} cannot be prepared: {reason(error)}") from error


def cases_to_predict(datalist: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The list `test` of a datalist, its paths relative to `root`; cases need no label.

    Raises:
        ValueError: there is none, or it is empty.
    """
    content = ConfigParser.load_config_file(datalist)
    if not content.get("test"):
        raise ValueError(
            f"`test` of {datalist} must list the cases to predict, got none; add them, or list a folder's images with "
            "`medkd datalist FOLDER LIST --no_labels --fractions 0,0,1`."
        )
    return load_decathlon_datalist(datalist, True, "test", root)


class CaseDataset(Dataset):
    """MONAI's `Dataset` of cases to predict; one that cannot be read or prepared does not end the list.

    Args:
        data: cases, each with the path of its image, or of its channels.
        transform: of a case.
        key: of the image.

    Raises:
        ValueError: two predictions would have one name: images in one folder that differ only in the ending.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Callable[..., Any], key: str = "image") -> None:
        super().__init__(data, transform)
        self.key = key
        owners: dict[str, str] = {}
        for path in self.paths():
            other = owners.setdefault(_stem(path), path)
            if other != path or self.paths().count(path) > 1:
                raise ValueError(
                    f"`data` must have images whose predictions can have a name each, got {other} and {path}; rename "
                    "one, put it into another folder, or predict it on its own."
                )

    def paths(self) -> list[str]:
        """Path of each case's image; what is no path, such as an array, has none."""
        images = [case.get(self.key) for case in self.data]
        firsts = [image[0] if isinstance(image, (list, tuple)) and image else image for image in images]
        return [os.fspath(image) for image in firsts if isinstance(image, (str, os.PathLike))]

    def folder(self) -> str:
        """The folder that all images lie in, directly or deeper; empty where there is none."""
        folders = [os.path.dirname(os.path.abspath(path)) for path in self.paths()]
        try:
            return os.path.commonpath(folders) if folders else ""
        except ValueError:                                         # on several drives
            return ""

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            return {_FAILED: f"{self.data[index].get(self.key)}, which cannot be read: {reason(error)}"}


class CaseEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for a `CaseDataset`: cases that fail are named, the others are done, and the run then fails.

    Predictions keep the folders of their images below the one that all have in common, so that `a/image.nii.gz` and
    `b/image.nii.gz` become `a/image_seg.nii.gz` and `b/image_seg.nii.gz`; what lies in one folder is written into one.

    Args:
        options: of `SupervisedEvaluator`.

    Raises:
        OSError: at the start, when there is no place for predictions.
        CasesFailedError: at the end, when a case failed.
    """

    def __init__(self, *, postprocessing: Any = None, **options: Any) -> None:
        super().__init__(postprocessing=postprocessing, **options)
        self.failures: list[str] = []
        dataset = getattr(self.data_loader, "dataset", None)
        folder = dataset.folder() if isinstance(dataset, CaseDataset) else ""
        self._layouts = list(_layouts(postprocessing))
        for layout in self._layouts:
            layout.data_root_dir = layout.data_root_dir or folder

    def run(self, global_epoch: int = 1) -> None:   # type: ignore[override]
        """Predict all cases, then raise if one failed."""
        for place in {str(layout.output_dir) for layout in self._layouts}:
            _check_writable(place)
        self.failures.clear()
        super().run(global_epoch)
        if self.failures:
            count, most = len(self.failures), self.failures[:_MOST]
            rest = f"\n  and {count - _MOST} more" if count > _MOST else ""
            raise CasesFailedError(
                f"{count} of {self.state.epoch_length} cases have no result, the others are done:"
                + "".join(f"\n  {failure}" for failure in most) + rest
            )

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Any) -> Any:
        if isinstance(batchdata, Mapping) and _FAILED in batchdata:
            return self._note(batchdata[_FAILED][0])
        try:
            return super()._iteration(engine, batchdata)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:   # also what compiled code raises, which is no Exception
            if problem := _channels(self.network, batchdata):
                return self._note(problem)
            return self._note(f"{case_names(batchdata) or 'a case without a name'}: {reason(error)}")

    def _note(self, failure: str) -> dict[str, Any]:
        logger.error("No result for %s", failure)
        self.failures.append(failure)
        return {}


class CaseGuard:
    """Raise `CaseError` with the names of the batch's cases when a step of an engine fails, where it knows them.

    What is raised while the next batch is read is not about the last one, and names its case by itself (`CaseCompose`).
    Place it first: MONAI's `StatsHandler` raises errors again as they are.

    Args:
        image_key: key of the batch whose metadata names the files.
    """

    def __init__(self, image_key: str = "image") -> None:
        self.image_key = image_key
        self._is_step = False

    def attach(self, engine: Engine) -> None:
        """Register on a trainer or evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set, True)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._set, False)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._raise)

    def _set(self, is_step: bool) -> None:
        self._is_step = is_step

    def _raise(self, engine: Any, error: BaseException) -> None:
        batch = engine.state.batch
        items = batch if isinstance(batch, list) else [batch]      # decollated, or not yet
        names = ", ".join(filter(None, (case_names(item, self.image_key) for item in items))) if self._is_step else ""
        self._is_step = False
        if not names or isinstance(error, (CaseError, KeyboardInterrupt, SystemExit)) or names in str(error):
            raise error
        raise CaseError(f"Step {engine.state.iteration} failed on {names}: {reason(error)}") from error


def _stem(path: str) -> str:
    """The path without what a prediction does not take over: `.nii.gz`, `.png`."""
    stem, ending = os.path.splitext(os.path.abspath(path))
    return os.path.splitext(stem)[0] if ending == ".gz" else stem


def case_names(batch: Any, key: str = "image") -> str:
    """Paths of the images of a case or batch, by the metadata or as they stand in a datalist; empty if unknown."""
    image = batch.get(key) if isinstance(batch, Mapping) else None
    names = image if isinstance(image, (str, os.PathLike)) else getattr(image, "meta", {}).get("filename_or_obj", "")
    return ", ".join(dict.fromkeys(map(str, names if isinstance(names, (list, tuple)) else [names])))


def _channels(network: nn.Module, batch: Any) -> str | None:
    """What is wrong with the channels of a batch's images, if that is why a network has failed."""
    image = batch.get("image") if isinstance(batch, Mapping) else None
    weight = next((one for one in network.parameters() if one.dim() > 3), None)
    if not isinstance(image, Tensor) or weight is None or image.shape[1] == weight.shape[1]:
        return None
    return (
        f"{case_names(batch)} must have {weight.shape[1]} channel(s), as the network takes, got {image.shape[1]}; "
        "save the one that it was trained on."
    )


def _check_writable(folder: str) -> None:
    """Find out before any work is done whether results can be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"`output_dir` must be a folder to write to, got {folder}: {error.strerror}.") from error


def _layouts(transform: Any) -> Iterator[FolderLayout]:
    """How the savers among some transforms name their files."""
    if isinstance(transform, Compose):
        for one in transform.transforms:
            yield from _layouts(one)
    for value in [transform, *vars(transform).values()] if hasattr(transform, "__dict__") else ():
        if isinstance(value, SaveImage) and isinstance(value.folder_layout, FolderLayout):
            yield value.folder_layout
