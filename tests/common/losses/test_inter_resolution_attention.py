# SPDX-License-Identifier: Apache-2.0
"""Inter-resolution attention as a whole: known answers, whole networks, what counts, and what is refused."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.squeeze_and_excitation import SEResNetBottleneck
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.senet import SENet
from torch import Tensor, nn

from medkd.losses.inter_resolution_attention import InterResolutionAttentionLoss
from medkd.losses.logits import SoftLabelLoss
from medkd.ops.class_attention import class_attention, head_matrix, head_mismatch
from medkd.ops.ignored import IGNORED, UNLABELED
from medkd.ops.prediction import hard_labels
from medkd.taps import FeatureTaps
from oracles import inter_resolution_attention as oracle

Maps = dict[str, Tensor]
DENSE: dict[str, Any] = {"task": "segmentation"}


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def network(maps: Tensor, weight: Tensor, bias: Tensor | float = 0.0, dense: bool = False) -> Maps:
    """What is tapped of a network with these features and this head."""
    pred = torch.einsum("ck,bk...->bc...", weight, maps)
    shape = (1, -1, *[1] * (maps.dim() - 2))
    pred = pred + bias.view(shape) if isinstance(bias, Tensor) else pred + bias
    return {"f": maps, "h": weight, "pred": pred if dense else pred.flatten(2).mean(2)}


def random_network(
    size: tuple[int, ...], batch: int = 3, channels: int = 5, classes: int = 3, dense: bool = False
) -> Maps:
    maps = torch.randn(batch, channels, *size, dtype=torch.float64)
    weight = torch.randn(classes, channels, dtype=torch.float64)
    return network(maps, weight, torch.randn(classes, dtype=torch.float64), dense)


def leaves(maps: Maps, bias: float = 0.0) -> Maps:
    """The same with gradients from the terms down to features and head."""
    own = {name: maps[name].detach().clone().requires_grad_() for name in ("f", "h")}
    return own | {"pred": maps["pred"].detach().clone().requires_grad_()}


def a_loss(**options: Any) -> InterResolutionAttentionLoss:
    return InterResolutionAttentionLoss("f", "h", **options)


def example() -> tuple[Maps, Maps]:
    """The specification's two networks."""
    teacher = network(
        double([[[[1, 0], [0, 2]], [[0, 1], [1, -1]]]]), double([[1, -1], [0.5, 2]]), double([0.1, -0.2])
    )
    student = network(double([[[[1, 1], [0, 1]], [[-1, 0], [2, 0.5]]]]), double([[1, -2], [1, 1]]))
    return leaves(student), teacher


# ---- known answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_known_answers(preset: str) -> None:
    student, teacher = example()
    assert teacher["pred"][0].tolist() == pytest.approx([0.6, 0.675])
    assert student["pred"][0].tolist() == pytest.approx([0.0, 1.125])
    terms = a_loss(preset=preset)(student, teacher, torch.tensor([1]))
    assert terms["attention"].item() == pytest.approx(0.381881308, abs=1e-9)
    assert terms["feature"].item() == pytest.approx(0.951971638, abs=1e-9)
    assert terms["regression"].item() == pytest.approx(0.197642354, abs=1e-9)
    weights = a_loss(preset=preset).preset_weights
    supervised = F.cross_entropy(student["pred"], torch.tensor([1]))
    assert supervised.item() == pytest.approx(0.281150136, abs=1e-9)
    total = supervised + sum(weights[name] * value for name, value in terms.items())
    assert total.item() == pytest.approx(4.195160379, abs=1e-8)


@pytest.mark.parametrize(("options", "expected"), [
    ({"normalization": "minmax_class"}, 0.503460249),
    ({"normalization": "softmax"}, 0.5),
    ({"normalization": "l2"}, 6 / 11),
    ({"variant": "positive_weight"}, 0.429995155),
    ({"variant": "gradcam"}, 0.493006649),
    ({"variant": "signed"}, 0.448966003),
    ({"variant": "activation", "normalization": "l2"}, 0.945678049),
    ({"include_background": False}, 0.506896878),
])
def test_known_answers_of_other_options(options: dict[str, Any], expected: float) -> None:
    student, teacher = example()
    assert a_loss(**options)(student, teacher)["attention"].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("label", "expected"), [(0, 0.5), (1, 0.506896878)])
def test_known_answers_of_the_targets_class(label: int, expected: float) -> None:
    student, teacher = example()
    value = a_loss(classes="target")(student, teacher, torch.tensor([label]))["attention"]
    assert value.item() == pytest.approx(expected, abs=1e-9)
    if label == hard_labels(teacher["pred"][..., None, None]).item():
        torch.testing.assert_close(a_loss(classes="teacher_argmax")(student, teacher)["attention"], value)


@pytest.mark.parametrize("weight_grad", ["through", "detached"])
def test_known_gradients(weight_grad: str) -> None:
    student, teacher = example()
    a_loss(weight_grad=weight_grad)(student, teacher)["attention"].backward()
    expected = [[[0.027277236, 0], [0, -0.054554473]], [[-0.018184824, 0], [0, 0.018184824]]]
    torch.testing.assert_close(student["f"].grad, double([expected]), atol=1e-9, rtol=0.0)
    if weight_grad == "detached":
        assert student["h"].grad is None
    else:
        expected = [[-0.027277236, -0.009092412], [0, 0.009092412]]
        torch.testing.assert_close(student["h"].grad, double(expected), atol=1e-9, rtol=0.0)


def test_known_answers_of_soft_labels_beside_it() -> None:
    student, teacher = example()
    values = {t: SoftLabelLoss(temperature=t)(student, teacher)["logits"].item() for t in (1.0, 4.0)}
    assert values[1.0] == pytest.approx(0.130121719, abs=1e-9)
    assert values[4.0] == pytest.approx(0.137294399, abs=1e-9)
    chances = teacher["pred"].softmax(1)
    entropy = -(chances * chances.log()).sum().item()
    assert values[1.0] + entropy == pytest.approx(0.822566268, abs=1e-9)


def test_known_answers_of_two_grids() -> None:
    ramp, small = torch.arange(16.0).view(1, 1, 4, 4).double(), double([[[[0, 2], [2, 4]]]])
    student, teacher = leaves(network(small, double([[1]]))), network(ramp, double([[1]]))
    assert a_loss()(student, teacher)["attention"].item() == pytest.approx(0.212132034, abs=1e-9)
    for options in ({"grid": "teacher"}, {"preset": "paper"}):
        assert a_loss(**options)(student, teacher)["attention"].item() == pytest.approx(0.163511807, abs=1e-9)


def test_known_answer_of_a_dense_head_in_3d() -> None:
    ramp = torch.arange(16.0).view(1, 1, 2, 2, 4).double()
    teacher = network(torch.cat([ramp, 15 - ramp], 1), double([[1, -1], [0.5, 1]]), dense=True)
    student = leaves(network(double([1, 3]).view(1, 1, 1, 1, 2), double([[1], [2]]), dense=True))
    loss = a_loss(include_background=True, **DENSE)
    loss.activate(["attention"])
    assert loss(student, teacher)["attention"].item() == pytest.approx(0.411291864, abs=1e-9)


def test_the_mean_over_samples_is_that_of_roots() -> None:
    """Two samples with 0.1 and 0.7 give 0.4, not 0.5."""
    maps = torch.zeros(2, 1, 1, 102, dtype=torch.float64)
    maps[..., 1] = 1.0
    teacher = maps.clone()
    for sample, root in enumerate((0.1, 0.7)):
        teacher[sample, ..., 2:] = root * (102 / 100) ** 0.5
    value = a_loss()(leaves(network(maps, double([[1]]))), network(teacher, double([[1]])))["attention"]
    assert value.item() == pytest.approx(0.4, abs=1e-9)


# ---- whole networks ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, mean over positions, linear head; or a head on each position."""

    def __init__(self, rank: int, dense: bool = False, width: int = 6, classes: int = 3, stride: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv2d if rank == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if rank == 2 else nn.BatchNorm3d
        self.body = nn.Sequential(
            convolution(1, width, 3, padding=1), norm(width), nn.ReLU(), convolution(width, width, 3, stride, 1)
        )
        self.act = nn.ReLU()
        self.head = convolution(width, classes, 1) if dense else nn.Linear(width, classes)
        self.dense = dense

    def forward(self, image: Tensor) -> Tensor:
        maps = self.act(self.body(image))
        logits: Tensor = self.head(maps if self.dense else maps.flatten(2).mean(2))
        return logits


def run(net: nn.Module, image: Tensor, *paths: str) -> Maps:
    """What is tapped of a network, by default of one of these."""
    taps = FeatureTaps(net, paths or ["act", "head.weight"])
    taps.open()
    pred = net(image)
    found = taps.close() | {"pred": pred}
    taps.remove()
    return found


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_value_and_gradients_of_whole_networks_are_those_of_autograd(rank: int, dense: bool) -> None:
    torch.manual_seed(rank)
    student, teacher = Net(rank, dense).double(), Net(rank, dense, width=8).double().eval()
    image = torch.randn(3, 1, *(6, 5, 4)[:rank], dtype=torch.float64)
    mine, other = run(student, image), run(teacher, image)
    loss = InterResolutionAttentionLoss("act", "head.weight", task="segmentation" if dense else "classification",
                                        include_background=True)
    loss.activate(["attention"])
    found = loss(mine, other)["attention"]
    expected = oracle.distance(oracle.attention(mine["pred"], mine["act"]),
                               oracle.attention(other["pred"], other["act"]).detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    slopes = [
        torch.autograd.grad(one, list(student.parameters()), retain_graph=True, allow_unused=True)
        for one in (found, expected)
    ]
    for name, one, right in zip(dict(student.named_parameters()), *slopes, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if one is None else one, zero if right is None else right,
                                   rtol=1e-6, atol=1e-9, check_dtype=False, msg=name)


MONAI: dict[str, tuple[Any, str, str]] = {
    "DenseNet": (
        lambda rank: DenseNet(rank, 1, 3, 4, growth_rate=4, block_config=(1, 1)), "class_layers.relu",
        "class_layers.out.weight",
    ),
    "ResNet": (
        lambda rank: ResNet("basic", [1] * 4, [4, 4, 8, 8], rank, 1, conv1_t_stride=1, no_max_pool=True, num_classes=3),
        "layer4", "fc.weight",
    ),
    "SENet": (
        lambda rank: SENet(rank, 1, SEResNetBottleneck, [1] * 4, 1, 16, dropout_prob=None, inplanes=64,
                           downsample_kernel_size=1, input_3x3=False, num_classes=3),
        "layer4", "last_linear.weight",
    ),
    "BasicUNet": (lambda rank: BasicUNet(rank, 1, 3, (4,) * 6), "upcat_1", "final_conv.weight"),
    "DynUNet": (
        lambda rank: DynUNet(rank, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 6, 8]), "upsamples.1",
        "output_block.conv.conv.weight",
    ),
}


@pytest.mark.parametrize("name", list(MONAI))
@pytest.mark.parametrize("rank", [2, 3])
def test_layers_and_heads_of_monais_networks_are_those_that_the_docstring_names(rank: int, name: str) -> None:
    torch.manual_seed(0)
    make, tap, head = MONAI[name]
    assert f"`{tap}`, `{head}`" in " ".join(str(InterResolutionAttentionLoss.__doc__).split())
    net = make(rank).eval().double()
    maps = run(net, torch.randn(2, 1, *[32] * rank, dtype=torch.float64), tap, head)
    dense = maps["pred"].dim() > 2
    weight = head_matrix(head, maps[head])
    assert head_mismatch(maps["pred"], maps[tap], weight, pooled=not dense) < 1e-9
    found, expected = class_attention(maps[tap], weight, pooled=not dense), oracle.attention(maps["pred"], maps[tap])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weight_grad", ["through", "detached"])
@pytest.mark.parametrize("dense", [False, True])
def test_the_gradient_reaches_what_is_before_the_layer_and_the_heads_weight_and_never_the_teacher(
    dense: bool, weight_grad: str
) -> None:
    torch.manual_seed(0)
    student, teacher = Net(2, dense), Net(2, dense)
    before = copy.deepcopy(teacher.eval().state_dict())
    image = torch.randn(4, 1, 16, 16)
    loss = InterResolutionAttentionLoss("act", "head.weight", task="segmentation" if dense else "classification",
                                        weight_grad=weight_grad)   # type: ignore[arg-type]
    loss.activate(["attention"])
    loss(run(student, image[..., ::2, ::2]), run(teacher, image))["attention"].backward()
    assert all(one.grad is None for one in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    reached = {name for name, one in student.named_parameters() if one.grad is not None and bool(one.grad.any())}
    assert {"body.0.weight", "body.1.weight", "body.3.weight"} <= reached
    assert ("head.weight" in reached) == (weight_grad == "through")
    assert "head.bias" not in reached


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one patch with stripes of one voxel or of two, the class, and three flat patches."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    image = 0.1 * torch.randn(count, 1, 24, 24, generator=generator)
    stripes = torch.stack([torch.arange(8) % 2, torch.arange(8) // 2 % 2]).float() * 2 - 1
    for n in range(count):
        for kind in range(4):
            row, column = torch.randint(0, 16, (2,), generator=generator).tolist()
            patch = stripes[label[n]].expand(8, 8) if kind == 0 else torch.full((8, 8), 0.7)
            image[n, 0, row : row + 8, column : column + 8] += patch
    return image, label


def halved(image: Tensor) -> Tensor:
    """Half the resolution, up-sampled."""
    return F.interpolate(F.avg_pool2d(image, 2), scale_factor=2.0, mode="bilinear")


def fit(net: nn.Module, steps: int, teacher: nn.Module | None, weight: float) -> nn.Module:
    """Train with cross entropy, and with attention where there is a teacher."""
    loss = InterResolutionAttentionLoss("act", "head.weight")
    loss.activate(["attention"])
    images, labels = textures(128, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(steps):
        image, label = (one.roll(32 * step, 0)[:32] for one in (images, labels))
        mine = run(net, image if teacher is None else halved(image))
        total = F.cross_entropy(mine["pred"], label)
        if teacher is not None and weight:
            with torch.no_grad():
                other = run(teacher, image)
            total = total + weight * loss(mine, other, label)["attention"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return net.eval()


def test_a_student_learns_where_to_look() -> None:
    """Held-out distance of a student at half the resolution, with cross entropy alone and with attention beside it."""
    loss = InterResolutionAttentionLoss("act", "head.weight")
    loss.activate(["attention"])
    torch.manual_seed(0)
    teacher = fit(Net(2, classes=2, stride=2), 60, None, 0.0)
    image, label = textures(64, seed=1)
    distances = []
    for weight in (0.0, 10.0):
        torch.manual_seed(1)
        student = fit(Net(2, classes=2, stride=2), 60, teacher, weight)
        with torch.no_grad():
            mine, other = run(student, halved(image)), run(teacher, image)
            distances.append(loss(mine, other, label)["attention"].item())
    assert distances[1] < 0.85 * distances[0], distances          # 0.149 and 0.194


# ---- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["student", "teacher"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [(9, 8), (4, 5, 6)])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(
    size: tuple[int, ...], dense: bool, grid: str
) -> None:
    teacher = random_network(size, dense=dense)
    student = leaves(teacher)
    terms = a_loss(grid=grid, task="segmentation" if dense else "classification")(student, teacher)
    for term, value in terms.items():
        assert value.item() <= 1.001e-6, term
        slopes = torch.autograd.grad(value, [student["f"], student["h"]], retain_graph=True, allow_unused=True)
        assert all(slope is None or float(slope.abs().max()) < 1e-9 for slope in slopes), term


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [(5, 4), (3, 1, 4)])
def test_it_does_not_matter_whose_grid_it_is_where_both_are_one(size: tuple[int, ...], dense: bool) -> None:
    torch.manual_seed(0)
    task: Any = "segmentation" if dense else "classification"
    student, teacher = leaves(random_network(size, dense=dense)), random_network(size, dense=dense)
    first, second = (a_loss(grid=grid, task=task)(student, teacher) for grid in ("student", "teacher"))
    assert first == second
    assert all(value.item() > 0.01 for value in first.values())


def test_attention_is_a_distance_between_0_and_1_that_no_scale_and_no_bias_changes() -> None:
    torch.manual_seed(0)
    student, teacher = random_network((7, 6)), random_network((7, 6))
    before = a_loss()(leaves(student), teacher)["attention"]
    assert 0.0 <= before.item() <= 1.0
    for role, factors in ((0, (3.0, 1.0)), (0, (1.0, 1e-4)), (1, (1e4, 1.0)), (1, (1.0, 0.5))):
        pair = [dict(student), dict(teacher)]
        pair[role] = network(factors[0] * pair[role]["f"], factors[1] * pair[role]["h"], bias=7.0)
        after = a_loss()(leaves(pair[0]), pair[1])["attention"]
        torch.testing.assert_close(after, before)


def test_classes_have_their_places_and_channels_have_none() -> None:
    torch.manual_seed(0)
    student, teacher = random_network((7, 6)), random_network((7, 6), channels=8)
    before = a_loss()
    before.activate(["attention"])
    value = before(leaves(student), teacher)["attention"]
    order = torch.tensor([2, 0, 4, 1, 3])
    shuffled = network(student["f"][:, order], student["h"][:, order])
    torch.testing.assert_close(before(leaves(shuffled), teacher)["attention"], value)
    swapped = network(student["f"], student["h"].flip(0))
    assert abs(before(leaves(swapped), teacher)["attention"].item() - value.item()) > 1e-3


def test_volumes_of_one_slice_and_single_samples_are_images() -> None:
    torch.manual_seed(0)
    student, teacher = random_network((6, 4)), random_network((12, 12))
    expected = a_loss()(leaves(student), teacher)
    flat = [
        {**one, "f": one["f"].unsqueeze(-1), "h": one["h"][..., None, None, None]} for one in (student, teacher)
    ]
    for term, value in a_loss()(leaves(flat[0]), flat[1]).items():
        torch.testing.assert_close(value, expected[term], msg=term)
    single = [
        a_loss()(leaves({**student, "f": student["f"][n : n + 1], "pred": student["pred"][n : n + 1]}),
                 {**teacher, "f": teacher["f"][n : n + 1], "pred": teacher["pred"][n : n + 1]})["attention"]
        for n in range(3)
    ]
    torch.testing.assert_close(torch.stack(single).mean(), expected["attention"])


@pytest.mark.parametrize("grid", ["student", "teacher"])
def test_networks_may_have_any_grids_and_any_channels_with_a_projection(grid: str) -> None:
    """Thick slices: a factor of 1, 1 and 4; and a student that is finer along one axis."""
    torch.manual_seed(0)
    student, teacher = leaves(random_network((8, 8, 2))), random_network((8, 4, 8), channels=9)
    loss = a_loss(grid=grid, channels=[5, 9]).double()
    assert [tuple(one.shape) for one in loss.parameters()] == [(9, 5, 1, 1)]
    terms = loss(student, teacher)
    torch.stack(list(terms.values())).sum().backward()
    assert all(one.grad is not None and bool(one.grad.any()) for one in (student["f"], *loss.parameters()))


@pytest.mark.parametrize("dense", [False, True])
def test_a_projection_of_ones_on_the_diagonal_changes_nothing(dense: bool) -> None:
    torch.manual_seed(0)
    task: Any = "segmentation" if dense else "classification"
    student, teacher = leaves(random_network((4, 4, 3), dense=dense)), random_network((8, 8, 6), dense=dense)
    loss = a_loss(task=task, channels=[5, 5]).double()
    with torch.no_grad():
        next(loss.parameters()).copy_(torch.eye(5)[..., None, None])
    torch.testing.assert_close(loss(student, teacher), a_loss(task=task)(student, teacher))


def test_building_the_loss_leaves_the_global_generator_and_is_repeatable() -> None:
    before = torch.get_rng_state()
    first, second, other = a_loss(channels=[4, 6]), a_loss(channels=[4, 6]), a_loss(channels=[4, 6], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(next(first.parameters()), next(second.parameters()))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_give_what_float32_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    nets = [random_network((6, 6)) for _ in range(2)]
    halves = [{name: (30.0 if name == "f" else 1.0) * value.to(dtype) for name, value in net.items()} for net in nets]
    halves = [{**net, "pred": network(net["f"].float(), net["h"].float())["pred"].to(dtype)} for net in halves]
    wide = [{name: value.float() for name, value in net.items()} for net in halves]
    expected = a_loss()(leaves(wide[0]), wide[1])
    with torch.autocast("cpu", dtype=dtype):
        found = a_loss()(leaves(halves[0]), halves[1])
    for term, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[term], rtol=1e-4, atol=1e-5, msg=term)


def test_the_released_regression_is_that_of_scores_through_the_teachers_head() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4))), random_network((8, 8))
    bias = teacher["pred"] - teacher["f"].mean((2, 3)) @ teacher["h"].T
    scores = student["f"].mean((2, 3)) @ teacher["h"].T + bias
    expected = (scores - teacher["pred"]).square().mean().sqrt()
    torch.testing.assert_close(a_loss()(student, teacher)["regression"], expected)


def test_only_what_is_needed_is_tapped() -> None:
    loss = InterResolutionAttentionLoss(["f", "g"], ["h", "k"], variant="activation")
    both = (("f", "g"), ("h", "k"))
    assert loss.tap_pairs == both                                  # regression reads the teacher's head
    for terms, pairs in ((["attention", "feature"], both[:1]), (["regression"], both), ([], ())):
        loss.activate(terms)
        assert loss.tap_pairs == pairs
    assert loss({"pred": torch.zeros(1, 2)}, {"pred": torch.zeros(1, 2)}) == {}


# ---- what counts ---------------------------------------------------------------------------------------------------


def taken(maps: Maps, kept: list[int]) -> Maps:
    return {name: value if name == "h" else value[kept] for name, value in maps.items()}


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("options", [{}, {"classes": "target"}, {"normalization": "minmax_class"}])
def test_samples_with_a_negative_class_are_as_if_they_were_not_there(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 5))), random_network((8, 5))
    label = torch.tensor([2, IGNORED, 0]).view(shape)
    expected = a_loss(**options)(taken(student, [0, 2]), taken(teacher, [0, 2]), label[[0, 2]])
    found = a_loss(**options)(student, teacher, label)
    torch.testing.assert_close(found, expected)
    nothing = a_loss(**options)(student, teacher, torch.full_like(label, IGNORED))
    for term, value in nothing.items():
        assert value.item() == 0.0, term
        (slope,) = torch.autograd.grad(value, student["f"], retain_graph=True)
        assert not slope.any(), term


@pytest.mark.parametrize("options", [
    {}, {"classes": "target"}, {"classes": "teacher_argmax"}, {"teacher_filter": "correct"},
])
def test_samples_without_a_class_count_with_the_teachers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4), batch=4)), random_network((4, 4), batch=4)
    own = teacher["pred"].argmax(1)
    given = (own + 1) % 3
    none, all_of_them = torch.full_like(own, UNLABELED), a_loss(**options)(student, teacher)
    torch.testing.assert_close(a_loss(**options)(student, teacher, none), all_of_them)
    torch.testing.assert_close(a_loss(**options)(student, teacher, own), all_of_them)
    mixed = torch.where(torch.arange(4) < 2, given, none)
    expected = a_loss(**options)(student, teacher, torch.where(torch.arange(4) < 2, given, own))
    torch.testing.assert_close(a_loss(**options)(student, teacher, mixed), expected)


def test_samples_that_the_teacher_gets_wrong_can_be_left_out() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4), batch=4)), random_network((4, 4), batch=4)
    right = teacher["pred"].argmax(1)
    label = torch.where(torch.arange(4) % 2 == 0, right, (right + 1) % 3)
    loss = a_loss(teacher_filter="correct")
    expected = a_loss()(taken(student, [0, 2]), taken(teacher, [0, 2]))["attention"]
    torch.testing.assert_close(loss(student, teacher, label)["attention"], expected)
    nothing = loss(student, teacher, (right + 1) % 3)["attention"]
    assert nothing.item() == 0.0
    (slope,) = torch.autograd.grad(nothing, student["f"])
    assert not slope.any()


def test_a_teacher_that_shows_nothing_in_a_sample_does_not_pull_at_it() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4))), random_network((4, 4))
    teacher["f"] = teacher["f"].clone()
    teacher["f"][1] = 0.0
    teacher = network(teacher["f"], teacher["h"])
    loss = a_loss()
    loss.activate(["attention"])
    value = loss(student, teacher)["attention"]
    torch.testing.assert_close(value, loss(taken(student, [0, 2]), taken(teacher, [0, 2]))["attention"])
    (slope,) = torch.autograd.grad(value, student["f"])
    assert not slope[1].any()
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("size", [(6, 8), (4, 6, 8)])
@pytest.mark.parametrize("options", [{}, {"normalization": "l2"}, {"normalization": "minmax_class"}])
def test_ignored_voxels_are_as_if_they_were_not_there(options: dict[str, Any], size: tuple[int, ...]) -> None:
    """The label has the teacher's grid, and the student half of it along the last axis."""
    torch.manual_seed(0)
    half = (*size[:-1], size[-1] // 2)
    student, teacher = leaves(random_network(half, dense=True)), random_network(size, dense=True)
    label = torch.randint(0, 3, (3, 1, *size))
    label[..., 4:] = IGNORED
    kept = [
        {name: value if name == "h" else value[..., :length] for name, value in maps.items()}
        for maps, length in ((student, 2), (teacher, 4))
    ]
    expected = a_loss(**DENSE, **options)(kept[0], kept[1], label[..., :4])
    torch.testing.assert_close(a_loss(**DENSE, **options)(student, teacher, label), expected)


def test_a_cell_that_is_ignored_in_part_weighs_less() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((1, 4), 1, dense=True)), random_network((1, 4), 1, dense=True)
    label = torch.zeros(1, 1, 1, 16, dtype=torch.int64)
    label[..., :3] = IGNORED                                       # three quarters of the first of four cells
    difference = (student["f"] - teacher["f"]).square().mean((0, 1, 2))
    expected = (difference * double([0.25, 1, 1, 1])).sum() / 3.25
    torch.testing.assert_close(a_loss(**DENSE)(student, teacher, label)["feature"], (expected + 1e-12).sqrt())


def test_what_a_teacher_has_in_the_ignored_part_of_a_cell_does_not_count() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 2), dense=True)), random_network((4, 8), dense=True)
    label = torch.randint(0, 3, (3, 1, 4, 8))
    label[:, :, 1, 2:5] = IGNORED                                  # two of a cell's four voxels, and one of the next
    other = teacher["f"].clone()
    other[:, :, 1, 2:5] *= 1000
    changed = network(other, teacher["h"], dense=True)
    found, expected = (a_loss(**DENSE)(student, one, label) for one in (changed, teacher))
    torch.testing.assert_close(found, expected)


def test_background_has_no_map_in_a_segmentation_unless_asked_for() -> None:
    torch.manual_seed(0)
    student, teacher = random_network((4, 4), dense=True), random_network((4, 4), dense=True)
    found = a_loss(**DENSE)(leaves(student), teacher)["attention"]
    fewer = [network(one["f"], one["h"][1:], dense=True) for one in (student, teacher)]
    expected = a_loss(include_background=True, **DENSE)(leaves(fewer[0]), fewer[1])["attention"]
    torch.testing.assert_close(found, expected)
    single = [network(one["f"], one["h"][:1], dense=True) for one in (student, teacher)]
    assert a_loss(**DENSE)(leaves(single[0]), single[1])["attention"].item() > 0.01


def test_classes_that_a_patch_does_not_have_are_left_out_where_each_has_its_own_scale() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4), 1, dense=True)), random_network((4, 4), 1, dense=True)
    label = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    label[..., 0] = 2
    loss = a_loss(normalization="minmax_class", **DENSE)
    alone = [network(one["f"], one["h"][2:], dense=True) for one in (student, teacher)]
    expected = a_loss(include_background=True, **DENSE)(leaves(alone[0]), alone[1])["attention"]
    torch.testing.assert_close(loss(student, teacher, label)["attention"], expected)
    target = a_loss(classes="target", **DENSE)
    torch.testing.assert_close(target(student, teacher, label)["attention"], expected)


def test_classes_that_may_be_together_are_chosen_by_their_channels() -> None:
    torch.manual_seed(0)
    student, teacher = leaves(random_network((4, 4), 1)), random_network((4, 4), 1)
    options: dict[str, Any] = {"classes": "target", "activation": "sigmoid"}
    found = a_loss(**options)(student, teacher, torch.tensor([[1.0, 0.0, 1.0]]))["attention"]
    fewer = [network(one["f"], one["h"][::2]) for one in (student, teacher)]
    torch.testing.assert_close(found, a_loss()(leaves(fewer[0]), fewer[1])["attention"])
    with pytest.raises(ValueError, match=r"`label` must have a channel for each of 3 classes .* got \(1, 1, 1, 1\)"):
        a_loss(**options)(student, teacher, torch.tensor([2]))


# ---- what is told and refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"preset": "free"}, "`preset` must be one of .*'paper'.*, got 'free'"),
    ({"variant": "cam"}, "`variant` must be one of .*'gradcam'.*, got 'cam'"),
    ({"grid": "both"}, "`grid` must be one of .*, got 'both'"),
    ({"classes": "some"}, "`classes` must be one of .*, got 'some'"),
    ({"normalization": "l1"}, "`normalization` must be one of .*, got 'l1'"),
    ({"weight_grad": "no"}, "`weight_grad` must be one of .*, got 'no'"),
    ({"task": "detection"}, "`task` must be one of .*, got 'detection'"),
    ({"teacher_filter": "correct", **DENSE}, "`teacher_filter` 'correct' must go with task 'classification'"),
    ({"variant": "activation", "classes": "target"}, "`variant` 'activation' must go with `classes` 'all'"),
    ({"activation": "tanh"}, "`activation` must be one of .*, got 'tanh'"),
    ({"channels": [4]}, r"`channels` must be \[student, teacher\] of the layer, got \[4\]"),
    ({"least_positions": 1}, "`least_positions` must be 2 or more, got 1"),
])
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_loss(**options)


@pytest.mark.parametrize(("change", "message"), [
    ({"pred": torch.zeros(3, 4)}, r"`student\['pred'\]` must have the teacher's 3 classes, got 4"),
    ({"pred": torch.zeros(3, 3, 4, 4)}, "`task` must be 'segmentation' for predictions of voxels"),
    ({"h": torch.zeros(3, 5, 3, 3)}, r"`student\['h'\]` must be the weight of a linear layer .* got \(3, 5, 3, 3\)"),
    ({"h": torch.zeros(3, 7)}, r"`head` must have shape \(3, 5\) in the student, .* got 'h' of \(3, 7\)"),
    ({"h": torch.zeros(4, 5)}, r"`head` must have shape \(3, 5\) in the student, .* got 'h' of \(4, 5\)"),
    ({"f": torch.zeros(3, 5)}, r"`student\['f'\]` must be a floating map of shape \(B, C, \*S\)"),
    ({"f": torch.zeros(3, 5, 1, 1)}, r"`tap` must have 2 positions or more, .* got maps of size \(1, 1\)"),
    ({"f": torch.zeros(3, 5, 4, 4, 4)}, "`tap` must have as many axes in both networks, got 3 and 2"),
])
def test_tensors_that_do_not_fit_are_refused(change: Maps, message: str) -> None:
    student = {**random_network((4, 4)), **change}
    with pytest.raises(ValueError, match=message):
        a_loss()(student, random_network((4, 4)), torch.tensor([0, 1, 2]))


def test_a_class_that_does_not_exist_and_other_channels_are_refused() -> None:
    student, teacher = random_network((4, 4)), random_network((4, 4), channels=6)
    with pytest.raises(ValueError, match="`label` must be class indices below 3"):
        a_loss()(student, teacher, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"`channels` must be \[5, 6\], .* got None"):
        a_loss()(student, teacher)
    with pytest.raises(ValueError, match=r"`channels` must be \[5, 6\], .* got \[4, 6\]"):
        a_loss(channels=[4, 6])(student, teacher)
    loss = a_loss()
    loss.activate(["attention"])
    loss(leaves(student), teacher)                                 # reads no features of the other
    single = [network(one["f"], one["h"][:1]) for one in (student, teacher)]
    with pytest.raises(ValueError, match="`classes` must be 'all' for predictions of one channel, got 'target'"):
        a_loss(classes="target")(*single)


def test_a_head_that_does_not_read_the_layer_is_refused_in_the_teacher_and_told_of_the_student(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    student, teacher = random_network((8, 8), batch=8), random_network((8, 8), batch=8)
    wrong = {**teacher, "f": teacher["f"].relu()}
    with pytest.raises(ValueError, match="`head` must read the mean of `tap` and nothing else, but the teacher's"):
        a_loss()(leaves(student), wrong)
    a_loss(teacher_output="probabilities")(leaves(student), {**wrong, "pred": wrong["pred"].softmax(1)})
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "medkd"):
        loss = a_loss()
        for _ in range(3):
            loss(leaves({**student, "f": student["f"].relu()}), teacher)
    assert [record.message for record in caplog.records if "Dropout between them" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_a_coarse_grid_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = random_network((4, 4)), random_network((8, 8))
    loss = a_loss()
    for _ in range(2):
        loss(leaves(student), teacher)
    assert caplog.text.count("compared on a grid of (4, 4)") == 1
    caplog.clear()
    a_loss(grid="teacher")(leaves(student), teacher)
    assert not caplog.records


def test_volumes_whose_maps_are_too_coarse_are_refused_where_a_least_grid_is_asked_for() -> None:
    student, teacher = random_network((3, 3, 2)), random_network((6, 6, 6))
    with pytest.raises(ValueError, match=r"`tap` must have 27 positions or more, .* got maps of size \(3, 3, 2\)"):
        a_loss(least_positions=27)(leaves(student), teacher)
    assert a_loss(least_positions=27, grid="teacher")(leaves(student), teacher)["attention"].item() > 0.01
    assert a_loss(least_positions=18)(leaves(student), teacher)["attention"].item() > 0.01
