# SPDX-License-Identifier: Apache-2.0
"""Write procedural data with exact labels: of a kind, or with `--for` of the kind that a bundle takes.

medkd phantom KIND OUTPUT [options], or medkd phantom --for BUNDLE OUTPUT [options]
"""

from __future__ import annotations

from collections.abc import Sequence

from medkd.cli.lists import tell_written
from medkd.cli.parser import Parser, literal
from medkd.phantoms.kinds import KINDS, kind_of

__all__ = ["run"]


def run(parser: Parser, words: Sequence[str]) -> None:
    """Run `medkd phantom`."""
    finder = Parser(parser.prog, add_help=False)
    for each in (parser, finder):
        each.add_argument("--for", metavar="BUNDLE", help="folder of a bundle")
    found, rest = finder.parse_known_args(words)
    bundle = vars(found)["for"]
    words = words if bundle is None else [kind_of(bundle).name, *rest]
    kind = KINDS[parser.choose({name: kind.about for name, kind in KINDS.items()}, words)]

    leaf = Parser(f"{parser.prog} {kind.name}", f"Write phantoms. {kind.about}")
    leaf.add_argument("output", help="folder to fill with images/, labels/ and datalist.json")
    for name, number in zip(("training", "validation", "test", "unlabeled"), (*kind.cases, 0), strict=True):
        leaf.add_argument(f"--{name}", type=literal, metavar="N", default=number, help=f"number of {name} cases")
    leaf.add_argument("--seed", type=literal, default=0, help="0 or more; the same seed gives the same cases")
    for name, (default, about) in kind.options.items():
        leaf.add_argument(f"--{name}", type=literal, default=default, help=about)
    options = vars(leaf.parse(words[1:]))
    tell_written(kind.write(options.pop("output"), **options))
