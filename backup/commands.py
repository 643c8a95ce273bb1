"""The everyday commands: put, get, list, delete.

Rules: a command turns its options into jobs, runs them side by side, reports
each as it ends and sums them up. One file's failure does not keep the others
from being done; only a server that cannot be reached ends the whole. The exit
code says how it went for all of them together.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from contextlib import suppress
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from . import config
from .client import Client
from .console import Console, Meter
from .errors import FAILED, BackupError, ConfigError, NotDeleted, NotFound, Refused, Unreachable
from .exchange import Backup, Delete, Job, Listing, Outcome, Retrieve, subject
from .names import of_path, show
from .sequence import format_size

ALL_DONE, PARTLY_DONE = 0, 3


def put(options: argparse.Namespace, console: Console) -> int:
    """Backs files up."""
    paths: List[str] = list(options.files)
    if options.files_from:
        paths += config.read_file_list(options.files_from)
    if not paths:
        raise ConfigError("put: no files given; name one, or a list of them with --files-from")
    if "" in paths:
        raise ConfigError("put: one of the paths is empty; name a file")
    config.check_distinct(paths, "put")
    jobs = [Backup(path, of_path(path)) for path in paths]
    return _run(
        "put",
        options,
        console,
        jobs,
        lambda outcome: f"Backup OK ({subject(outcome.job)})",
        parallel=options.parallel,
        total=sum(_size(path) for path in paths),
    )


def get(options: argparse.Namespace, console: Console) -> int:
    """Retrieves files."""
    names: List[str] = options.names
    _check_once(names, "get")
    config.check_folder(options.output_dir)
    if options.output is None:
        paths = [os.path.join(options.output_dir, name) for name in names]
    elif len(names) > 1:
        raise ConfigError(f"get: -o takes one NAME, not {len(names)}; use --output-dir")
    elif options.output == "-":
        raise ConfigError("get: -o - is not supported; save it as a file")
    else:
        paths = [options.output]
    jobs = [Retrieve(name, path, options.force) for name, path in zip(names, paths)]

    def line(outcome: Outcome) -> str:
        return f"Retrieved: {subject(outcome.job)} ({format_size(outcome.bytes)})"

    return _run("get", options, console, jobs, line)


def list_names(options: argparse.Namespace, console: Console) -> int:
    """Lists names."""
    return _run("list", options, console, [Listing()], None)


def delete(options: argparse.Namespace, console: Console) -> int:
    """Removes files."""
    _check_once(options.names, "delete")
    jobs = [Delete(name) for name in options.names]
    return _run(
        "delete", options, console, jobs, lambda outcome: f"Delete OK ({subject(outcome.job)})"
    )


def _run(
    command: str,
    options: argparse.Namespace,
    console: Console,
    jobs: Sequence[Job],
    line: Optional[Callable[[Outcome], str]],
    parallel: Optional[int] = None,
    total: int = 0,
) -> int:
    """Runs the jobs and reports; ``line`` is what a job that was done prints."""
    address = config.server_address(options.server, os.environ)
    user = config.user_id(options.user_id, os.environ)
    if user.kept_in:
        console.notice(f"your user id is {user.value}, drawn now and kept in {show(user.kept_in)}")
    began = time.monotonic()
    done: List[Outcome] = []
    errors: List[BackupError] = []
    with Client(address, user.value) as client:
        outcomes = client.run(jobs, parallel, Meter(console, len(jobs), total))
        for outcome in _explained(client, outcomes):
            if outcome.error is None:
                done.append(outcome)
                _report(command, console, outcome, line)
                continue
            errors.append(outcome.error)
            console.error(str(outcome.error))
            console.record({**_fields(command, outcome.job), **_failure(outcome.error)})
            if isinstance(outcome.error, Unreachable):
                break  # nor will the others find it
    console.end()
    code = exit_code(len(done), errors)
    console.record(
        {
            "summary": True,
            "op": command,
            "done": len(done),
            "failed": len(jobs) - len(done),
            "bytes": sum(outcome.bytes for outcome in done),
            "seconds": round(time.monotonic() - began, 3),
            "exit_code": code,
        }
    )
    return code


def exit_code(done: int, errors: Sequence[BackupError]) -> int:
    """The code for so many jobs done and these errors of the others."""
    if not errors:
        return ALL_DONE
    if done:
        return PARTLY_DONE
    codes = {error.exit_code for error in errors}
    return codes.pop() if len(codes) == 1 else FAILED


def _explained(client: Client, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """The outcomes, but for each 1002, which may mean two things, which of them it was."""
    unclear: List[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome.error, NotDeleted):
            unclear.append(outcome)
            continue
        if isinstance(outcome.error, Unreachable):  # nor will there be an answer to LIST
            yield from unclear
            unclear = []
        yield outcome
    there: Optional[List[str]] = None
    if unclear:
        with suppress(BackupError):  # then it stays unclear
            there = client.list()
    for outcome in unclear:
        if there is None:
            yield outcome
        elif outcome.job.name in there:
            text = "the server did not remove it; its log says why"
            yield outcome._replace(error=Refused(text, subject(outcome.job)))
        else:
            yield outcome._replace(error=NotFound("not on the server", subject(outcome.job)))


def _report(
    command: str, console: Console, outcome: Outcome, line: Optional[Callable[[Outcome], str]]
) -> None:
    if line is None:
        for name in outcome.names:
            console.name(name)
            console.record({"op": command, "name": name})
        return
    console.result(line(outcome))
    fields = {"ok": True, "bytes": outcome.bytes, "seconds": round(outcome.seconds, 3)}
    console.record({**_fields(command, outcome.job), **fields})


def _fields(command: str, job: Job) -> Dict[str, object]:
    fields: Dict[str, object] = {"op": command, "name": _text(job.name)}
    if isinstance(job, (Backup, Retrieve)):
        fields["path"] = _text(os.fspath(job.path))
    return fields


def _text(name: str) -> str:
    """A name for JSON, which has no place for bytes that are no UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _failure(error: BackupError) -> Dict[str, object]:
    return {"ok": False, "reason": error.reason, "error": str(error)}


def _check_once(names: Sequence[str], command: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{command}: {show(name)} is named twice; name it once")


def _size(path: str) -> int:
    with suppress(OSError, ValueError):  # the upload will say what is wrong with it
        return os.path.getsize(path)
    return 0
