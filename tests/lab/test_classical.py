# SPDX-License-Identifier: Apache-2.0
"""Rules beside networks: orientation, the choice on validation, the metrics of a bundle, and what they find."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from numpy.typing import NDArray
from PIL import Image

from lab.classical import RULES
from lab.classical.case import Case, Rule, body_box
from lab.classical.headneck import canal, gullet
from lab.classical.priors import mean_label
from lab.classical.sarcoma import ELLIPSOID, ellipsoid
from lab.classical.scoring import choose, measure_rules, to_case, to_file_axes
from lab.classical.target import larger_side
from lab.classical.texture import features
from lab.recipe import Row, read_recipe

DATA = Path(__file__).parents[3] / "shared" / "data"


def oblique(axes: str) -> MetaTensor:
    """A numbered volume of 2 x 3 x 4 voxels whose axes run as told."""
    turns = {"RAS": np.diag([2.0, 3.0, 4.0, 1.0]), "LPS": np.diag([-2.0, -3.0, 4.0, 1.0]),
             "SRA": np.array([[0, 3.0, 0, 0], [0, 0, 4.0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])}
    values = torch.arange(24.0).reshape(1, 2, 3, 4)
    return MetaTensor(values, affine=torch.as_tensor(turns[axes], dtype=torch.float64))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA"])
def test_a_label_map_comes_back_to_the_axes_of_its_file(axes: str) -> None:
    image = oblique(axes)
    case = to_case(image, image)

    assert case.label is not None
    found = to_file_axes(case.label.astype(np.uint8), image)
    assert np.array_equal(found, np.asarray(image[0]))
    # along the world's axes, the first voxel step must be what the affine says of it
    steps = {"RAS": (2, 3, 4), "LPS": (2, 3, 4), "SRA": (3, 4, 2)}
    assert case.spacing == steps[axes]
    world = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(image[0]), np.asarray(image.affine)))
    assert np.array_equal(case.image, world.get_fdata())


def test_pictures_lie_as_they_do() -> None:
    image = MetaTensor(torch.arange(6.0).reshape(1, 2, 3))
    case = to_case(image)
    assert (case.image.shape, case.label) == ((2, 3), None)
    assert np.array_equal(to_file_axes(case.image.astype(np.uint8), image), case.image)


class Scorer:
    """Scores how near the one number of a map is to 7; the lower the better."""

    def run(self, cases: Any, found: Any, names: Any) -> dict[str, float]:
        return {"far": float(np.mean([abs(int(one.max()) - 7) for one in found]))}


@pytest.mark.parametrize(("higher", "expected"), [(False, ({"a": 6, "b": 0}, 1.0)), (True, ({"a": 1, "b": 0}, 6.0))])
def test_the_first_of_the_best_parameters_on_validation_is_taken(higher: bool, expected: Any) -> None:
    def segment(case: Case, a: int, b: int) -> NDArray[np.uint8]:
        return np.full(case.image.shape, a, np.uint8)

    rule = Rule(lambda training, classes: segment, {"a": (1, 6, 8), "b": (0, 1)})
    cases = [{"image": oblique("RAS")}, {"image": oblique("LPS")}]
    assert choose(rule, segment, cases, Scorer(), "far", higher) == expected


def test_an_inset_ellipsoid_touches_what_it_must() -> None:
    mask = ellipsoid((21, 11, 5), (1.0, 2.0, 4.0), 2.0)

    assert mask[10, 5, 2]
    assert [int(mask.any(tuple({0, 1, 2} - {axis})).sum()) for axis in range(3)] == [17, 9, 5]
    assert not mask[0].any()
    assert not mask[2, 1, 0]
    image = np.zeros((9, 9, 9), np.float32)
    image[:5] = -800.0
    found = ELLIPSOID.prepare([], 2)(Case(image, (1.0,) * 3, None), inset=1.0, soft_tissue=True)
    assert found[6, 4, 4] == 1
    assert not found[:5].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mean_label_follows_the_body_and_not_what_it_looks_like(dims: int) -> None:
    def case(size: int, shift: int, label: bool = True) -> Case:
        image = np.full((40,) * dims, -1000.0, np.float32)
        body = tuple(slice(shift, shift + size) for _ in range(dims))
        image[body] = 50.0
        organ = np.zeros(image.shape, np.int16)
        organ[tuple(slice(shift, shift + size // 2) for _ in range(dims))] = 2
        return Case(image, (1.0,) * dims, organ if label else None)

    training, test = [case(20, 4), case(24, 10)], case(32, 6)
    found = mean_label(training, 3)(Case(test.image * 2, test.spacing, None), threshold=0.5)

    assert test.label is not None
    assert set(np.unique(found)) == {0, 2}
    overlap = 2 * ((found == 2) & (test.label == 2)).sum() / ((found == 2).sum() + (test.label == 2).sum())
    assert overlap > 0.9
    with pytest.raises(ValueError, match="training cases of `mean_label` must have labels, got one without"):
        mean_label([case(20, 4, label=False)], 3)


@pytest.mark.parametrize("left", [True, False])
def test_the_side_with_more_tissue_is_taken(left: bool) -> None:
    def case(side: int, label: bool) -> Case:
        """A body of fat with two columns of muscle, one of them wider, which is the target."""
        image, marks = np.full((40, 40, 40), -1000.0, np.float32), np.zeros((40, 40, 40), np.int16)
        image[2:38, 2:38, 2:38] = -90.0
        for at, width in ((12, 4 + 3 * (side < 0)), (27, 4 + 3 * (side > 0))):
            image[at - width : at + width, 12:28, 12:28] = 40.0
            if width > 4:
                marks[at - width : at + width, 12:28, 12:28] = 1
        return Case(image, (2.0,) * 3, marks if label else None)

    segment = larger_side([case(-1, True), case(1, True)], 2)
    found = segment(case(-1 if left else 1, False), threshold=0.4, low=-1000.0, side=0.6)
    halves = int(found[:20].sum()), int(found[20:].sum())
    assert min(halves) == 0 < max(halves)
    assert (halves[0] > halves[1]) == left
    both = segment(case(1, False), threshold=0.2, low=-1000.0, side=0.0)
    assert both[:20].any()
    assert both[20:].any()


def test_the_box_of_a_body_is_tight_and_all_where_there_is_none() -> None:
    image = np.full((6, 7), -1000.0)
    assert body_box(image) == (slice(0, 6), slice(0, 7))
    image[2:4, 5] = 0
    assert body_box(image) == (slice(2, 4), slice(5, 6))


def test_the_canal_is_followed_through_slices_and_the_gullet_lies_behind_the_air() -> None:
    places = np.mgrid[0:100, 0:130]
    bone, image = np.zeros((100, 130, 12), bool), np.full((100, 130, 12), 40.0, np.float32)
    for z in range(12):
        distance = np.hypot(places[0] - 50 - z / 4, places[1] - 50)
        bone[:, :, z] = (distance > 6) & (distance < 40)
        image[:, :, z][np.hypot(places[0] - 50, places[1] - 102) < 6] = -900
    places_found = canal(bone, (1.0, 1.0, 3.0), (50.0, 54.0, 11), length=30.0)
    path = np.array(places_found)

    assert path[:, 2].tolist() == list(range(11, 1, -1))
    assert np.abs(path[:, 0] - 50 - path[:, 2] / 4).max() <= 1.5
    assert np.abs(path[:, 1] - 50).max() <= 1.5
    found = gullet(image, (1.0, 1.0, 3.0), places_found[0])
    assert found.shape == (100, 130)
    assert np.argwhere(found).mean(0) == pytest.approx((46, 88), abs=0.5)      # the middle of the air is at 50, 102
    assert not gullet(np.zeros_like(image), (1.0, 1.0, 3.0), places_found[0]).any()


@pytest.mark.parametrize("dark", [False, True])
def test_touching_nuclei_are_apart_and_specks_are_gone(dark: bool) -> None:
    places = np.mgrid[0:60, 0:90]
    discs = [np.hypot(places[0] - row, places[1] - column) < 12 for row, column in ((20, 20), (20, 41), (42, 70))]
    image = np.full((60, 90), 30.0, np.float32)
    for disc in discs:
        image[disc] = 200.0
    image[42, 70] = image[55, 5] = 120.0                           # a hole and a speck
    segment = RULES["nuclei_watershed"].prepare([], 2)
    values = {key: values[0] for key, values in RULES["nuclei_watershed"].grid.items()}
    found = segment(Case(255 - image if dark else image, (1.0, 1.0), None), **values)

    assert found.max() == len(set(np.unique(found))) - 1 == 3
    for disc in discs:
        number = np.bincount(found[disc]).argmax()
        assert ((found == number) & disc).sum() / ((found == number) | disc).sum() > 0.9
    assert found[55, 5] == 0
    assert not segment(Case(np.full((9, 9), 7.0, np.float32), (1.0, 1.0), None), **values).any()


def test_dark_walls_part_cells() -> None:
    pytest.importorskip("waterz")
    image = np.random.default_rng(0).normal(150, 3, (24, 40, 40)).astype(np.float32)
    image[:, 19:22] = image[:, :, 13:16] = 60.0
    image[:, 22:, 28:31] = 60.0                                    # a wall on one side only
    segment = RULES["em_ridges"].prepare([], 2)
    found = segment(Case(image, (10.0,) * 3, None), sigma=1.5, share=0.9, threshold=0.5)
    middles = [found[12, row, column] for row in (9, 31) for column in (6, 22, 36)]
    assert middles[1] == middles[2]
    assert len({*middles}) == 5


def write_case(folder: Path, name: str, box: int) -> dict[str, str]:
    """A box of muscle in fat, and its label."""
    image, label = np.full((30, 28, 26), -90, np.int16), np.zeros((30, 28, 26), np.uint8)
    place = tuple(slice(8, 8 + box) for _ in range(3))
    image[place], label[place] = 40, 1
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    for kind, values in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}_{kind}.nii.gz")
    return {kind: str(folder / f"{name}_{kind}.nii.gz") for kind in ("image", "label")}


def test_rules_are_scored_by_the_metrics_of_the_bundle_and_write_label_maps(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository / "bundles" / "boundary_relation_ct_organs")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    lists = {"training": 14, "validation": 12, "test": 13}
    content = {name: [write_case(tmp_path, name, box)] for name, box in lists.items()}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    found = measure_rules({
        "rules": ["sarcoma_muscle", "mean_label"], "configs": ["train", "evaluate"],
        "options": {"datalist": str(tmp_path / "datalist.json")}, "metric": "val_mean_dice", "higher_is_better": True,
        "patient": None, "test": None, "output": str(tmp_path / "out"),
    })

    muscle = found["sarcoma_muscle"]
    written = nibabel.load(tmp_path / "out" / "sarcoma_muscle" / "test_image.nii.gz")
    label = nibabel.load(content["test"][0]["label"])
    assert np.array_equal(written.affine, label.affine)
    mine, true = (np.asarray(one.dataobj) > 0 for one in (written, label))
    assert muscle["mean"] == pytest.approx(2 * (mine & true).sum() / (mine.sum() + true.sum()), abs=1e-4)
    assert muscle["mean"] > 0.6
    assert muscle["per_case"] == {"test_image": muscle["mean"]}
    assert muscle["metrics"].keys() >= {"val_hd95", "val_assd", "val_surface_dice", "val_wrong_volume"}
    assert set(muscle["parameters"]) == {"low", "high", "radius"}
    assert 0 < found["mean_label"]["mean"] <= 1


@pytest.fixture
def without_scripts() -> Iterator[None]:
    """Bundles share the name `scripts`: that of another one is forgotten, before and after."""
    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
            del sys.modules[name]

    forget()
    yield
    forget()


@pytest.mark.usefixtures("without_scripts")
def test_instances_are_scored_by_the_metrics_of_their_bundle_and_written_as_pictures(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository / "bundles" / "graph_relation_nuclei")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    places, content = np.mgrid[0:64, 0:96], {}
    for name, color in {"validation": (250, 200, 240), "test": (20, 40, 20)}.items():
        label, pixels = np.zeros((64, 96), np.uint8), np.full((64, 96, 3), color, np.uint8)
        for number, (row, column) in enumerate(((20, 20), (20, 43), (44, 70)), start=1):
            label[np.hypot(places[0] - row, places[1] - column) < 11] = number
        pixels[label > 0] = 120
        files = {kind: str(tmp_path / f"{name}_{kind}.png") for kind in ("image", "label")}
        Image.fromarray(pixels).save(files["image"])
        Image.fromarray(label).save(files["label"])
        content[name] = [files]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": content["validation"], **content}))
    found = measure_rules({
        "rules": ["nuclei_watershed"], "configs": ["train", "evaluate"],
        "options": {"datalist": str(tmp_path / "datalist.json")}, "metric": "val_pq", "higher_is_better": True,
        "patient": None, "test": None, "output": str(tmp_path / "out"),
    })["nuclei_watershed"]

    assert found["mean"] == found["per_case"]["test_image"] > 0.9
    assert found["metrics"]["val_dic"] == 0
    written = np.asarray(Image.open(tmp_path / "out" / "nuclei_watershed" / "test_image.png"))
    assert written.shape == label.shape
    assert [np.bincount(written[label == number]).argmax() > 0 for number in range(4)] == [False, True, True, True]


@pytest.mark.usefixtures("without_scripts")
@pytest.mark.parametrize("scale", [1, 8])
def test_texture_tells_classes_apart_at_the_resolution_of_the_student(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: int
) -> None:
    """Stripes of two or of four pixels, of any color: averages of eight pixels hide them."""
    monkeypatch.chdir(repository / "bundles" / "inter_resolution_histology_classification")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    draws = np.random.default_rng(0)
    content: dict[str, Any] = {"labels": {"0": "fine", "1": "coarse", "2": "even"}}
    for name, count in {"training": 18, "validation": 9, "test": 9}.items():
        content[name] = []
        for number in range(count):
            width = (2, 4, 8)[number % 3]
            stripes = (np.arange(66) // (width // 2)) % 2 * 80 if number % 3 < 2 else np.full(66, 40)
            pixels = draws.integers(60, 160, 3) + stripes[:, None, None] + draws.normal(0, 4, (66, 66, 3))
            file = tmp_path / f"{name}_{number}.png"
            Image.fromarray(np.uint8(pixels.clip(0, 255))).save(file)
            content[name].append({"image": str(file), "label": content["labels"][str(number % 3)]})
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    found = measure_rules({
        "rules": ["texture"], "configs": ["train", "evaluate"],
        "options": {"datalist": str(tmp_path / "datalist.json"), "scale": scale}, "metric": "val_balanced_accuracy",
        "higher_is_better": True, "patient": None, "test": None, "output": str(tmp_path / "out"),
    })["texture"]
    assert len(found["per_case"]) == 9
    assert set(found["per_case"].values()) <= {0.0, 1.0}
    assert found["mean"] == pytest.approx(np.mean(list(found["per_case"].values())), abs=1e-4)
    assert (found["mean"] == 1.0) is (scale == 1)
    assert list(found["parameters"]) == ["penalty"]


def test_a_picture_without_any_texture_has_features() -> None:
    assert np.isfinite(features(np.full((3, 6, 5), 0.5, np.float32))).all()


@pytest.mark.parametrize("told", [{"classical": "magic"}, {"leaks": ["magic"]}])
def test_a_row_names_rules_that_there_are(told: dict[str, Any]) -> None:
    message = r"`classical` and `leaks` of row 'a' must be of .*'mean_label'.*got \['magic'\]"
    with pytest.raises(ValueError, match=message):
        Row("a", **told)


def test_the_rules_of_the_repository_are_named_by_its_recipes(repository: Path) -> None:
    rows = [row for bundle in (repository / "bundles").glob("*/") for row in read_recipe(bundle).rows.values()]
    named = {name for row in rows for name in (row.classical, *row.leaks) if name}
    assert named == RULES.keys()


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside the repository")
def test_the_mandible_is_found_in_real_scans() -> None:
    folder, rule = DATA / "ct_headneck_openkbp", RULES["headneck_thresholds"]
    segment = rule.prepare([], 8)
    scores = []
    for name in json.loads((folder / "splits.json").read_text())["val"][:2]:
        volumes = [nibabel.load(folder / kind / name) for kind in ("images", "labels")]
        image, label = map(nibabel.as_closest_canonical, volumes)
        case = Case(image.get_fdata().astype(np.float32), tuple(map(float, image.header.get_zooms()[:3])), None)
        found = segment(case, **{key: values[-1] for key, values in rule.grid.items()}) == 7
        true = np.asarray(label.dataobj) == 7
        scores.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert np.mean(scores) > 0.6
