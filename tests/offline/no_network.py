"""Refuse every connection that leaves this machine, so that a test which needs a network fails everywhere."""

import ipaddress
import socket

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _ours(host: str) -> bool:
    """Whether this machine has the address: then nothing that is sent there leaves it."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_loopback or address.is_multicast:
        return address.is_loopback
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return not address.is_unspecified and host != "255.255.255.255"


def _check(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    try:
        local = _ours(name)
    except ValueError:
        local = name in ("localhost", socket.gethostname())
    if not local:
        raise ConnectionRefusedError(f"the tests run without a network, and this asked for {name}")


def _guarded(original):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return original(self, address)

    return connect


def _lookup(host, *args, **kwargs):
    _check(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = _guarded(_connect)
socket.socket.connect_ex = _guarded(_connect_ex)
socket.getaddrinfo = _lookup
