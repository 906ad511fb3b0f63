# SPDX-License-Identifier: Apache-2.0
"""A list of cases to predict: one that fails is named, the others have results, and none overwrites another's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, SaveImaged
from PIL import Image
from torch import nn

import toys
from medkd.inference.cases import (
    CaseCompose,
    CaseDataset,
    CaseError,
    CaseEvaluator,
    CaseGuard,
    CasesFailedError,
    cases_to_predict,
    reason,
)


@pytest.mark.parametrize("content", ['{"training": [{"image": "a.png"}]}', '{"test": []}'])
def test_a_list_without_cases_to_predict_says_how_to_get_some(tmp_path: Path, content: str) -> None:
    (tmp_path / "datalist.json").write_text(content)
    with pytest.raises(ValueError, match=r"`test` of .*datalist.json must list the cases to predict, got none; add"):
        cases_to_predict(tmp_path / "datalist.json", tmp_path)


def picture(path: Path, value: int = 1) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5), value, np.uint8)).save(path)
    return {"image": str(path)}


class Panic(BaseException):
    """What compiled code raises, and no Exception."""


class Fragile(nn.Module):
    """Fails for pictures of some values."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if image.max() == 9:
            raise Panic("called `unwrap` on a missing value")
        if image.max() == 8:
            raise KeyboardInterrupt
        return image


def evaluator(cases: list[dict[str, Any]], output: Path, num_workers: int = 0) -> CaseEvaluator:
    reading = Compose([LoadImaged("image", reader="PILReader"), EnsureChannelFirstd("image")])
    names = {"output_dir": output, "output_postfix": "seg", "output_ext": ".png", "separate_folder": False}
    saving = Compose([SaveImaged("pred", **names)])
    loader = DataLoader(CaseDataset(cases, reading), batch_size=1, num_workers=num_workers)
    return CaseEvaluator(
        device=torch.device("cpu"), val_data_loader=loader, network=Fragile(), postprocessing=saving
    )


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_predictions_keep_the_folders_that_tell_images_of_one_name_apart(tmp_path: Path) -> None:
    cases = [picture(tmp_path / "in" / name) for name in ("a/image.png", "b/image.png", "b/c/image.png")]
    evaluator(cases, tmp_path / "out").run()
    assert written(tmp_path / "out") == ["a/image_seg.png", "b/c/image_seg.png", "b/image_seg.png"]


def test_predictions_of_one_folder_are_written_into_one(tmp_path: Path) -> None:
    evaluator([picture(tmp_path / "in/a" / name) for name in ("x.png", "y.png")], tmp_path / "out").run()
    assert written(tmp_path / "out") == ["x_seg.png", "y_seg.png"]


@pytest.mark.parametrize("names", [("x.png", "x.tif"), ("x.png", "y.png", "x.png"), ("x.nii.gz", "x.png")])
def test_two_images_whose_predictions_would_have_one_name_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    cases = [{"image": str(tmp_path / name)} for name in names]
    with pytest.raises(ValueError, match="predictions can have a name each, got .*x.*x.*; rename one"):
        CaseDataset(cases, Compose([]))


def test_cases_without_a_path_are_told_apart_by_nobody(tmp_path: Path) -> None:
    dataset = CaseDataset([{"image": np.zeros(3)}, {"image": np.zeros(3)}, {"image": ["a.png", "b.png"]}], Compose([]))
    assert dataset.paths() == ["a.png"]
    assert CaseDataset([], Compose([])).folder() == ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_case_that_fails_is_named_and_the_others_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    good = [picture(tmp_path / f"in/{name}.png") for name in "ab"]
    (tmp_path / "in/broken.png").write_bytes(b"\x89PNG nothing")
    cases = [
        {"image": str(tmp_path / "in/broken.png")}, good[0], picture(tmp_path / "in/panic.png", 9),
        {"image": str(tmp_path / "in/missing.png")}, good[1],
    ]
    engine = evaluator(cases, tmp_path / "out", num_workers)
    for _ in range(2):                                             # a second run tells of its own failures only
        with caplog.at_level(logging.ERROR), pytest.raises(CasesFailedError) as error:
            engine.run()
        lines = str(error.value).splitlines()
        assert lines[0] == "3 of 5 cases have no result, the others are done:"
        assert [line.split(",")[0].split(":")[0].strip() for line in lines[1:]] == [
            str(tmp_path / f"in/{name}.png") for name in ("broken", "panic", "missing")
        ]
        assert "called `unwrap` on a missing value" in lines[2]
        assert written(tmp_path / "out") == ["a_seg.png", "b_seg.png"]
    assert "No result for" in caplog.text


def test_a_user_who_interrupts_is_obeyed(tmp_path: Path) -> None:
    cases = [picture(tmp_path / "in/a.png", 8), picture(tmp_path / "in/b.png")]
    with pytest.raises(KeyboardInterrupt):
        evaluator(cases, tmp_path / "out").run()
    assert written(tmp_path / "out") == []


def test_a_place_that_takes_no_predictions_is_refused_before_the_first_case(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    engine = evaluator([picture(tmp_path / "in/a.png", 9)], tmp_path / "out")
    with pytest.raises(OSError, match="`output_dir` must be a folder to write to, got .*out: "):
        engine.run()
    assert not engine.failures


def test_many_failures_are_counted(tmp_path: Path) -> None:
    cases = [{"image": str(tmp_path / f"{number}.png")} for number in range(30)]
    with pytest.raises(CasesFailedError, match=r"^30 of 30 cases[\s\S]*19.png[\s\S]*\n  and 10 more$"):
        evaluator(cases, tmp_path / "out").run()


@pytest.mark.parametrize(("message", "told"), [
    ("/usr/itkTIFFImageIO.cxx:514:\nITK ERROR: TIFFImageIO(0x55): 64 bits", "ITK ERROR: TIFFImageIO(0x55): 64 bits"),
    ("reading failed\nsecond line", "reading failed"),
    ("'label'", "KeyError: 'label'"),
    ("", "KeyError: "),
])
def test_the_reason_is_the_line_that_says_something(message: str, told: str) -> None:
    first = RuntimeError(message) if len(message) > 8 else type("KeyError", (RuntimeError,), {})(message)
    last = RuntimeError("applying transform <x>")
    last.__cause__ = first
    assert reason(last) == told


def broken(case: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("three channels instead of one")


def test_an_error_of_a_transform_names_the_case(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"a\.png cannot be prepared: three channels instead of one"):
        CaseCompose([broken])({"image": "a.png"})
    image = MetaTensor(torch.ones(1, 2), meta={"filename_or_obj": "b.png"})
    with pytest.raises(CaseError, match=r"b\.png cannot be prepared"):
        CaseCompose([CaseCompose([broken])])({"image": image})
    with pytest.raises(CaseError, match=r"c\.png cannot be prepared: .* No such file"):
        CacheDataset([{"image": str(tmp_path / "c.png")}], CaseCompose([LoadImaged("image")]), progress=False)
    with pytest.raises(RuntimeError, match="applying transform"):
        CaseCompose([broken])({"image": torch.ones(1, 2)})         # nobody knows which
    assert CaseCompose([])({"image": "a.png"}) == {"image": "a.png"}


class Picky(nn.Module):
    """A toy network that takes no batch after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = toys.student(), 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ValueError("expected 1 channel")
        out: torch.Tensor = self.network(image)
        return out


def test_an_error_of_a_step_names_the_cases_of_its_batch() -> None:
    engine = toys.make_trainer(Picky(), [CaseGuard()], data=toys.cases(4))
    with pytest.raises(CaseError, match=r"Step 2 failed on case_\d.nii.gz, case_\d.nii.gz: expected 1 channel"):
        engine.run()


def test_an_error_between_steps_is_not_laid_on_the_last_cases() -> None:
    def fail(_: Any) -> None:
        raise ValueError("the disk is full")

    engine = toys.make_trainer(toys.student(), [CaseGuard(), toys.on(Events.EPOCH_COMPLETED, fail)], data=toys.cases(2))
    with pytest.raises(ValueError, match="^the disk is full$"):
        engine.run()
