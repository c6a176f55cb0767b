"""Run several processes as one job: they find one another, compare settings, and end together.

    detect                          identify this process: variables, SLURM, or jax's TPU detection
    init_distributed                rendezvous, jax.distributed, and the table of devices
    assert_equal_across_processes   compare a value, or stop every process with the difference
    preemption_handler              SIGTERM on any process stops all after the same step
    abort_all                       end every process when one of them fails, with its reason

The processes meet over plain TCP (`rendezvous.py`) before jax takes the coordinator's port, because
jax aborts with an anonymous C++ trace if the coordinator is unreachable or a process is missing.
The connections stay open. The kernel closes those of a killed process, so the remaining processes
learn of it at once and exit with a message instead of waiting in a collective. If a whole machine
is lost, jax's heartbeat ends the remaining processes.

    JAX_COORDINATOR_ADDRESS        HOST:PORT of process 0, the same for all
    JAX_NUM_PROCESSES              number of processes
    JAX_PROCESS_ID                 index of this process, from 0
    JAX_LOCAL_DEVICE_IDS           accelerators of this machine to use, all by default
    STARFLOW2_JOB_TOKEN            secret of the job, by which its processes know each other
    STARFLOW2_DEVICES_PER_PROCESS  number of devices that each process must see; optional
    STARFLOW2_CLUSTER=auto         ask jax for the cluster (TPU slices)

SLURM provides the first three. Without any of them a run is a single process.
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

from starflow2_jax.runtime import json_text, rendezvous
from starflow2_jax.runtime.rendezvous import ProcessInfo

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUTS = {"rendezvous_timeout": 45, "initialization": 45, "heartbeat": 20, "shutdown": 30}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PREFIX = "starflow2_jax"
# Seconds that a process gets to print its own error after another one has failed.
_GRACE = 1.5


@dataclass
class _Session:
    """The state of this process in a job of several, from `init_distributed` to its exit."""

    info: ProcessInfo
    timeouts: Mapping[str, int]
    connections: dict[int, rendezvous.Connection]
    finished: dict[int, threading.Event]
    ending: threading.Event = field(default_factory=threading.Event)
    exchange_ids: Iterator[int] = field(default_factory=itertools.count)


# One per process, like jax's own distributed state, because any module may call `abort_all`.
_session: _Session | None = None


# ------------------------------------------------------------------------------------- this process


def detect(environ: Mapping[str, str]) -> ProcessInfo | None:
    """Return the index and coordinator of this process, or None for a single process."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    slurm = {"SLURM_PROCID", "SLURM_JOB_ID"} <= set(environ) and int(tasks) > 1
    variables = {name: environ[name] for name in (ADDRESS, COUNT, INDEX) if environ.get(name)}
    if not variables and not slurm:
        return _detect_by_jax() if environ.get("STARFLOW2_CLUSTER") == "auto" else None
    if slurm:
        if "SLURM_STEP_NUM_TASKS" not in environ and INDEX not in variables:
            raise ValueError(
                f"SLURM_NTASKS={tasks}, but srun did not start this process, so the others will "
                "not come: start it with srun (see launch/slurm.sbatch), or unset SLURM_NTASKS for "
                "a single process"
            )
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        if ADDRESS not in variables:
            variables[ADDRESS] = _slurm_address(nodes, environ["SLURM_JOB_ID"])
        variables = {COUNT: tasks, INDEX: environ["SLURM_PROCID"], **variables}
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in variables]
    if missing:
        raise ValueError(f"{', '.join(variables)} set, but not {', '.join(missing)}")
    for name in (COUNT, INDEX):
        if not variables[name].isdecimal():
            raise ValueError(f"{name}={variables[name]!r} is not a whole number")
    count, index = int(variables[COUNT]), int(variables[INDEX])
    if index >= count:
        raise ValueError(f"{INDEX}={index} is not below {COUNT}={count}")
    if not re.fullmatch(r".+:\d{1,5}", variables[ADDRESS]):
        raise ValueError(f"{ADDRESS}={variables[ADDRESS]!r} is not HOST:PORT")
    devices, token = _local_devices(environ, slurm), environ.get(rendezvous.TOKEN, "")
    info = ProcessInfo(variables[ADDRESS], count, index, devices, token)
    return info if count > 1 else None


def _slurm_address(nodes: str, job: str) -> str:
    """Return the first host of `node[001-004,007],node9` and a port derived from the job id."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set {ADDRESS}=HOST:PORT")
    return f"{match[1]}{match[2] or ''}:{61000 + int(job) % 4000}"


def _local_devices(environ: Mapping[str, str], slurm: bool) -> tuple[int, ...] | None:
    # Under SLURM, tasks that all see the devices of their node (`--gres`) split them evenly. A task
    # with devices of its own (`--gpus-per-task`) keeps them. None stands for all visible devices.
    device_ids = environ.get("JAX_LOCAL_DEVICE_IDS")
    if device_ids:
        if not re.fullmatch(r"\d+(,\d+)*", device_ids):
            raise ValueError(f"JAX_LOCAL_DEVICE_IDS={device_ids!r} is not a list such as 0,1,2,3")
        return tuple(int(n) for n in device_ids.split(","))
    visible = [n for n in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
    tasks = int(re.match(r"\d*", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))[0] or 1)
    if not slurm or tasks == 1 or len(visible) < tasks:
        return None
    per_task, task = len(visible) // tasks, int(environ.get("SLURM_LOCALID", "0"))
    return tuple(range(task * per_task, (task + 1) * per_task))


def _detect_by_jax() -> ProcessInfo | None:
    from jax._src import clusters  # jax.distributed.initialize does not return what it detects

    detect_unset = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, devices = detect_unset(
        None, None, None, None, None, TIMEOUTS["rendezvous_timeout"]
    )
    if None in (address, count, index):
        raise ValueError(
            f"STARFLOW2_CLUSTER=auto, but jax detects no cluster here: set {ADDRESS}, {COUNT} and "
            f"{INDEX}"
        )
    token = os.environ.get(rendezvous.TOKEN, "")
    info = ProcessInfo(address, count, index, devices and tuple(devices), token)
    return None if count == 1 else info


def code_fingerprint() -> str:
    """Return the sha256 of the names and contents of the package's source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _code_versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"sources": code_fingerprint(), "python": platform.python_version(), **versions}


# -------------------------------------------------------------------------------- start, agreement


def init_distributed(timeouts: Mapping[str, int] | None = None) -> None:
    """Join this process to the other processes of its job, if there are any.

    Call it before anything asks jax for a device; a second call does nothing. Process 0 prints the
    table of processes.

    Args:
        timeouts: Seconds: `rendezvous_timeout` to meet at the coordinator, the remaining keys as in
            `jax.distributed.initialize`. Missing keys are taken from `TIMEOUTS`.

    Raises:
        ValueError: If variables contradict each other, or the processes differ in code or devices.
        RuntimeError: If the coordinator is unreachable, its port is taken, or a process is missing.
    """
    global _session
    info = detect(os.environ)
    if info is None or _session is not None:
        return
    timeouts = {**TIMEOUTS, **(timeouts or {})}
    host, port = rendezvous.listening_host(info.address[0]), info.address[1]
    if info.process == 0 and not info.token and not host.startswith(("127.", "::1")):
        print(
            f"warning: {rendezvous.TOKEN} is not set, so any program that reaches "
            f"{info.coordinator} can join this run; the launchers draw one",
            file=sys.stderr,
        )
    connections = rendezvous.rendezvous(info, timeouts["rendezvous_timeout"])
    finished = {process: threading.Event() for process in connections}
    _session = _Session(info, timeouts, connections, finished)
    for process in connections:
        threading.Thread(target=_watch, args=(_session, process), daemon=True).start()
    default_hook = sys.excepthook
    sys.excepthook = lambda kind, error, trace: (default_hook(kind, error, trace), abort_all(error))
    atexit.register(_finish, _session)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    jax.distributed.initialize(
        info.coordinator,
        info.num_processes,
        info.process,
        local_device_ids=info.local_devices,
        coordinator_bind_address=f"{f'[{host}]' if ':' in host else host or '[::]'}:{port}",
        cluster_detection_method="deactivate",  # under SLURM, detection would take a single device
        initialization_timeout=timeouts["initialization"],
        heartbeat_timeout_seconds=timeouts["heartbeat"],
        shutdown_timeout_seconds=timeouts["shutdown"],
    )
    assert_equal_across_processes("the code", _code_versions())
    _check_devices(_session, os.environ.get("STARFLOW2_DEVICES_PER_PROCESS"))


def _client() -> Any:
    from jax._src import distributed  # jax has no public name for its key-value store

    return distributed.global_state.client


def _all_gather(session: _Session, name: str, value: Any) -> list[Any]:
    """Return the values of all processes, by process index, without using a device."""
    client, info = _client(), session.info
    folder = f"{_PREFIX}/{next(session.exchange_ids)}_{name}/"
    client.key_value_set(f"{folder}{info.process}", json.dumps(value))
    client.wait_at_barrier(folder, session.timeouts["initialization"] * 1000)
    stored = client.key_value_dir_get(folder)
    rows = {int(key.rpartition("/")[2]): json_text.decode(text, key) for key, text in stored}
    return [rows[i] for i in range(info.num_processes)]


def assert_equal_across_processes(label: str, value: Any) -> None:
    """Raise on every process if the processes do not all pass the same value.

    The value is anything that JSON can represent; the error names the first process that differs,
    and the keys.
    """
    if _session is None:
        return
    rows = [_flat(row) for row in _all_gather(_session, "value", value)]
    for process, row in enumerate(rows):
        keys = [key for key in sorted({*rows[0], *row}) if rows[0].get(key) != row.get(key)]
        if keys:
            differences = "; ".join(
                f"{k}{k and ': '}{rows[0].get(k)!r} and {row.get(k)!r}" for k in keys[:5]
            )
            more = f"; and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ValueError(
                f"processes 0 ({_hosts(_session)[0]}) and {process} ({_hosts(_session)[process]}) "
                f"differ in {label}: {differences}{more}"
            )


def wait_for_all(timeout: int = 3600) -> None:
    """Return once every process has called this; at once in a single process.

    Call it after compiling: compile times differ, and collectives on CPUs give up after 30 s.
    """
    if _session is not None:
        _client().wait_at_barrier(f"{_PREFIX}/{next(_session.exchange_ids)}", timeout * 1000)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    rows: dict[str, Any] = {}
    for key, inner in value.items():
        rows |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return rows


def _hosts(session: _Session) -> list[str]:
    """Return host names by process index; processes above 0 know only process 0 and their own."""
    hosts = ["?"] * session.info.num_processes
    for process, connection in session.connections.items():
        hosts[process] = connection.host
    hosts[session.info.process] = socket.gethostname()
    return hosts


def _check_devices(session: _Session, devices_per_process: str | None) -> None:
    """Print the table of processes, and raise ValueError if their devices differ."""
    timeout = session.timeouts["initialization"]

    def report_missing() -> None:
        # If one process finds no accelerator, the runtime of the remaining ones blocks.
        rows = dict(_client().key_value_dir_get(f"{_PREFIX}/1_devices/"))
        ready = [f"process {key.rpartition('/')[2]} has {row}" for key, row in rows.items()]
        reason = f"not all processes have their devices after {timeout} s; of those that have: "
        reason += "; ".join(sorted(ready)) or "none"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        abort_all(reason)

    timer = threading.Timer(timeout, report_missing)
    timer.daemon = True
    timer.start()
    local = jax.local_devices()
    row = [len(local), local[0].device_kind, local[0].platform, socket.gethostname(), os.getpid()]
    rows = _all_gather(session, "devices", row)
    timer.cancel()
    if session.info.process == 0:
        print(_table(rows), flush=True)
    for process, (count, kind, name, host, _) in enumerate(rows):
        message = f"process {process} ({host}) sees {count} x {kind} ({name})"
        if devices_per_process and str(count) != devices_per_process:
            raise ValueError(
                f"{message}, but STARFLOW2_DEVICES_PER_PROCESS={devices_per_process} are expected"
            )
        if [count, kind, name] != rows[0][:3]:
            first = "({3}) sees {0} x {1} ({2})".format(*rows[0])
            raise ValueError(f"{message}, process 0 {first}")


def _table(rows: list[list[Any]]) -> str:
    width = max(len("host"), *(len(row[3]) for row in rows))
    lines = [f"process  {'host':{width}}  {'pid':>8}  devices"]
    for process, (count, kind, name, host, pid) in enumerate(rows):
        lines.append(f"{process:7}  {host:{width}}  {pid:8}  {count} x {kind} ({name})")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- end


def preemption_handler() -> Callable[[int], bool]:
    """Catch SIGTERM, and return a function of the step that says whether to stop after it.

    A process on its own catches the first SIGINT (Ctrl-C) as well; the second one ends it at once.
    In a job of several processes all of them must call it at every step. After a signal to any
    process it returns True on all of them at the same step. It sends nothing until then.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # `jax.distributed.initialize` has installed the signal handler.
        return multihost_utils.reached_preemption_sync_point
    signaled = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: signaled.set())

    def interrupt(*_: object) -> None:
        signaled.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one does not wait

    # A shell starts its background jobs with SIGINT ignored, and they stay so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return lambda step: signaled.is_set()


def abort_all(error: BaseException | str) -> None:
    """End all processes of the job after the caller has printed the error."""
    session = _session
    if session is None or session.ending.is_set():
        return
    session.ending.set()
    reason = str(error).strip() or type(error).__name__
    for connection in session.connections.values():
        rendezvous.send(connection, failed=reason, process=session.info.process)
    _exit(session)


def _exit(session: _Session) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if session.info.process == 0:
        time.sleep(_GRACE + 1)  # the exit of the coordinator would abort the messages of the rest
    os._exit(1)


def _watch(session: _Session, process: int) -> None:
    """Wait for a message of another process; a closed connection means that it is gone."""
    message = rendezvous.receive(session.connections[process]) or {}
    if "done" in message:
        session.finished[process].set()
        return
    reason, origin = message.get("failed"), message.get("process")
    if type(origin) is not int or not 0 <= origin < session.info.num_processes:
        origin = process
    reason = reason if reason and isinstance(reason, str) else None
    if session.info.process == 0:
        for connection in session.connections.values():
            rendezvous.send(connection, failed=reason or "", process=origin)
    if reason is not None or session.info.process == 0:
        time.sleep(_GRACE)  # processes that fail for the same reason print it themselves
    if session.ending.is_set():
        return
    session.ending.set()
    end = f"stopped: {reason}" if reason else "exited without an error (killed, or its host lost)"
    name = f"process {origin} ({_hosts(session)[origin]}) of {session.info.num_processes}"
    print(f"error: {name} {end}", file=sys.stderr)
    _exit(session)


def _finish(session: _Session) -> None:
    """Exit in order: process 0 hosts jax's coordinator, so it leaves last."""
    if session.ending.is_set():
        return
    if session.info.process:
        # Process 0 may still be writing files for longer than jax waits for it.
        rendezvous.send(session.connections[0], done=True)
        session.finished[0].wait()
    else:
        deadline = time.monotonic() + session.timeouts["shutdown"]
        for connection in session.connections.values():
            rendezvous.send(connection, done=True)
        for event in session.finished.values():
            event.wait(max(deadline - time.monotonic(), 0))
    session.ending.set()
