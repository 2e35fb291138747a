"""A process that has imported all that runs on text need; for every line that it reads it forks one that runs `rlx`.

A line is {"folder": ..., "arguments": [...], "strike": [module, name, number] or null}: the run takes place in
`folder`, prints into its output.txt, and is killed by SIGKILL as it calls `name` of `module` for the number-th time.
The answer is the exit code, -9 for a killed one. A start of the interpreter for each would take seconds.
"""

import functools
import importlib
import json
import os
import signal
import sys
import traceback
from operator import attrgetter

from rlx.cli import main

for module in ("text_algorithm", "algorithms.grpo", "algorithms.rlhf_ppo", "algorithms.sft", "algorithms.dpo"):
    importlib.import_module(f"rlx.{module}")
importlib.import_module("transformers.models.llama.modeling_llama")


def kill_at(module: str, name: str, number: int) -> None:
    path, _, last = name.rpartition(".")
    owner = importlib.import_module(module)
    owner = attrgetter(path)(owner) if path else owner
    original, calls = getattr(owner, last), 0

    @functools.wraps(original)
    def struck(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, last, struck)


def run(command: dict) -> int:
    os.chdir(command["folder"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        if command["strike"]:
            kill_at(*command["strike"])
        return main(command["arguments"])
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


for line in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(run(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
