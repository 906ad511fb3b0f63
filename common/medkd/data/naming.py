# SPDX-License-Identifier: Apache-2.0
"""Names of files and cases: endings, the words that mark an image or a label, and how a message lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

__all__ = ["has_ending", "is_label_name", "plain", "quote", "shorten", "split_channel", "without_ending"]

_SLIDES = r"svs|ndpi|scn|bif|svslide|mrxs"    # of scanners, beside TIFF
_ENDING = re.compile(rf"\.(nii\.gz|nii|mha|mhd|nrrd|npy|npz|png|tiff?|jpe?g|bmp|dcm|h5|hdf5?|zarr|{_SLIDES})$", re.I)
_IMAGE = r"(?:images?|imaging|imgs?|im|volumes?|vol|scans?|raw)"
_LABEL = (
    r"(?:labels?|lbls?|segs?|segmentations?|masks?|gt|ground[_-]?truth|annotations?|annot|manual|instances?)"
)
_CHANNEL = re.compile(r"^(.+)_(\d{4})$")   # of nnU-Net: 0000 is the first channel


def shorten(names: Sequence[str], most: int = 5) -> str:
    """List the first of some names, and tell how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def quote(names: Sequence[str]) -> str:
    """List names in quotes, or say that there are none."""
    return shorten(list(map(repr, names)), 8) or "none"


def has_ending(name: str) -> bool:
    """Tell whether a name ends as a volume or picture does."""
    return bool(_ENDING.search(name))


def without_ending(name: str) -> str:
    """Cut the ending of a volume or picture off a path."""
    return _ENDING.sub("", name)


def plain(case: str, label: bool) -> str:
    """Strip the words off a case name that mark an image, or a label.

    Example:
        >>> plain("p1/liver_07-seg", label=True), plain("img0007", label=False)
        ('p1/liver_07', '0007')
    """
    words = _LABEL if label else _IMAGE
    *folders, name = PurePath(case).parts
    before = None
    while name != before:
        before = name
        name = re.sub(rf"^{words}(?:[_\-. ]+|(?=\d)|$)|[_\-. ]+{words}$", "", name, flags=re.I)
    return "/".join([*folders, *([name] if name else [])])


def is_label_name(case: str) -> bool:
    """Tell whether a case name has a word that marks a label."""
    return plain(case, label=True) != case


def split_channel(case: str) -> tuple[str, str]:
    """Take the number of a channel off a name as nnU-Net writes it; without one it is empty.

    Example:
        >>> split_channel("liver_07_0000"), split_channel("liver_07")
        (('liver_07', '0000'), ('liver_07', ''))
    """
    match = _CHANNEL.match(case)
    return (match[1], match[2]) if match else (case, "")
