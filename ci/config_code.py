# SPDX-License-Identifier: Apache-2.0
"""What code a config may name: `_target_`, `$` expressions and `$import` lines, by allow-list."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Sequence
from typing import Any

STUDENT_PACKAGES = frozenset({"monai", "torch", "scripts"})
PACKAGES = STUDENT_PACKAGES | {"ignite", "medkd"}
# MONAI runs all imports of a config before `initialize`, which puts the bundle and its copy of medkd on the path
LATE_PACKAGES = frozenset({"medkd", "scripts"})
# of these modules, with all that is below
LIBRARY = """functools.partial operator.itemgetter operator.gt operator.lt itertools math
    os.path os.environ.get sys.argv sys.path""".split()
BUILTINS = frozenset(
    "bool dict enumerate float int isinstance len list max min range round set sorted str sum tuple zip".split()
)
REFUSED = """torch.load torch.save torch.hub torch.ops.load_library torch.utils.cpp_extension
    monai.apps""".split()
REFUSED_PARTS = set("os sys subprocess shutil importlib builtins system popen eval exec pickle".split())
REFUSED_SYNTAX = {
    ast.Lambda: "a lambda", ast.NamedExpr: "a walrus", ast.Await: "an await", ast.Yield: "a yield",
}
IMPORT = re.compile(r"\$\s*(import|from)\s")
REFERENCE = re.compile(r"@\w*(?:(?:#|::)\w*)*")
ABSOLUTE = "must not be an absolute path; build it from @bundle_root or @dataset_dir."


def check_name(name: str, packages: frozenset[str], library: Sequence[str] = LIBRARY) -> str | None:
    """Say what is wrong with a dotted name, if anything is."""
    root, *parts = name.split(".")
    if _is_below(name, library):
        return None
    if root not in packages:
        known = [path for path in library if _is_below(path, [root])] or sorted(packages)
        return f"must name one of {', '.join(known)}, got {name!r}; put other code into scripts."
    if _is_below(name, REFUSED) or REFUSED_PARTS & set(parts):
        return f"must not name {name!r}, which can run or fetch what is not in the bundle; put it into scripts."
    return None


def _is_below(name: str, known: Sequence[str]) -> bool:
    return any(name == start or name.startswith(start + ".") for start in known)


def check_target(name: Any, packages: frozenset[str]) -> str | None:
    """`_target_`: a full path in an allowed package, or the bare name of a class of MONAI."""
    if isinstance(name, str) and re.fullmatch(r"[A-Z]\w*", name):
        return None
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", name)):
        return f"must be a full path to a class or the name of a class of MONAI, got {name!r}."
    return check_name(name, packages, library=())


def check_import(text: str, packages: frozenset[str]) -> tuple[dict[str, str], str | None]:
    """Read `import x` or `from x import y`; returns {name: dotted path}, and what is wrong with the line."""
    try:
        node, *rest = ast.parse(text.strip()).body
    except SyntaxError as error:
        return {}, f"must be an import: {error.msg}."
    if rest or not isinstance(node, ast.Import | ast.ImportFrom) or len(node.names) != 1:
        return {}, "must import one name per line, as MONAI does only the first."
    (alias,) = node.names
    plain = isinstance(node, ast.Import)
    path = alias.name if plain else f"{node.module}.{alias.name}"
    name = alias.asname or (path.split(".")[0] if plain else alias.name)
    names = {name: path if alias.asname or not plain else name}
    whole_library = plain and path in {known.split(".")[0] for known in LIBRARY}
    return names, None if whole_library else check_name(path, packages) or _check_early(path, name)


def _check_early(path: str, name: str) -> str | None:
    if path.split(".")[0] not in LATE_PACKAGES:
        return None
    component = f'"{name}": {{"_target_": "{path}", "_mode_": "callable"}}'
    return (
        f"must not import {path}: imports run before `initialize` puts the bundle on the path, so that a packed "
        f"bundle finds nothing; give the key {component} and write @{name}."
    )


class Expression(ast.NodeVisitor):
    """What is wrong with the names and the syntax of one `$` expression.

    Args:
        aliases: name -> dotted path of what the config's `$import` lines bring.
        packages: packages that may be named.
    """

    def __init__(self, aliases: dict[str, str], packages: frozenset[str]) -> None:
        self.aliases, self.packages = aliases, packages
        self.bound: set[str] = set()
        self.problems: list[str] = []

    def check(self, text: str) -> list[str]:
        """Parse `text`, without its `$`, and list the problems."""
        try:
            tree = ast.parse(REFERENCE.sub("_reference", text).strip(), mode="eval")
        except SyntaxError as error:
            return [f"must be a Python expression: {error.msg}."]
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        builtin = vars(builtins).keys() - {"_"}                    # what a prompt, or a doctest, showed last
        self.bound = {"_reference"} | (stored - builtin)
        self.visit(tree)
        return list(dict.fromkeys(self.problems))

    def visit(self, node: ast.AST) -> None:
        """Refuse some syntax, then look inside."""
        if type(node) in REFUSED_SYNTAX:
            self.problems.append(f"must not hold {REFUSED_SYNTAX[type(node)]}; write a function in scripts.")
        super().visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Check `a.b.c` as one name, or what an attribute is taken of."""
        if node.attr.startswith("_"):
            problem = f"must not use the private attribute {node.attr!r}; write a function in scripts."
            self.problems.append(problem)
        path = ast.unparse(node)
        if re.fullmatch(r"[^\W\d][\w.]*", path):
            self._check_name(path)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Check a name that stands alone."""
        self._check_name(node.id)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Let `@bundle_root + '/models'` be: what follows a plus is the end of a path."""
        self.visit(node.left)
        if not (isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant)):
            self.visit(node.right)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Look at the values of an f-string; its text is the middle of a path."""
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Refuse a string that begins at the root of the file system."""
        if isinstance(node.value, str) and node.value.startswith("/"):
            self.problems.append(ABSOLUTE)

    def _check_name(self, name: str) -> None:
        root, _, rest = name.partition(".")
        full = self.aliases.get(root, root) + (f".{rest}" if rest else "")
        if root not in self.bound | BUILTINS and (problem := check_name(full, self.packages)):
            self.problems.append(problem)
