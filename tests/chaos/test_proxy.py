"""The fault proxy does to a connection what it is told, and nothing else."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.proxy import CUT, HALF_OPEN, SWALLOWED, SWALLOWED_SILENTLY, Fault, FaultProxy

HEARD: list[bytes] = []


class Echo(socketserver.StreamRequestHandler):
    """Answers each line in capitals."""

    def handle(self) -> None:
        try:
            for line in self.rfile:
                HEARD.append(line.strip())
                self.wfile.write(line.upper())
        except ConnectionError:
            pass  # the proxy has cut it


@pytest.fixture(scope="module")
def shared() -> Iterator[FaultProxy]:
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with FaultProxy(server.server_address[1]) as proxy:
        yield proxy
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def proxy(shared: FaultProxy) -> FaultProxy:
    HEARD.clear()
    return shared


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.5) as client:
        yield client


def exchange(client: socket.socket, line: bytes) -> bytes:
    """What comes back: nothing where the connection ends. Raises TimeoutError."""
    try:
        client.sendall(line + b"\n")
        return client.recv(1000).strip()
    except ConnectionError:
        return b""


def test_what_is_well_passes_unchanged(client: socket.socket) -> None:
    assert exchange(client, b"a") == b"A"
    assert exchange(client, b"b" * 900) == b"B" * 900


def test_a_late_answer_is_late(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(Fault(delay=0.1)):
        began = time.monotonic()
        assert exchange(client, b"a") == b"A"
        assert time.monotonic() - began >= 0.2
    with proxy.fault(CUT):  # a connection that was late is as good as any
        assert exchange(client, b"b") == b""


def test_a_cut_request_never_arrives(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(CUT):
        assert exchange(client, b"a") == b""
    assert HEARD == []


def test_a_half_open_connection_says_nothing(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(HALF_OPEN), pytest.raises(TimeoutError):
        exchange(client, b"a")
    with pytest.raises(TimeoutError):  # for good
        exchange(client, b"b")
    assert HEARD == []


def test_a_truncated_reply_breaks_off(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(Fault(reply_bytes=3)):
        assert exchange(client, b"abcd") == b"ABC"
        assert exchange(client, b"b") == b""
    assert HEARD == [b"abcd"]


def test_a_swallowed_reply_is_to_a_request_that_arrived(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(SWALLOWED):
        assert exchange(client, b"a") == b""
    assert HEARD == [b"a"]


def test_a_reply_that_is_swallowed_in_silence_leaves_the_connection(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(SWALLOWED_SILENTLY), pytest.raises(TimeoutError):
        exchange(client, b"a")
    assert HEARD == [b"a"]


def test_a_fault_begins_with_the_piece_that_it_names(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(replace(CUT, when=b"go", skip=1)):
        assert [exchange(client, line) for line in (b"a", b"go 1", b"go 2")] == [b"A", b"GO 1", b""]
    assert HEARD == [b"a", b"go 1"]


def test_a_fault_may_begin_with_a_reply(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(replace(SWALLOWED, when=b"B")):
        assert [exchange(client, line) for line in (b"a", b"b")] == [b"A", b""]
    assert HEARD == [b"a", b"b"]


def test_a_fault_befalls_as_many_connections_as_it_says(proxy: FaultProxy, client: socket.socket) -> None:
    with proxy.fault(replace(CUT, times=1)), socket.create_connection(("127.0.0.1", proxy.port), timeout=0.5) as other:
        assert exchange(client, b"a") == b""
        assert exchange(other, b"b") == b"B"
        assert proxy.num_befallen == 1


def test_what_is_to_happen_first_happens_first(proxy: FaultProxy, client: socket.socket) -> None:
    seen: list[list[bytes]] = []
    look = Fault(at_request=lambda: seen.append(list(HEARD)), at_reply=lambda: seen.append(list(HEARD)))
    with proxy.fault(look):
        exchange(client, b"a")
    assert seen == [[], [b"a"]]


def test_all_connections_can_be_cut(proxy: FaultProxy, client: socket.socket) -> None:
    exchange(client, b"a")
    proxy.cut_all()
    assert exchange(client, b"b") == b""
