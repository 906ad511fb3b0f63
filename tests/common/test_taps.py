# SPDX-License-Identifier: Apache-2.0
"""Recording the outputs of named layers."""

from __future__ import annotations

import weakref

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from medkd.taps import FeatureTaps, plain_tensor, unwrap


class Pair(nn.Module):
    """A layer that returns a tuple, one that is never called, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Split()
        self.idle = nn.Identity()
        self.again = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(x)
        return self.again(first) + self.again(second)


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


def a_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1))


def record(network: nn.Module, *paths: str) -> dict[str, Tensor]:
    taps = FeatureTaps(network, paths)
    taps.open()
    network(torch.rand(1, 1, 4, 4))
    return taps.close()


def test_outputs_and_parameters_come_in_the_order_of_the_paths() -> None:
    network = a_network()
    found = record(network, "2", "0.weight", "0", "2")
    assert [(path, tuple(value.shape)) for path, value in found.items()] == [
        ("2", (1, 3, 4, 4)), ("0.weight", (2, 1, 1, 1)), ("0", (1, 2, 4, 4))
    ]
    assert found["0.weight"] is network[0].weight


def test_recorded_tensors_carry_the_graph_to_the_layers_before_them() -> None:
    network = a_network()
    record(network, "1")["1"].sum().backward()
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None


def test_nothing_is_recorded_while_closed() -> None:
    network = a_network()
    taps = FeatureTaps(network, ["0"])
    network(torch.rand(1, 1, 4, 4))
    taps.open()
    expected = network(torch.rand(2, 1, 4, 4))
    assert taps.close()["0"].shape[0] == expected.shape[0]
    network(torch.rand(3, 1, 4, 4))
    taps.open()
    with pytest.raises(RuntimeError, match=r"Taps \['0'\] of the student never fired"):
        taps.close()


def test_opening_again_forgets_what_was_recorded() -> None:
    network = a_network()
    taps = FeatureTaps(network, ["0"])
    for batch in (1, 2):
        taps.open()
        network(torch.rand(batch, 1, 4, 4))
    assert taps.close()["0"].shape[0] == 2


def test_tapping_leaves_output_and_state_dict_as_they_are() -> None:
    network, image = a_network(), torch.rand(1, 1, 4, 4)
    expected, keys = network(image), list(network.state_dict())
    taps = FeatureTaps(network, ["0", "1"])
    taps.open()
    torch.testing.assert_close(network(image), expected, rtol=0, atol=0)
    assert list(network.state_dict()) == keys


def test_closing_ends_the_recording_even_when_it_fails() -> None:
    network = Pair()
    taps = FeatureTaps(network, ["idle", "again"])
    taps.open()
    with pytest.raises(RuntimeError, match="never fired"):
        taps.close()
    network(torch.rand(1))                                         # would fire twice


def test_closed_taps_keep_no_tensor_alive() -> None:
    network = a_network()
    taps = FeatureTaps(network, ["0"])
    taps.open()
    network(torch.rand(1, 1, 4, 4))
    value = weakref.ref(taps.close()["0"])
    assert value() is None


def test_removed_taps_record_nothing() -> None:
    network = a_network()
    taps = FeatureTaps(network, ["0"])
    taps.remove()
    assert not network[0]._forward_hooks
    taps.open()
    network(torch.rand(1, 1, 4, 4))
    with pytest.raises(RuntimeError, match="never fired"):
        taps.close()


def test_paths_are_those_of_the_unwrapped_network() -> None:
    network = a_network()
    wrapped = nn.DataParallel(network)
    assert unwrap(wrapped) is network
    assert unwrap(torch.compile(network)) is network
    assert record(wrapped, "0")["0"].shape == (1, 2, 4, 4)


def test_metadata_is_stripped_and_the_graph_stays() -> None:
    image = MetaTensor(torch.rand(1, 1, 4, 4))
    network = a_network()
    taps = FeatureTaps(network, ["1"])
    taps.open()
    network(image)
    value = taps.close()["1"]
    assert type(value) is Tensor
    assert value.requires_grad
    assert plain_tensor(value) is value


@pytest.mark.parametrize("path", ["3", "0.wieght", ""])
def test_a_wrong_path_names_the_paths_that_exist(path: str) -> None:
    with pytest.raises(ValueError, match="A tap of the teacher must be a module or parameter path of Sequential, got"):
        FeatureTaps(a_network(), [path], role="teacher")


def test_a_near_path_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"did you mean '0\.weight'"):
        FeatureTaps(a_network(), ["0.wieght"])


def test_a_layer_that_is_never_called_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Taps \['idle'\] of the student never fired in a forward pass"):
        record(Pair(), "idle")


def test_a_layer_that_runs_twice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Tap 'again' of the student fired twice in one forward pass"):
        record(Pair(), "again")


def test_a_layer_that_gives_several_tensors_is_an_error() -> None:
    with pytest.raises(TypeError, match="Tap 'split' of the student must give one tensor, got tuple"):
        record(Pair(), "split")


def test_an_output_changed_in_place_afterwards_is_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match=r"Taps \['0'\] of the student were changed in place by a later layer"):
        record(network, "0")
    assert record(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True)), "1")["1"].min() >= 0
