"""A TCP proxy that a test puts in front of a server: it can wait, hold, be cut, and speak TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time


class TcpProxy:
    """Forwards every connection to `port` of this machine; `delay_seconds` before each answer.

    Answers wait while `gate` is cleared.
    """

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.delay_seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self._target = ("127.0.0.1", port)
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self) -> None:
        """Break every connection; new ones are let through."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.gate.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._tls is not None:
                    client.settimeout(5.0)
                    client = self._tls.wrap_socket(client, server_side=True)
                    client.settimeout(None)
            except OSError:  # it did not like our certificate
                client.close()
                continue
            server = socket.create_connection(self._target)
            self._open += [client, server]
            for source, sink, waits in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._forward, args=(source, sink, waits))
                thread.start()
                self._threads.append(thread)

    def _forward(self, source: socket.socket, sink: socket.socket, waits: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if waits:
                    time.sleep(self.delay_seconds)
                    self.gate.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
