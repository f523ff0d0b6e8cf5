"""The console script ``ringattn``: one module per command, each a parser of its own arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ringattn.cli.request import RequestError
from ringattn.refusal import advice, refuse

COMMANDS = {
    "plan": "what every rank does for a mask and a schedule",
    "estimate": "memory, traffic and time of a training run without its GPUs; its best split",
    "kernels": "compile the launch table of the Triton kernels without a GPU, and read the result",
    "calibrate": "measure this machine, for predictions and plans",
    "report": "a table, pictures and a page from run directories",
    "tokenize": "write text as token shards that every rank maps into memory",
    "bpe": "train a byte-level BPE tokenizer on text",
    "export": "write a training checkpoint as a Hugging Face folder",
    "info": "versions, devices, links and kernels, to read or to put into a report of a fault",
    "verify": "compare distributed attention with float64, on your device, backend and shapes",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status. Bad input is one line and status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ringattn COMMAND KEY=VALUE... (ringattn COMMAND --help lists the keys)\n")
        for name, text in COMMANDS.items():
            print(f"  {name:8s} {text}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "predict":
        return refuse("ringattn: predict is estimate now, with ranks=N for world=N")
    if name not in COMMANDS:
        return refuse(f"ringattn: unknown command {name!r}; one of: {', '.join(COMMANDS)}")
    try:
        if name == "plan":  # imported here: planning needs no torch
            from ringattn.cli.plan import run
        elif name == "kernels":
            from ringattn.cli.kernels import run
        elif name == "calibrate":
            from ringattn.cli.calibrate import run
        elif name == "report":
            from ringattn.cli.report import run
        elif name == "estimate":
            from ringattn.cli.estimate import command as run
        elif name == "tokenize":
            from ringattn.cli.tokenize import tokenize as run
        elif name == "bpe":
            from ringattn.cli.tokenize import bpe as run
        elif name == "export":
            from ringattn.cli.export import run
        elif name == "info":
            from ringattn.cli.info import run
        else:
            from ringattn.cli.verify import run
        return run(rest)
    except RequestError as error:
        return refuse(f"ringattn {name}: {error}")
    except ModuleNotFoundError as error:
        if not (line := advice(error.name)):
            raise
        return refuse(f"ringattn {name}: {line}")
    except MemoryError as error:
        return refuse(f"ringattn {name}: too large for this machine: {error}")
