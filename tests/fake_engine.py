"""A container engine without containers: its command line, and processes that outlive its client.

Run as ``python fake_engine.py STATE KIND SUBCOMMAND...``. STATE is a folder: ``images.json`` maps
an image's name to what is told of it, ``calls`` gets a line of JSON for each call, ``faults`` may
hold one word, and each container is a file. KIND is ``docker`` or ``podman``. The program in every
image is the one of ``command.json``; paths in its arguments are those of the mounts.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SWITCHES = {"--rm", "--pull=never"}
"""Flags of ``run`` that take no value, besides those with ``=``."""


def running(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def parse(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the flags of ``run``, and the image with its arguments."""
    flags = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if flag not in SWITCHES and not equals:
            value = rest.pop(0)
        flags.append((name, value))
    return flags, rest


def run(state: Path, arguments: list[str]) -> int:
    """Run a container in the foreground, and leave it running if this client is killed."""
    flags, [image, *own] = parse(arguments)
    fault = (state / "faults").read_text("utf-8") if (state / "faults").exists() else ""
    values = dict(flags)
    if fault == "start" and "--name" in values:
        sys.stderr.write("Error: the device is busy\n")
        return 125
    if image not in {
        one["Id"] for one in json.loads((state / "images.json").read_text("utf-8")).values()
    }:
        return 125
    for name, value in flags:
        if name == "--mount":
            [fields] = csv.reader([value])
            places = dict(field.partition("=")[::2] for field in fields)
            own = [places["source"] if one == places["destination"] else one for one in own]
            # In a real container the arguments keep the paths inside.
            own += ["--fake-inside", places["destination"]] if "--name" in values else []
    command = json.loads((state / "command.json").read_text("utf-8"))
    server = subprocess.Popen([*command, *own], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    labels = dict(value.partition("=")[::2] for name, value in flags if name == "--label")
    name = values.get("--name", f"unnamed-{os.getpid()}")
    record = state / f"{name}.container"
    record.write_text(json.dumps({"labels": labels, "pid": server.pid}), "utf-8")
    status = server.wait()
    code = status if status >= 0 else 128 - status
    if "--rm" in values:
        record.unlink(missing_ok=True)
    elif record.exists():
        record.write_text(json.dumps({"labels": labels, "pid": 0, "code": code}), "utf-8")
    return code


def look(state: Path, form: str, names: list[str]) -> int:
    """Tell of containers in one of the forms that are asked for."""
    for name in names:
        record = state / f"{name}.container"
        if not record.exists():
            sys.stderr.write(f"Error: no such container {name}\n")
            return 1
        known = json.loads(record.read_text("utf-8"))
        alive = running(known["pid"]) if known["pid"] else False
        if "json .State" in form:
            if (state / "faults").exists() and (state / "faults").read_text("utf-8") == "slow":
                time.sleep(1.5)
            told = {"Running": alive, "ExitCode": known.get("code", 0), "StartedAt": "2026-01-01"}
            sys.stdout.write(f"{json.dumps(told)} 0\n")
        elif ".State.Pid" in form:
            sys.stdout.write(f"{known['pid']} {{}}\n")
        else:
            owner = known["labels"].get("pytest-llmperf.owner", "")
            sys.stdout.write(f"{name} {str(alive).lower()} {owner}\n")
    return 0


def remove(state: Path, names: list[str]) -> int:
    """End and remove containers."""
    for name in names:
        record = state / f"{name}.container"
        if record.exists():
            pid = json.loads(record.read_text("utf-8"))["pid"]
            record.unlink()
            while pid and running(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
    return 0


def listed(state: Path, arguments: list[str]) -> int:
    """List the containers that have all the labels of the filters."""
    wanted = [one.removeprefix("label=").partition("=") for one in arguments if "label=" in one]
    for record in state.glob("*.container"):
        labels = json.loads(record.read_text("utf-8"))["labels"]
        if all(key in labels and (not eq or labels[key] == value) for key, eq, value in wanted):
            sys.stdout.write(f"{record.stem}\n")
    return 0


def image_of(state: Path, name: str) -> int:
    """Tell what is known of an image."""
    images = json.loads((state / "images.json").read_text("utf-8"))
    if name not in images:
        sys.stderr.write(f"Error: No such image: {name}\n")
        return 1
    sys.stdout.write(json.dumps([images[name]]))
    return 0


def main(state: Path, kind: str, arguments: list[str]) -> int:
    """Do what a subcommand asks."""
    with (state / "calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({"arguments": arguments, "env": dict(os.environ)}) + "\n")
    if (state / "down").exists():
        sys.stderr.write("Cannot connect to the daemon.\nIs it running?\n")
        return 1
    code = 0
    match arguments:
        case ["--version"]:
            sys.stdout.write(f"{kind} version 4.3.1\n")
        case ["version"]:
            pass
        case ["image", "inspect", name]:
            code = image_of(state, name)
        case ["run", *rest]:
            code = run(state, rest)
        case ["container", "inspect", "--format", form, *names]:
            code = look(state, form, names)
        case ["ps", *rest]:
            code = listed(state, rest)
        case ["rm", *rest]:
            code = remove(state, [one for one in rest if not one.startswith("-")])
        case _:
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
