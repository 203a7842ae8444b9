"""RabbitMQ as tests see it: started by those that need it, and stopped in between by those that want to see that."""

import atexit
from dataclasses import dataclass

import pytest

from devstack import DevstackError, stores
from devstack.process import running
from devstack.stores import common, rabbitmq


@dataclass(frozen=True)
class Broker:
    """The devstack's RabbitMQ."""

    url: str

    @classmethod
    def up(cls) -> "Broker":
        """Bring it up; one that was not running before ends with this process."""
        if not running(rabbitmq.NAME):
            atexit.register(rabbitmq.down)
        broker = cls(rabbitmq.url(f"{common.HOST}:{rabbitmq.port()}"))
        broker.start()
        return broker

    def start(self) -> None:
        try:
            stores.up_optional(rabbitmq.NAME)
        except DevstackError as error:
            pytest.fail(str(error), pytrace=False)

    def stop(self, *, kill: bool = False) -> None:
        rabbitmq.down(kill=kill)
