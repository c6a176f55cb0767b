"""Several processes as one run: they find one another, agree, and end together.

    detect            who this process is: variables, SLURM, or jax's own detection of a TPU slice
    init_distributed  meeting at the coordinator, jax.distributed, the table of devices
    agree             a value that has to be the same everywhere, or every process says what differs
    stopper           SIGTERM on any of them stops all after the same step
    fail              the end of one, with its reason, is the end of all

The processes meet over plain TCP (`meeting`) before jax takes the coordinator's port: jax aborts
with a C++ trace, and without a name, where the coordinator cannot be reached or a process does not
come. The connections stay open. A process that is killed closes its own, so that the others know at
once, and those that a collective would leave waiting are told why and end. Where a whole machine is
lost, jax's heartbeat ends the others.

    JAX_COORDINATOR_ADDRESS        HOST:PORT of process 0, the same for all
    JAX_NUM_PROCESSES              how many processes there are
    JAX_PROCESS_ID                 which one this is, from 0
    JAX_LOCAL_DEVICE_IDS           which of the machine's accelerators it takes, all by default
    STARFLOW2_DEVICES_PER_PROCESS  how many devices each has to see; not checked where absent
    STARFLOW2_CLUSTER=auto         ask jax where the process runs (TPU slices)

The first three may be left out under SLURM. Without any of them a run is a single process.
"""

import atexit
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from starflow2_jax.runtime import rendezvous
from starflow2_jax.runtime.rendezvous import Place

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUTS = {"rendezvous_timeout": 45, "initialization": 45, "heartbeat": 20, "shutdown": 30}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PREFIX = "starflow2_jax"
# How long a process that hears of another's end has to say the same of itself.
_GRACE = 1.5


@dataclass
class _Session:
    """This process among the others, from `init_distributed` to its end."""

    place: Place
    timeouts: Mapping[str, int]
    connections: dict[int, rendezvous.Connection]
    done: dict[int, threading.Event]
    ending: threading.Event = field(default_factory=threading.Event)
    numbers: Iterator[int] = field(default_factory=itertools.count)


# Like jax's own distributed state one a process: `fail` and `agree` are called from anywhere.
_session: _Session | None = None


# ------------------------------------------------------------------------------------- who we are


def detect(environ: Mapping[str, str]) -> Place | None:
    """Where this process stands; None where it is alone.

    Raises:
        ValueError: variables that are missing, no numbers, or do not fit together.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    slurm = {"SLURM_PROCID", "SLURM_JOB_ID"} <= set(environ) and int(tasks) > 1
    given = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    if not given and not slurm:
        return _ask_jax() if environ.get("STARFLOW2_CLUSTER") == "auto" else None
    if slurm:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        given.setdefault(ADDRESS, _slurm_address(nodes, environ["SLURM_JOB_ID"]))
        given = {COUNT: tasks, INDEX: environ["SLURM_PROCID"], **given}
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}")
    for name in (COUNT, INDEX):
        if not given[name].isdecimal():
            raise ValueError(f"{name}={given[name]!r} is not a whole number")
    count, index = int(given[COUNT]), int(given[INDEX])
    if index >= count:
        raise ValueError(f"{INDEX}={index} is not below {COUNT}={count}")
    if not re.fullmatch(r".+:\d+", given[ADDRESS]):
        raise ValueError(f"{ADDRESS}={given[ADDRESS]!r} is not HOST:PORT")
    place = Place(given[ADDRESS], count, index, _local_devices(environ, slurm))
    return place if count > 1 else None


def _slurm_address(nodes: str, job: str) -> str:
    """The first host of `node[001-004,007],other`, and a port that follows from the job."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set {ADDRESS}=HOST:PORT")
    return f"{found[1]}{found[2] or ''}:{61000 + int(job) % 4000}"


def _local_devices(environ: Mapping[str, str], slurm: bool) -> tuple[int, ...] | None:
    """Which accelerators this process takes; None for all it sees.

    Under SLURM the tasks of a node share out the devices that each of them sees where those are as
    many or more (`--gres`); a task that was given its own (`--gpus-per-task`) keeps them.

    Raises:
        ValueError: JAX_LOCAL_DEVICE_IDS is not a list of numbers.
    """
    asked = environ.get("JAX_LOCAL_DEVICE_IDS")
    if asked:
        if not re.fullmatch(r"\d+(,\d+)*", asked):
            raise ValueError(f"JAX_LOCAL_DEVICE_IDS={asked!r} is not a list such as 0,1,2,3")
        return tuple(int(n) for n in asked.split(","))
    visible = [n for n in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    tasks = int(re.match(r"\d*", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[0] or 1)
    if not slurm or tasks == 1 or len(visible) < tasks:
        return None
    share, mine = len(visible) // tasks, int(environ.get("SLURM_LOCALID", "0"))
    return tuple(range(mine * share, (mine + 1) * share))


def _ask_jax() -> Place | None:
    from jax._src import clusters  # jax.distributed.initialize does not tell what it has found

    none = (None,) * 5
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        *none, TIMEOUTS["rendezvous_timeout"]
    )
    address, count, index, devices = found
    if None in (address, count, index):
        raise ValueError(
            f"STARFLOW2_CLUSTER=auto, but jax finds no cluster around this process: set {ADDRESS}, "
            f"{COUNT} and {INDEX}"
        )
    return None if count == 1 else Place(address, count, index, devices and tuple(devices))


def code_fingerprint() -> str:
    """sha256 of the package's sources: names and contents, in order."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _code() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"sources": code_fingerprint(), "python": platform.python_version(), **versions}


# -------------------------------------------------------------------------------- start, agreement


def init_distributed(timeouts: Mapping[str, int] | None = None) -> None:
    """Joins this process to the others; does nothing where it is alone, or has joined already.

    To be called before anything asks jax for a device. Process 0 prints the table of processes.

    Args:
        timeouts: seconds; `rendezvous_timeout` for meeting at the coordinator, the others as in
            `jax.distributed.initialize`. `TIMEOUTS` by default.

    Raises:
        ValueError: variables that do not fit together, or processes of other code or devices.
        RuntimeError: the coordinator cannot be reached, its port is taken, or a process is missing.
    """
    global _session
    place = detect(os.environ)
    if place is None or _session is not None:
        return
    timeouts = {**TIMEOUTS, **(timeouts or {})}
    connections = rendezvous.meet(place, timeouts["rendezvous_timeout"])
    done = {process: threading.Event() for process in connections}
    _session = _Session(place, timeouts, connections, done)
    for process in connections:
        threading.Thread(target=_listen, args=(_session, process), daemon=True).start()
    before = sys.excepthook
    sys.excepthook = lambda kind, error, trace: (before(kind, error, trace), fail(error))
    atexit.register(_finish, _session)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # all is known; under SLURM it would take one device
        initialization_timeout=timeouts["initialization"],
        heartbeat_timeout_seconds=timeouts["heartbeat"],
        shutdown_timeout_seconds=timeouts["shutdown"],
    )
    agree("the code", _code())
    _check_devices(_session, os.environ.get("STARFLOW2_DEVICES_PER_PROCESS"))


def _client() -> Any:
    from jax._src import distributed  # jax has no public name for its key-value store

    return distributed.global_state.client


def _exchange(session: _Session, name: str, value: Any) -> list[Any]:
    """Everybody's value, in order of the processes, through the coordinator; no device is used."""
    client, place = _client(), session.place
    folder = f"{_PREFIX}/{next(session.numbers)}_{name}/"
    client.key_value_set(f"{folder}{place.process}", json.dumps(value))
    client.wait_at_barrier(folder, session.timeouts["initialization"] * 1000)
    rows = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(folder)}
    return [rows[i] for i in range(place.processes)]


def agree(what: str, value: Any) -> None:
    """Checks that all processes hold the same value; nothing to do where there is one process.

    Args:
        what: name for the message; value: anything JSON can hold.

    Raises:
        ValueError: on every process alike; names the first process that differs, and in what.
    """
    if _session is None:
        return
    rows = [_flat(row) for row in _exchange(_session, "value", value)]
    for process, row in enumerate(rows):
        keys = [key for key in sorted({*rows[0], *row}) if rows[0].get(key) != row.get(key)]
        if keys:
            listed = "; ".join(
                f"{k}{k and ': '}{rows[0].get(k)!r} and {row.get(k)!r}" for k in keys[:5]
            )
            more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ValueError(
                f"processes 0 ({_hosts(_session)[0]}) and {process} ({_hosts(_session)[process]}) "
                f"differ in {what}: {listed}{more}"
            )


def wait_for_all(limit: int = 3600) -> None:
    """Returns once every process has come here; nothing to do where there is one.

    To be called after compiling: how long that takes differs, and collectives wait less (30 s on
    CPUs) for one another.

    Args:
        limit: seconds. One that fails meanwhile ends all, whatever the limit.
    """
    if _session is not None:
        _client().wait_at_barrier(f"{_PREFIX}/{next(_session.numbers)}", limit * 1000)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        rows |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return rows


def _hosts(session: _Session) -> list[str]:
    """Of all processes; the others know only process 0 and themselves."""
    hosts = ["?"] * session.place.processes
    for process, connection in session.connections.items():
        hosts[process] = connection.host
    hosts[session.place.process] = socket.gethostname()
    return hosts


def _check_devices(session: _Session, asked: str | None) -> None:
    """Prints the table of processes; ValueError where one sees other devices than asked for."""
    limit = session.timeouts["initialization"]

    def stuck() -> None:
        # Where one process finds no accelerator, the others wait for it inside the runtime.
        rows = dict(_client().key_value_dir_get(f"{_PREFIX}/1_devices/"))
        there = [f"process {key.rpartition('/')[2]} has {row}" for key, row in rows.items()]
        reason = f"not all processes have their devices after {limit} s; of those that have: "
        reason += "; ".join(sorted(there)) or "none"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        fail(reason)

    timer = threading.Timer(limit, stuck)
    timer.daemon = True
    timer.start()
    local = jax.local_devices()
    mine = [len(local), local[0].device_kind, local[0].platform, socket.gethostname(), os.getpid()]
    rows = _exchange(session, "devices", mine)
    timer.cancel()
    if session.place.process == 0:
        print(_table(rows), flush=True)
    for process, (count, kind, name, host, _) in enumerate(rows):
        sees = f"process {process} ({host}) sees {count} x {kind} ({name})"
        if asked and str(count) != asked:
            raise ValueError(f"{sees}, but {asked} a process were asked for")
        if [count, kind, name] != rows[0][:3]:
            first = "({3}) sees {0} x {1} ({2})".format(*rows[0])
            raise ValueError(f"{sees}, process 0 {first}")


def _table(rows: list[list[Any]]) -> str:
    width = max(len("host"), *(len(row[3]) for row in rows))
    lines = [f"process  {'host':{width}}  {'pid':>8}  devices"]
    for process, (count, kind, name, host, pid) in enumerate(rows):
        lines.append(f"{process:7}  {host:{width}}  {pid:8}  {count} x {kind} ({name})")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- end


def stopper() -> Callable[[int], bool]:
    """Catches SIGTERM; the function returned says at each step whether to stop after it.

    With several processes all of them have to call it at every step; once any has had the signal,
    it is true on all of them at one and the same step. Until then nothing is sent.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # jax has caught the signal since `jax.distributed.initialize`.
        return multihost_utils.reached_preemption_sync_point
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return lambda step: asked.is_set()


def fail(error: BaseException | str) -> None:
    """Ends this process, which has said why, and tells the others; returns where it is alone."""
    session = _session
    if session is None or session.ending.is_set():
        return
    session.ending.set()
    reason = str(error).strip() or type(error).__name__
    for connection in session.connections.values():
        rendezvous.tell(connection, failed=reason, process=session.place.process)
    _leave(session)


def _leave(session: _Session) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if session.place.process == 0:
        time.sleep(_GRACE + 1)  # the others speak before the coordinator's end aborts them
    os._exit(1)


def _listen(session: _Session, process: int) -> None:
    """Waits for what another process has to say; its silence is an end as well."""
    message = rendezvous.hear(session.connections[process]) or {}
    if "done" in message:
        session.done[process].set()
        return
    reason, origin = message.get("failed"), message.get("process", process)
    if session.place.process == 0:
        for other in session.connections.values():
            rendezvous.tell(other, failed=reason, process=origin)
    if reason is not None or session.place.process == 0:
        time.sleep(_GRACE)  # where all have the same to say, each says it itself
    if session.ending.is_set():
        return
    session.ending.set()
    what = f"stopped: {reason}" if reason else "ended without a word: killed, or its machine lost"
    print(
        f"error: process {origin} ({_hosts(session)[origin]}) of {session.place.processes} {what}",
        file=sys.stderr,
    )
    _leave(session)


def _finish(session: _Session) -> None:
    """At exit: process 0, which hosts the coordinator, goes last of all that are well."""
    if session.ending.is_set():
        return
    if session.place.process:
        # What process 0 still writes may take longer than jax waits for it.
        rendezvous.tell(session.connections[0], done=True)
        session.done[0].wait()
    else:
        deadline = time.monotonic() + session.timeouts["shutdown"]
        for connection in session.connections.values():
            rendezvous.tell(connection, done=True)
        for done in session.done.values():
            done.wait(max(deadline - time.monotonic(), 0))
    session.ending.set()
