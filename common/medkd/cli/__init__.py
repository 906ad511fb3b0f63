# SPDX-License-Identifier: Apache-2.0
"""The console command `medkd`.

A command is a name in `COMMANDS` and a file of this package: its docstring says what the command does, its function
`run` gets a parser to add arguments to and the words to parse. It imports what it needs when it runs: `--help` has to
be quick.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc

from medkd import __version__
from medkd.cli.parser import Parser

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    name: import_module(f"medkd.cli.{name.replace('-', '_')}")
    for name in ("phantom", "datalist", "check-data", "compare", "verify")
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        arguments: words after `medkd`; None takes those of the process. `--num-classes` is `--num_classes`.

    Returns:
        Exit code: 0, 2 for wrong arguments or data, 130 when interrupted.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [re.sub(r"^--\w[^=]*", lambda option: f"--{option[0][2:].replace('-', '_')}", word) for word in given]
    logging.basicConfig(format="medkd: %(message)s")
    logging.getLogger("medkd").setLevel(logging.INFO)
    try:
        _run(words)
    except SystemExit:   # help was asked for and shown
        return 0
    except (ValueError, OSError) as error:
        print(f"medkd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("medkd: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(words: Sequence[str]) -> None:
    parser = Parser("medkd", "Knowledge distillation for medical segmentation, as MONAI bundles.")
    parser.add_argument("--version", action="version", version=f"medkd {__version__}")
    about = {name: getdoc(command) or "" for name, command in COMMANDS.items()}
    name = parser.choose({name: text.partition("\n")[0] for name, text in about.items()}, words)
    COMMANDS[name].run(Parser(f"medkd {name}", about[name]), words[1:])
