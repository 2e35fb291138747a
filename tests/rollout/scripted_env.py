"""An environment of tokens that does what it is told to; a file of its own, as processes import it quickly."""

import os
import signal
import time

import gymnasium
import numpy as np


class Scripted(gymnasium.Env):
    """Says 20 + turn twice to every turn, for 0.5; ends with the third one, or does what the record says."""

    def reset(self, *, seed=None, options=None):
        self.what, self.turn = options["record"].get("what"), 0
        if self.what == "raises in reset":
            raise FloatingPointError("no luck")
        if self.what == "starts with nothing":
            return np.zeros(0, np.int64), {}
        if self.what == "starts with a book":
            return np.full(62, 7), {}
        return np.array([*options["prompt"], 7]), {}

    def step(self, action):
        self.turn += 1
        if self.what == "raises":
            raise FloatingPointError(f"at {action.tolist()}")
        if self.what == "hangs":
            while True:
                time.sleep(0.001)
        if self.what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "is no number":
            return np.zeros(0, np.int64), float("nan"), False, False, {}
        if self.what == "says another language":
            return np.array([30]), 0.0, False, False, {}
        if self.what == "says words":
            return "words", 0.0, False, False, {}
        return np.full(2, 20 + self.turn), 0.5, self.turn == 3, False, {}


class Talkative(gymnasium.Env):
    """Begins with a token that the seed chooses, and answers each turn with its sum; ends after the record's turns.

    It does what the record says in the second turn.
    """

    def reset(self, *, seed=None, options=None):
        self.record, self.turn = options["record"], 0
        return np.array([*options["prompt"], seed % 10]), {}

    def step(self, action):
        self.turn += 1
        if self.turn == 2 and self.record["what"] == "hangs":
            while True:
                time.sleep(0.001)
        if self.turn == 2 and self.record["what"] == "waits":
            with open(self.record["gate"]) as fifo:  # until somebody opens it to write
                fifo.read()
        total = int(action.sum())
        return np.full(1 + total % 3, total % 10), total / 100, self.turn == self.record["turns"], False, {}
