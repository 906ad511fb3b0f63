# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import SliceInferer, SlidingWindowInferer

import toys
from medkd.data.soft_labels import FillLabeld, SoftLabeld, SoftLabels, UnpackSoftLabeld
from medkd.handlers.teacher import Teacher
from medkd.losses.adversarial import AdversarialLoss
from medkd.losses.base import DistillationLoss
from medkd.losses.discriminator import Discriminator
from medkd.losses.logits import SoftLabelLoss
from medkd.losses.soft_target import SoftTargetLoss
from medkd.ops.ignored import UNLABELED
from medkd.ops.soft_label import unpack_probabilities

WEIGHTS = {"logits": 1.0}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(toys.teacher().state_dict(), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


def soft_labels(
    path: Path, losses: DistillationLoss | list[DistillationLoss] | None = None,
    network: Callable[[], torch.nn.Module] = toys.teacher, **options: Any,
) -> SoftLabels:
    given = options.pop("weights", WEIGHTS)
    teacher = Teacher(network, path, weights=given)
    inferer = SlidingWindowInferer((8, 8), sw_batch_size=2, overlap=0.5)
    return SoftLabels(teacher, path.parent / "soft", inferer, losses or SoftLabelLoss(), given, **options)


def case() -> dict[str, Any]:
    return {"image": toys.cases(1)[0]["image"]}


def test_a_volume_gets_what_the_teacher_says_of_it(weights: Path) -> None:
    image = case()["image"]
    network = toys.teacher()
    network.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        expected = SlidingWindowInferer((8, 8), overlap=0.5)(image[None].as_tensor(), network.eval())[0].softmax(0)
    found = unpack_probabilities(soft_labels(weights)(image))
    assert (found - expected).abs().max() < 0.01


def test_the_teacher_predicts_a_volume_once_for_all_runs(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = soft_labels(weights)(case()["image"])
    assert len(list((weights.parent / "soft").glob("*/*.npz"))) == 1
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("the teacher was loaded again"))
    assert torch.equal(soft_labels(weights)(case()["image"]), first)


def test_an_inferer_that_changes_when_it_is_used_finds_the_soft_labels_of_before(weights: Path) -> None:
    """MONAI's `SliceInferer` sets its `roi_size` at each call."""
    volume = torch.stack([one["image"] for one in toys.cases(3)], dim=-1)
    teacher = Teacher(toys.teacher, weights, weights=WEIGHTS)
    for images in ([volume, volume + 0.1], [volume + 0.1, volume]):   # of two runs
        inferer = SliceInferer(roi_size=[8, 8], spatial_dim=2, overlap=0.5)
        store = SoftLabels(teacher, weights.parent / "soft", inferer, SoftLabelLoss(), WEIGHTS)
        for image in images:
            assert store(image).shape[1:] == volume.shape[1:]
    assert len(list((weights.parent / "soft").glob("*/*.npz"))) == 2


def test_another_image_or_another_teacher_has_its_own_file(weights: Path) -> None:
    store = soft_labels(weights)
    store(case()["image"])
    store(case()["image"] + 0.1)
    torch.save(toys.teacher(seed=5).state_dict(), weights)
    other = soft_labels(weights)(case()["image"])
    assert not torch.equal(other, store(case()["image"]))
    assert sorted(len(list(folder.glob("*.npz"))) for folder in (weights.parent / "soft").iterdir()) == [1, 2]


def test_file_of_another_teacher_is_refused(weights: Path) -> None:
    soft_labels(weights)(case()["image"])
    (file,) = (weights.parent / "soft").glob("*/*.npz")
    torch.save(toys.teacher(seed=5).state_dict(), weights)
    other = soft_labels(weights)
    other(case()["image"])
    (own,) = (one for one in (weights.parent / "soft").glob("*/*.npz") if one != file)
    own.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="`soft_label_dir` must hold soft labels of the teacher .*remove the file"):
        soft_labels(weights)(case()["image"])


@pytest.mark.parametrize("content", [b"", b"PK", b"torn"])
def test_broken_file_is_made_again(weights: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    first = soft_labels(weights)(case()["image"])
    (file,) = (weights.parent / "soft").glob("*/*.npz")
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(soft_labels(weights)(case()["image"]), first)
    assert "is no soft label" in caplog.text
    assert np.load(file)["values"].dtype == np.uint8


def test_folder_that_cannot_be_written_to_is_no_obstacle(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    (weights.parent / "soft").write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        soft_labels(weights)(case()["image"])
    assert "could not be kept" in caplog.text


def test_classes_that_are_nowhere_take_no_room(weights: Path) -> None:
    class Three(toys.ToyNetwork):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([super().forward(image), torch.full_like(image, -1e4)], dim=1)

    packed = soft_labels(weights, network=lambda: Three(toys.TEACHER_WIDTH))(case()["image"])
    assert packed.shape[0] == 3
    assert not packed[2].any()
    (file,) = (weights.parent / "soft").glob("*/*.npz")
    assert np.load(file)["values"].shape[0] == 2
    assert torch.equal(soft_labels(weights, network=lambda: Three(toys.TEACHER_WIDTH))(case()["image"]), packed)


def test_losses_that_tap_layers_need_the_live_teacher(weights: Path) -> None:
    both = [SoftLabelLoss(), toys.hint_loss()]
    assert soft_labels(weights, both, weights={"logits": 1.0}).replaces_teacher
    assert not soft_labels(weights, both, weights={"logits": 1.0, "features": 0.1}).replaces_teacher
    assert not soft_labels(weights, cache=False).replaces_teacher


def test_a_discriminator_sees_the_live_teacher(weights: Path) -> None:
    both = [SoftLabelLoss(), AdversarialLoss(Discriminator(2, spatial_dims=3, width=4, layers=2), "paper")]
    assert soft_labels(weights, both, weights={"logits": 1.0, "adversarial": 0.0}).replaces_teacher
    assert not soft_labels(weights, both, weights={"logits": 1.0, "adversarial": 0.1}).replaces_teacher


def test_without_a_teacher_nothing_is_wanted(weights: Path) -> None:
    weights.unlink()
    store = soft_labels(weights)
    assert not store.are_wanted(labeled=False)
    assert set(SoftLabeld(store)(case())) == {"image", "centers"}
    assert not soft_labels(weights, weights={}).are_wanted(labeled=False)


def test_losses_must_read_the_teacher_alike(weights: Path) -> None:
    losses: list[DistillationLoss] = [SoftLabelLoss(), SoftLabelLoss(activation="sigmoid")]
    with pytest.raises(ValueError, match="`losses` must agree on `activation`"):
        soft_labels(weights, losses)


def test_crops_are_centered_by_the_label_or_else_by_the_teacher(weights: Path) -> None:
    store = soft_labels(weights)
    labeled = toys.cases(1)[0]
    assert SoftLabeld(store)(labeled)["centers"] is labeled["label"]
    found = SoftLabeld(store)(case())
    assert torch.equal(found["centers"].as_tensor()[0], unpack_probabilities(store(case()["image"])).argmax(0).byte())


def test_crops_carry_probabilities_on_the_grid_of_their_image(weights: Path) -> None:
    store = soft_labels(weights)
    data = SoftLabeld(store)(toys.cases(1)[0])
    assert isinstance(data["soft_label"], MetaTensor)
    found = UnpackSoftLabeld(store)(data)
    assert found.keys() == {"image", "label", "teacher_image", "teacher_pred"}
    assert found["teacher_pred"].shape == (2, toys.SIZE, toys.SIZE)
    assert found["teacher_pred"].dtype == torch.float32


@pytest.mark.parametrize("labeled", [True, False])
def test_crops_carry_one_class_map_where_the_losses_read_no_more(weights: Path, labeled: bool) -> None:
    store = soft_labels(weights, SoftTargetLoss(), weights={"soft_target": 1.0})
    data = SoftLabeld(store)(toys.cases(1)[0] if labeled else case())
    assert data["soft_label"].shape == (1, toys.SIZE, toys.SIZE)
    assert data["soft_label"].dtype == torch.uint8
    found = UnpackSoftLabeld(store)(data)["teacher_classes"]
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.as_tensor()[0], unpack_probabilities(store(case()["image"])).argmax(0).float())


def test_one_loss_that_reads_more_keeps_the_probabilities(weights: Path) -> None:
    both = [SoftTargetLoss(), SoftLabelLoss()]
    assert soft_labels(weights, both, weights={"soft_target": 1.0}).gives_classes
    for one in ({"soft_target": 1.0, "logits": 1.0}, {"logits": 1.0}):
        assert not soft_labels(weights, both, weights=one).gives_classes
    assert not soft_labels(weights, SoftTargetLoss("probabilities"), weights={"soft_target": 1.0}).gives_classes


def test_cases_without_a_label_get_one_that_says_so() -> None:
    filled = FillLabeld()(case())["label"]
    assert filled.shape == (1, toys.SIZE, toys.SIZE)
    assert bool((filled == UNLABELED).all())
    labeled = toys.cases(1)[0]
    assert FillLabeld()(labeled)["label"] is labeled["label"]
    padded = {**case(), "label": torch.nn.functional.pad(filled[:, 1:], (0, 0, 1, 0))}
    assert bool((FillLabeld()(padded)["label"] == UNLABELED).all())


def test_soft_labels_travel_to_workers(weights: Path) -> None:
    store = copy.deepcopy(soft_labels(weights))                    # which asks for the same state as pickling
    assert torch.equal(store(case()["image"]), soft_labels(weights)(case()["image"]))
