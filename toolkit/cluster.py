"""Networks made on a Ray cluster: by the same function as here, in a store of each machine's own.

What the function needs goes there by Ray's object store, code and checkpoints by Ray's runtime environment, and
what it has made comes back as the store's folders, so that no file system has to be shared.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import toolkit
from toolkit import compression, workers
from toolkit.console import Console
from toolkit.errors import StageError, ToolkitError, UsageError, disk_errors
from toolkit.job import Job
from toolkit.stages import silenced
from toolkit.store import Artifact, DamagedError, Store
from toolkit.workers import Make
from toolkit.workload import Model

CONNECTION_ATTEMPTS = 3

Key = tuple[str, str]  # stage and key of an artifact


@dataclass(frozen=True)
class Sent:
    """What comes back from a machine of the cluster.

    Attributes:
        error: What kept the networks from being made.
        folders: Artifacts that were made there, as tar files.
        searches: Files of what the pruners' searches have found out.
    """

    error: ToolkitError | None
    folders: dict[Key, bytes]
    searches: dict[str, bytes]


@contextlib.contextmanager
def connected(address: str, parallel: int, job: Job) -> Iterator[Make]:
    """Yield what makes networks on a Ray cluster, until the connection is closed.

    Args:
        address: The head's, as ``ray://HOST:10001``.
        parallel: How many networks each machine makes at a time; they share its cores and GPUs.
        job: What all networks share: their model, its checkpoint and its teacher go there at once.

    Raises:
        UsageError: The address is none, Ray is not installed, or there is no network to train.
        StageError: The cluster cannot be reached, or fails.
    """
    if not address.startswith("ray://"):
        raise UsageError(f"--ray {address} is no address of a Ray cluster", "write --ray ray://HOST:10001")
    if not job.model.trainable:
        raise UsageError("an ONNX file is not trained, so that a cluster has nothing to do", "leave out --ray")
    try:
        import grpc  # noqa: F401  the client's own, which Ray imports too late to say that it is missing
        import ray
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"--ray needs a package that is not installed: {missing.name}",
            "in the toolkit's checkout: python3 -m pip install -e '.[ray]'; or use --parallel N on this machine",
        ) from missing
    with tempfile.TemporaryDirectory() as folder:
        stage(job, Path(folder))
        try:
            _connect(address, folder)
        except Exception as error:  # Ray's own are of many kinds
            ray.shutdown()
            if isinstance(error, ConnectionAbortedError):  # by the cluster
                remedy = (
                    "if its head was busy, the same command again; RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S=300 "
                    "in the environment of its ray start has it wait longer than 30 s, and "
                    "GRPC_ENABLE_FORK_SUPPORT=0 keeps gRPC from ending what it forks"
                )
            else:
                remedy = (
                    "look whether it runs (ray status there) and the port of its client server can be reached, "
                    "or leave out --ray"
                )
            raise StageError(
                f"no connection to the Ray cluster at {address}: {_sentence(error)}", remedy
            ) from error
    try:
        yield functools.partial(_make, share(ray.nodes(), parallel))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(cause, ImportError):
            raise
        raise StageError(
            f"the Ray cluster at {address} failed: {_sentence(cause or error)}",
            "its machines need this toolkit's Python packages; the same command continues",
        ) from error
    except ConnectionError as error:
        raise StageError(
            f"the connection to the Ray cluster at {address} was lost: {_sentence(error)}",
            "the same command continues",
        ) from error
    finally:
        ray.shutdown()


def _connect(address: str, folder: str) -> None:
    """Connect to a cluster, again where its head could not start this client's server.

    The head forks it while threads of gRPC run, which it does not always survive
    (https://github.com/ray-project/ray/issues/63202).
    """
    import ray

    for attempt in range(1, CONNECTION_ATTEMPTS + 1):
        try:
            with silenced():
                ray.init(
                    address, runtime_env={"working_dir": folder}, log_to_driver=False, logging_level=logging.ERROR
                )
        except ConnectionAbortedError as error:
            if attempt == CONNECTION_ATTEMPTS or "Starting Ray client server failed" not in str(error):
                raise
            ray.shutdown()
        else:
            return


def stage(job: Job, folder: Path) -> None:
    """Lay what Ray brings to every machine into a folder: this code, the user's modules, checkpoints."""
    here = Path.cwd()
    package = Path(toolkit.__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for role, model in (("model", job.model), ("teacher", job.teacher)):
        if model is None:
            continue
        if model.source == "factory":
            for path in compression.sources.files_of(model):
                if path.is_relative_to(here):
                    there = folder / path.relative_to(here)
                    there.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, there)
        if model.checkpoint:
            shutil.copyfile(model.checkpoint, folder / _name(role, model.checkpoint))


def there(job: Job) -> Job:
    """Return a job as a machine of the cluster gets it: its paths are those of :func:`stage`."""
    content = compression.data.fingerprint(job.data, job.build / "store" / ".index", remember=True).get("content")
    teacher = job.teacher and _moved("teacher", job.teacher)
    data = job.data.model_copy(update={"content": content})
    return replace(job, data=data, model=_moved("model", job.model), teacher=teacher)


def run(job: Job, until: str, known: Mapping[Key, Any], searches: Mapping[str, bytes]) -> Sent:
    """Make the networks of a job on a machine of the cluster.

    Args:
        job: From :func:`there`.
        until: The stage to end with.
        known: Tar files of artifacts that are there already, as references into Ray's object store: what this
            machine has from an earlier time is not fetched.
        searches: Likewise of the pruners' searches, by file name.
    """
    import ray

    def fetch(content: Any, out: Path) -> None:
        _unpack(ray.get(content), out)

    job = replace(job, build=Path.home() / ".cache" / "edge-toolkit")
    store = Store(job.build / "store")
    with store.in_use():
        for (stage, key), content in known.items():
            store.receive(stage, key, functools.partial(fetch, content))
        _write(searches, store)
    error = workers.compress(job, until, Console(quiet=True))
    found = workers.found_of(job, until)
    made = {name: _pack(artifact.path) for name, artifact in found.items() if name not in known}
    return Sent(error, made, _searches(found, store))


def _make(
    share: Mapping[str, float], jobs: Mapping[str, Job], until: str
) -> Iterator[tuple[str, ToolkitError | None]]:
    import ray

    task = ray.remote(run).options(**share)
    contents: dict[Key, Any] = {}
    pending: dict[Any, str] = {}
    try:
        for name, job in jobs.items():
            found = workers.found_of(job, until)
            if until in {stage for stage, _ in found}:
                yield name, None
                continue
            for key, artifact in found.items():
                if key not in contents:
                    contents[key] = ray.put(_pack(artifact.path))
            known = {key: contents[key] for key in found}
            searches = _searches(found, Store(job.build / "store"))
            pending[task.remote(there(job), until, known, searches)] = name
        while pending:
            (done, *_), _ = ray.wait(list(pending))
            sent: Sent = ray.get(done)
            name = pending.pop(done)
            _take(sent, jobs[name])
            arrived = {stage for stage, _ in workers.found_of(jobs[name], until)}
            if sent.error is None and until not in arrived:
                raise StageError(
                    "the cluster has made networks under other keys than this machine's",
                    "install the same versions of the toolkit, PyTorch and torchvision there",
                )
            yield name, sent.error
    except BaseException:
        for waiting in pending:
            ray.cancel(waiting, force=True)
        raise


def _take(sent: Sent, job: Job) -> None:
    """Take what has come from the cluster into this machine's store."""
    store = Store(job.build / "store")
    with disk_errors(store.root, "what the cluster has made"), store.in_use():
        for (stage, key), content in sent.folders.items():
            try:
                store.receive(stage, key, functools.partial(_unpack, content))
            except DamagedError as damage:
                raise StageError(f"not whole from the cluster: {damage}", "the same command again") from damage
        _write(sent.searches, store)


def share(nodes: Sequence[Mapping[str, Any]], parallel: int) -> dict[str, float]:
    """Return what one of so many networks on each machine may use, so that it fits on every one that computes."""
    resources = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    gpus = min((some["GPU"] for some in resources if some.get("GPU")), default=0) / parallel
    cores = min((some["CPU"] for some in resources), default=1)
    return {"num_cpus": max(1, cores // parallel), "num_gpus": gpus // 1 if gpus > 1 else gpus}


def _name(role: str, checkpoint: Path) -> str:
    return f"{role}-{checkpoint.name}"


def _moved(role: str, model: Model) -> Model:
    if model.checkpoint is None:
        return model
    return model.model_copy(update={"weights": _name(role, model.checkpoint)})


def _pack(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, ".")
    return buffer.getvalue()


def _unpack(content: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")


def _searches(found: Mapping[Key, Artifact], store: Store) -> dict[str, bytes]:
    """Return what the searches have found out of the baseline among these artifacts, by file name."""
    digests = [artifact.digest for (stage, _), artifact in found.items() if stage == "train"]
    paths = [path for digest in digests for path in store.searches.glob(f"{digest[:16]}-*.pth")]
    return {path.name: path.read_bytes() for path in paths}


def _write(searches: Mapping[str, bytes], store: Store) -> None:
    for name, content in searches.items():
        if not (store.searches / name).exists():
            store.searches.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=store.searches, delete=False) as file:
                file.write(content)
            Path(file.name).replace(store.searches / name)


def _sentence(error: BaseException) -> str:
    """Return what Ray says, on one line; of a traceback that it brings, the error at its end."""
    said, _, traceback = str(error).partition("Traceback")
    _, *endings = re.split(r"^[\w.]*(?:Error|Exception): ", traceback, flags=re.MULTILINE)
    text = " ".join([said, *endings[-1:]]).strip() or type(error).__name__
    return " ".join(text.split()).rstrip(".")
