# SPDX-License-Identifier: Apache-2.0
"""What is compared: how a word names it, how it was trained, and weights that are not its own."""

from __future__ import annotations

import json
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from medkd.cli.networks import read_network, read_settings
from medkd.compare.loading import check_settings, load_weights
from medkd.compare.networks import Network, check_comparable
from medkd.data.bundle_check import scripts_of

BUNDLES = Path(__file__).parents[3] / "bundles"
CT, NUCLEI = BUNDLES / "boundary_relation_ct_organs", BUNDLES / "graph_relation_nuclei"
TUMOR = BUNDLES / "layer_feedback_ct_tumor"
HISTOLOGY = BUNDLES / "inter_resolution_histology_classification"


def built(network: Network) -> torch.nn.Module:
    with scripts_of(network.root):
        module: torch.nn.Module = network.parse().get_parsed_content("network")
    return module


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the CT bundle with a teacher and a student of seven classes."""
    shutil.copytree(CT, tmp_path / "ct", ignore=shutil.ignore_patterns("runs", "eval", "teacher"))
    for place, configs, classes in (("models/teacher", ["teacher"], 2), ("runs/seven", [], 7)):
        network = Network("any", tmp_path / "ct", configs, {"out_channels": classes})
        (tmp_path / "ct" / place).mkdir(parents=True)
        torch.save(built(network).state_dict(), tmp_path / "ct" / place / "model.pt")
    return tmp_path / "ct"


# how a word names it


def test_word_names_weights_configs_and_settings(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "models/teacher/model.pt"
    word = f"big={weights}+teacher+out_channels=3+spacing=[4,4,3]"
    network = read_network(word, tmp_path, common={"spacing": [1, 1, 1]})
    assert (network.name, network.root, network.weights) == ("big", bundle, weights)
    assert network.configs == ("teacher",)
    assert network.settings == {"spacing": [4, 4, 3], "out_channels": 3}
    assert network.classes == 3


def test_folder_of_a_bundle_has_the_weights_that_its_configs_write(bundle: Path, tmp_path: Path) -> None:
    assert read_network(str(bundle), tmp_path).weights == bundle / "models/model.pt"
    network = read_network(f"{bundle}+teacher", tmp_path)
    assert network.weights == bundle / "models/teacher/model.pt"
    assert network.name == "ct+teacher"


def test_zip_is_checked_and_unpacked(bundle: Path, tmp_path: Path) -> None:
    files = [file for file in sorted(bundle.rglob("*")) if file.is_file()]
    hashes = "".join(f"{sha256(file.read_bytes()).hexdigest()}  {file.relative_to(bundle)}\n" for file in files)
    with zipfile.ZipFile(tmp_path / "ct_v1.zip", "w") as archive:
        archive.writestr("ct/MANIFEST.sha256", hashes)
        for file in files:
            archive.write(file, f"ct/{file.relative_to(bundle)}")
    network = read_network(f"{tmp_path / 'ct_v1.zip'}+teacher", tmp_path / "unpacked")
    assert network.name == "ct_v1+teacher"
    assert network.weights == tmp_path / "unpacked/ct_v1/ct/models/teacher/model.pt"
    with zipfile.ZipFile(tmp_path / "ct_v1.zip", "a") as archive:
        archive.writestr("ct/more.txt", "")
    with pytest.raises(ValueError, match=r"more.txt: not in the manifest"):
        read_network(str(tmp_path / "ct_v1.zip"), tmp_path / "again")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "ct_v1.zip").read_bytes()[:1000])
    with pytest.raises(ValueError, match="got one that is cut off or damaged"):
        read_network(str(tmp_path / "cut.zip"), tmp_path / "again")


def test_plus_and_equals_in_a_path_are_part_of_it(bundle: Path, tmp_path: Path) -> None:
    odd = bundle.rename(tmp_path / "a=b+c")
    network = read_network(f"{odd}+teacher", tmp_path)
    assert (network.root, network.configs) == (odd, ("teacher",))


@pytest.mark.parametrize(
    ("weights", "name"),
    [("models/model.pt", "ct"), ("models/teacher/model.pt", "teacher"), ("runs/seven/model.pt", "seven")],
)
def test_weights_without_a_name_are_called_by_their_folder(
    bundle: Path, tmp_path: Path, weights: str, name: str
) -> None:
    assert read_network(str(bundle / weights), tmp_path).name == name


def test_weights_outside_of_a_bundle_need_one(bundle: Path, tmp_path: Path) -> None:
    lone = shutil.copy(bundle / "models/model.pt", tmp_path / "lone.pt")
    with pytest.raises(ValueError, match="Weights must lie in the folder of their bundle, or come with --bundle"):
        read_network(str(lone), tmp_path)
    assert read_network(str(lone), tmp_path, str(bundle)).root == bundle


def test_two_files_of_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    for path, files in ((bundle, "a.pt and b.pt"), (bundle / "models/model.pt", "model.pt and a.pt and b.pt")):
        with pytest.raises(ValueError, match=f"must have one file of weights, got {files} in"):
            read_network(f"{path}+a.pt+b.pt", tmp_path)


def test_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'a=nowhere\\+teacher', and there is no nowhere"):
        read_network("a=nowhere+teacher", tmp_path)


def test_settings_are_literals_or_text() -> None:
    assert read_settings(["a=1e-3", "b#c=null", "d=text"], "--set") == {"a": 1e-3, "b#c": None, "d": "text"}
    with pytest.raises(ValueError, match="--set must have settings KEY=VALUE, got 'spacing'"):
        read_settings(["spacing"], "--set")


def test_scale_of_all_networks_is_that_of_students(tmp_path: Path) -> None:
    """A teacher's config says that it sees all; `--set scale=8` is not meant for it."""
    words = [f"{HISTOLOGY}", f"{HISTOLOGY}+teacher", f"{HISTOLOGY}+teacher+scale=2"]
    student, teacher, odd = (read_network(word, tmp_path, common={"scale": 8, "rim": 0}) for word in words)
    assert (student.value("scale"), teacher.value("scale"), odd.value("scale")) == (8, 1, 2)
    assert (student.value("rim"), teacher.value("rim")) == (0, 0)


# weights


def test_weights_of_another_config_are_refused_with_the_one_that_fits(bundle: Path) -> None:
    network = Network("big", bundle, (), {}, bundle / "models/teacher/model.pt")
    with pytest.raises(ValueError, match=r"`big` must have weights of UNet .* They fit big=...\+teacher\.$"):
        load_weights(network, built(network))


def test_weights_of_another_number_of_classes_are_refused_with_theirs(bundle: Path) -> None:
    network = Network("seven", bundle, (), {}, bundle / "runs/seven/model.pt")
    with pytest.raises(ValueError, match=r"instead of \(2,.* They fit seven=...\+out_channels=7\.$"):
        load_weights(network, built(network))


def test_weights_of_another_task_are_refused(bundle: Path) -> None:
    network = Network("odd", bundle, (), {}, NUCLEI / "models/model.pt")
    with pytest.raises(ValueError, match=r"misses 'model.* Name the configs and settings that it was trained with"):
        load_weights(network, built(network))


def test_student_in_a_checkpoint_is_found(bundle: Path) -> None:
    own = torch.load(bundle / "models/model.pt", weights_only=True)
    (bundle / "models/checkpoints").mkdir()
    file = bundle / "models/checkpoints/epoch_00003.pt"
    torch.save({"objects": {"network": own, "optimizer": {}}, "epoch": 3}, file)
    network = Network("student", bundle, (), {}, file)
    module = built(network)
    load_weights(network, module)
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_other_settings_than_in_training_are_refused(bundle: Path) -> None:
    (bundle / "models/checkpoints").mkdir()
    recorded = Network("student", bundle, (), {"spacing": [4.0, 4.0, 3.0]})
    from medkd.settings import flatten

    torch.save({"record": {"settings": flatten(recorded.config)}}, bundle / "models/checkpoints/epoch_00003.pt")
    check_settings(recorded)
    message = r"with spacing \[4.0, 4.0, 3.0\], as its .*, got \[3.0, .*write student=...\+spacing=\[4.0,4.0,3.0\]"
    with pytest.raises(ValueError, match=message):
        check_settings(Network("student", bundle))


def test_another_scale_than_in_training_is_refused_but_for_pictures_that_have_it_already(tmp_path: Path) -> None:
    from medkd.settings import flatten

    weights = tmp_path / "model.pt"
    weights.touch()
    recorded = Network("student", HISTOLOGY, (), {"scale": 8}, weights)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"record": {"settings": flatten(recorded.config)}}, tmp_path / "checkpoints/epoch_00003.pt")
    check_settings(recorded)
    check_settings(Network("student", HISTOLOGY, (), {"scale": 1}, weights))
    with pytest.raises(ValueError, match=r"with scale 8, as its checkpoint says, got 4; write student=...\+scale=8"):
        check_settings(Network("student", HISTOLOGY, (), {}, weights))


# what it is


def test_story_names_the_teacher_if_it_is_compared_too(bundle: Path) -> None:
    teacher = Network("big", bundle, ["teacher"])
    told = {"mode": "distilled", "teacher_sha256": teacher.sha256, "weights": {"boundary": 5.0, "logits": 0.0},
            "epoch": 3, "max_epochs": 9, "validation": {"val_mean_dice": 0.5}}
    student = Network("small", bundle)
    assert student.story() == "unknown: there is no model.json beside the weights"
    (bundle / "models/model.json").write_text(json.dumps(told))
    assert student.story([teacher]) == (
        "distilled from `big` (weights: boundary 5); weights of epoch 3 of 9, val_mean_dice 0.500 on its validation "
        "cases"
    )
    assert f"a teacher of SHA-256 {teacher.sha256[:12]}" in student.story()


# which can be compared


def test_networks_of_other_tasks_are_refused(bundle: Path) -> None:
    two, seven = Network("two", bundle), Network("seven", bundle, (), {"out_channels": 7})
    with pytest.raises(ValueError, match="same number of classes, got 2 for `two` and 7 for `seven`; .*out_channels=2"):
        check_comparable([two, seven])
    with pytest.raises(ValueError, match="the same task, got labels of classes for `two` and instances for `cells`"):
        check_comparable([two, Network("cells", NUCLEI)])
    with pytest.raises(ValueError, match="the same task, got a number of axes of 3 for `two` and 2 for `flat`"):
        check_comparable([two, Network("flat", bundle, ["2d"])])
    with pytest.raises(ValueError, match="got labels of classes for `two` and whole images for `grades`"):
        check_comparable([two, Network("grades", HISTOLOGY)])
    three, four = (Network(f"{classes}", HISTOLOGY, (), {"out_channels": classes}) for classes in (3, 4))
    with pytest.raises(ValueError, match="same number of classes, got 3 for `3` and 4 for `4`"):
        check_comparable([three, four])
    networks = [Network(name, TUMOR, configs) for name, configs in (("whole", []), ("by slices", ["kidney_2d"]))]
    check_comparable(networks)                                     # both of volumes
    slices = Network("slices", TUMOR, ["kidney_2d", "slices"])
    with pytest.raises(ValueError, match="a number of axes of 3 for `by slices` and 2 for `slices`"):
        check_comparable([networks[1], slices])


def test_a_single_network_and_two_of_one_name_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="needs two or more networks, got 1"):
        check_comparable([Network("a", bundle)])
    with pytest.raises(ValueError, match="names of their own, got 'a' twice; write NAME=PATH"):
        check_comparable([Network("a", bundle), Network("a", bundle)])


def test_folder_that_is_no_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`b` must be of a bundle that trains .* without configs/train.json"):
        check_comparable([Network("a", bundle), Network("b", tmp_path / "empty")])


def test_missing_weights_config_and_key_are_refused(bundle: Path) -> None:
    message = r"`a` must have weights, got .*runs/baseline/model.pt, .*a=FILE\+baseline"
    with pytest.raises(FileNotFoundError, match=message):
        _ = Network("a", bundle, ["baseline"]).weights
    with pytest.raises(ValueError, match="`a` must have the config 'techer' in .*did you mean 'teacher'"):
        _ = Network("a", bundle, ["techer"]).config
    with pytest.raises(ValueError, match="`a` must have a 'spacing' that its configs can make, got .*nothing"):
        Network("a", bundle, (), {"spacing": "$nothing"}).value("spacing")
    with pytest.raises(ValueError, match="`a` must be set by keys of its configs, got 'spacng'; .* 'spacing'"):
        _ = Network("a", bundle, (), {"spacng": 1}).config
