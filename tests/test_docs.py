# SPDX-License-Identifier: Apache-2.0
"""Every example in the documentation runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import medkd
from medkd.cli import COMMANDS

ROOT = Path(__file__).parents[1]

# wheels of the extras; a module that needs one of them may be absent from a plain installation
OPTIONAL = frozenset({
    "cc3d", "dask", "distributed", "highdicom", "mwatershed", "ome_zarr", "onnx", "onnxruntime", "onnxscript",
    "openvino", "pydicom", "waterz", "zarr",
})
MODULES = sorted(module.name for module in pkgutil.walk_packages(medkd.__path__, "medkd."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module)
    assert failed == 0, f"examples of {name} failed; their output stands above"


BUNDLE_PAGES = sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("bundles/*/docs/*.md"))
READMES = {"README.md": 150} | {page: 120 for page in BUNDLE_PAGES if page.endswith("README.md")}   # most lines
PAGES = ["README.md", "CONTRIBUTING.md", *BUNDLE_PAGES]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page: str) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), {"__name__": "page"})   # noqa: S102


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page: str) -> None:
    folder = (ROOT / page).parent.parent if page.startswith("bundles") else ROOT
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = "\n".join(blocks(page, "sh"))
    assert [name for name in re.findall(r"^\s*make (\w+)", text, flags=re.MULTILINE) if name not in targets] == []
    assert [name for name in re.findall(r"^medkd ([\w-]+)", text, flags=re.MULTILINE) if name not in COMMANDS] == []
    modules = re.findall(r"python -m ((?:lab|scripts)[\w.]*)", (ROOT / page).read_text())
    assert [name for name in modules if not _is_module(folder if name.startswith("scripts") else ROOT, name)] == []
    configs = set(re.findall(r"configs/\w+\.json", text))
    bundles = [folder] if folder != ROOT else sorted((ROOT / "bundles").glob("*/"))
    assert [name for name in configs for bundle in bundles if not (bundle / name).is_file()] == []


def _is_module(folder: Path, name: str) -> bool:
    path = folder.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short(page: str) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= READMES[page]


@pytest.mark.parametrize("page", BUNDLE_PAGES)
def test_a_preset_of_inference_is_named_behind_what_it_overrides(page: str) -> None:
    text = (ROOT / page).read_text()
    lists = re.findall(r"\[[^\[\]]*configs/inference_[^\[\]]*\]", text)
    assert [one for one in lists if not one.startswith("['configs/inference.json','configs/inference_")] == []
    assert text.count("configs/inference_") == "".join(lists).count("configs/inference_")


def test_every_link_within_the_repository_leads_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            if not ((ROOT / page).parent / target).exists():
                broken.append(f"{page}: {target}")
    assert broken == []
