"""Fixtures of several files: a server whose engine writes what it is told to."""

import pytest

from bytelm.serving.api import Api
from bytelm.serving.server import Guard, Server, own_names
from bytelm.tests.api_client import LIMITS, Echo


@pytest.fixture(scope="module")
def engine():
    return Echo()


@pytest.fixture(scope="module")
def address(engine, request):
    api = Api(engine, "echo", LIMITS, 2, "secret")
    guard = Guard(api.app(), own_names("127.0.0.1"), 2**16, LIMITS.body_bytes, api.count)
    server = Server(guard, "127.0.0.1", 0)
    request.addfinalizer(api.close)
    request.addfinalizer(server.close)
    request.addfinalizer(engine.gate.set)
    return server.address.removeprefix("http://").rstrip("/")
