# SPDX-License-Identifier: Apache-2.0
"""The teacher: strict, hashed, frozen, and never code."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import toys
from medkd.handlers.teacher import Teacher
from medkd.weights import load_tensors


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        return toys.state_of(toys.teacher(seed=7))


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_the_loaded_teacher_has_the_files_weights_and_is_frozen(tmp_path: Path, weights: dict[str, Any]) -> None:
    network = Teacher(toys.teacher, saved(weights, tmp_path / "model.pt")).load()
    assert toys.same(network.state_dict(), weights)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


def test_a_network_without_path_keeps_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    network = toys.teacher()
    before = toys.state_of(network)
    with caplog.at_level(logging.INFO, "medkd"):
        assert Teacher(network).load() is network
    assert toys.same(before, network.state_dict())
    assert "as built (no weights file)" in caplog.text


def test_the_teacher_is_put_on_its_device_and_its_precision_is_that_of_its_first_floating_parameter() -> None:
    network = nn.Linear(2, 2).half()
    network.register_parameter("weight", nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False))
    reference = Teacher(network)
    loaded = reference.load("meta")
    assert reference.dtype == torch.float16
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


@pytest.mark.parametrize("key", ["state_dict", "model", "network"])
def test_a_nested_state_dict_is_found(tmp_path: Path, weights: dict[str, Any], key: str) -> None:
    path = saved({key: weights, "epoch": 3}, tmp_path / "model.pt")
    assert toys.same(Teacher(toys.teacher, path).load().state_dict(), weights)


def test_a_safetensors_file_is_read(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    assert toys.same(Teacher(toys.teacher, path).load().state_dict(), weights)


def test_building_and_loading_leaves_the_global_generators_untouched(tmp_path: Path, weights: dict[str, Any]) -> None:
    def build() -> nn.Module:
        random.random()
        np.random.rand()
        return toys.teacher()

    path = saved(weights, tmp_path / "model.pt")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()   # type: ignore[index]
    Teacher(build, path).load()
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()   # type: ignore[index]
    assert toys.same(before, after)


# ---- the right file ------------------------------------------------------------------------------------------------


def test_the_hash_is_logged_and_a_given_one_is_checked(
    tmp_path: Path, weights: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(weights, tmp_path / "model.pt")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    reference = Teacher(toys.teacher, path, sha256=expected.upper())
    with caplog.at_level(logging.INFO, "medkd"):
        reference.load()
    assert reference.file_sha256 == expected
    assert f"Teacher ToyNetwork, 58 parameters, from {path}, sha256 {expected}" in caplog.text


def test_another_hash_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = saved(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="`teacher_sha256` must be the hash of .*, which is [0-9a-f]{64}, got ab12"):
        Teacher(toys.teacher, path, sha256="ab12").load()


def test_a_missing_file_stops_at_once_with_the_command_that_trains_the_teacher(tmp_path: Path) -> None:
    reference = Teacher(toys.teacher, tmp_path / "no.pt")
    assert reference.is_missing
    message = r"`teacher_path` must be the teacher's weights, got '.*no.pt', which does not exist; .*teacher.json"
    with pytest.raises(FileNotFoundError, match=message):
        reference.require()
    with pytest.raises(FileNotFoundError, match=message):
        reference.load()


@pytest.mark.parametrize(
    ("weights", "needed"), [(None, True), ({"logits": 0.1}, True), ({"logits": 0.0}, False), ({}, False)]
)
def test_only_a_run_that_distils_needs_the_teacher(
    tmp_path: Path, weights: dict[str, float] | None, needed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    missing = Teacher(toys.teacher, tmp_path / "model.pt", weights=weights)
    missing.allow_missing()
    assert ("it does NOT distil" in caplog.text) == needed
    with pytest.raises(FileNotFoundError) if needed else nullcontext():
        missing.require()
    with pytest.raises(FileNotFoundError, match="does not exist; train it with"):
        missing.load()                                             # whoever wants its weights all the same


def test_a_file_that_is_there_is_neither_missed_nor_warned_of(
    tmp_path: Path, weights: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reference = Teacher(toys.teacher, saved(weights, tmp_path / "model.pt"))
    reference.require()
    reference.allow_missing()
    assert caplog.messages == []


def test_a_missing_key_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    del weights["head.bias"]
    path = saved(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"must hold weights of the teacher's network .* misses 'head.bias'\."):
        Teacher(toys.teacher, path).load()


def test_an_extra_key_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = saved(weights | {"head.scale": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"ToyNetwork, but .*model.pt has 'head.scale' too much\. Is `teacher_def`"):
        Teacher(toys.teacher, path).load()


def test_another_shape_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = saved(weights | {"head.bias": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"'head.bias' is \(3,\) instead of \(2,\)"):
        Teacher(toys.teacher, path).load()


def test_a_value_that_is_no_tensor_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = saved(weights | {"head.bias": 0.5}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"'head.bias' is a float instead of \(2,\)"):
        Teacher(toys.teacher, path).load()


def test_three_differences_are_all_told(tmp_path: Path, weights: dict[str, Any]) -> None:
    kept = {name: value for name, value in weights.items() if name not in ("encoder.conv.bias", "head.weight")}
    path = saved(kept | {"head.bias": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"misses 'head.weight'; 'head.bias' is \(3,\) instead of \(2,\)\. Is"):
        Teacher(toys.teacher, path).load()


def test_many_differences_are_counted(tmp_path: Path) -> None:
    path = saved(toys.ToyNetwork(6).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'encoder.norm.weight' is .*; and 4 more"):
        Teacher(toys.teacher, path).load()


# ---- files that are no weights -------------------------------------------------------------------------------------


class Attack:
    """What a hostile checkpoint looks like: loading it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path, weights: dict[str, Any], zipped: bool) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "was_here"
    torch.save(weights | {"attack": Attack(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.pt` must hold tensors only, got other objects, which could run code"):
        Teacher(toys.teacher, path).load()
    assert not mark.exists()
    torch.load(path, weights_only=False)                           # the attack is a real one
    assert mark.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "was_here"
    path.write_bytes(pickle.dumps(Attack(mark), protocol=2))
    with pytest.raises(ValueError, match="model.pt` must hold tensors only"):
        load_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file_is_refused(tmp_path: Path, weights: dict[str, Any], share: float) -> None:
    path = saved(weights, tmp_path / "model.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="model.pt` must be a whole weights file, got one that cannot be read"):
        load_tensors(path)


def test_weights_that_a_gpu_wrote_are_read_without_one(
    tmp_path: Path, weights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
    path = saved(weights, tmp_path / "model.pt")
    assert {value.device.type for value in load_tensors(path).values()} == {"cpu"}


def test_a_torn_safetensors_file_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="model.safetensors` must be a whole weights file"):
        load_tensors(path)


@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "<html>Sign in</html>"])
def test_a_text_file_in_the_place_of_weights_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.pt"
    path.write_text(text)
    with pytest.raises(ValueError, match="model.pt` must"):
        load_tensors(path)


def test_a_tensor_in_the_place_of_a_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.pt` must hold a state dict, got Tensor"):
        load_tensors(saved(torch.ones(2), tmp_path / "model.pt"))


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` must be a weights file, got '.*no.pt', which does not exist"):
        load_tensors(tmp_path / "no.pt")


def test_a_teacher_without_a_file_is_known_by_its_weights_and_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))  # its count of batches has no axis
    teacher = Teacher(network)
    before = teacher.hash()
    assert teacher.hash() == before
    with torch.no_grad():
        network[1].running_mean.add_(1.0)
    assert teacher.hash() != before
