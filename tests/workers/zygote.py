"""Forks worlds of ranks that have imported everything already: a start is most of a short run.

Reads a JSON object a line: script or "-m" and module, arguments, world, environment, the file that
takes all output, seconds. Answers with a line {"status": N}: 0, or that of the first rank that
failed; the others are then killed, as by torchrun.
"""

import importlib.util
import json
import os
import runpy
import signal
import socket
import sys
import time

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # an optimizer of DeepSpeed would load all of the compiler

import numpy  # noqa: F401

import ringattn.execution.attention

if importlib.util.find_spec("deepspeed"):  # else the core alone is tested: tools/oldest.sh
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import ringattn.training.engines.deepspeed_engine
    import ringattn.training.engines.fsdp_engine
    import ringattn.training.loop
    import ringattn.training.main  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(job: dict, rank: int, port: int) -> int:
    """The process id of a rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        out = os.open(job["out"], os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(out, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(job["environment"])
        world = str(job["world"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world,
                       "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}  # fmt: skip
        script, *arguments = job["command"]
        if script == "-m":
            module, *arguments = arguments
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [script, *arguments]
            sys.path[0] = os.path.dirname(script)
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict) -> int:
    port = free_port()
    alive = {start(job, rank, port) for rank in range(job["world"])}
    status, end = 0, time.monotonic() + job["seconds"]
    while alive:
        child, how = os.waitpid(-1, os.WNOHANG)
        if child in alive:
            alive.discard(child)
            code = os.waitstatus_to_exitcode(how)
            if code and not status:
                status = code
                for other in alive:
                    os.killpg(other, signal.SIGTERM)
                end = min(end, time.monotonic() + 10)
        elif time.monotonic() > end:
            status = status or 124
            for other in alive:
                os.killpg(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return status


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"status": run(json.loads(line))}), flush=True)
