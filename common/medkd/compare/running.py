# SPDX-License-Identifier: Apache-2.0
"""Run a network on cases as its bundle evaluates it, and keep what a report shows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.data.dataloader import DataLoader
from monai.data.dataset import Dataset
from monai.engines.evaluator import SupervisedEvaluator
from numpy.typing import NDArray
from torch import Tensor, nn

from medkd.compare.attention import attention_maps
from medkd.compare.cases import Files
from medkd.compare.levels import Level, find_levels, named_levels
from medkd.compare.loading import check_settings, load_weights
from medkd.compare.networks import Network
from medkd.data.bundle_check import scripts_of
from medkd.inference.cases import told_cause
from medkd.outputs import plain_tensor

__all__ = ["AFFINITY", "Outcome", "Runner", "Seen"]

Array = NDArray[Any]

AFFINITY = "affinities"        # path of what is no layer: the mean affinity to the nearest voxels
_WHEELS = {"waterz": "waterz", "mutex": "mwatershed"}
_SOME = 32                     # voxels per axis where an inferer has no windows


@dataclass(frozen=True)
class Seen:
    """Maps of a case on the grid that the network sees it on, in files: path of the layer -> file, shape (*S)."""

    files: Mapping[str, Path]
    affine: Array

    def load(self, path: str) -> Array:
        """A map, float32."""
        values: Array = np.load(self.files[path]).astype(np.float32)
        return values


@dataclass
class Outcome:
    """What a network made of the cases."""

    parameters: int = 0
    layer: str = ""                                               # name of the network's class
    device: str = "cpu"
    predictions: dict[str, Path] = field(default_factory=dict)    # case -> file of numbers (*S) on the file's grid
    seconds: dict[str, float] = field(default_factory=dict)       # case -> of the network with its windows
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)   # metric -> case -> value of each column
    seen: dict[str, Seen] = field(default_factory=dict)           # case -> maps, of cases with pictures
    left_out: list[str] = field(default_factory=list)             # what there is not, and why

    def prediction(self, case: str) -> Array | None:
        """Class or instance numbers; None where there are none."""
        values: Array | None = np.load(self.predictions[case]) if case in self.predictions else None
        return values

    def score(self, metric: str, case: str) -> float:
        """Mean over the columns that a case has; NaN without any."""
        values = [value for value in self.scores.get(metric, {}).get(case, ()) if not math.isnan(value)]
        return float(np.mean(values)) if values else math.nan


class Runner:
    """A network, built and loaded, that is to be run on cases once.

    Args:
        network: what to build.
        folder: for maps and predictions, which are large.
        exponent: of attention maps.
        taps: paths of layers; None takes the levels of the network.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the weights are of another network, or it was trained otherwise; there is no such tap.
    """

    def __init__(self, network: Network, folder: Path, exponent: float, taps: Sequence[str] | None = None) -> None:
        self.network = network
        self.folder = folder
        self.exponent = exponent
        folder.mkdir(parents=True, exist_ok=True)
        check_settings(network)
        self.outcome = Outcome()
        self._looked_at: Collection[str] = ()
        with scripts_of(network.root):
            try:
                self._build()
            except (ValueError, OSError):
                raise
            except Exception as error:   # whatever its configs make of a setting
                raise ValueError(
                    f"`{network.name}` must be built by {', '.join(('train', *network.configs))} of {network.root} "
                    f"with the settings given, got: {told_cause(error)}; correct them."
                ) from error
            module = self.module
            self.outcome.parameters = sum(one.numel() for one in module.parameters())
            self.outcome.layer = type(module).__name__
            self.levels = self._levels(taps)

    def _build(self) -> None:
        parser = self.network.parse({"validate#handlers": [{"_target_": "scripts.cases.CaseGuard"}]})
        self._decodes = self._can_decode(parser)
        with torch.random.fork_rng(devices=()):
            module = parser.get_parsed_content("network")
        load_weights(self.network, module)
        self.module: nn.Module = module.eval()
        names = ["preprocessing", "inferer", "postprocessing", "handlers", *(["key_metric"] if self._decodes else [])]
        self._parts = {name: parser.get_parsed_content(f"validate#{name}") for name in names}
        self._options = {name: parser.get_parsed_content(name) for name in ("device", "amp")}
        self.outcome.device = str(self._options["device"])
        offsets = [key for key in ("decoded_offsets", "offsets") if key in parser and self.network.kind == "instances"]
        self._offsets = parser.get_parsed_content(offsets[0]) if offsets else []
        roi = getattr(self._parts["inferer"], "roi_size", None) or [0] * self.network.axes
        self.window = [length if length > 0 else _SOME for length in roi]

    def _can_decode(self, parser: Any) -> bool:
        """Whether instances can be made; without the package for it affinities are all there is."""
        method = parser.get("decoding", {}).get("method") if self.network.kind == "instances" else None
        wheel = _WHEELS.get(method or "")
        if wheel is None or find_spec(wheel) is not None:
            return True
        parser["validate#postprocessing#transforms"] = []
        self.outcome.left_out.append(
            f"Instances of `{self.network.name}` and their scores: the package {wheel} is not installed "
            "(pip install medkd[em])."
        )
        return False

    def _levels(self, taps: Sequence[str] | None) -> list[Level]:
        if any(getattr(self.module, "margin", ())):
            self.outcome.left_out.append(
                f"Attention of `{self.network.name}`: its maps are smaller than its image (padding 'valid'), so that "
                "they do not lie on it."
            )
            return []
        if taps is not None:
            return named_levels(self.module, taps, self.window, self.network.name)
        try:
            return find_levels(self.module, self.window)
        except (RuntimeError, ValueError) as error:   # a network unknown to us, whose layers run twice, for example
            self.outcome.left_out.append(
                f"Attention of `{self.network.name}`: its levels are not found ({error}); name layers by --tap."
            )
            return []

    def run(
        self, cases: Mapping[str, Files], looked_at: Collection[str], told: Callable[[str], None] = lambda case: None
    ) -> Outcome:
        """Predict, score and look, one case after the other.

        Args:
            cases: name -> files.
            looked_at: cases whose maps are kept, for pictures: they take as long again, and more room.
            told: called with each case that is done.

        Raises:
            ValueError: a case fails; the message names it and the network.
        """
        self._looked_at = frozenset(looked_at)
        with scripts_of(self.network.root):
            for labeled in (True, False):
                chosen = {name: files for name, files in cases.items() if ("label" in files) == labeled}
                if chosen:
                    self._evaluate(chosen, labeled, told)
        return self.outcome

    def _evaluate(self, cases: Mapping[str, Files], labeled: bool, told: Callable[[str], None]) -> None:
        names = list(cases)
        dataset = Dataset([dict(files) for files in cases.values()], self._parts["preprocessing"])
        metrics = self._parts.get("key_metric") if labeled else None
        evaluator = SupervisedEvaluator(
            self._options["device"], DataLoader(dataset, batch_size=1, num_workers=0), self.module,
            inferer=self._watch(names), postprocessing=self._parts["postprocessing"], key_val_metric=metrics,
            val_handlers=self._parts["handlers"], amp=self._options["amp"],
        )

        def keep(engine: Any) -> None:
            case = names[engine.state.iteration - 1]
            self._keep_prediction(case, engine.state.output[0]["pred"])
            told(case)

        evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
        try:
            evaluator.run()
        except Exception as error:
            raise ValueError(
                f"`{self.network.name}` must be able to predict each case, got: {told_cause(error)}; leave the case "
                "out, or correct its file."
            ) from error
        for metric, values in getattr(evaluator.state, "metric_details", {}).items():
            rows = torch.as_tensor(values).float().reshape(len(names), -1).tolist()
            self.outcome.scores.setdefault(metric, {}).update(zip(names, rows, strict=True))

    def _watch(self, names: Sequence[str]) -> Any:
        """The inferer, timed on one thread; afterwards the network is looked at."""
        inferer, waiting = self._parts["inferer"], iter(names)

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
            if case in self._looked_at:
                self._look(case, image, result)
            return result

        return infer

    def _look(self, case: str, image: Any, result: Tensor) -> None:
        """Keep maps in files, in half precision: they are looked at."""
        paths = [level.path for level in self.levels]
        files: dict[str, Path] = {}
        for path, values in attention_maps(self.module, image, paths, self.window, self.exponent):
            files[path] = self._save(f"{case} {path}", values.clamp(max=6e4).numpy().astype(np.float16))
        near = [n for n, offset in enumerate(self._offsets) if sum(map(abs, offset)) == 1]
        if near:
            mean = plain_tensor(result)[0, near].mean(0)
            files[AFFINITY] = self._save(f"{case} {AFFINITY}", mean.cpu().numpy().astype(np.float16))
        affine = np.asarray(image.affine, dtype=np.float64)
        affine = affine[0] if affine.ndim == 3 else affine
        axes = image.dim() - 2
        square = np.eye(axes + 1)
        square[:axes, :axes], square[:axes, -1] = affine[:axes, :axes], affine[:axes, -1]
        self.outcome.seen[case] = Seen(files, square)

    def _keep_prediction(self, case: str, pred: Any) -> None:
        if not self._decodes:
            return
        values: Array = plain_tensor(pred).cpu().numpy()
        if self.network.kind == "classes":
            values = (values.argmax(0) if len(values) > 1 else values[0]).astype(np.int32)
        else:
            values = values[0].astype(np.int64)
        self.outcome.predictions[case] = self._save(f"{case} prediction", values)

    def _save(self, name: str, values: Array) -> Path:
        file = self.folder / f"{len(list(self.folder.iterdir()))}_{''.join(c for c in name if c.isalnum())}.npy"
        np.save(file, values)
        return file


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
