# SPDX-License-Identifier: Apache-2.0
"""Read the outputs of named layers, and named parameters, of a network that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from medkd.checks import suggest
from medkd.outputs import MainOutput, plain_tensor

__all__ = ["FeatureTaps", "plain_tensor", "unwrap"]


def unwrap(network: nn.Module) -> nn.Module:
    """Take a network out of `DistributedDataParallel` and `torch.compile`, so that paths are the author's."""
    while True:
        if isinstance(network, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod   # type: ignore[assignment]
        else:
            return network


class FeatureTaps:
    """Outputs of named modules and named parameters of one network, recorded only while open.

    Hooks are registered once, at construction, on the unwrapped network. `open` starts a recording; `close` ends
    it and hands over the tensors with their graph.

    Args:
        network: the network, possibly wrapped for several GPUs or compiled.
        paths: dotted paths of modules (their output) or parameters (the tensor itself), as in
            `network.named_modules()` and `named_parameters()`.
        role: what to call the network in messages.

    Raises:
        ValueError: a path names neither a module nor a parameter of the network.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> taps = FeatureTaps(network, ["0", "0.bias"])
        >>> taps.open()
        >>> _ = network(torch.zeros(1, 2))
        >>> {path: tuple(value.shape) for path, value in taps.close().items()}
        {'0': (1, 3), '0.bias': (3,)}
    """

    def __init__(self, network: nn.Module, paths: Sequence[str], role: str = "student") -> None:
        self.role = role
        self.network = unwrap(network)
        self.paths = tuple(dict.fromkeys(paths))
        self.recording = False
        self._parameters = dict(self.network.named_parameters())
        modules = dict(self.network.named_modules())
        self._layers = [path for path in self.paths if path in modules]
        for path in self.paths:
            self._refuse_unknown(path, modules)
        self._main = {
            path: MainOutput(f"Tap {path!r} of the {role}", "name a layer inside it", equal_heads=False)
            for path in self._layers
        }
        self._outputs: dict[str, tuple[Tensor, int]] = {}
        self._hooks = [modules[path].register_forward_hook(partial(self._record, path)) for path in self._layers]

    def _refuse_unknown(self, path: str, modules: dict[str, nn.Module]) -> None:
        if path and (path in modules or path in self._parameters):
            return
        known = [name for name in modules if name] + list(self._parameters)
        raise ValueError(
            f"A tap of the {self.role} must be a module or parameter path of {type(self.network).__name__}, "
            f"got {path!r}; {suggest(path, known)}"
        )

    def _record(self, path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self.recording:
            return
        tensor = self._main[path](output)
        if path in self._outputs:
            raise RuntimeError(
                f"Tap {path!r} of the {self.role} fired twice in one forward pass; name a layer that runs once, "
                "and use an inferer that calls the network once per training step."
            )
        self._outputs[path] = (tensor, tensor._version)

    def open(self) -> None:
        """Forget what was recorded and record from now on."""
        self._outputs = {}
        self.recording = True

    def close(self) -> dict[str, Tensor]:
        """Stop recording and return path -> tensor, in the order of `paths`.

        Raises:
            RuntimeError: a layer did not run since `open`, or its output was changed in place afterwards.
        """
        self.recording = False
        silent = [path for path in self._layers if path not in self._outputs]
        if silent:
            raise RuntimeError(
                f"Taps {silent} of the {self.role} never fired in a forward pass; "
                "they name layers that the network does not call, so their losses would be missing."
            )
        changed = [path for path, (value, version) in self._outputs.items() if value._version != version]
        if changed:
            raise RuntimeError(
                f"Taps {changed} of the {self.role} were changed in place by a later layer; "
                "tap the in-place layer (often the activation) instead."
            )
        outputs, self._outputs = self._outputs, {}
        return {path: outputs[path][0] if path in outputs else self._parameters[path] for path in self.paths}

    def remove(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()
