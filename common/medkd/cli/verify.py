# SPDX-License-Identifier: Apache-2.0
"""Check that a packed bundle is whole and unchanged: no file changed, missing or added since `make pack`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import file_digest

from medkd.cli.parser import Parser

__all__ = ["run"]


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd verify`."""
    parser.add_argument("path", help="the zip, or the folder unpacked from it, as long as nothing ran in it")
    path = parser.parse(words).path
    from medkd.verify import verify

    number = verify(path)
    print(f"OK: {number} files of {path} are as they were packed.")
    if os.path.isfile(path):
        with open(path, "rb") as file:
            print(f"SHA-256 of the zip, to compare with its author's: {file_digest(file, 'sha256').hexdigest()}")
