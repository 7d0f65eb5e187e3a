"""A release as a program on the device uses it: images in, logits out, and whatever release is current."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import List, NamedTuple

import numpy as np

# all that a reload may need is imported now: later the archive that this comes from is another release's
from . import engine, images, releases, runner  # noqa: F401
from .protocol import Refusal

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # between two looks at where `current` points


class Answer(NamedTuple):
    """What one release says of some images.

    Attributes:
        logits: float32 ``(N, ...)``, of a classifier ``(N, classes)``.
        classes: Names, in the order of the logits; empty where nobody has named them.
        release: Id of the release.
    """

    logits: np.ndarray
    classes: List[str]
    release: str

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """Return for each image its ``count`` likeliest classes with their softmax, the likeliest first.

        Raises:
            Refusal: The network is no classifier.
        """
        if self.logits.ndim != 2:
            raise Refusal(
                "release {} is no classifier: it computes {} values an image".format(
                    self.release, " x ".join(str(length) for length in self.logits.shape[1:])
                ),
                "take its values as they are: docs/applications.md",
            )
        names = self.classes or [str(number) for number in range(self.logits.shape[1])]
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(1, keepdims=True))
        scores = powers / powers.sum(1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return [[(names[i], float(row[i])) for i in chosen] for row, chosen in zip(scores, best)]


class Model:
    """The current release of a device, in a program that runs there.

    Another release that becomes current is taken up within seconds: it is loaded beside the one at work, tried on
    one image, and takes over between two calls, so that no call waits for it or fails. One that does not run is
    logged, and the one at work goes on. Calls may come from several threads.

    Args:
        current: ``ROOT/current``, or the folder of a release.
        reload: Whether to follow ``current``.

    Raises:
        Refusal: Nothing is there, it is damaged, or it does not run here.
    """

    def __init__(self, current: str, reload: bool = True) -> None:
        self._current = os.path.abspath(current)
        if not os.path.isdir(self._current):
            raise Refusal("there is no release at {}".format(self._current), "bring one: toolkit run TARGET")
        self._lock = threading.Lock()
        self._engine = _Engine(os.path.realpath(self._current))
        self._closed = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="toolkit-follow", daemon=True)
        if reload:
            self._follower.start()

    @property
    def release(self) -> str:
        """Id of the release at work."""
        return self._engine.release

    @property
    def classes(self) -> list[str]:
        """Names of its classes, in the order of the logits."""
        return self._engine.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, ``(3, S, S)``."""
        return self._engine.input_shape

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return the logits, float32 ``(N, ...)``, of uint8 images ``(N, 3, S, S)``, RGB, any number of them.

        Raises:
            ValueError: The images are of another size or type than the release at work takes.
        """
        with self._at_work() as at_work:
            return at_work.run(batch)

    def predict(self, sources: Sequence[images.Source]) -> Answer:
        """Read image files (paths, or what stands in them) as in training, and say what the release says of them.

        Raises:
            ValueError: One of them is no image.
        """
        with self._at_work() as at_work:
            batch = np.stack([images.read(source, at_work.input_shape[-1]) for source in sources])
            return Answer(at_work.run(batch), at_work.classes, at_work.release)

    def close(self) -> None:
        """Let go of the engine; no call may follow."""
        self._closed.set()
        if self._follower.is_alive():
            self._follower.join()
        self._engine.close()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[_Engine]:
        """Hold the engine at work, which is not closed before it is let go of."""
        with self._lock:
            held = self._engine
            held.users += 1
        try:
            yield held
        finally:
            with self._lock:
                held.users -= 1
                last = held is not self._engine and held.users == 0
            if last:
                held.close()

    def _follow(self) -> None:
        refused = None
        while not self._closed.wait(_LOOK_SECONDS):
            folder = os.path.realpath(self._current)
            if os.path.basename(folder) == self.release:
                refused = None
            elif folder != refused:
                try:
                    self._take_up(_Engine(folder))
                except Exception as problem:  # whatever it is: the one at work goes on
                    refused = folder
                    log.warning("%s is not taken up: %s; release %s goes on", folder, problem, self.release)

    def _take_up(self, found: _Engine) -> None:
        with self._lock:
            before, self._engine = self._engine, found
            idle = before.users == 0
        log.info("release %s has taken over from %s", found.release, before.release)
        if idle:
            before.close()


class _Engine:
    """A release's engine, and how many are at work with it."""

    def __init__(self, folder: str) -> None:
        manifest = releases.read_manifest(folder)
        if manifest.get("format") != releases.FORMAT:
            raise Refusal(
                "release {} is of format {}, and this program knows {}".format(
                    manifest["id"], manifest.get("format"), releases.FORMAT
                ),
                "start the program again, so that it loads the release's own agent",
            )
        releases.require_whole(folder)
        self.release: str = manifest["id"]
        self.classes: list[str] = manifest["model"]["classes"]
        self.input_shape: tuple[int, ...] = tuple(manifest["model"]["input"][1:])
        self.users = 0
        self._session = engine.load(folder, os.path.dirname(os.path.dirname(folder)))
        try:
            if not np.isfinite(self.run(np.zeros((1, *self.input_shape), np.uint8))).all():
                raise Refusal("the engine computes values that are not numbers", "build it again (--rerun build)")
        except BaseException:
            self.close()
            raise

    def run(self, batch: np.ndarray) -> np.ndarray:
        if batch.dtype != np.uint8 or batch.shape[1:] != self.input_shape or not len(batch):
            raise ValueError(
                "release {} takes uint8 images (N, {}), not {} {}".format(
                    self.release, ", ".join(str(length) for length in self.input_shape), batch.dtype, batch.shape
                )
            )
        most = self._session.max_batch
        parts = [self._session.run(np.ascontiguousarray(batch[i : i + most])) for i in range(0, len(batch), most)]
        logits: np.ndarray = np.concatenate(parts).astype(np.float32, copy=False)
        return logits

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of the caches, which this program's user may be unable to write
            self._session.close()
