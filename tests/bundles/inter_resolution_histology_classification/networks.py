# SPDX-License-Identifier: Apache-2.0
"""The classifiers; run by `test_contract.py` in a process of its own, as the name `scripts` is shared."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from bundle_runs import parsed

sys.path.insert(0, os.environ["MEDKD_BUNDLE"])

from scripts.networks import VGG16, FieldClassifier, with_backbone

BUNDLE = Path(os.environ["MEDKD_BUNDLE"])


def parameters(network: torch.nn.Module) -> int:
    return sum(one.numel() for one in network.parameters())


def test_the_published_network_has_the_published_number_of_parameters() -> None:
    network = VGG16(4)
    assert parameters(network) == 14_716_740
    assert parameters(network.features) == 14_714_688
    assert isinstance(network.features[28], torch.nn.Conv2d)           # before the last ReLU, as released
    assert len(network.features) == 29


def test_the_readme_tells_the_parameters() -> None:
    parser = parsed(BUNDLE, "train")
    student, teacher = parser.get_parsed_content("network_def"), parser.get_parsed_content("teacher_def")()
    text = (BUNDLE / "docs/README.md").read_text()
    assert f"{parameters(student):,}" in text
    assert f"{parameters(teacher):,}" in text


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (55, 33), (1, 1)])
def test_pictures_of_any_size_have_one_score_per_class(size: tuple[int, int]) -> None:
    network = FieldClassifier(5, [4, 6], [1, 2]).eval()
    assert network(torch.rand(2, 3, *size)).shape == (2, 5)


def test_the_head_reads_the_mean_of_the_features_and_nothing_else() -> None:
    for network in (FieldClassifier(3, [4, 6], [2, 2]).eval(), VGG16(3)):
        image = torch.rand(2, 3, 32, 32)
        maps = network.features(image)
        torch.testing.assert_close(network(image), maps.mean((2, 3)) @ network.head.weight.T + network.head.bias)


def test_features_of_the_default_are_not_negative_and_those_of_the_paper_are() -> None:
    image = torch.rand(2, 3, 32, 32)
    assert FieldClassifier(3, [4, 6], [2, 2]).features(image).min() >= 0
    assert VGG16(3).features(image).min() < 0


def test_networks_are_scripted_for_export() -> None:
    network, image = FieldClassifier(3, [4, 6], [1, 2]).eval(), torch.rand(1, 3, 20, 20)
    torch.testing.assert_close(torch.jit.script(network)(image), network(image))


def test_strides_that_are_not_as_many_as_filters_are_refused() -> None:
    with pytest.raises(ValueError, match="`strides` must be as many as `filters`, 2, got 3"):
        FieldClassifier(3, [4, 8], [1, 2, 2])


def test_a_backbone_comes_from_a_file_of_the_same_layers_and_nothing_else_does(tmp_path: Path) -> None:
    """torchvision's file has a classifier of other layers beside the features."""
    source, network = FieldClassifier(9, [4, 6], [1, 2]), FieldClassifier(3, [4, 6], [1, 2])
    head = network.head.weight.clone()
    weights = {**source.state_dict(), "classifier.0.weight": torch.zeros(3)}
    torch.save(weights, tmp_path / "backbone.pt")
    assert with_backbone(network, None) is network
    with_backbone(network, str(tmp_path / "backbone.pt"))
    for name, value in network.features.state_dict().items():
        torch.testing.assert_close(value, source.features.state_dict()[name])
    torch.testing.assert_close(network.head.weight, head)
    with pytest.raises(ValueError, match=r"must hold weights of FieldClassifier, got none that fit for \d+ of \d+"):
        with_backbone(FieldClassifier(3, [4, 7], [1, 2]), str(tmp_path / "backbone.pt"))
