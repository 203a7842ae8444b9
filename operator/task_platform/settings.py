"""Settings as environment variables, read and checked once at start; all that is wrong is said at once."""

import re
from importlib import metadata
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationError
from pydantic_settings import BaseSettings, NoDecode

from task_contract.redis_address import check_redis_url


class SettingsError(ValueError):
    """Variables of the environment are missing or wrong; the message names each of them."""


def _names(value: object) -> object:
    """Split a comma separated list; an empty one is no names."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError('must be HOST:PORT, such as "0.0.0.0:8081"')
    return value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
"""Comma separated."""
Address = Annotated[str, AfterValidator(_address)]
"""HOST:PORT to listen on."""
EmptyIsNone: Final = BeforeValidator(_empty_is_none)
"""For a setting that may be left empty."""
OptionalAddress = Annotated[Address | None, EmptyIsNone]
"""The same; empty: do not listen."""
OptionalUrl = Annotated[str | None, EmptyIsNone]
RedisUrl = Annotated[Annotated[str, AfterValidator(check_redis_url)] | None, EmptyIsNone]
"""Of one server, of Sentinels or of a cluster (:mod:`task_contract.redis_address`); empty: none."""


def product_version() -> str:
    """Return the version of the product as a label may hold it; empty when it runs without being installed."""
    try:
        version = metadata.version("processing-tasks")
    except metadata.PackageNotFoundError:
        return ""
    return re.sub(r"[^A-Za-z0-9._-]", "_", version)[:63]


S = TypeVar("S", bound=BaseSettings)


def load_settings(kind: type[S], *, program: str) -> S:
    """Read the environment. Raises :class:`SettingsError` that names every bad variable at once."""
    prefix = kind.model_config.get("env_prefix", "")
    try:
        return kind()
    except ValidationError as error:
        problems = "; ".join(
            f"{prefix}{'.'.join(str(part) for part in problem['loc']).upper()}: "
            f"{'is required' if problem['type'] == 'missing' else problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise SettingsError(f"cannot start the {program}: {problems}") from error
    except ValueError as error:  # pydantic-settings: text that should be JSON and is not
        raise SettingsError(f"cannot start the {program}: {error}; give a JSON value in {prefix}… variables") from error
