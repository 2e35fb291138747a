"""The actor core by itself: objects in processes of their own, with all verbs once. Takes two seconds."""

import os
import signal
import threading
import time

import numpy as np

from rlx import actors
from rlx.actors import Restart
from rlx.errors import ActorDied


class Sampler:
    """Draws from a distribution that others change."""

    def __init__(self, seed, channel):
        self.random, self.channel = np.random.default_rng(seed), channel

    def draw(self, count):
        """Return `count` draws around the newest mean."""
        mean = self.channel.latest()  # the newest version, read in place: no message, no copy
        return self.random.normal(mean.value["mean"], 1.0, count)

    def batches(self, count):
        """Yield draws without end."""
        while True:
            yield self.draw(count)

    def score(self, points):
        """Return a number made of all points."""
        return float(points.sum())


def main():
    with actors.runtime("local", preload=("numpy",)) as rt:
        channel = rt.channel("mean")
        channel.publish({"mean": np.zeros(1)})
        samplers = [
            rt.spawn(Sampler, seed, channel, name=f"sampler/{seed}", restart=Restart(max=3, per_s=60))
            for seed in range(2)
        ]

        # One call, one future; a group, one outcome a member: Ok(value) or Err(error), never half an exception.
        for sampler, outcome in rt.group(samplers).draw.call(1_000_000).as_completed(timeout_s=10):
            print(sampler.name, outcome.value.mean().round(2), "read-only:", not outcome.value.flags.writeable)

        # Weights go the other way: readers take the newest version when they want it.
        channel.publish({"mean": np.full(1, 5.0)})
        print("after publishing:", samplers[0].draw.call(1000).result(10).mean().round(1))

        # Put once, pass often: every actor reads the same memory.
        points = rt.put(np.ones(5_000_000))
        print("scores:", rt.group(samplers).score.call(points).values(10))

        # A generator's items as they come; the actor is at most `credits` items ahead.
        with samplers[0].batches.stream(100, credits=4) as stream:
            print("streamed:", [next(stream).shape for _ in range(3)])

        # Plain functions on a pool that comes and goes.
        print("squares:", list(rt.map(lambda x: x * x, range(5))))

        # A death is an error that says why, and the actor is there again.
        back = threading.Event()
        rt.monitor(samplers[1], on_restart=lambda actor, error: back.set())
        future = rt.lookup("sampler/1").draw.call(300_000_000)
        time.sleep(0.2)
        os.kill(rt.state()["sampler/1"].pid, signal.SIGKILL)
        try:
            future.result(10)
        except ActorDied as error:
            print("told:", str(error).splitlines()[0])
        assert back.wait(10)
        print("restarted:", samplers[1].draw.call(3).result(10).shape, "restarts:", rt.state()["sampler/1"].restarts)


if __name__ == "__main__":
    main()
