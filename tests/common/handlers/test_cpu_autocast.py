# SPDX-License-Identifier: Apache-2.0
"""Training on a CPU with the forward passes in bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

import toys
from medkd.handlers.cpu_autocast import CpuAutocast, cpu_autocast
from medkd.handlers.distillation import DistillationHandler

INSIDE = "encoder.conv"


def types_in(network: nn.Module, seen: list[torch.dtype]) -> None:
    """Note the type of what a convolution inside a network gives."""
    network.get_submodule(INSIDE).register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))


def train(dtype: Any, *handlers: Any, network: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    network = toys.student() if network is None else network
    engine = toys.make_trainer(network, [CpuAutocast(dtype), *handlers], epochs=1, **options)
    engine.run()
    return engine


def test_training_computes_in_bfloat16_and_the_loss_in_float32() -> None:
    network, inside, given = toys.student(), list[torch.dtype](), list[torch.dtype]()
    types_in(network, inside)
    note = toys.on(IterationEvents.LOSS_COMPLETED, lambda engine: given.append(engine.state.output["pred"].dtype))
    train("bfloat16", note, network=network)
    assert set(inside) == {torch.bfloat16}
    assert set(given) == {torch.float32}
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def test_validation_computes_in_float32() -> None:
    network, inside = toys.student(), list[torch.dtype]()
    evaluator = toys.make_evaluator(network)
    types_in(network, inside)

    def validate(_engine: Any) -> None:
        inside.clear()
        evaluator.run()

    train("bfloat16", toys.on(Events.EPOCH_COMPLETED, validate), network=network)
    assert set(inside) == {torch.float32}


def test_the_teacher_takes_part_and_terms_with_learned_heads_stay_in_float32() -> None:
    teacher, inside = toys.teacher(), list[torch.dtype]()
    types_in(teacher, inside)
    terms: list[Tensor] = []
    note = toys.on(IterationEvents.LOSS_COMPLETED, lambda engine: terms.append(engine.state.output["kd/features"]))
    train("bfloat16", DistillationHandler(teacher, toys.hint_loss(), {"features": 1.0}), note)
    assert set(inside) == {torch.bfloat16}
    assert terms[0].dtype == torch.float32
    assert bool(torch.isfinite(terms[0]))


def test_float32_changes_no_bit() -> None:
    plain = toys.student()
    torch.manual_seed(0)
    toys.make_trainer(plain, [], epochs=1).run()
    assert toys.same(train("float32").network.state_dict(), plain.state_dict())


def test_bfloat16_trains_nearly_as_float32_does() -> None:
    wide, narrow = (train(dtype).network.state_dict() for dtype in ("float32", "bfloat16"))
    assert not toys.same(wide, narrow)
    for name, value in wide.items():
        assert torch.allclose(value.float(), narrow[name].float(), atol=0.05), name


def test_nothing_stays_behind_after_training_or_an_error() -> None:
    image = torch.rand(1, 1, toys.SIZE, toys.SIZE)

    def gives(network: nn.Module) -> Tensor:
        output: Tensor = copy.deepcopy(network).train().get_submodule(INSIDE)(image)
        return output

    engine = train("bfloat16")
    assert gives(engine.network).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert not engine.state.cpu_autocast

    def fail(_module: nn.Module, _inputs: Any) -> None:
        raise RuntimeError("in the forward pass")

    network = toys.student()
    network.get_submodule(INSIDE).register_forward_pre_hook(fail)
    handler = CpuAutocast("bfloat16")
    with pytest.raises(RuntimeError, match="in the forward pass"):
        toys.make_trainer(network, [handler], epochs=1).run()
    assert not torch.is_autocast_enabled("cpu")
    toys.make_trainer(toys.student(), [handler], epochs=1).run()    # takes off what the broken run has left
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


class Several(toys.ToyNetwork):
    """Gives its logits among other things, as networks with deep supervision do."""

    def forward(self, image: Tensor) -> Any:
        return [super().forward(image)]


def test_a_network_that_gives_several_tensors_is_left_as_it_is() -> None:
    def loss(pred: list[Tensor], _label: Tensor) -> Tensor:
        assert pred[0].dtype == torch.bfloat16
        return pred[0].float().square().mean()

    train("bfloat16", network=Several(toys.STUDENT_WIDTH), loss_function=loss, decollate=False)


def test_other_devices_are_left_alone() -> None:
    engine: Any = toys.make_trainer(toys.student(), [], epochs=1)
    engine.state.device = torch.device("cuda")
    handler = CpuAutocast("bfloat16")
    handler._start(engine)
    assert not engine.state.cpu_autocast
    assert not handler._hooks


def test_a_trainer_without_it_computes_as_it_did() -> None:
    engine: Any = toys.make_trainer(toys.student(), [], epochs=1)
    with cpu_autocast(engine):
        assert not torch.is_autocast_enabled("cpu")


def test_another_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="`dtype` must be one of .*bfloat16.*, got 'float16'"):
        CpuAutocast("float16")   # type: ignore[arg-type]
