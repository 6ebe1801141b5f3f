"""The proxy itself: what it does not spoil, it does not change."""

from collections.abc import Callable
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected

import pytest

from tests.faulty_s3 import FaultyS3, random_faults

SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
"""moto lets anybody write, but only somebody read."""


@pytest.fixture
def proxy(faulty_s3: Callable[..., FaultyS3]) -> FaultyS3:
    return faulty_s3("cut", rate=0)


@pytest.fixture
def connection(proxy: FaultyS3) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", proxy.server_port, timeout=10)


def test_one_connection_carries_every_kind_of_request(
    bucket: str, connection: HTTPConnection
) -> None:
    path = f"/{bucket.removeprefix('s3://')}/a"
    pieces = [b"one", b"two" * 100_000, b"three"]
    content = b"".join(pieces)

    def ask(method: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection.request(method, path, body, headers | SIGNED)
        answer = connection.getresponse()
        return answer.status, answer.read()

    # Chunked: http.client does not know the length of an iterator.
    assert ask("PUT", iter(pieces)) == (200, b"")
    socket = connection.sock
    assert ask("GET") == (200, content)
    assert ask("GET", Range="bytes=2-6") == (206, content[2:7])
    assert ask("HEAD") == (200, b"")
    assert ask("PUT", b"again", Expect="100-continue") == (200, b"")
    assert ask("GET") == (200, b"again")
    assert ask("DELETE") == (204, b"")
    assert ask("GET")[0] == 404
    assert connection.sock is socket


def test_each_fault_is_what_it_says(
    bucket: str, proxy: FaultyS3, connection: HTTPConnection
) -> None:
    path = f"/{bucket.removeprefix('s3://')}/a"
    proxy.plan(["cut request", "cut answer", "cut answer", "503 SlowDown"])

    def ask(method: str, body: bytes | None = None) -> bytes:
        connection.request(method, path, body, SIGNED)
        return connection.getresponse().read()

    with pytest.raises((RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
        ask("PUT", b"1" * 10_000)
    connection.close()
    with pytest.raises(RemoteDisconnected):
        ask("PUT", b"2" * 10_000)
    connection.close()
    with pytest.raises(IncompleteRead) as caught:
        ask("GET")
    assert caught.value.partial == b"2" * 5_000
    connection.close()
    assert b"<Code>SlowDown</Code>" in ask("PUT", b"3" * 10_000)
    assert ask("GET") == b"2" * 10_000
    assert proxy.injected == {"cut request": 1, "cut answer": 2, "503 SlowDown": 1}


def test_one_in_ten_fails_in_the_same_order_each_time() -> None:
    def drawn() -> list[str]:
        faults = random_faults("cut", 0.1, seed=5)
        return [next(faults) for _ in range(1000)]

    assert drawn() == drawn()
    assert 80 < sum(fault != "" for fault in drawn()) < 120
    assert set(drawn()) == {"", "cut request", "cut answer"}
