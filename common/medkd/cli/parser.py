# SPDX-License-Identifier: Apache-2.0
"""The parser of all commands: the standard library's, with messages of our grammar and defaults in the help."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

__all__ = ["Parser", "literal"]


def literal(text: str) -> Any:
    """Read an argument as Python would, such as 3 or 96,80,64; what is no literal stays text, for others to refuse.

    Example:
        >>> literal("96,80,64"), literal("0.5"), literal("all")
        ((96, 80, 64), 0.5, 'all')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Parser(argparse.ArgumentParser):
    """A parser of the words after `prog`, such as "medkd phantom"; it raises `ValueError` with a way out."""

    def __init__(self, prog: str, about: str | None = None, add_help: bool = True) -> None:
        self._options: list[str] = []
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, about, formatter_class=layout, add_help=add_help, allow_abbrev=False)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument as `argparse` does, positional ones in capitals; its help tells the default, if any."""
        self._options += names
        default, about = settings.get("default"), settings.get("help", "")
        if default not in (None, argparse.SUPPRESS):
            about += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
        if not names[0].startswith("-"):
            settings.setdefault("metavar", names[0].upper())
        return super().add_argument(*names, **settings | {"help": about.replace("%", "%%")})

    def choose(self, choices: Mapping[str, str], words: Sequence[str]) -> str:
        """Take the first of the words, which has to be a choice; without words show what each of them does."""
        width = max(map(len, choices))
        self.usage = "%(prog)s [options] COMMAND ..."
        self.epilog = "commands:\n" + "\n".join(f"  {name:{width}}  {about}" for name, about in choices.items())
        if not words or words[0].startswith("-"):
            self.parse(words or ["--help"])
        if words[0] not in choices:
            self.error(f"`{words[0]}` is no command of `{self.prog}`, which has {', '.join(choices)}")
        return words[0]

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read all of the words; one that is no option is refused, with the nearest that is."""
        options, left = self.parse_known_args(words)
        if left:
            word = left[0].partition("=")[0]
            known = self._options if word.startswith("--") and word not in self._options else []
            near = get_close_matches(word, known, n=1)
            self.error(f"`{word}` is no option of `{self.prog}`" + "".join(f"; did you mean {name}?" for name in near))
        return options

    def error(self, message: str) -> NoReturn:
        """Raise what `argparse` would print, with the way out."""
        message = re.sub(r"^the following arguments are required: (.*)", rf"`{self.prog}` needs \1, got none", message)
        raise ValueError(f"{message}{'' if message.endswith('?') else ';'} see `{self.prog} --help`.")
