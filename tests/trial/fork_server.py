"""Runs the command line in forks of one process that has imported everything: a start costs milliseconds.

One JSON list a line. In: commands to start together, each with `arguments`, `folder` and perhaps a `signal`
to send `after` seconds, counted from when the file `watch`, if given, has been seen to change `changes`
times. Out: for each its exit `code` (minus the signal's number if it died of one), `stdout` and `stderr`.
The very first command is carried out in the server itself, so that whatever it imports is there for all
that follow.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback


def carry_out(command: dict) -> int:
    """Run the command line as the `weightlab` script does; return its exit code."""
    from weightlab.cli import main

    os.chdir(command["folder"])
    sys.argv = ["weightlab", *command["arguments"]]
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(command: dict) -> dict:
    """Fork a child that carries out one command, its streams in files."""
    streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    modified = written(command)
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            for descriptor, stream in enumerate(streams, 1):
                os.dup2(stream.fileno(), descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = carry_out(command)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return {"pid": pid, "streams": streams, "begun": begun, "modified": modified, **command}


def written(command: dict) -> int:
    """When the watched file was last written to; 0 if it is not there."""
    try:
        return os.stat(os.path.join(command["folder"], command["watch"])).st_mtime_ns
    except (KeyError, OSError):
        return 0


def ended(child: dict) -> bool:
    return os.waitid(os.P_PID, child["pid"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def send_signal(child: dict) -> None:
    """Send the signal in its time, unless the child ends before."""
    begun = child["begun"]
    if "watch" in child:
        for _ in range(child["changes"]):
            while written(child) in (0, child["modified"]) and not ended(child):
                time.sleep(0.0005)
            child["modified"] = written(child)
        begun = time.monotonic()
    while time.monotonic() < begun + child["after"] and not ended(child):
        time.sleep(0.0005)
    os.kill(child["pid"], child["signal"])


def finish(child: dict) -> dict:
    """Wait for a child and tell how it ended."""
    if "signal" in child:
        send_signal(child)
    _, status = os.waitpid(child["pid"], 0)
    reply: dict = {"code": os.waitstatus_to_exitcode(status)}
    for name, stream in zip(("stdout", "stderr"), child["streams"], strict=True):
        stream.seek(0)
        reply[name] = stream.read().decode()
        stream.close()
    return reply


def serve() -> None:
    """Answer until standard input ends."""
    commands = sys.stdin
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    replies.write(json.dumps(carry_out(json.loads(next(commands))[0])) + "\n")
    replies.flush()
    for line in commands:
        children = [start(command) for command in json.loads(line)]
        replies.write(json.dumps([finish(child) for child in children]) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
