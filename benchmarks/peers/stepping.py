"""What the trainers of benchmarks/grpo.py share: the task, and the conversation in which steps are asked for and timed.

Runs in the environment of each system, so it imports nothing but the standard library.
"""

import json
import platform
import sys
import time
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "numpy")
ALPHABET = "0123456789+="


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Return the share of even digits in each completion: groups have spread, and no length is better than another."""
    return [sum(text.count(digit) for digit in "02468") / max(1, len(text)) for text in completions]


class Turns:
    """Times steps in turns: a line {"steps": k} on standard input asks for k of them, the end of input for none more.

    The step before the first turn is the warm-up: lazy imports and first allocations fall into it.
    """

    def __init__(self, system: str) -> None:
        self._system = system
        self._left = 0
        self._done: list[dict[str, float]] = []
        self._began = self._cpu_began = 0.0

    def end_step(self, tokens: float, **parts: float) -> bool:
        """Note that a step ended, with how many tokens a completion on average; return whether there is another.

        parts: seconds of the step by what they went to.
        """
        seconds, cpu_s = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        if self._left:
            self._done.append({"seconds": seconds, "cpu_s": cpu_s, "tokens": tokens} | parts)
            self._left -= 1
        if not self._left:
            print(json.dumps(self._answer()), flush=True)
            line = sys.stdin.readline()
            if not line:
                return False
            self._left, self._done = json.loads(line)["steps"], []
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        return True

    def _answer(self) -> dict[str, Any]:
        if self._done:
            return {"steps": self._done}
        versions = {name: _version(name) for name in PACKAGES}
        return {"system": self._system, "packages": {"python": platform.python_version()} | versions}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"
