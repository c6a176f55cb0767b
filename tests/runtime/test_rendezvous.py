"""The rendezvous: who meets, who is dropped, and how long it takes."""

import contextlib
import json
import socket
import threading
import time

import pytest

from starflow2_jax.runtime import distributed, rendezvous
from starflow2_jax.runtime.rendezvous import ProcessInfo


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def meet(infos, timeout=30.0, delays=()):
    """Return the result or error of each process, run as a thread, and its seconds."""
    results = [None] * len(infos)

    def run(number):
        time.sleep(delays[number] if delays else 0)
        start_time = time.monotonic()
        try:
            results[number] = (
                rendezvous.rendezvous(infos[number], timeout),
                time.monotonic() - start_time,
            )
        except Exception as error:
            results[number] = error, time.monotonic() - start_time

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(infos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def job(port, processes=3, indices=None, token="secret"):
    numbers = indices or range(processes)
    return [ProcessInfo(f"localhost:{port}", processes, i, None, token) for i in numbers]


def test_after_the_rendezvous_the_port_is_free_and_the_connections_are_open():
    port = free_port()
    (zero, _), (one, _), (two, _) = meet(job(port), delays=(1.0, 0, 0))
    assert set(zero) == {1, 2} and set(one) == set(two) == {0}
    with socket.create_server(("", port)):
        rendezvous.send(zero[2], failed="x")
        assert rendezvous.receive(two[0]) == {"failed": "x"}
        rendezvous.send(one[0], done=True)
        assert rendezvous.receive(zero[1]) == {"done": True}
        two[0].socket.close()
        assert rendezvous.receive(zero[2]) is None


def test_a_missing_process_is_named_by_all():
    for error, seconds in meet(job(free_port(), 4, (0, 1, 3)), timeout=2.0):
        assert isinstance(error, RuntimeError) and seconds < 6
        assert "process 2 of 4 did not connect to localhost:" in str(error)


def test_a_coordinator_that_cannot_be_reached():
    ((error, seconds),) = meet(job(free_port(), 2, (1,)), timeout=2.0)
    assert isinstance(error, RuntimeError) and seconds < 6
    assert "cannot be reached from" in str(error) and "within 2 s: Connection refused" in str(error)
    nowhere = ProcessInfo("no-such-host.invalid:1", 2, 1)
    ((error, _),) = meet([nowhere], timeout=2.0)
    assert "no-such-host.invalid:1 cannot be reached" in str(error)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ((error, seconds),) = meet(job(port, 2, (0,)), timeout=2.0)
    assert f"port {port} of the coordinator" in str(error) and seconds < 2


def test_something_else_at_the_coordinators_port():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        ((error, seconds),) = meet(job(port, 2, (1,)), timeout=1.0)
    assert "not all of 2 processes have connected within 1 s" in str(error) and seconds < 6


@pytest.mark.fast
def test_duplicate_indices_and_different_process_counts_are_refused():
    port = free_port()
    for error, _ in meet(job(port, 3, (0, 1, 1)), timeout=10.0):
        assert "two processes have the index 1" in str(error)
    port = free_port()
    odd = [*job(port, 3, (0,)), *job(port, 2, (1,))]
    for error, _ in meet(odd, timeout=10.0):
        assert "process 1" in str(error) and "is one of 2, process 0 one of 3" in str(error)


def hello(token="", nonce="n", process=1, processes=2, host="x"):
    """Return the first message of a process, as one with this token would send it."""
    info = ProcessInfo("localhost:1", 2, 1, None, token)
    fields = {"nonce": nonce, "process": process, "processes": processes, "host": host}
    proof = rendezvous._proof(info, "hello", *fields.values())
    return (json.dumps({**fields, "proof": proof}) + "\n").encode()


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"process": "1"}\n',
    b"\xff\n",
    b"[" * 3000 + b"\n",
    b"[" * 300_000 + b"\n",
    b"x" * 300_000,
    b'{"process": ' + b"9" * 9000 + b"}\n",
    b'{"process": true, "processes": 2, "host": "x", "nonce": "n", "proof": null}\n',
    hello("guess"),
    hello("guess", processes=3),
    hello("guess", host="\x1b[2J"),
    hello("secret", process=True),
    hello("secret", nonce=7),
    hello("secret") + b"more",
]


def connect_strangers(port, lines, closing):
    """Connect once for each line, when the port is open, and send it."""
    ends = []
    for line in lines:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                ends.append(socket.create_connection(("localhost", port), timeout=5))
                break
            except OSError:
                time.sleep(0.05)
        with contextlib.suppress(OSError):  # dropped before the whole line was sent
            ends[-1].sendall(line)
        if closing:
            ends.pop().close()
    return ends


@pytest.mark.fast
@pytest.mark.parametrize("closing", [True, False])
def test_strangers_at_the_port_are_dropped(closing):
    port, results = free_port(), []
    first = threading.Thread(target=lambda: results.append(meet(job(port, 2, (0,)))[0]))
    first.start()
    # Silent ones too, more than process 0 lets wait.
    silent = [b""] * (5 if closing else rendezvous._MAX_PENDING + 20)
    ends = connect_strangers(port, [*STRANGERS, *silent], closing)
    ((one, seconds),) = meet(job(port, 2, (1,)))
    first.join()
    assert set(one) == {0} and set(results[0][0]) == {1} and seconds < 5
    for end in ends:
        end.close()


@pytest.mark.fast
def test_a_byte_at_a_time_does_not_hold_the_meeting():
    port, ended = free_port(), threading.Event()

    def drip():
        (end,) = connect_strangers(port, [b" "], closing=False)
        while not ended.wait(0.1):
            with contextlib.suppress(OSError):
                end.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    ((error, seconds),) = meet(job(port, 2, (0,)), timeout=1.5)
    ended.set()
    thread.join()
    assert "process 1 of 2 did not connect" in str(error) and seconds < 2.5


@pytest.mark.fast
def test_another_token_is_another_run():
    port = free_port()
    infos = [*job(port, 2, (0,)), *job(port, 2, (1,), token="other")]
    (zero, _), (one, _) = meet(infos, timeout=1.5)
    assert "process 1 of 2 did not connect" in str(zero)
    assert "is not process 0 of this run, has another STARFLOW2_JOB_TOKEN" in str(one)


@pytest.mark.fast
@pytest.mark.parametrize(
    "line",
    [b"5\n", b'{"begin": 5}\n', b'{"begin": []}\n', b'["begin"]\n', b"[" * 300_000 + b"\n",
     b'{"begin": "x", "proof": "y"}\n', b'{"refused": "\\u001b[2J"}\n', b'{"refused": {}}\n'],
)  # fmt: skip
def test_what_answers_is_no_coordinator(line):
    with socket.create_server(("localhost", 0)) as server:

        def answer():
            end, _ = server.accept()
            with end, contextlib.suppress(OSError):
                end.recv(1000)
                end.sendall(line)
                end.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        ((error, seconds),) = meet(job(server.getsockname()[1], 2, (1,)), timeout=20.0)
        thread.join()
    assert "is not process 0 of this run" in str(error) and seconds < 10


@pytest.mark.fast
def test_a_coordinator_that_drips_is_left_at_the_deadline():
    with socket.create_server(("localhost", 0)) as server:

        def drip():
            end, _ = server.accept()
            with end, contextlib.suppress(OSError):
                while True:
                    end.sendall(b" ")
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        ((error, seconds),) = meet(job(server.getsockname()[1], 2, (1,)), timeout=0.5)
        thread.join()
    assert "not all of 2 processes have connected" in str(error) and seconds < 5


@pytest.mark.fast
@pytest.mark.parametrize(
    "line, text",
    [
        (b"[1]\n", "process 1 (peer) of 2 exited without an error"),
        (b"[" * 300_000 + b"\n", "process 1 (peer) of 2 exited without an error"),
        (b'{"failed": {"a": 1}}\n', "process 1 (peer) of 2 exited without an error"),
        (b'{"failed": "x", "process": 99}\n', "process 1 (peer) of 2 stopped: x"),
        (b'{"failed": "a\\u001b[2Jb\\nc"}\n', "process 1 (peer) of 2 stopped: a\\x1b[2Jb\\nc"),
    ],
)
def test_a_bad_line_after_the_meeting_ends_the_job(line, text, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_GRACE", 0)
    exits = []
    monkeypatch.setattr(distributed, "_exit", exits.append)
    local, remote = socket.socketpair()
    remote.settimeout(1)  # a line that is too long is not read to its end
    connection = rendezvous.Connection("peer", local)
    session = distributed._Session(
        ProcessInfo("h:1", 2, 0), {}, {1: connection}, {1: threading.Event()}
    )
    watcher = threading.Thread(target=distributed._watch, args=(session, 1))
    watcher.start()
    with remote, contextlib.suppress(OSError):
        remote.sendall(line)
        watcher.join(10)
    local.close()
    assert exits == [session] and text in capsys.readouterr().err


@pytest.mark.fast
def test_the_address_to_listen_on(monkeypatch):
    assert rendezvous.listening_host("127.0.0.1") == "127.0.0.1"
    assert rendezvous.listening_host("localhost") == "127.0.0.1"
    assert rendezvous.listening_host("192.0.2.1") == ""  # not of this machine
    assert rendezvous.listening_host("no-such-host.invalid") == ""
    rows = [(socket.AF_INET, 0, 0, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: rows)
    assert rendezvous.listening_host("node1") == ""  # its own name, as Debian lists it
    info = ProcessInfo("127.0.0.1:0", 2, 0)
    monkeypatch.undo()
    with rendezvous._listen(info) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
