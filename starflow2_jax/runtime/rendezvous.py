"""The first meeting of a job's processes, over plain TCP at the coordinator's address.

Process 0 listens; each of the remaining processes connects and sends its index. Once all are
connected, process 0 sends `begin` and releases the port for jax. Messages are JSON, one per line.
The connections stay open for the messages of `distributed.py`, which are short texts.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class ProcessInfo:
    """The identity of a process in a job."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int  # number of processes of the job
    process: int  # index of this process, from 0
    # Ids of the machine's accelerators that this process uses; None for all
    local_devices: tuple[int, ...] | None = None


@dataclass
class Connection:
    """An open connection to another process, and the name of its host."""

    host: str
    socket: socket.socket
    file: Any = field(repr=False)


def rendezvous(info: ProcessInfo, timeout: float) -> dict[int, Connection]:
    """Wait until all processes are connected, at most `timeout` seconds.

    Returns:
        On process 0 a connection to each other process, by its index; elsewhere one to process 0.

    Raises:
        RuntimeError: If the coordinator is unreachable, its port is in use, or a process is missing
            (process 0 sends the indices of the missing processes to the connected ones).
        ValueError: If two processes have the same index, or differ in the number of processes.
    """
    host, _, port = info.coordinator.rpartition(":")
    if info.process == 0:
        return _accept_all(info, int(port), timeout)
    return {0: _connect(info, (host.strip("[]"), int(port)), timeout)}


def send(connection: Connection, **message: Any) -> None:
    """Send a message; a closed connection is ignored."""
    with contextlib.suppress(OSError):
        connection.socket.sendall((json.dumps(message) + "\n").encode())


def receive(connection: Connection) -> dict[str, Any] | None:
    """Return the next message, or None if the other end is closed."""
    try:
        line = connection.file.readline(_MAX_LINE_BYTES)
        return json.loads(line) if line.endswith(b"\n") else None
    except TimeoutError:
        raise
    except (OSError, ValueError):
        return None


def _make_connection(end: socket.socket, host: str, timeout: float | None) -> Connection:
    end.settimeout(timeout)
    # Firewalls drop connections that are silent for minutes.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    return Connection(host, end, end.makefile("rb"))


def _listen(port: int, info: ProcessInfo) -> socket.socket:
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, backlog=info.num_processes, dualstack_ipv6=dual_stack
        )
    except OSError as error:
        raise RuntimeError(
            f"port {port} of the coordinator {info.coordinator} cannot be opened on "
            f"{socket.gethostname()}: {error.strerror}. Another run may be using it; stop that run "
            f"or choose another port"
        ) from None


def _accept_all(info: ProcessInfo, port: int, timeout: float) -> dict[int, Connection]:
    deadline = time.monotonic() + timeout
    connections: dict[int, Connection] = {}
    with _listen(port, info) as listener:
        while len(connections) < info.num_processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                end, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, info.num_processes) if i not in connections]
                _refuse(
                    connections,
                    f"process {', '.join(missing)} of {info.num_processes} did not connect to "
                    f"{info.coordinator} within {timeout:g} s",
                )
            newcomer = _make_connection(end, "", 5.0)
            hello = _read_hello(newcomer)
            if hello is None:  # a port scanner, or a process that gave up
                end.close()
                continue
            newcomer.host, process = hello["host"], hello["process"]
            if hello["processes"] != info.num_processes:
                connections[-1] = newcomer
                _refuse(
                    connections,
                    f"process {process} ({newcomer.host}) is one of {hello['processes']}, "
                    f"process 0 one of {info.num_processes}",
                    ValueError,
                )
            if process in connections or not 0 < process < info.num_processes:
                connections[-1] = newcomer
                _refuse(connections, f"two processes have the index {process}", ValueError)
            connections[process] = newcomer
    for connection in connections.values():
        connection.socket.settimeout(None)
        hosts = {i: c.host for i, c in connections.items()} | {0: socket.gethostname()}
        send(connection, begin=[hosts[i] for i in range(info.num_processes)])
    return connections


def _read_hello(newcomer: Connection) -> dict[str, Any] | None:
    try:
        hello = receive(newcomer)
    except TimeoutError:
        return None
    types = {"process": int, "processes": int, "host": str}
    valid = isinstance(hello, dict) and all(isinstance(hello.get(k), t) for k, t in types.items())
    return hello if valid else None


def _refuse(connections: dict[int, Connection], reason: str, kind: type[Exception] = RuntimeError):
    for connection in connections.values():
        send(connection, refused=reason)
        connection.socket.close()
    raise kind(reason)


def _connect(info: ProcessInfo, address: tuple[str, int], timeout: float) -> Connection:
    deadline = time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        try:
            end = socket.create_connection(address, timeout=max(min(remaining, 5.0), 0.1))
            break
        except OSError as error:
            if remaining <= 1.0:
                raise RuntimeError(
                    f"the coordinator {info.coordinator} cannot be reached from "
                    f"{socket.gethostname()} (process {info.process}) within {timeout:g} s: "
                    f"{error.strerror or error}. Check that process 0 runs on that host and that "
                    f"the port is open"
                ) from None
        time.sleep(0.5)
    # Wait two seconds longer than process 0, so that it can report the missing processes.
    connection = _make_connection(end, address[0], max(deadline - time.monotonic(), 1.0) + 2.0)
    send(
        connection,
        process=info.process,
        processes=info.num_processes,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    try:
        reply = receive(connection)
    except TimeoutError:
        raise RuntimeError(
            f"{info.coordinator} answers, but not all of {info.num_processes} processes have "
            f"connected within {timeout:g} s (this is process {info.process})"
        ) from None
    if reply is None or not {"begin", "refused"} & set(reply):
        raise RuntimeError(
            f"{info.coordinator} is not process 0 of this run, or it has just exited"
        )
    if "refused" in reply:
        raise RuntimeError(reply["refused"])
    connection.socket.settimeout(None)
    connection.host = reply["begin"][0]
    return connection
