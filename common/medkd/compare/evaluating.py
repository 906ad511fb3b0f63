# SPDX-License-Identifier: Apache-2.0
"""Run a network on cases as its bundle evaluates it, and measure the time; what is kept of it, subclasses say."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from ignite.engine import Events
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.engines.evaluator import SupervisedEvaluator
from numpy.typing import NDArray
from torch import Tensor, nn

from medkd.compare.cases import Files
from medkd.compare.loading import check_settings, load_weights
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.inference.cases import told_cause

__all__ = ["Evaluation", "Kept", "Measured", "image_affine"]

Array = NDArray[Any]


@dataclass
class Measured:
    """What there is to say of any network."""

    parameters: int = 0
    layer: str = ""                                               # name of the network's class
    device: str = "cpu"
    seconds: dict[str, float] = field(default_factory=dict)       # case -> of the network with its windows
    left_out: list[str] = field(default_factory=list)             # what there is not, and why


Kept = TypeVar("Kept", bound=Measured)


class Evaluation(ABC, Generic[Kept]):
    """A network, built and loaded, that is to be run on cases once.

    A subclass says what is kept: `keep` a prediction, `score` the metrics, `look` at the network after each case.

    Args:
        network: what to build.
        outcome: what is filled.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights are of another network, or it was trained otherwise.
    """

    def __init__(self, network: Network, outcome: Kept) -> None:
        self.network = network
        self.outcome = outcome
        check_settings(network)
        with scripts_of(network.root):
            try:
                self.build(network.parse({"validate#handlers": [{"_target_": "scripts.cases.CaseGuard"}]}))
            except (ValueError, OSError):
                raise
            except Exception as error:   # whatever its configs make of a setting
                raise ValueError(
                    f"`{network.name}` must be built by {', '.join(('train', *network.configs))} of {network.root} "
                    f"with the settings given, got: {told_cause(error)}; correct them."
                ) from error
            self.outcome.parameters = sum(one.numel() for one in self.module.parameters())
            self.outcome.layer = type(self.module).__name__
            self.prepare()

    def build(self, parser: Any) -> None:
        """Make the network and what its evaluation needs."""
        with torch.random.fork_rng(devices=()):
            module = parser.get_parsed_content("network")
        load_weights(self.network, module)
        self.module: nn.Module = module.eval()
        names = ("preprocessing", "inferer", "postprocessing", "handlers", "key_metric")
        self.parts = {name: parser.get_parsed_content(f"validate#{name}") for name in names}
        self._options = {name: parser.get_parsed_content(name) for name in ("device", "amp")}
        self.outcome.device = str(self._options["device"])

    @abstractmethod
    def prepare(self) -> None:
        """Find the layers to look at, in the network that is built."""

    @abstractmethod
    def keep(self, case: str, pred: Any) -> None:
        """Keep what came of a case."""

    @abstractmethod
    def score(self, evaluator: Any, cases: Sequence[str]) -> None:
        """Keep the metrics of an evaluation."""

    def look(self, case: str, image: Tensor, result: Any) -> None:
        """Look at the network after it has seen an image (1, C, *S)."""

    def run(self, cases: Mapping[str, Files], told: Callable[[str], None] = lambda case: None) -> Kept:
        """Predict, score and look, one case after the other.

        Args:
            cases: name -> files.
            told: called with each case that is done.

        Raises:
            ValueError: a case fails; the message names it and the network.
        """
        with scripts_of(self.network.root):
            for labeled in (True, False):
                chosen = {name: files for name, files in cases.items() if ("label" in files) == labeled}
                if chosen:
                    self._evaluate(chosen, labeled, told)
        return self.outcome

    def _evaluate(self, cases: Mapping[str, Files], labeled: bool, told: Callable[[str], None]) -> None:
        names = list(cases)
        dataset = Dataset([dict(files) for files in cases.values()], self.parts["preprocessing"])
        evaluator = SupervisedEvaluator(
            self._options["device"], DataLoader(dataset, batch_size=1, num_workers=0), self.module,
            inferer=self._watch(names), postprocessing=self.parts["postprocessing"],
            key_val_metric=self.parts["key_metric"] if labeled else None, val_handlers=self.parts["handlers"],
            amp=self._options["amp"],
        )

        def keep(engine: Any) -> None:
            case = names[engine.state.iteration - 1]
            self.keep(case, engine.state.output[0]["pred"])
            told(case)

        evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
        try:
            evaluator.run()
        except Exception as error:
            raise ValueError(
                f"`{self.network.name}` must be able to predict each case, got: {told_cause(error)}; leave the case "
                "out, or correct its file."
            ) from error
        self.score(evaluator, names)

    def _watch(self, names: Sequence[str]) -> Any:
        """The inferer, timed on one thread; afterwards the network is looked at."""
        inferer, waiting = self.parts["inferer"], iter(names)

        def infer(image: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            case = next(waiting)
            with torch.no_grad(), _one_thread():
                clock = time.perf_counter if image.is_cuda else time.process_time   # other programs do not count
                if image.is_cuda:
                    torch.cuda.synchronize(image.device)           # what was begun before does not count
                start = clock()
                result = inferer(image, network, *args, **kwargs)
                if image.is_cuda:
                    torch.cuda.synchronize(image.device)
                self.outcome.seconds[case] = clock() - start
            self.look(case, image, result)
            return result

        return infer


def image_affine(image: Any, axes: int) -> Array:
    """Affine of an image, or of the only one of a batch, for the number of axes it has: (axes + 1, axes + 1)."""
    affine = np.asarray(image.affine, dtype=np.float64)
    affine = affine[0] if affine.ndim == 3 else affine
    square = np.eye(axes + 1)
    square[:axes, :axes], square[:axes, -1] = affine[:axes, :axes], affine[:axes, -1]
    return square


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
