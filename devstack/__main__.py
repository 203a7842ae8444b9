"""Command line of the devstack: up, down, status, logs, env, images, and the product on it: install, uninstall, demo."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import devstack
from devstack import Endpoints, cluster, images, installation, node, providers, stores, tools
from devstack.cache import cache_dir, state_dir
from devstack.process import Process, find, log_path
from devstack.progress import DevstackError, say
from devstack.providers.embedded import Embedded

_LINE = 400
"""Characters of a log's line that `logs` shows."""
_TICKS = os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 with one sentence on standard error, or 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.command(options)
        return result
    except DevstackError as error:
        print(error, file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"cannot read or write {error.filename}: it belongs to root; run this as root (`sudo`)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("Interrupted. `python -m devstack up` goes on from here, `python -m devstack down` ends what runs.")
        return 130


@dataclass(frozen=True)
class Row:
    """One process as `status` shows it."""

    part: str
    name: str
    process: Process | None


def rows() -> list[Row]:
    """Return the processes of all parts, running or not."""
    parts = {"cluster": cluster.NAMES, "node": node.NAMES, "stores": stores.NAMES}
    return [Row(part, name, find(name)) for part, names in parts.items() for name in names]


def session_memory(session: int) -> int:
    """Return the proportional memory, in bytes, of all processes in the session SESSION: shared pages count in parts."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (OSError, IndexError):
            continue  # it ended while we looked
    return total


def _provider(options: argparse.Namespace) -> providers.Provider:
    return providers.choose(options.cluster, namespace=options.namespace, values=options.values)


def _endpoints(options: argparse.Namespace) -> tuple[providers.Provider, Endpoints]:
    """Return the chosen cluster and where it is; the embedded one is not brought up for it, others are made sure of."""
    provider = _provider(options)
    return provider, devstack.endpoints() if isinstance(provider, Embedded) else provider.up()


def _up(options: argparse.Namespace) -> int:
    began = time.monotonic()
    provider = _provider(options)
    if options.parts and not isinstance(provider, Embedded):
        raise DevstackError("cannot bring up parts of this cluster: --parts is for the embedded one")
    if options.parts:
        devstack.up(options.parts)
    else:
        provider.up()
    parts = f": {', '.join(options.parts)}" if options.parts else ""
    say(f"Up in {time.monotonic() - began:.1f} s{parts}. For a shell that reaches it:")
    say(f'    eval "$(python -m devstack env{_choice(options)})"')
    return 0


def _choice(options: argparse.Namespace) -> str:
    """Return the options that choose the same cluster again."""
    given = {"--cluster": options.cluster, "--namespace": options.namespace, "--values": options.values}
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)


def _down(options: argparse.Namespace) -> int:
    began = time.monotonic()
    provider = _provider(options)
    if options.keep_data and not isinstance(provider, Embedded):
        raise DevstackError("cannot keep the data of this cluster: --keep-data is for the embedded one")
    if options.keep_data:
        devstack.down(keep_data=True)
    else:
        provider.down()
    say(f"Down in {time.monotonic() - began:.1f} s. The cache of builds stays in {cache_dir()}.")
    return 0


def _status(_: argparse.Namespace) -> int:
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    print(f"{'PART':<9}{'PROCESS':<20}{'STATE':<10}{'PID':>8}  {'SINCE':<20}{'MEMORY':>8}")
    listed = rows()
    total = 0
    for row in listed:
        if row.process is None:
            print(f"{row.part:<9}{row.name:<20}{'stopped':<10}")
            continue
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(boot + row.process.start / _TICKS))
        memory = session_memory(row.process.pid)
        total += memory
        print(f"{row.part:<9}{row.name:<20}{'running':<10}{row.process.pid:>8}  {since:<20}{memory >> 20:>5} MB")
    print(f"{'':<67}{total >> 20:>5} MB")
    print(f"State: {state_dir()}  Logs: {log_path('*')}  Cache: {cache_dir()}")
    return 0 if all(row.process for row in listed) else 3


def _logs(options: argparse.Namespace) -> int:
    """Show the ends of the logs: the devstack's processes, the operator, and the youngest pods of tasks."""
    provider, endpoints = _endpoints(options)
    place = provider.place

    def show(title: str, text: str) -> None:
        lines = [
            line if len(line) <= _LINE else f"{line[:_LINE]}..." for line in text.strip().splitlines()[-options.lines :]
        ]
        print(f"==> {title} <==", *lines or ["(nothing)"], "", sep="\n")

    for row in rows():
        path = log_path(row.name)
        if path.exists():
            state = "running" if row.process else "stopped"
            show(f"{row.part}: {row.name} ({state}), {path}", path.read_text(errors="replace"))
    if find("apiserver") is None and isinstance(provider, Embedded):
        say("The API server does not run: no logs of the operator and of tasks.")
        return 0
    reach = [str(endpoints.kubectl), f"--kubeconfig={endpoints.kubeconfig}"]

    def kubectl(*arguments: str) -> str:
        done = subprocess.run([*reach, *arguments], capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    tail = f"--tail={options.lines}"
    operator = f"deploy/{place.release}-operator"
    show("operator", kubectl("logs", "-n", place.namespace, operator, "--all-containers", tail))
    youngest = ["--sort-by=.metadata.creationTimestamp", "--no-headers", "--output=custom-columns=:metadata.name"]
    for pod in kubectl("get", "pods", "-n", place.task_namespace, *youngest).split()[-options.pods :]:
        show(f"pod {pod}", kubectl("logs", "-n", place.task_namespace, pod, "--all-containers", tail))
    return 0


def _env(options: argparse.Namespace) -> int:
    _, endpoints = _endpoints(options)
    for name, value in {"KUBECONFIG": str(endpoints.kubeconfig), **endpoints.host_urls}.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f'export PATH={shlex.quote(str(endpoints.kubectl.parent))}:{shlex.quote(str(tools.helm().parent))}:"$PATH"')
    return 0


def _images(options: argparse.Namespace) -> int:
    if options.variant:
        built = {f"runner with {options.variant}": images.build_variant(options.variant, options.tag)}
    else:
        built = images.build(options.tag)
    if find("containerd") is not None:
        for image in built.values():
            images.import_image(image)
    print(images.table(built))
    return 0


def _install(options: argparse.Namespace) -> int:
    provider = _provider(options)
    installed = installation.install(provider.up(), provider)
    documents = installed.documents or "the volume of the claim there (docs/install.md, Documents)"
    say(f"Installed. Documents for tasks in namespace {provider.place.task_namespace} go to {documents}.")
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    provider, endpoints = _endpoints(options)
    installation.uninstall(endpoints, provider)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from devstack import demo  # not at the top: it needs the clients of the stores

    demo.run(_provider(options))
    return 0


def _parts(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in devstack.PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(devstack.PARTS)}")
    return chosen


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        choices=providers.NAMES,
        help="embedded: one of this package, as root; kind: in Docker; current: the current context of kubectl, never taken "
        "unless it is named (default: kind where Docker answers an ordinary user, else embedded)",
    )
    parser.add_argument("--namespace", metavar="NAME", help="with --cluster current: a namespace of its own, which is made")
    parser.add_argument(
        "--values", type=Path, metavar="FILE", help="values for the chart: stores in hand, and for `current` the images"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m devstack",
        description="A real one-node Kubernetes with PostgreSQL, Redis, Milvus and Elasticsearch on this machine, for "
        "demo and tests. Needs root. `up` may be repeated and interrupted; `down` leaves nothing but the cache.",
        epilog=f"Folders: DEVSTACK_STATE (now {state_dir()}), DEVSTACK_CACHE (now {cache_dir()}). Ports: "
        "DEVSTACK_API_PORT (6443), DEVSTACK_ETCD_PORT (23790 and the next). Flags for the control plane: "
        "DEVSTACK_API_SERVER_ARGS, DEVSTACK_CONTROLLER_MANAGER_ARGS, DEVSTACK_SCHEDULER_ARGS.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="bring up what is not running, and wait until it is ready")
    up.add_argument(
        "--parts",
        type=_parts,
        metavar="PART,...",
        help=f"some of {', '.join(devstack.PARTS)} (default: all); node brings cluster with it",
    )
    up.set_defaults(command=_up)
    down = commands.add_parser("down", help="end everything and put the machine back as it was; data is deleted")
    down.add_argument("--keep-data", action="store_true", help="keep documents and what is in the stores for the next up")
    down.set_defaults(command=_down)
    status = commands.add_parser("status", help="show what runs, since when and its memory; exit code 3 unless all do")
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="show the ends of all logs: processes, operator, the youngest pods of tasks")
    logs.add_argument("--lines", type=int, default=15, metavar="N", help="lines of each (default: 15)")
    logs.add_argument("--pods", type=int, default=3, metavar="N", help="so many pods of tasks (default: 3)")
    logs.set_defaults(command=_logs)
    env = commands.add_parser("env", help='print exports for a shell: eval "$(python -m devstack env)"')
    env.set_defaults(command=_env)
    image = commands.add_parser("images", help="build the images, load them into a running node, print sizes by package")
    image.add_argument("--tag", help="tag of the images (default: a hash of what each is built from)")
    image.add_argument("--variant", choices=images.VARIANTS, help="build the runner with these libraries instead")
    image.set_defaults(command=_images)
    install = commands.add_parser("install", help="bring all up, build the images and install or upgrade the chart")
    install.set_defaults(command=_install)
    uninstall = commands.add_parser("uninstall", help="remove the chart's release, its CRDs and with them every task")
    uninstall.set_defaults(command=_uninstall)
    demo = commands.add_parser("demo", help="real documents end to end, with questions answered from them")
    demo.set_defaults(command=_demo)
    for command in (up, down, logs, env, install, uninstall, demo):
        _add_choice(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
