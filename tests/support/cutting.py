"""A proxy that cuts every answer."""

import contextlib
import select
import socket
import threading
from typing import Self

import h11
from support.servers import LiveServer


class CuttingProxy:
    """Passes connections on to a server, and cuts each when it has brought so many bytes of the answer.

    A request is passed on when it has arrived whole, and in one piece, which the server reads as one: a document that
    is cut before the server has read all of it has broken off, which is another thing.
    """

    def __init__(self, server: LiveServer, num_bytes: int) -> None:
        self._target = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self._num_bytes = num_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cut = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=30)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._threads.append(threading.Thread(target=self._serve, args=[self._listener.accept()[0]]))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        """A connection has one request; what comes from the client after it is that it has gone."""
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            server.sendall(read_request(client))
            left = self._num_bytes
            while left and client not in select.select([client, server], [], [])[0] and (data := server.recv(left)):
                client.sendall(data)
                left -= len(data)
            self.num_cut += not left
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)


def read_request(client: socket.socket) -> bytes:
    """The bytes of a request, to the end of its body. Raises ConnectionError where it ends before."""
    parser, request = h11.Connection(h11.SERVER), b""
    while not isinstance(event := parser.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            if not (data := client.recv(65_536)):
                raise ConnectionError("the client has gone")
            parser.receive_data(data)
            request += data
    return request
