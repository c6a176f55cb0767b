"""The first meeting of a job's processes, over plain TCP at the coordinator's address.

Process 0 listens; each of the remaining processes connects and sends its index. Once all are
connected, process 0 sends `begin` and releases the port for jax. The connections stay open for the
messages of `distributed.py`.

Messages are flat JSON objects, one per line of at most `_MAX_LINE_BYTES`. Both ends prove that they
know the job's token, which the launchers draw; whoever does not is dropped, without an effect on
the meeting or its deadline.
"""

import contextlib
import hmac
import ipaddress
import json
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from starflow2_jax.runtime import json_text

TOKEN = "STARFLOW2_JOB_TOKEN"
_MAX_LINE_BYTES = 1 << 14
_MAX_TEXT = 1000  # characters of a message's text
# Connections that have not introduced themselves; the oldest is dropped if there are more.
_MAX_PENDING = 256
_HELLO = ("nonce", "process", "processes", "host")  # fields of the first message, besides its proof


@dataclass(frozen=True)
class ProcessInfo:
    """The identity of a process in a job."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int  # number of processes of the job
    process: int  # index of this process, from 0
    # Ids of the machine's accelerators that this process uses; None for all
    local_devices: tuple[int, ...] | None = None
    token: str = field(default="", repr=False)  # the job's shared secret

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass
class Connection:
    """An open connection to another process, and the name of its host."""

    host: str
    socket: socket.socket
    nonce: str = ""  # of the process that connected
    buffer: bytearray = field(default_factory=bytearray, repr=False)  # bytes of the next message


def rendezvous(info: ProcessInfo, timeout: float) -> dict[int, Connection]:
    """Wait until all processes are connected, at most `timeout` seconds.

    Returns:
        On process 0 a connection to each other process, by its index; elsewhere one to process 0.

    Raises:
        RuntimeError: If the coordinator is unreachable, its port is in use, or a process is missing
            (process 0 sends the indices of the missing processes to the connected ones).
        ValueError: If two processes have the same index, or differ in the number of processes.
    """
    if info.process == 0:
        return _accept_all(info, timeout)
    return {0: _connect(info, timeout)}


def listening_host(host: str) -> str:
    """Return the address on which process 0 listens if the job names it `host`.

    It is the address of that name, or empty for every interface: if the name has several addresses,
    if none of them is this machine's (behind NAT), or if they are loopback addresses although the
    name is not, as some distributions list a machine's own name.
    """
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return ""
    local = [str(row[4][0]) for row in addresses if _can_bind(row[0], row[4])]
    loopback = [ip for ip in local if ipaddress.ip_address(ip).is_loopback]
    if host in ("localhost", *loopback):
        return "127.0.0.1" if "127.0.0.1" in loopback else "".join(loopback[:1])
    return local[0] if len(local) == 1 and not loopback else ""


def _can_bind(family: int, address: tuple) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.bind(address)
        return True
    return False


def printable(text: str) -> str:
    """Return text for another process's terminal: one short line without control characters."""
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_TEXT])
    return "".join(escaped)[:_MAX_TEXT]


def send(connection: Connection, **message: Any) -> None:
    """Send a message, its texts `printable`; a closed connection is ignored."""
    with contextlib.suppress(OSError):
        connection.socket.sendall((json.dumps(_printable_texts(message)) + "\n").encode())


def receive(connection: Connection, deadline: float | None = None) -> dict[str, Any] | None:
    """Return the next message, its texts `printable`, or None if the other end is closed.

    A line that is no message is like a closed end.

    Args:
        deadline: Time on `time.monotonic` until which the whole message must be there.

    Raises:
        TimeoutError: If it is not.
    """
    while b"\n" not in connection.buffer:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        connection.socket.settimeout(remaining)
        if not _read(connection):
            return None
    line, _, rest = connection.buffer.partition(b"\n")
    connection.buffer = rest
    return _parse(line)


def _read(connection: Connection) -> bool:
    """Read the bytes that are there; False if the end is closed or the line too long."""
    try:
        chunk = connection.socket.recv(4096)
    except TimeoutError:
        raise
    except BlockingIOError:
        return True
    except OSError:
        return False
    connection.buffer += chunk
    return bool(chunk) and len(connection.buffer) <= _MAX_LINE_BYTES


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json_text.decode(line, "a message")
    except ValueError:
        return None
    if not isinstance(message, dict):
        return None
    if not all(isinstance(value, str | int) for value in message.values()):
        return None
    return _printable_texts(message)


def _printable_texts(message: dict[str, Any]) -> dict[str, Any]:
    return {k: printable(v) if isinstance(v, str) else v for k, v in message.items()}


def _proof(info: ProcessInfo, *parts: Any) -> str:
    """Return what only a process with the job's token can compute of `parts`."""
    return hmac.new(info.token.encode(), json.dumps(parts).encode(), "sha256").hexdigest()


def _is_proof(value: Any, info: ProcessInfo, *parts: Any) -> bool:
    return isinstance(value, str) and hmac.compare_digest(
        value.encode(), _proof(info, *parts).encode()
    )


def _make_connection(end: socket.socket, host: str) -> Connection:
    # Firewalls drop connections that are silent for minutes.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    return Connection(host, end)


def _listen(info: ProcessInfo) -> socket.socket:
    host = listening_host(info.address[0])
    dual_stack = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack or ":" in host else socket.AF_INET
    port, backlog = info.address[1], info.num_processes + _MAX_PENDING
    try:
        return socket.create_server(
            (host, port), family=family, backlog=backlog, dualstack_ipv6=dual_stack
        )
    except (OSError, OverflowError) as error:
        raise RuntimeError(
            f"port {port} of the coordinator {info.coordinator} cannot be opened on "
            f"{socket.gethostname()}: {getattr(error, 'strerror', None) or error}. Another run may "
            f"be using it; stop that run or choose another port"
        ) from None


def _accept_all(info: ProcessInfo, timeout: float) -> dict[int, Connection]:
    deadline = time.monotonic() + timeout
    connections: dict[int, Connection] = {}
    pending: dict[socket.socket, Connection] = {}
    with _listen(info) as listener, selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

        def drop(end: socket.socket) -> Connection:
            selector.unregister(end)
            return pending.pop(end)

        while len(connections) < info.num_processes - 1:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                _refuse(info, connections, _missing(info, connections, timeout))
            for key, _ in selector.select(remaining):
                if key.fileobj is not listener:
                    if key.fileobj in pending and _is_complete(pending[key.fileobj]):
                        _introduce(info, connections, drop(key.fileobj))
                    continue
                with contextlib.suppress(OSError):
                    end, _ = listener.accept()
                    end.setblocking(False)
                    pending[end] = _make_connection(end, "")
                    selector.register(end, selectors.EVENT_READ)
                    if len(pending) > _MAX_PENDING:
                        drop(next(iter(pending))).socket.close()
        for connection in pending.values():
            connection.socket.close()
    for connection in connections.values():
        connection.socket.settimeout(None)
        _reply(info, connection, begin=socket.gethostname())
    return connections


def _missing(info: ProcessInfo, connections: dict[int, Connection], timeout: float) -> str:
    indices = [str(i) for i in range(1, info.num_processes) if i not in connections]
    return (
        f"process {', '.join(indices)} of {info.num_processes} did not connect to "
        f"{info.coordinator} within {timeout:g} s"
    )


def _is_complete(newcomer: Connection) -> bool:
    """Read what a newcomer has sent; True once its first line is there, or it sends no more."""
    return not _read(newcomer) or b"\n" in newcomer.buffer


def _introduce(info: ProcessInfo, connections: dict[int, Connection], newcomer: Connection) -> None:
    """Add a newcomer to the connections if it is of this job, or close it."""
    line, _, rest = newcomer.buffer.partition(b"\n")
    hello = _parse(line) or {}
    nonce, process, processes, host = (hello.get(name) for name in _HELLO)
    typed = [type(hello.get(name)) for name in _HELLO] == [str, int, int, str]
    proved = _is_proof(hello.get("proof"), info, "hello", nonce, process, processes, host)
    # Otherwise a port scanner, another job's process, or one that gave up.
    if rest or not (typed and proved):
        newcomer.socket.close()
        return
    newcomer.buffer, newcomer.host, newcomer.nonce = rest, host, nonce
    if processes != info.num_processes:
        reason = (
            f"process {process} ({host}) is one of {processes}, process 0 one of "
            f"{info.num_processes}"
        )
        _refuse(info, {**connections, -1: newcomer}, reason, ValueError)
    if process in connections or not 0 < process < info.num_processes:
        reason = f"two processes have the index {process}"
        _refuse(info, {**connections, -1: newcomer}, reason, ValueError)
    connections[process] = newcomer


def _reply(info: ProcessInfo, connection: Connection, **message: str) -> None:
    ((kind, text),) = message.items()
    send(connection, **message, proof=_proof(info, kind, connection.nonce, printable(text)))


def _refuse(
    info: ProcessInfo,
    connections: dict[int, Connection],
    reason: str,
    kind: type[Exception] = RuntimeError,
) -> None:
    for connection in connections.values():
        _reply(info, connection, refused=reason)
        connection.socket.close()
    raise kind(reason)


def _connect(info: ProcessInfo, timeout: float) -> Connection:
    deadline = time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        try:
            end = socket.create_connection(info.address, timeout=max(min(remaining, 5.0), 0.1))
            break
        except (OSError, OverflowError) as error:
            if remaining <= 1.0:
                raise RuntimeError(
                    f"the coordinator {info.coordinator} cannot be reached from "
                    f"{socket.gethostname()} (process {info.process}) within {timeout:g} s: "
                    f"{getattr(error, 'strerror', None) or error}. Check that process 0 runs on "
                    f"that host and that the port is open"
                ) from None
        time.sleep(0.5)
    connection = _make_connection(end, info.address[0])
    connection.nonce = secrets.token_hex(16)
    hello = (connection.nonce, info.process, info.num_processes, printable(socket.gethostname()))
    send(connection, **dict(zip(_HELLO, hello)), proof=_proof(info, "hello", *hello))
    try:
        # Wait two seconds longer than process 0, so that it can report the missing processes.
        reply = receive(connection, max(deadline, time.monotonic() + 1.0) + 2.0) or {}
    except TimeoutError:
        end.close()
        raise RuntimeError(
            f"{info.coordinator} answers, but not all of {info.num_processes} processes have "
            f"connected within {timeout:g} s (this is process {info.process})"
        ) from None
    kind = "begin" if "begin" in reply else "refused"
    text = reply.get(kind)
    is_ours = _is_proof(reply.get("proof"), info, kind, connection.nonce, text)
    if is_ours and kind == "begin":
        connection.socket.settimeout(None)
        connection.host = text
        return connection
    end.close()
    raise RuntimeError(
        text
        if is_ours
        else f"{info.coordinator} is not process 0 of this run, has another {TOKEN}, or has just "
        f"exited"
    )
