"""The two stores of a knowledge base, opened together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from job_runner.index import Generation, Label, Stale, TextIndex, VectorIndex
from job_runner.settings import Settings, revealed
from task_contract.errors import StoreUnavailable

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Stores:
    """Both stores of one generation."""

    vectors: VectorIndex
    texts: TextIndex

    async def ensure(self) -> None:
        """Create what is missing in both."""
        await _both(self.vectors.ensure(), self.texts.ensure())

    async def stored(
        self, document_id: str, version: int, *, first: int = 0, below: int | None = None
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return chunk id → content hash of the rows of a version, all or of some ordinals, in each store."""
        return await _both(
            self.vectors.stored(document_id, version, first=first, below=below),
            self.texts.stored(document_id, version, first=first, below=below),
        )

    async def open_existing(self) -> None:
        """Make what is there ready for reading and removing; nothing is created where the generation is not there."""
        for store in (self.vectors, self.texts):
            if await store.exists():
                await store.ensure()

    async def serve(self) -> int:
        """Make both aliases lead here; return how many did not. A store without the generation is left as it is."""
        moved = 0
        for store in (self.vectors, self.texts):
            if await store.exists() and not await store.serves():
                await store.serve()
                moved += 1
        return moved

    async def count(self, stale: Sequence[Stale]) -> tuple[int, int]:
        """Return how many rows each store has of stale versions."""
        return await _both(self.vectors.count(stale), self.texts.count(stale))

    async def remove(self, stale: Sequence[Stale]) -> tuple[int, int]:
        """Remove stale versions from both; return how many rows each had. Then no reader sees any."""
        return await _both(self.vectors.remove(stale), self.texts.remove(stale))

    async def drop(self) -> tuple[bool, bool]:
        """Remove the generation from both; return which had it."""
        return await _both(self.vectors.drop(), self.texts.drop())

    async def aclose(self) -> None:
        """Close both."""
        await self.vectors.aclose()
        await self.texts.aclose()


OpenStores = Callable[[Generation], Stores]
OpenLabelled = Callable[[Label], Stores]
"""What it creates is labelled so."""


class SharedStores:
    """Stores that several documents use one after another, as :data:`OpenStores`: opened and made ready once."""

    def __init__(self, open_stores: OpenStores) -> None:
        self._open_stores = open_stores
        self._opened: dict[Generation, _Lent] = {}

    def __call__(self, generation: Generation) -> Stores:
        """Open a generation; whoever closes it leaves it open for the next one."""
        if generation not in self._opened:
            stores = self._open_stores(generation)
            self._opened[generation] = _Lent(vectors=stores.vectors, texts=stores.texts, inner=stores)
        return self._opened[generation]

    async def aclose(self) -> None:
        """Close all."""
        for lent in self._opened.values():
            await lent.inner.aclose()


@dataclass(frozen=True, slots=True)
class _Lent(Stores):
    inner: Stores
    ready: list[bool] = field(default_factory=list)

    async def ensure(self) -> None:
        if not self.ready:
            await self.inner.ensure()
            self.ready.append(True)

    async def aclose(self) -> None:
        """Leave it open."""


async def _both(in_vectors: Awaitable[R], in_texts: Awaitable[R]) -> tuple[R, R]:
    """Wait for both, also when one fails: the stores are closed only when nothing uses them any more."""
    first, second = await asyncio.gather(in_vectors, in_texts, return_exceptions=True)
    if isinstance(first, BaseException):
        raise first
    if isinstance(second, BaseException):
        raise second
    return first, second


async def labels(settings: Settings) -> list[Label]:
    """Return the labels of what both stores have, each once. Raises StoreUnavailable."""
    from job_runner import elasticsearch, milvus

    _check_configured(settings)
    assert settings.milvus_url is not None  # noqa: S101 - for the type checker: looked at above
    assert settings.elasticsearch_url is not None  # noqa: S101 - for the type checker: looked at above
    in_milvus, in_elasticsearch = await asyncio.gather(
        milvus.labels(settings.milvus_url.get_secret_value(), revealed(settings.milvus_token)),
        elasticsearch.labels(
            settings.elasticsearch_url.get_secret_value(),
            revealed(settings.elasticsearch_api_key),
            settings.elasticsearch_ca,
        ),
    )
    return sorted({*in_milvus, *in_elasticsearch}, key=lambda label: (label.namespace, label.kb_id, label.generation))


def import_clients() -> None:
    """Import the clients of both stores, the most expensive imports of the runner; blocks for half a second."""
    from job_runner import elasticsearch, milvus

    milvus.load()
    elasticsearch.load()


def opener(settings: Settings, *, dimension: int, model_fingerprint: str = "") -> OpenStores:
    """Return what opens the configured stores; what they create is labelled with the model.

    Raises StoreUnavailable, naming the variables that are not set.
    """
    _check_configured(settings)

    def open_stores(generation: Generation) -> Stores:
        from job_runner.elasticsearch import ElasticsearchIndex
        from job_runner.milvus import MilvusIndex

        label = Label(generation.namespace, generation.kb_id, generation.number, model_fingerprint, dimension).written()
        assert settings.milvus_url is not None  # noqa: S101 - for the type checker: looked at above
        assert settings.elasticsearch_url is not None  # noqa: S101 - for the type checker: looked at above
        return Stores(
            vectors=MilvusIndex(
                generation,
                url=settings.milvus_url.get_secret_value(),
                token=revealed(settings.milvus_token),
                dimension=dimension,
                label=label,
            ),
            texts=ElasticsearchIndex(
                generation,
                url=settings.elasticsearch_url.get_secret_value(),
                api_key=revealed(settings.elasticsearch_api_key),
                ca=settings.elasticsearch_ca,
                analyzer=settings.elasticsearch_analyzer,
                replicas=settings.elasticsearch_replicas,
                label=label,
            ),
        )

    return open_stores


def labelled_opener(settings: Settings) -> OpenLabelled:
    """Return what opens generations of any model. Raises StoreUnavailable, naming the variables that are not set."""
    _check_configured(settings)
    return lambda label: opener(settings, dimension=label.dimension, model_fingerprint=label.model_fingerprint)(label.names)


def _check_configured(settings: Settings) -> None:
    if missing := settings.document_stores_missing:
        raise StoreUnavailable(
            f"cannot reach the stores: {', '.join(missing)} not set; "
            "set it in the environment (in a cluster, in the Secret of the stores)"
        )
