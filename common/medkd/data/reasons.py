# SPDX-License-Identifier: Apache-2.0
"""Why a file cannot be read, in a sentence: the line of a reader's error that says it, and a way out that fits."""

from __future__ import annotations

import gzip
import os
import re
import zlib

__all__ = ["unreadable"]

# lines that only tell where a reader stands: "/ITK/.../itkTIFFImageIO.cxx:514:", "Traceback ...", "  File ..., line 3"
_PLACE = re.compile(r"^\s*(?:[^\s:]+\.(?:c|cc|cpp|cxx|h|hpp|hxx|txx|py):\d+:?|Traceback\b.*|File \".*)\s*$")
_OBJECT = re.compile(r"^\s*(?:ITK )?(?:ERROR|Error):\s*(?:\w+\(0x[0-9a-f]+\):\s*)?")
_WRAPPER = re.compile(
    r"applying transform <|\w+ cannot find a suitable reader|Please install the reader libraries|https?://|"
    r"The current registered"
)
_HEADER = 2**20           # bytes to read
_MOST = 160               # characters of a reason
# words of a reason -> the way out, the first that fits
_WAYS_OUT = (
    (r"64-bit samples|unsupported (?:data )?type|not support.*(?:type|bit)|can ?not handle|is not wrapped",
     "save it in a type that the reader knows: labels as 32-bit, 16-bit or 8-bit integers, images as 8-bit or 16-bit"),
    (r"end-of-stream|truncated|failed to read \d+ bytes|ended before|"
     r"Expected \d+ bytes|unexpected end|incorrect data check|CRC|damaged|EOF",
     "it is cut or damaged: copy it again"),
    (r"Empty file|file is empty|size 0", "it is empty: copy it again"),
    (r"not a gzip|Error -3 while|invalid (?:stored )?block|cannot identify|Could not create IO|not a TIFF|bad magic|"
     r"not recognized|[Cc]annot work out file type",
     "its content is not what its name says, or of a kind that is not read: save it as NIfTI, PNG or TIFF"),
    (r"No module named|pip install|not installed", "install what it names"),
    (r"[Pp]ermission denied", "allow reading it"),
)


def unreadable(path: str, what: str, error: BaseException) -> str:
    """Say in a sentence that a file cannot be read, why, and what to do.

    Args:
        path: the file.
        what: `image` or `label`.
        error: what a reader raised, perhaps wrapped.
    """
    reason = _cut(path) or _reason(error)
    if reason.startswith(f"{path} must "):
        return reason              # a sentence already, of a reader that knows our bundles
    reason = reason.replace(path, os.path.basename(path))[:_MOST]
    default = "if it is cut, copy it again, else save it as NIfTI, PNG or TIFF"
    way_out = next((way for words, way in _WAYS_OUT if re.search(words, reason)), default)
    return f"{path} must be a readable {what}, got {reason!r}; {way_out}."


def _cut(path: str) -> str | None:
    """What a compressed file says that ends too early; readers often see only that there is no header."""
    try:
        with gzip.open(path) as file:
            file.read(_HEADER)
    except EOFError as error:
        return str(error)
    except (OSError, zlib.error):
        pass
    return None


def _reason(error: BaseException) -> str:
    """The first line that tells something, of the outermost error that has one."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    for one in chain:
        for line in str(one).splitlines():
            text = _OBJECT.sub("", line).strip()
            if text and not _PLACE.match(line) and not _WRAPPER.match(text):
                return text
    return type(chain[-1]).__name__
