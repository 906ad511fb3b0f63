# SPDX-License-Identifier: Apache-2.0
"""Who may import whom; the rules are the tables below, so a new module needs a line here only if it brings a layer."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

COPIED = "inference"  # its files are scripts of bundles, too, where there may be no medkd
# layer of medkd -> layers it may import, besides itself; every other module of medkd may import all
LAYERS: dict[str, set[str]] = {
    "checks": set(),
    "ops": {"checks"},
    "outputs": {"checks"},
    "taps": {"checks", "outputs"},
    "weights": {"checks"},
    "losses": {"checks", "ops", "weights"},
    "handlers": {"checks", "ops", "outputs", "taps", "weights", "settings", "losses"},
    COPIED: set(),
}
SHARED_BY_LOSSES = {"base", "boundary_head", "class_heads", "fitted", "focus", "paraphraser", "predictions"}
SHARED_BY_LOSSES |= {"discriminator", "relation_bank"}
OURS = {"bundles", "scripts", "tests", "ci", "lab"}  # what the shared package knows nothing of
STDLIB = set(sys.stdlib_module_names)
NETWORK_PACKAGES = {"torch", "monai", "scripts"} | STDLIB
INFERENCE_PACKAGES = NETWORK_PACKAGES | {"PIL", "ignite", "nibabel", "numpy", "scipy", "skimage", "tqdm"}
INFERENCE_PACKAGES |= {"mwatershed", "waterz", "cc3d"}  # the wheels of extra `em`
INFERENCE_PACKAGES |= {"tifffile"}  # scikit-image requires it
SCRIPT_PACKAGES = INFERENCE_PACKAGES | {"medkd", "itk"}
SCRIPT_PACKAGES |= {"h5py"}  # what public data sets come in


def imports(source: str) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` is `a.b`, `from . import b` is `.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (start + alias.name for alias in node.names)


def package_problem(module: str, name: str) -> str | None:
    """Say why `module` of medkd (`losses.graph_relation`) must not import `name`, if so."""
    own = module.split(".")
    is_copied = own[0] == COPIED
    if (name.startswith(".") or name.split(".")[0] == "medkd") and name.startswith(".") != is_copied:
        return f"{COPIED} imports itself relatively, nothing else does"
    root, *parts = resolve_name(name, f"medkd.{COPIED}").split(".")
    if root in OURS:
        return "the shared package knows no bundle"
    if is_copied and root not in INFERENCE_PACKAGES | {"medkd"}:
        return f"{COPIED} may import {sorted(INFERENCE_PACKAGES - STDLIB - OURS)}"
    if root != "medkd" or not parts or own[0] not in LAYERS or parts == ["__version__"]:
        return None
    if parts[0] not in LAYERS[own[0]] | {own[0]}:
        return f"{own[0]} stands below {parts[0]}"
    if own[0] == parts[0] == "losses" and len(own) > 1:
        other = parts[1] if len(parts) > 1 else ""
        return None if other in SHARED_BY_LOSSES | {own[1]} else "one method's loss never imports another's"
    return None


def script_problem(file_name: str, name: str) -> str | None:
    """Say why a file of a bundle's scripts/ must not import `name`, if so."""
    allowed = NETWORK_PACKAGES if file_name == "networks.py" else SCRIPT_PACKAGES
    return (
        None
        if resolve_name(name, "scripts").split(".")[0] in allowed
        else f"scripts/{file_name} may import {sorted(allowed - STDLIB)}"
    )


def closure(scripts: Path, names: Iterable[str]) -> set[Path]:
    """Files of scripts/ that run when `names` (`scripts.networks.Student`) are imported."""
    files: set[Path] = set()
    waiting = list(names)
    while waiting:
        parts = waiting.pop().split(".")[1:]
        steps = [scripts.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
        for file in [
            f for step in steps for f in (step / "__init__.py", step.with_suffix(".py")) if f.is_file()
        ]:
            if file not in files:
                files.add(file)
                package = ".".join(("scripts", *file.parent.relative_to(scripts).parts))
                names = (resolve_name(name, package) for name in imports(file.read_text()))
                waiting += [name for name in names if name.split(".")[0] == "scripts"]
    return files


def module_name(file: Path, package: Path) -> str:
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def test_the_layers_of_the_shared_package_hold(repository: Path) -> None:
    package = repository / "common" / "medkd"
    found = [
        f"{file.relative_to(repository)} imports {name}: {problem}"
        for file in sorted(package.rglob("*.py"))
        for name in imports(file.read_text())
        if (problem := package_problem(module_name(file, package), name))
    ]
    assert not found, "\n".join(found)


def test_the_scripts_of_a_bundle_import_no_other_bundle_and_networks_no_medkd(repository: Path) -> None:
    found = [
        f"{file.relative_to(repository)} imports {name}: {problem}"
        for file in sorted(repository.glob("bundles/*/scripts/**/*.py"))
        if "_vendor" not in file.parts
        for name in imports(file.read_text())
        if (problem := script_problem(file.name, name))
    ]
    assert not found, "\n".join(found)


def test_what_inference_runs_imports_no_medkd(repository: Path) -> None:
    found = [
        f"{config.relative_to(repository)} runs {file.name}, which imports {name}"
        for config in sorted(repository.glob("bundles/*/configs/inference*.json"))
        for file in closure(
            config.parents[1] / "scripts", re.findall(r"scripts(?:\.\w+)+", config.read_text())
        )
        for name in imports(file.read_text())
        if name.split(".")[0] == "medkd"
    ]
    assert not found, "\n".join(found)


def test_ci_imports_the_standard_library_and_itself_only(repository: Path) -> None:
    files = sorted((repository / "ci").glob("*.py"))
    allowed = STDLIB | {file.stem for file in files}
    found = [(f.name, n) for f in files for n in imports(f.read_text()) if n.split(".")[0] not in allowed]
    assert files
    assert not found


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("ops.affinity", "medkd.losses.base.DistillationLoss"),
        ("ops.affinity", "medkd.taps"),
        ("losses.logits", "medkd.handlers.distillation"),
        ("losses.logits", "medkd.taps.FeatureTaps"),
        ("taps", "medkd.ops.graph"),
        *((layer, f"medkd.{top}.x") for layer in LAYERS for top in "data phantoms metrics inference report".split()),
        *((layer, f"medkd.{top}") for layer in LAYERS for top in "export distill blocks cli".split()),
        ("losses.graph_flow", "medkd.losses.graph_relation.GraphRelationLoss"),
        ("losses.graph_flow", "medkd.losses.logits"),
        ("losses.graph_flow", "medkd.losses"),
        ("data.datalist", "bundles.x"),
        ("cli", "scripts.networks.Student"),
        ("report.page", "lab.pages"),
        ("losses.graph_flow", ".base.DistillationLoss"),
        ("inference.windows", "..ops.affinity"),
        ("inference.windows", "itk"),
        ("inference.windows", "scripts.affinities"),
    ],
)
def test_an_import_against_the_layers_is_found(module: str, name: str) -> None:
    assert package_problem(module, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("handlers.distillation", "medkd.losses.base.DistillationLoss"),
        ("handlers.distillation", "medkd.handlers.teacher"),
        ("losses.graph_flow", "medkd.losses.base.DistillationLoss"),
        ("losses.graph_flow", "medkd.ops.graph.unit_vectors"),
        ("cli", "medkd.losses.graph_flow.GraphFlowLoss"),
        ("ops.affinity", "torch.Tensor"),
        ("export", "medkd.__version__"),
        ("export", "medkd.inference.windows.AffinityInferer"),
        ("inference.windows", ".affinities.embedding_affinity"),
        ("inference.instances", "skimage.measure.label"),
    ],
)
def test_an_import_along_the_layers_is_fine(module: str, name: str) -> None:
    assert package_problem(module, name) is None


def test_imports_inside_functions_are_seen() -> None:
    source = "import a.b\ndef f():\n    from c import d, e\n    from . import g\n    from ..h import i\n"
    assert sorted(imports(source)) == ["..h.i", ".g", "a.b", "c.d", "c.e"]


@pytest.mark.parametrize(("file", "name"), [("networks.py", "medkd.ops"), ("inferers.py", "bundles.other")])
def test_a_foreign_import_of_scripts_is_found(file: str, name: str) -> None:
    assert script_problem(file, name)
    assert script_problem("inferers.py", "medkd.ops") is None
    assert script_problem(file, ".affinities.output_head") is None


def test_the_closure_of_scripts_follows_imports(tmp_path: Path) -> None:
    texts = {"a": "from scripts import b", "b": "from .c import x", "c": "from . import d", "d": "import medkd"}
    for name, text in {"__init__": "", **texts, "e": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert {file.stem for file in closure(tmp_path, ["scripts.a.Student"])} == {"__init__", "a", "b", "c", "d"}
