"""How long the devstack takes with a warm cache of builds, and when it runs already."""

import time

import devstack
from tests.bench.measurement import Measurement


def run() -> list[Measurement]:
    """Measure `up` from nothing with a warm cache, and `up` again. Ends what runs first: its data is lost."""
    devstack.up()  # fills the cache
    devstack.down()
    began = time.monotonic()
    devstack.up()
    warm = time.monotonic() - began
    began = time.monotonic()
    devstack.up()
    again = time.monotonic() - began
    how = "wall time of devstack.up(): cluster, node and the four stores, until all answer"
    return [
        Measurement(metric="up, warm cache", value=warm, unit="s", target=30, how=how),
        Measurement(metric="up again", value=again, unit="s", target=5, how=how),
    ]
