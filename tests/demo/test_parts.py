# SPDX-License-Identifier: Apache-2.0
"""The pure functions of the demo: scores, orientation, curves, steps."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from curves import curve_figure, epoch_means
from pictures import Volume, best_slice, cut, disagreement, load
from progress import progress_of
from scores import (
    ALONE,
    DISTILLED,
    RUNS,
    TEACHER,
    Result,
    gap_recovered,
    gap_text,
    read_cases,
    table,
    verdict,
)
from steps import Step, StepError, last_lines, run_step, show_command

from medkd.phantoms.ct import ct_phantom

LIVER, SPLEEN, AORTA = 1, 2, 4


def results(teacher: float, alone: float, distilled: float) -> dict[str, Result]:
    dice = {TEACHER: teacher, ALONE: alone, DISTILLED: distilled}
    return {run: Result([[dice[run], math.nan]] * 2, [[3.0, 4.0]] * 2, 10**6, [1.0, 3.0]) for run in RUNS}


def show(words: object, folder: Path) -> str:
    return "a command"


@pytest.mark.parametrize(
    ("scores", "percent"), [((0.75, 0.5, 0.625), 50.0), ((0.75, 0.5, 0.25), -100.0), ((0.5, 0.5, 0.6), None)]
)
def test_the_gap_is_the_share_of_the_distance_to_the_teacher(
    scores: tuple[float, float, float], percent: float | None
) -> None:
    assert gap_recovered(*scores) == percent


def test_a_gap_to_a_weak_teacher_is_not_defined_and_the_text_says_why() -> None:
    assert gap_text(results(0.4, 0.5, 0.6)) == "not defined: the teacher is not better than the student alone"


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.8, 0.5, 0.7), "helped in this run: mean Dice 0.500 alone, 0.700 distilled"),
        ((0.8, 0.5, 0.7), "better in 2 of 2 test cases; 67 % of the gap"),
        ((0.8, 0.5, 0.4), "did not help"),
        ((0.8, 0.5, 0.502), "made no difference"),
        ((0.4, 0.5, 0.7), "nothing to distil"),
    ],
)
def test_the_verdict_is_honest(scores: tuple[float, float, float], words: str) -> None:
    assert words in verdict(results(*scores))


def test_the_table_has_a_row_per_organ_and_a_dash_for_an_organ_that_no_case_has() -> None:
    rows = table(results(0.8, 0.5, 0.7), ["liver", "spleen"])

    assert rows[0] == ["liver", "0.800", "0.500", "0.700", "3.0", "3.0", "3.0"]
    assert rows[1] == ["spleen", "-", "-", "-", "4.0", "4.0", "4.0"]
    assert rows[2] == ["mean", "0.800", "0.500", "0.700", "3.5", "3.5", "3.5"]
    assert rows[3:] == [["parameters"] + ["1.00 M"] * 3, ["seconds per case"] + ["2.00"] * 3]


def test_the_columns_of_a_score_file_are_read_in_the_order_of_their_classes(tmp_path: Path) -> None:
    path = tmp_path / "val_mean_dice_raw.csv"
    path.write_text("filename,class0,class10,class2,mean\na,0.1,0.3,0.2,0.2\nb,1.0,nan,0.5,0.75\n")

    first, second = read_cases(path)

    assert first == [0.1, 0.2, 0.3]
    assert second[:2] == [1.0, 0.5]
    assert math.isnan(second[2])


@pytest.mark.parametrize("seed", range(4))
def test_pictures_are_radiological_whatever_the_orientation_of_the_file(seed: int, tmp_path: Path) -> None:
    case = ct_phantom(seed, shape=(48, 40, 32), spacing=(6.0, 6.0, 8.0))
    nib.save(nib.Nifti1Image(case.label, case.affine), tmp_path / "label.nii.gz")
    label = load(tmp_path / "label.nii.gz")

    def middle(organ: int, plane: str) -> tuple[float, float]:
        axis = 2 if plane == "axial" else 1
        position = int(np.argwhere(label.data == organ)[:, axis].mean())
        pixels, _ = cut(label, plane, position)  # type: ignore[arg-type]
        row, column = np.argwhere(pixels == organ).mean(axis=0)
        return row / pixels.shape[0], column / pixels.shape[1]

    for plane in ("axial", "coronal"):
        assert middle(LIVER, plane)[1] < 0.45 < 0.6 < middle(SPLEEN, plane)[1]
    assert middle(AORTA, "axial")[0] > 0.5    # before the spine, behind the middle
    assert middle(LIVER, "coronal")[0] < 0.5  # under the diaphragm, the top of the picture


def test_a_pixel_has_the_size_of_its_voxel() -> None:
    volume = Volume(np.zeros((4, 5, 6)), (1.0, 2.0, 3.0))

    axial, axial_pixel = cut(volume, "axial", 0)
    coronal, coronal_pixel = cut(volume, "coronal", 0)

    assert (axial.shape, axial_pixel) == ((5, 4), (2.0, 1.0))
    assert (coronal.shape, coronal_pixel) == ((6, 4), (3.0, 1.0))


def test_the_slice_with_most_organs_is_chosen() -> None:
    label = np.zeros((6, 6, 6), dtype=np.uint8)
    label[:, :, 1] = 1
    label[0, :, 4], label[1, :, 4] = 2, 3

    assert best_slice(label, "axial") == 4


def test_disagreement_counts_the_voxels_that_either_calls_an_organ() -> None:
    assert disagreement(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 0])) == pytest.approx(100 * 2 / 3)
    assert disagreement(np.zeros(3), np.zeros(3)) == 0.0


def test_steps_are_averaged_by_epoch() -> None:
    assert epoch_means([(0.5, 4.0), (1.0, 2.0), (1.5, 1.0), (2.0, 1.0)]) == [(1, 3.0), (2, 1.0)]
    assert [epoch for epoch, _ in epoch_means([(step * 25 / 300, 1.0) for step in range(1, 301)])] == list(range(1, 26))


def test_a_plot_takes_the_color_of_the_text_around_it() -> None:
    svg = curve_figure({"teacher": [(1.0, 0.1), (2.0, 0.2)], "student alone": [(2.0, 0.1)]}, "Dice")

    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "student alone" in svg


@pytest.mark.parametrize(
    ("log", "epochs", "expected"),
    [
        ("", 4, (0.0, "epoch 0/4")),
        ("training [3/4]: [1/2]  50%|█████ [00:02<?]", 4, (0.625, "epoch 3/4")),
        ("INFO - Epoch[2] Complete. Time taken", 4, (0.5, "epoch 2/4")),
        ("INFO - Epoch 3/4: loss 3.1 = supervised 3.0", 4, (0.75, "epoch 3/4")),
        ("CT phantoms:  26%|██▋       | 5/20 [00:01<00:03]", 0, (0.25, "case 5/20")),
        ("evaluating: [1/4]  25%|██▌  [00:00<?]", 0, (0.25, "case 1/4")),
        ("something else", 0, (0.0, "")),
    ],
)
def test_progress_is_read_from_the_log(log: str, epochs: int, expected: tuple[float, str]) -> None:
    assert progress_of(log, epochs) == expected


def test_the_end_of_a_log_leaves_out_what_a_bar_wrote_over() -> None:
    assert last_lines("first\nbar 1\rbar 2\r\n\nError: why\n", 2) == "bar 2\nError: why"


def test_a_command_is_shown_as_it_is_typed() -> None:
    words = [sys.executable, "-m", "monai.bundle", "--config_file", "['a.json','b.json']"]

    shown = show_command(words, Path("/home/me/medkd/demo"), Path("/home/me/medkd"))

    assert shown == "cd demo && python -m monai.bundle --config_file \"['a.json','b.json']\""


def make_step(folder: Path, code: str, needs: object = 0) -> Step:
    return Step("one step", [[sys.executable, "-c", code]], folder, folder, needs, [folder / "made"])


def test_a_finished_step_is_skipped_until_its_options_change(tmp_path: Path) -> None:
    code = "open('made', 'w').close(); open('runs', 'a').write('x')"

    ran = [run_step(make_step(tmp_path, code, needs), show) for needs in (0, 0, 1)]
    (tmp_path / "made").unlink()
    ran.append(run_step(make_step(tmp_path, code, 1), show))

    assert ran == [True, False, True, True]
    assert (tmp_path / "runs").read_text() == "xxx"


def test_a_failing_step_shows_the_last_lines_and_is_not_finished(tmp_path: Path) -> None:
    step = make_step(tmp_path, "print('x\\n' * 50); raise SystemExit('the cause')")

    for _ in range(2):
        with pytest.raises(StepError, match=r"'one step' failed with exit code 1[\s\S]*the cause") as error:
            run_step(step, show)
        assert str(tmp_path / "one_step.log") in str(error.value)
        assert str(error.value).count("\nx") < 15


def test_an_interrupted_training_goes_on_and_a_changed_one_starts_anew(tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path('made').mkdir(exist_ok=True)\n"
    code += "pathlib.Path('made/epoch_1.pt').touch(); print(sys.argv[1:]); sys.exit('--resume' not in sys.argv)"

    def step(needs: int) -> Step:
        words = [[sys.executable, "-c", code]]
        return Step("t", words, tmp_path, tmp_path, needs, [tmp_path / "made"], 1, (("--resume",), "epoch_*.pt"))

    with pytest.raises(StepError):
        run_step(step(0), show)
    with pytest.raises(StepError):
        run_step(step(1), show)
    assert run_step(step(1), show)
