# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import format_json
import sync_bundles

SKELETON: dict[str, Any] = {
    "device": "cpu",
    "network_def": "<own>",
    "sampler": {"<own>": None},
    "train": {
        "handlers": [
            {"_target_": "ValidationHandler", "interval": "@val_interval"},
            "<more>",
            {"_target_": "StatsHandler", "tag": "train"},
            {"_target_": "CheckpointHandler", "objects": {"network": "@network", "<more>": "<own>"}},
        ],
        "trainer": {"_target_": "SupervisedTrainer", "amp": False},
    },
    "run": ["$@data_check", "$@train#trainer.run()"],
}
BUNDLE: dict[str, Any] = {
    "device": "cpu",
    "network_def": {"_target_": "UNet"},
    "sampler": None,
    "train": {
        "handlers": [
            {"_target_": "ValidationHandler", "interval": "@val_interval"},
            {"_target_": "StatsHandler", "tag": "train"},
            {"_target_": "CheckpointHandler", "objects": {"network": "@network"}},
        ],
        "trainer": {"_target_": "SupervisedTrainer", "amp": False},
    },
    "run": ["$@data_check", "$@train#trainer.run()"],
}
OWN_HANDLER = {"_target_": "scripts.adversary.Adversary", "optimizer": "@adversary_optimizer"}
TRAINER = '{"_target_": "SupervisedTrainer", "amp": false}'


class House:
    """A repository with one skeleton and one bundle."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        self.skeleton = root / "ci" / "skeleton" / "train.json"
        self.config = root / "bundles" / "toy" / "configs" / "train.json"
        for file, content in ((self.skeleton, SKELETON), (self.config, BUNDLE)):
            file.parent.mkdir(parents=True)
            file.write_text(format_json.dumps(content))

    def change(self, path: str, value: Any = None, remove: bool = False) -> None:
        content = node = json.loads(self.config.read_text())
        *parents, last = path.split("#")
        for part in parents:
            node = node[int(part) if part.isdigit() else part]
        place = int(last) if isinstance(node, list) else last
        if remove:
            del node[place]
        else:
            node[place] = value
        self.config.write_text(format_json.dumps(content))

    def run(self, mode: str) -> tuple[int, str]:
        self.capsys.readouterr()
        status = sync_bundles.main([mode, "--root", str(self.root)])
        return status, self.capsys.readouterr().out


@pytest.fixture
def house(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> House:
    return House(tmp_path, capsys)


def test_a_bundle_that_differs_in_own_values_only_passes(house: House) -> None:
    house.change("network_def", {"_target_": "DynUNet", "filters": [4, 8]})
    assert house.run("--check")[0] == 0


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("device", "cuda", 'device: must be "cpu", got "cuda"'),
        ("train#trainer#amp", True, "train#trainer#amp: must be false, got true"),
        ("train#trainer#amp", 0, "train#trainer#amp: must be false, got 0"),
        ("train#trainer", "@x", f'train#trainer: must be {TRAINER}, got "@x"'),
        ("run", [], 'run: must have "$@data_check" first, got none'),
        ("run", ["$@data_check"], 'run: must have "$@train#trainer.run()" behind "$@data_check", got none'),
        ("run#1", "$@train.run()", 'run#1: must be "$@train#trainer.run()", got "$@train.run()"'),
        ("run", BUNDLE["run"][::-1], 'run#0: "$@train#trainer.run()" must stand behind "$@data_check"'),
        ("train#handlers#0#interval", 1, 'train#handlers#0#interval: must be "@val_interval", got 1'),
        ("train#handlers#0#_target_", "X", 'train#handlers#0#_target_: must be "ValidationHandler", got "X"'),
        ("train#handlers#1#_target_", "X", 'train#handlers#1#_target_: must be "StatsHandler", got "X"'),
        ("train#handlers#2#objects", {}, 'train#handlers#2#objects#network: must be "@network", got nothing'),
        ("train#handlers", BUNDLE["train"]["handlers"][:2],
         "train#handlers: must have CheckpointHandler behind StatsHandler, got none"),
        ("train#handlers", [BUNDLE["train"]["handlers"][place] for place in (1, 0, 2)],
         "train#handlers#0: StatsHandler must stand behind ValidationHandler"),
    ],
)
def test_check_names_a_difference_by_its_path_and_write_repairs_it_alone(
    house: House, path: str, value: Any, line: str
) -> None:
    house.change(path, value)
    status, out = house.run("--check")
    assert status == 1
    assert f"{house.config}: {line}\n" in out
    assert house.run("--write")[0] == 0
    assert json.loads(house.config.read_text()) == BUNDLE
    assert house.run("--check")[0] == 0


def test_a_missing_plumbing_key_is_put_in_at_its_place(house: House) -> None:
    house.change("device", remove=True)
    assert 'device: must be "cpu", got nothing' in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    assert next(iter(json.loads(house.config.read_text()))) == "device"


def test_a_missing_own_key_is_an_error_that_write_cannot_repair(house: House) -> None:
    house.change("network_def", remove=True)
    status, out = house.run("--write")
    assert status == 1
    assert "network_def: must have a value of the bundle's own, got nothing" in out
    assert "network_def" not in json.loads(house.config.read_text())


def test_an_own_key_with_a_usual_value_gets_that_and_may_have_any_other(house: House) -> None:
    house.change("sampler", {"_target_": "DistributedSampler"})
    assert house.run("--check")[0] == 0
    house.change("sampler", remove=True)
    assert "sampler: must have a value of the bundle's own, such as null, got nothing" in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    assert json.loads(house.config.read_text()) == BUNDLE


@pytest.mark.parametrize(
    ("path", "reference"),
    [
        ("heads", "@heads"), ("heads", "%heads"), ("heads", "$@heads + 1"), ("heads", "@heads#0"),
        ("train#unlabeled", "@train#unlabeled"), ("train#unlabeled", "$len(@train::unlabeled::data)"),
    ],
)
def test_a_key_that_something_refers_to_is_the_bundles_own_at_any_depth(
    house: House, path: str, reference: str
) -> None:
    house.change(path, {"any": 1})
    line = "the skeleton has no such key, and nothing refers to it"
    before = house.config.read_text()
    assert line in house.run("--check")[1]
    assert line in house.run("--write")[1]
    assert house.config.read_text() == before                      # named, and left as it is
    override = house.config.with_name("em.json")
    override.write_text(json.dumps({"network_def": {"x": [reference]}}))
    assert house.run("--check")[0] == 0
    house.change(path.replace("heads", "head").replace("unlabeled", "unlabelled"), {"any": 1})
    assert line in house.run("--check")[1]


def test_a_reference_to_what_holds_a_key_does_not_make_it_the_bundles_own(house: House) -> None:
    house.change("network_def", {"any": "@train"})
    house.change("train#trainer#max_epoch", 1)
    assert "train#trainer#max_epoch: the skeleton has no such key" in house.run("--check")[1]


def test_a_slip_in_a_key_is_guessed(house: House) -> None:
    house.change("devise", "cpu")
    assert "devise: did you mean device?" in house.run("--check")[1]


def test_expressions_that_are_run_by_their_name_are_the_bundles_own(house: House) -> None:
    house.change("paraphrase", ["$@train#trainer.run()"])
    assert house.run("--check")[0] == 0
    house.change("paraphrase", ["@train"])
    assert "paraphrase: the skeleton has no such key" in house.run("--check")[1]


def test_own_items_and_own_keys_stand_in_their_places(house: House) -> None:
    first, stats, checkpoint = BUNDLE["train"]["handlers"]
    house.change("adversary_optimizer", {"_target_": "torch.optim.Adam"})
    objects = {**checkpoint["objects"], "adversary_optimizer": "@adversary_optimizer"}
    handlers = [first, OWN_HANDLER, {"_target_": "B"}, stats, {**checkpoint, "objects": objects}]
    house.change("train#handlers", handlers)
    before = house.config.read_text()
    assert house.run("--check")[0] == 0
    assert house.run("--write")[0] == 0
    assert house.config.read_text() == before


def test_an_item_of_its_own_outside_its_place_is_named_and_stays(house: House) -> None:
    house.change("train#handlers", [{"_target_": "A"}, *BUNDLE["train"]["handlers"]])
    line = "train#handlers#0: A has no place here and stays; own ones go behind ValidationHandler: move it or take it"
    before = house.config.read_text()
    for mode in ("--check", "--write"):
        status, out = house.run(mode)
        assert status == 1
        assert line in out
    assert house.config.read_text() == before
    house.change("run", ["$x", *BUNDLE["run"]])
    assert 'run#0: "$x" has no place here and stays; all items are pinned: take it out' in house.run("--check")[1]


def test_a_pinned_item_beside_own_ones_is_put_back_and_they_stay(house: House) -> None:
    first, stats, checkpoint = BUNDLE["train"]["handlers"]
    house.change("train#handlers", [first, {"_target_": "A"}, {"_target_": "B"}, checkpoint])
    assert "train#handlers: must have StatsHandler behind ValidationHandler, got none" in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    found = json.loads(house.config.read_text())["train"]["handlers"]
    assert found == [first, {"_target_": "A"}, {"_target_": "B"}, stats, checkpoint]


def test_an_override_may_change_what_train_json_has_of_its_own(house: House) -> None:
    skeleton = house.skeleton.with_name("evaluate.json")
    skeleton.write_text(format_json.dumps({"train#trainer#amp": True}))
    override = house.config.with_name("evaluate.json")
    override.write_text(format_json.dumps({"train#trainer#amp": True, "network_def#channels": [1], "heads": 2}))
    assert house.run("--check")[0] == 0
    override.write_text(format_json.dumps({"train#trainer#amp": True, "device": "cuda"}))
    assert "device: the skeleton has no such key" in house.run("--check")[1]


def test_forms_of_an_override_for_presets_are_pinned_and_those_of_a_whole_config_are_not(house: House) -> None:
    skeleton = {"train#trainer#amp": True, "heads": "<own>"}
    house.skeleton.with_name("evaluate.json").write_text(format_json.dumps(skeleton))
    for name in ("evaluate", "evaluate_classes"):
        house.config.with_name(f"{name}.json").write_text(format_json.dumps({"train#trainer#amp": True, "heads": 2}))
    house.config.with_name("train_classes.json").write_text("{}\n")
    assert house.run("--check")[0] == 0
    form = house.config.with_name("evaluate_classes.json")
    form.write_text(format_json.dumps({"train#trainer#amp": False, "heads": 3}))
    assert "evaluate_classes.json: train#trainer#amp: must be true, got false" in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    assert json.loads(form.read_text()) == {"train#trainer#amp": True, "heads": 3}


def test_an_own_value_survives_the_repair_of_its_neighbors(house: House) -> None:
    house.change("network_def", {"_target_": "DynUNet"})
    house.change("device", "cuda")
    house.run("--write")
    assert json.loads(house.config.read_text()) == BUNDLE | {"network_def": {"_target_": "DynUNet"}}


def test_a_file_of_the_skeleton_that_the_bundle_lacks_is_an_error(house: House) -> None:
    house.config.unlink()
    assert house.run("--check")[0] == 1
    assert house.run("--write")[0] == 1  # its own values are not known
    assert not house.config.exists()


def test_other_files_of_a_bundle_are_its_own(house: House) -> None:
    house.config.with_name("em.json").write_text('{"epochs": 1}\n')
    assert house.run("--check")[0] == 0


def test_files_that_are_not_json_are_equal_byte_for_byte(house: House) -> None:
    house.skeleton.with_name("logging.conf").write_text("[loggers]\n")
    assert "logging.conf: must equal" in house.run("--check")[1]
    copy = house.config.with_name("logging.conf")
    copy.write_text("[loggers]")
    assert house.run("--check")[0] == 1
    assert house.run("--write")[0] == 0
    assert copy.read_text() == "[loggers]\n"


def test_scripts_that_bundles_share_are_equal_and_all_others_their_own(house: House) -> None:
    shared, copy, own, needed, package = (
        house.root / place for place in (
            "common/medkd/inference/windows.py", "bundles/toy/scripts/windows.py", "bundles/toy/scripts/networks.py",
            "common/medkd/inference/affinities.py", "common/medkd/__init__.py",
        )
    )
    for file in (shared, copy, own, needed, package, shared.with_name("__init__.py"), own.with_name("__init__.py")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {file.parts[-3]}\n")
    status, text = house.run("--check")
    assert (status, text.count("must equal"), f"{copy}: must equal" in text) == (1, 1, True)
    assert house.run("--write")[0] == 0
    assert copy.read_bytes() == shared.read_bytes()
    assert {file.name for file in copy.parent.iterdir()} == {"__init__.py", "networks.py", "windows.py"}
    assert own.read_text() == own.with_name("__init__.py").read_text() == "# toy\n"
    shared.unlink()
    assert house.run("--check")[0] == 0


def test_what_a_shared_script_imports_must_be_in_the_bundle_too(house: House) -> None:
    sources = {
        "__init__": "", "inference/__init__": "", "inference/other": "",
        "inference/windows": "def run():\n    from .affinities import affinity\n",
        "inference/affinities": "from . import offsets\n\naffinity = 1\n", "inference/offsets": "",
    }
    for name, text in sources.items():
        file = house.root / f"common/medkd/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    scripts = house.root / "bundles/toy/scripts"
    scripts.mkdir()
    (scripts / "windows.py").write_text(sources["inference/windows"])
    status, text = house.run("--check")
    assert status == 1
    assert [name for name in ("affinities", "offsets", "other", "windows") if f"{scripts / name}.py: must" in text] == [
        "affinities", "offsets"
    ]
    assert house.run("--write")[0] == 0
    assert (scripts / "affinities.py").read_text() == sources["inference/affinities"]
    assert sorted(file.stem for file in scripts.iterdir()) == ["affinities", "offsets", "windows"]
    assert house.run("--check")[0] == 0


def test_what_a_config_names_of_the_shared_scripts_must_be_in_the_bundle(house: House) -> None:
    for name in ("__init__", "inference/__init__", "inference/cases"):
        file = house.root / f"common/medkd/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# shared\n")
    config = house.config.with_name("more.json")
    config.write_text('{"inferer": {"_target_": "scripts.cases.Cases"}, "network": "$scripts.networks.Own()"}\n')
    (scripts := house.root / "bundles/toy/scripts").mkdir()
    assert f"{scripts / 'cases.py'}: must equal" in house.run("--check")[1]
    assert house.run("--write")[0] == 0
    assert [file.name for file in scripts.iterdir()] == ["cases.py"]


def test_shared_scripts_of_this_repository_are_equal(repository: Path) -> None:
    folders = sorted(repository.glob("bundles/*/scripts"))
    copies = [pair for one in folders for pair in sync_bundles.shared_scripts(one, repository / "common/medkd")]
    assert copies
    assert [copy for source, copy in copies if copy.read_bytes() != source.read_bytes()] == []


def test_what_write_leaves_has_the_canonical_layout(house: House) -> None:
    house.change("device", "cuda")
    house.run("--write")
    assert format_json.main(["--check", "--root", str(house.root)]) == 0


def test_broken_json_is_named(house: House) -> None:
    house.config.write_text("{")
    status, out = house.run("--check")
    assert status == 1
    assert f"{house.config}: must be JSON" in out


def test_without_a_skeleton_there_is_nothing_to_compare(house: House) -> None:
    house.skeleton.unlink()
    assert house.run("--check")[0] == 0
