"""Messages of every size, and such as cannot be sent or rebuilt: the error names the part, and the actor lives."""

import hashlib
import os
import sys
import threading

import cloudpickle
import numpy as np
import psutil
import pytest

from rlx import actors
from rlx.actors.engines.memory import SHARED_BYTES
from rlx.actors.engines.pickling import OUT_OF_BAND_BYTES
from rlx.actors.engines.wire import WINDOW_BYTES
from rlx.errors import ObjectMemoryFull, RemoteError

cloudpickle.register_pickle_by_value(sys.modules[__name__])
T = 20.0
LONG_T = 100.0


class NeedsKey(Exception):
    def __init__(self, *, key):
        super().__init__(f"key {key}")


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Talkative:
    """Its repr is 100 MB, and it cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()

    def __repr__(self):
        return "x" * 100_000_000


class Carrier(Exception):
    """An error that carries data."""

    def __init__(self, data):
        super().__init__("too much")
        self.data = data

    def __reduce__(self):
        return Carrier, (self.data,)


class CannotArrive:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise LookupError("not here")


class Echo:
    def echo(self, value):
        return value

    def give(self, what):
        return {"lock": {"deep": [threading.Lock()]}, "talkative": Talkative(), "cannot arrive": CannotArrive()}[what]

    def fail(self, what):
        if what == "a lock inside":
            raise ValueError(threading.Lock())
        if what == "a huge text":
            raise ValueError("x" * 50_000_000)
        if what == "a huge load":
            raise Carrier(np.zeros(100 * 2**20, np.uint8))
        raise {"an argument missing": NeedsKey(key=7), "no words": Unprintable(), "cannot arrive": Rebuilt()}[what]

    def digest(self, array):
        return hashlib.sha256(array).hexdigest(), _own_bytes()

    def zeros(self, size):
        return np.zeros(size, np.uint8)


class NeverMade:
    def __init__(self):
        raise Carrier(np.zeros(100 * 2**20, np.uint8))


class Rebuilt(Exception):
    def __reduce__(self):
        return _refuse, ()


def _own_bytes():
    """Return what this process has to itself."""
    return psutil.Process().memory_full_info().uss


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"config": [1, {"lock": threading.Lock()}]}, r"arguments\[0\]\[0\]\['config'\]\[1\]\['lock'\]"),
        ([CannotArrive(), Talkative()], r"arguments\[0\]\[0\]\[1\]\.lock"),
        ((n for n in range(3)), r"arguments\[0\]\[0\] is a builtins\.generator"),
    ],
    ids=["nested", "attribute", "generator"],
)
def test_an_argument_that_cannot_be_sent_is_named_by_its_path(rt, value, path):
    echo = rt.spawn(Echo)
    with pytest.raises(TypeError, match=path) as caught:
        echo.echo.call(value)
    assert len(str(caught.value)) < 10_000
    assert echo.echo.call(1).result(T) == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lock", r"the result of echo/0\.give\(\)\['deep'\]\[0\] is a _thread\.lock"),
        ("talkative", r"the result of echo/0\.give\(\)\.lock is a _thread\.lock"),
    ],
)
def test_a_result_that_cannot_be_sent_is_named_by_its_path_and_the_actor_lives(rt, what, words):
    echo = rt.spawn(Echo)
    with pytest.raises(TypeError, match=words) as caught:
        echo.give.call(what).result(T)
    assert len(str(caught.value)) < 10_000
    assert echo.echo.call(1).result(T) == 1


def test_what_cannot_be_rebuilt_is_an_error_where_it_arrives(rt):
    echo = rt.spawn(Echo)
    with pytest.raises(LookupError, match="not here") as caught:
        echo.echo.call(CannotArrive()).result(T)
    assert "echo/0.echo()" in "".join(caught.value.__notes__)
    with pytest.raises(LookupError, match="not here") as caught:
        echo.give.call("cannot arrive").result(T)
    assert "while unpickling the result of echo/0.give()" in caught.value.__notes__
    assert echo.echo.call(1).result(T) == 1


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("an argument missing", RemoteError, "NeedsKey: key 7"),
        ("a lock inside", RemoteError, "ValueError: <unlocked _thread.lock"),
        ("no words", Unprintable, None),
        ("cannot arrive", RemoteError, "here it cannot be rebuilt: LookupError: not here"),
        ("a huge text", ValueError, None),
    ],
)
def test_every_error_arrives_with_its_traceback_and_the_actor_lives(rt, what, kind, words):
    echo = rt.spawn(Echo)
    error = echo.fail.call(what).exception(T)
    assert type(error).__name__ == kind.__name__
    text = "\n".join([*map(str, error.args), *getattr(error, "__notes__", ())])
    assert "raised in echo/0.fail(), process" in text and ", in fail\n" in text
    assert words is None or words in text
    assert len("".join(getattr(error, "__notes__", ()))) < 30_000
    assert echo.echo.call(1).result(T) == 1


def test_an_error_that_carries_more_than_the_object_memory_arrives_as_its_text():
    with actors.runtime("local", preload=("numpy",), object_memory=16 * 2**20) as rt:
        echo = rt.spawn(Echo)
        with pytest.raises(RemoteError, match=r"(?s)raised in echo/0.fail.*Carrier: too much"):
            echo.fail.call("a huge load").result(T)
        with pytest.raises(RemoteError, match="Carrier: too much"):
            rt.spawn(NeverMade).ready(T)
        assert echo.echo.call(1).result(T) == 1


SIZES = sorted(
    {0, 1, 127 * 1024, 128 * 1024, 129 * 1024}
    | {edge + step for edge in (OUT_OF_BAND_BYTES, SHARED_BYTES, WINDOW_BYTES, 4 * 2**20) for step in (-200, -1, 0)}
)
"""Around each size at which the way of a message changes."""


def test_messages_of_every_size_arrive_byte_for_byte(rt):
    echo, rng = rt.spawn(Echo), np.random.default_rng(0)
    for size in SIZES:
        data = rng.integers(0, 256, size, np.uint8)
        want = data.tobytes()
        for value in (data, want, bytearray(want), [data[: size // 2], data[size // 2 :]], want.hex()):
            back = echo.echo.call(value).result(T)
            if isinstance(back, list):
                back = np.concatenate(back)
            assert (back.encode() if isinstance(back, str) else bytes(back)) == (
                want.hex().encode() if isinstance(value, str) else want
            )


@pytest.mark.slow
@pytest.mark.parametrize("size", [100_000_000, 5_000_000_000], ids=["100 MB", "5 GB"])
def test_a_large_message_arrives_byte_for_byte_in_little_more_than_one_copy(size):
    if psutil.virtual_memory().available < 2.5 * size:
        pytest.skip(f"needs {2.5 * size / 1e9:.1f} GB of memory")
    with actors.runtime("local", preload=("numpy",), object_memory=size + 2**24) as rt:
        echo = rt.spawn(Echo)
        echo.echo.call(1).result(T)
        data = np.arange(size // 8)
        want = hashlib.sha256(data).hexdigest()
        got, actors_own = echo.digest.call(data).result(LONG_T)
        assert got == want and actors_own < 0.1 * size + 2**26
        used = rt._engine.memory.arena.used_bytes  # the one copy; the sender's own makes two in all
        assert size <= used <= 1.13 * size and _shared_bytes() <= 2.2 * size
        del data
        back = echo.zeros.call(size).result(LONG_T)
        assert len(back) == size and not back[:: 2**20].any()


def _shared_bytes():
    """Return what this process has in shared memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssShmem"))


def test_a_message_beyond_the_limit_is_a_named_error_and_the_actor_lives():
    with actors.runtime("local", preload=("numpy",), object_memory=8 * 2**20) as rt:
        echo = rt.spawn(Echo)
        with pytest.raises(ObjectMemoryFull, match=r"no room for a message of 9\.0 MiB .* of 8\.0 MiB object memory"):
            echo.echo.call(np.zeros(9 * 2**20, np.uint8))
        with pytest.raises(ObjectMemoryFull, match=r"no room for a message of 9\.0 MiB"):
            echo.zeros.call(9 * 2**20).result(T)
        assert len(echo.zeros.call(7 * 2**20).result(T)) == 7 * 2**20
        assert os.getpid() == echo.echo.call(os.getpid()).result(T)
