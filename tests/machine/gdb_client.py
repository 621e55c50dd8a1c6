"""The client's side of gdb's remote protocol, as far as tests need it."""

import socket

from trapline.machine.gdb.codec import Decoder, encode


class Client:
    """A minimal gdb."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=20)
        self.decoder = Decoder()
        self.events = []

    def send(self, payload):
        self.socket.sendall(encode(payload))

    def receive(self):
        while not any(isinstance(event, bytes) for event in self.events):
            data = self.socket.recv(65536)
            if not data:
                return None
            self.events += self.decoder.feed(data)
        while not isinstance(event := self.events.pop(0), bytes):
            pass
        return event

    def ask(self, payload):
        self.send(payload)
        return self.receive()
