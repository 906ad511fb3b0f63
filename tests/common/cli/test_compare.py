# SPDX-License-Identifier: Apache-2.0
"""`medkd compare`: the report of networks that were trained for a step, of each bundle, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

import bundle_runs
from medkd.cli import main
from medkd.cli.networks import read_network, read_settings
from medkd.compare.cases import read_case
from medkd.compare.comparing import compare
from medkd.compare.errors import class_dice
from medkd.data.bundle_check import scripts_of
from medkd.report.pictures import DIFFERENT

Refused = Callable[[list[str], str], None]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
BUNDLES = Path(__file__).parents[3] / "bundles"
SEVEN = ["--set", "out_channels=7", "--set", "spacing=[8.0,8.0,8.0]", "--set", "patch_size=[32,32,32]"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def copied(name: str, folder: Path) -> Path:
    ignore = shutil.ignore_patterns("runs", "eval", "teacher", "checkpoints", "logs", "__pycache__")
    return Path(shutil.copytree(BUNDLES / name, folder / name, ignore=ignore))


def run_smoke(bundle: Path, data: Path, *configs: str, **options: object) -> None:
    """Two steps of a training, with the bundle's scripts out of the way of others afterwards."""
    before = list(sys.path)
    try:
        with scripts_of(bundle):
            bundle_runs.run(bundle, "training", "train", *configs, "smoke", dataset_dir=str(data), epochs=1,
                            spacing=[8.0] * 3, patch_size=[32] * 3, **options)
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def ct(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CT bundle with a teacher, and a student distilled from it, of two steps each."""
    bundle = copied("boundary_relation_ct_organs", tmp_path_factory.mktemp("ct"))
    teacher = bundle / "models/teacher"
    run_smoke(bundle, phantoms, "teacher", ckpt_dir=str(teacher))
    run_smoke(bundle, phantoms, ckpt_dir=str(bundle / "runs/student"))
    return bundle


@pytest.fixture(scope="module")
def words(ct: Path, phantoms: Path) -> list[str]:
    """Two networks of one bundle on the phantoms' test case."""
    return ["compare", f"teacher={ct / 'models/teacher/model.pt'}+teacher", f"student={ct / 'runs/student/model.pt'}",
            "--data", str(phantoms), *SEVEN]


@pytest.fixture(scope="module")
def report(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "compare.html"
    assert main([*words, "--output", str(path)]) == 0
    return path.read_text()


def pictures(html: str) -> dict[str, np.ndarray]:
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)"', html)
    return {text: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for text, data in found}


def has_color(pixels: np.ndarray, color: str) -> bool:
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((np.abs(pixels.astype(int) - wanted).max(axis=2) < 60).any())


def test_report_loads_nothing_and_names_no_place_of_this_machine(report: str, ct: Path) -> None:
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\(", report)
    body = report.partition("<h2>Repeat it</h2>")[0]
    assert str(ct) not in body


def test_report_says_what_each_network_is_and_who_taught_whom(report: str, ct: Path) -> None:
    assert "distilled from `teacher`" in report
    assert "with labels alone" in report
    for weights in ("models/teacher/model.pt", "runs/student/model.pt"):
        count = sum(value.numel() for value in torch.load(ct / weights, weights_only=True).values())
        assert f"UNet, {count:,} parameters" in report
        assert f"{weights}, SHA-256 " in report


def test_scores_are_those_of_the_bundles_own_evaluation(report: str, ct: Path, phantoms: Path, tmp_path: Path) -> None:
    before = list(sys.path)
    try:
        with scripts_of(ct):
            bundle_runs.run(ct, "evaluating", "train", "evaluate", dataset_dir=str(phantoms), out_channels=7,
                            spacing=[8.0] * 3, patch_size=[32] * 3, ckpt_dir=str(ct / "runs/student"),
                            output_dir=str(tmp_path))
    finally:
        sys.path[:] = before
    row = re.search(r"<tr><td>student</td>(.*?)</tr>", report)
    cells = re.findall(r"<td>(.*?)</td>", row[1]) if row else []
    head = re.findall(r"<th>(.*?)</th>", report.partition("</thead>")[0])[1:]
    shown = (("val_mean_dice", "Dice", 3), ("val_hd95", "HD95, mm", 1), ("val_volume_ratio", "volume", 2))
    for metric, name, digits in shown:
        lines = (tmp_path / f"{metric}_raw.csv").read_text().splitlines()
        assert cells[head.index(name)] == f"{float(lines[1].split(',')[-1]):.{digits}f}"


def test_pictures_of_all_networks_show_the_same_slices_and_mark_errors(report: str) -> None:
    shown = pictures(report)
    label = next(pixels for text, pixels in shown.items() if text.startswith("label, slice"))
    student = next(pixels for text, pixels in shown.items() if text.startswith("student: ") and "marked" in text)
    assert label.shape == student.shape
    assert has_color(student, DIFFERENT)
    assert not has_color(label, DIFFERENT)


def test_attention_has_a_row_per_level_and_a_column_per_network(report: str) -> None:
    shown = pictures(report)
    for path in ("model.0", "model.1.submodule.1.submodule.1.submodule", "model.2 (the logits)"):
        assert {f"teacher: {path}", f"student: {path}"} <= shown.keys()
        assert not np.array_equal(shown[f"teacher: {path}"], shown[f"student: {path}"])
    titles = re.findall(r"<h4>(.*?)</h4>", report)
    assert titles[0] == "encoder, 1/2 of the size"
    assert titles[-1] == "decoder, full size"


def test_printed_table_and_verdict(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    tap = "model.0,model.1.submodule.0"
    assert main([*words, "--tap", tap, "--pictures", "1", "--slices", "1", "--output", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert "is nearest to the labels: mean Dice " in said
    assert re.search(r"^teacher +\d\.\d{3} .* M +\d+\.\d\d$", said, re.MULTILINE)
    assert said.rstrip().endswith(f"Report with pictures: {tmp_path / 'r.html'}")
    html = (tmp_path / "r.html").read_text()
    assert len(re.findall("<h4>", html)) == 1
    assert "student: model.1.submodule.0" in html


def test_only_cases_with_pictures_are_looked_at(words: list[str], tmp_path: Path, monkeypatch: Patch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("medkd.compare.running.attention_maps", never)
    assert main([*words, "--pictures", "0", "--output", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "Pictures of 1 more case(s)" in html
    assert "Where the networks look" not in html
    assert "Case by case" in html


def test_what_is_marked_is_what_is_scored_whatever_the_axes_of_the_file(
    words: list[str], phantoms: Path, tmp_path: Path
) -> None:
    item = json.loads((phantoms / "datalist.json").read_text())["test"][0]
    files = {}
    for key in ("image", "label"):
        loaded = nib.load(phantoms / item[key])
        turned = loaded.as_reoriented(np.array([[2, 1], [0, -1], [1, -1]]))
        nib.save(turned, tmp_path / f"{key}.nii.gz")
        files[key] = str(tmp_path / f"{key}.nii.gz")
    settings = read_settings(SEVEN[1::2], "--set")
    networks = [read_network(word, tmp_path, None, settings) for word in words[1:3]]
    found = compare(networks, {"one": files}, tmp_path / "maps")
    label = read_case(networks[0], "one", files).label
    assert label is not None
    for outcome in found.outcomes.values():
        expected = [value for value in class_dice(outcome.prediction("one"), label, 7) if not np.isnan(value)]
        assert outcome.score("val_mean_dice", "one") == pytest.approx(np.mean(expected), abs=1e-5)
        assert np.mean(expected) > 0


def test_an_image_without_a_label_has_agreement_in_place_of_scores(
    words: list[str], phantoms: Path, tmp_path: Path, capsys: Capture
) -> None:
    image = phantoms / json.loads((phantoms / "datalist.json").read_text())["test"][0]["image"]
    networks = [word for word in words if "=" in word and "model.pt" in word]
    assert main(["compare", *networks, *SEVEN, "--image", str(image), "--output", str(tmp_path / "r.html")]) == 0
    assert "without scores: that one is better than another cannot be told here" in capsys.readouterr().out
    html = (tmp_path / "r.html").read_text()
    assert "How much the networks agree" in html
    assert "the networks differ" in html
    assert "Dice</th>" not in html


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("graph_relation_nuclei", "nuclei", {"shape": (96, 80)}),
        ("graph_relation_em_neurons", "em", {"shape": (20, 48, 40), "spacing": (10.0, 10.0, 10.0)}),
    ],
)
def test_instances_are_compared_too(name: str, kind: str, options: dict[str, object], tmp_path: Path) -> None:
    from medkd.phantoms.kinds import KINDS

    bundle = copied(name, tmp_path)
    KINDS[kind].write(tmp_path / "data", training=1, validation=1, test=1, **options)
    weights = torch.load(bundle / "models/model.pt", weights_only=True)
    other = {key: value + 0.02 * torch.randn_like(value) if value.dim() > 1 else value
             for key, value in weights.items()}
    torch.save(other, bundle / "models/other.pt")
    words = ["compare", f"ours={bundle}", f"other={bundle}+models/other.pt", "--data", str(tmp_path / "data")]
    assert main([*words, "--output", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    assert "mean affinity to the nearest voxels" in html
    assert "ours: decoder.0" in html
    assert "VOI" in html
    assert ("What is left out" in html) == (kind == "em")


# what is refused


def test_wrong_options_are_refused(words: list[str], refused: Refused) -> None:
    refused(words[:3], "`medkd compare` needs cases, got neither; give --data DATALIST or --image FILE.")
    refused([*words, "--image", "a.nii"], "`medkd compare` needs cases, got both")
    refused([*words, "--label", "a.nii"], "--label must come with --image")
    refused([*words, "--exponent", "0"], "--exponent must be a number of at least 1, got 0.")
    refused([*words, "--slices", "0"], "--slices must be a whole number of 1 or more, got 0.")
    refused([*words, "--window", "40"], "--window must be LEVEL,WIDTH with a width above 0, got 40")
    refused([*words, "--output", f"{__file__}/r.html"], "--output must be in a folder that can be written, got /")
    refused([*words, "--case", "nobody"], "--case must name a case of the list, got 'nobody'; there are 'case_003'.")
    refused([*words, "--list", "tests"], "`key` must name a list of")
    refused([words[0], words[1], *words[3:]], "`medkd compare` needs two or more networks, got 1")


def test_wrong_taps_are_refused(words: list[str], refused: Refused) -> None:
    refused([*words, "--tap", "model.1.submodule.9"],
            "A tap of the teacher must be a module or parameter path of UNet, got 'model.1.submodule.9'; did you mean ")
    refused([*words, "--tap", "model.0,model.0,model.0"], "--tap must have one path, or one for each of 2 networks")


def test_an_empty_list_is_refused(words: list[str], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [], "test": []}))
    refused([*words[:3], "--data", str(tmp_path)], "There must be a case that all networks can be run on, got none")


def test_another_spacing_than_in_training_is_refused(words: list[str], refused: Refused) -> None:
    refused([*words, "--set", "spacing=[3.0,3.0,3.0]"],
            "`teacher` must be run as it was trained, with spacing ")


def test_a_label_that_does_not_fit_is_refused(
    words: list[str], phantoms: Path, tmp_path: Path, refused: Refused
) -> None:
    item = json.loads((phantoms / "datalist.json").read_text())["test"][0]
    image, label = (nib.load(phantoms / item[key]) for key in ("image", "label"))
    voxels = np.asarray(label.dataobj)
    shifted = label.affine + np.array([[0, 0, 0, 40.0]] + [[0.0] * 4] * 3)
    for name, data, affine, message in (
        ("size", voxels[1:], label.affine, "must have the size of its image"),
        ("place", voxels, shifted, "must lie where its image does"),
        ("class", np.where(voxels == 1, 9, voxels), label.affine, "must have values in 0..6, the classes of `teacher`"),
    ):
        file = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(data.astype(np.uint8), affine), file)
        networks = words[:3]
        refused([*networks, *SEVEN, "--image", image.get_filename(), "--label", str(file)], message)
