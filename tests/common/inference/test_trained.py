# SPDX-License-Identifier: Apache-2.0
"""Weights that see another input than they were trained with are told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from medkd.inference.trained import tell_other_input


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    options = {"epochs": 3, "spacing": [4.0, 4.0, 3.0], "student_input": "native"}
    (tmp_path / "model.json").write_text(json.dumps({"options": options}))
    return tmp_path / "model.pt"


def told(weights: Path, caplog: pytest.LogCaptureFixture, place: str = "handlers", **options: Any) -> list[str]:
    """Warnings of a run of these weights."""
    loader = {"_target_": "CheckpointLoader", "load_path": "$@folder + '/" + weights.name + "'"}
    handlers = [{"_target_": "StatsHandler"}, loader]
    run = {"handlers": handlers} if place == "handlers" else {"validate": {"handlers": handlers}}
    caplog.clear()
    tell_other_input(ConfigParser({"folder": str(weights.parent), **run, **options}))
    return caplog.messages


@pytest.mark.parametrize("place", ["handlers", "validate#handlers"])
def test_another_spacing_is_told_with_the_way_out(weights: Path, caplog: pytest.LogCaptureFixture, place: str) -> None:
    (message,) = told(weights, caplog, place, spacing=[3, 3, 3], epochs=1)
    assert f"{weights} was trained with spacing [4.0, 4.0, 3.0], and this run has [3, 3, 3]" in message
    assert message.endswith("Give --spacing '[4.0, 4.0, 3.0]'.")
    (message,) = told(weights, caplog, place, student_input="upsampled")
    assert message.endswith("Give --student_input native.")


def test_the_same_input_is_not_told(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(weights, caplog, spacing=[4, 4, 3], student_input="native", epochs=1) == []
    assert told(weights, caplog, spacing="@others") == []
    assert told(weights, caplog) == []


def test_images_of_low_resolution_are_taken_as_they_are(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"scale": 4, "rim": 1, "intensity_range": [0, 255]}
    weights.with_name("model.json").write_text(json.dumps({"options": options}))
    assert told(weights, caplog, scale=1, rim=0) == []
    assert len(told(weights, caplog, scale=1, rim=0, intensity_range=[0, 1])) == 1
    assert len(told(weights, caplog, scale=2, rim=0)) == 2
    assert len(told(weights, caplog, scale=1, rim=1, student_input="upsampled")) == 1


def test_another_field_of_view_of_a_classifier_is_told(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights.with_name("model.json").write_text(json.dumps({"options": {"patch_size": [96, 96, 96]}}))
    assert told(weights, caplog, patch_size=[64, 64, 64]) == []
    assert len(told(weights, caplog, patch_size=[64, 64, 64], saving={"class_names": []})) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"options": []}'])
def test_without_what_was_trained_nothing_is_told(weights: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    weights.with_name("model.json").write_text(text)
    assert told(weights, caplog, spacing=[3, 3, 3]) == []
    weights.with_name("model.json").unlink()
    assert told(weights, caplog, spacing=[3, 3, 3]) == []


def test_other_files_are_not_taken_for_the_trained_one(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(weights.with_name("other.pt"), caplog, spacing=[3, 3, 3]) == []


def test_classes_of_another_order_are_refused(weights: Path, tmp_path: Path) -> None:
    weights.with_name("model.json").write_text(json.dumps({"labels": {"0": "polyp", "1": "cancer", "2": "cancer"}}))
    file = tmp_path / "datalist.json"

    def run(names: Any, **more: Any) -> None:
        file.write_text(json.dumps({"labels": names}))
        loader = {"_target_": "CheckpointLoader", "load_path": str(weights)}
        tell_other_input(ConfigParser({"datalist": str(file), "handlers": [loader], **more}))

    for known in ({"0": "polyp", "1": "cancer", "2": "cancer"}, {"0": "polyp", "1": "other"}, {}, []):
        run(known, saving={"class_names": []})
    with pytest.raises(ValueError, match=r"did, 0 polyp, 1 cancer, 2 cancer, got 0 cancer, 1 polyp; .*polyp,cancer,"):
        run({"0": "cancer", "1": "polyp"}, saving={"class_names": []})
    run({"0": "cancer", "1": "polyp"})                             # a map of classes has numbers, and no names


def test_weights_that_came_with_a_bundle_fit_its_configs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, configs = tmp_path / "models/model.pt", tmp_path / "configs"
    for folder in (weights.parent, configs):
        folder.mkdir()
    (configs / "inference.json").write_text(json.dumps({"spacing": [3, 3, 3], "scale": "$len(@spacing)", "epochs": 2}))
    pred = {"channel_def": {"0": "polyp", "1": "cancer"}}
    (configs / "metadata.json").write_text(json.dumps({"network_data_format": {"outputs": {"pred": pred}}}))
    (message,) = told(weights, caplog, spacing=[4, 4, 4], scale=2)
    assert "was trained with spacing [3, 3, 3]" in message
    (tmp_path / "datalist.json").write_text(json.dumps({"labels": {"0": "cancer", "1": "polyp"}}))
    with pytest.raises(ValueError, match="`labels` of the datalist must number"):
        told(weights, caplog, "validate#handlers", datalist=str(tmp_path / "datalist.json"))
    weights.with_name("model.json").write_text("{}")               # trained here, by a version that told nothing
    assert told(weights, caplog, spacing=[4, 4, 4], datalist=str(tmp_path / "datalist.json")) == []
