"""Where the processes of a run first meet: plain TCP at the coordinator's address.

Process 0 listens; every other one connects and says who it is. Once all are there process 0 tells
them to begin and gives the port free for jax. Messages are JSON, one a line. The connections stay
open for what `distributed` has to tell later; they carry words, never arrays.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

_LINE = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        coordinator: HOST:PORT of process 0.
        local_devices: ids of the machine's accelerators that this process takes; None for all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


@dataclass
class Connection:
    """The open line to another process, and the host it runs on."""

    host: str
    socket: socket.socket
    file: Any = field(repr=False)


def meet(place: Place, limit: float) -> dict[int, Connection]:
    """Waits until all processes have met.

    Args:
        limit: seconds; no process waits longer than this.

    Returns:
        process 0: a connection to each other process, by its number; the others: one to process 0.

    Raises:
        RuntimeError: the coordinator cannot be reached, its port is taken, or a process is missing
            (process 0 says which, and tells the others).
        ValueError: two processes of the same number, or of another count of processes.
    """
    host, _, port = place.coordinator.rpartition(":")
    if place.process == 0:
        return _gather(place, int(port), limit)
    return {0: _reach(place, (host.strip("[]"), int(port)), limit)}


def tell(connection: Connection, **message: Any) -> None:
    """Sends a message; one who is gone does not hear it."""
    with contextlib.suppress(OSError):
        connection.socket.sendall((json.dumps(message) + "\n").encode())


def hear(connection: Connection) -> dict[str, Any] | None:
    """The next message; None where the other end is closed. TimeoutError after a time limit."""
    try:
        line = connection.file.readline(_LINE)
        return json.loads(line) if line.endswith(b"\n") else None
    except TimeoutError:
        raise
    except (OSError, ValueError):
        return None


def _connection(end: socket.socket, host: str, limit: float | None) -> Connection:
    end.settimeout(limit)
    # Or a firewall between hosts forgets a line on which nothing is said for minutes.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    return Connection(host, end, end.makefile("rb"))


def _listener(port: int, place: Place) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=place.processes, dualstack_ipv6=both
        )
    except OSError as error:
        raise RuntimeError(
            f"port {port} of the coordinator {place.coordinator} cannot be opened on "
            f"{socket.gethostname()}: {error.strerror}; another run uses it, or set another one"
        ) from None


def _gather(place: Place, port: int, limit: float) -> dict[int, Connection]:
    deadline = time.monotonic() + limit
    there: dict[int, Connection] = {}
    with _listener(port, place) as listener:
        while len(there) < place.processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                end, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.processes) if i not in there]
                _refuse(
                    there,
                    f"process {', '.join(missing)} of {place.processes} did not come to "
                    f"{place.coordinator} within {limit:g} s",
                )
            newcomer = _connection(end, "", 5.0)
            hello = _greeting(newcomer)
            if hello is None:  # a port scanner, or a process that gave up
                end.close()
                continue
            newcomer.host, process = hello["host"], hello["process"]
            if hello["processes"] != place.processes:
                there[-1] = newcomer
                _refuse(
                    there,
                    f"process {process} ({newcomer.host}) is one of {hello['processes']}, "
                    f"process 0 one of {place.processes}",
                    ValueError,
                )
            if process in there or not 0 < process < place.processes:
                there[-1] = newcomer
                _refuse(there, f"two processes call themselves {process}", ValueError)
            there[process] = newcomer
    for connection in there.values():
        connection.socket.settimeout(None)
        hosts = {i: c.host for i, c in there.items()} | {0: socket.gethostname()}
        tell(connection, begin=[hosts[i] for i in range(place.processes)])
    return there


def _greeting(newcomer: Connection) -> dict[str, Any] | None:
    try:
        hello = hear(newcomer)
    except TimeoutError:
        return None
    wanted = {"process": int, "processes": int, "host": str}
    fits = isinstance(hello, dict) and all(isinstance(hello.get(k), t) for k, t in wanted.items())
    return hello if fits else None


def _refuse(there: dict[int, Connection], reason: str, kind: type[Exception] = RuntimeError):
    for connection in there.values():
        tell(connection, refused=reason)
        connection.socket.close()
    raise kind(reason)


def _reach(place: Place, address: tuple[str, int], limit: float) -> Connection:
    deadline = time.monotonic() + limit
    while True:
        left = deadline - time.monotonic()
        try:
            end = socket.create_connection(address, timeout=max(min(left, 5.0), 0.1))
            break
        except OSError as error:
            if left <= 1.0:
                raise RuntimeError(
                    f"the coordinator {place.coordinator} cannot be reached from "
                    f"{socket.gethostname()} (process {place.process}) within {limit:g} s: "
                    f"{error.strerror or error}; does process 0 run there, and is the port open?"
                ) from None
        time.sleep(0.5)
    # Two seconds more than process 0 waits, so that it can say who is missing.
    connection = _connection(end, address[0], max(deadline - time.monotonic(), 1.0) + 2.0)
    me = {"process": place.process, "processes": place.processes, "host": socket.gethostname()}
    tell(connection, **me, pid=os.getpid())
    try:
        answer = hear(connection)
    except TimeoutError:
        raise RuntimeError(
            f"{place.coordinator} answers, but not all of {place.processes} processes have come "
            f"within {limit:g} s (this is process {place.process})"
        ) from None
    if answer is None or not {"begin", "refused"} & set(answer):
        raise RuntimeError(
            f"{place.coordinator} is not process 0 of this run, or it has just ended"
        )
    if "refused" in answer:
        raise RuntimeError(answer["refused"])
    connection.socket.settimeout(None)
    connection.host = answer["begin"][0]
    return connection
