"""The actor's process: one thread that receives a call, runs it, and sends the answer."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from rlx.actors.engines import pickling, wire
from rlx.actors.engines.wire import Frame, FrameReader, Outbox

READ_AHEAD_FRAMES = 1024


def main(sock: socket.socket, name: str) -> NoReturn:
    """Be the actor at the other end of `sock` until it is stopped, fails or loses its driver."""
    code = 1
    try:
        faulthandler.enable()  # a crash in C leaves the Python stack in the last lines of stderr
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = _serve(_Link(sock), name)
    except SystemExit as exit:
        code = _exit_code(exit)
    except ConnectionError:
        pass  # the driver is gone, and nobody is left to be told
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the forkserver's atexit handlers, and no wait for threads of the user's


class _Link:
    """The actor's end of its link, with the frames that have come in."""

    def __init__(self, sock: socket.socket) -> None:
        self._reader, self._outbox = FrameReader(sock), Outbox(sock)
        self._frames: collections.deque[Frame] = collections.deque()

    def receive(self) -> Frame | None:
        """Return the next frame, None when the driver is gone."""
        if 0 < len(self._frames) < READ_AHEAD_FRAMES:  # so that a cancellation overtakes the call it is for
            with contextlib.suppress(BlockingIOError):
                self._accept(self._reader.read(socket.MSG_DONTWAIT))
        while not self._frames:
            frames = self._reader.read()
            if frames is None:
                return None
            self._accept(frames)
        return self._frames.popleft()

    def send(self, kind: int, call_id: int = 0, text: str = "", message: pickling.Message = pickling.EMPTY) -> None:
        """Write a frame; waits for the driver, which always reads."""
        self._outbox.add(wire.encode(kind, call_id, text, message))
        self._outbox.flush()

    def _accept(self, frames: list[Frame] | None) -> None:
        for frame in frames or ():
            if frame.kind != wire.CANCEL:
                self._frames.append(frame)
            elif waiting := [f for f in self._frames if f.kind == wire.CALL and f.call_id == frame.call_id]:
                self._frames.remove(waiting[0])
                self.send(wire.CANCELLED, frame.call_id)


def _serve(link: _Link, name: str) -> int:
    """Return the exit code."""
    first = link.receive()
    if first is None:
        return 1
    settings = json.loads(first.text)
    _settle_in(settings["env"], settings["cwd"], settings["path"], settings["threads"])
    try:
        make, args, kwargs = pickling.loads(first.message)
        instance = make(*args, **kwargs)
    except SystemExit:
        raise
    except BaseException as error:
        link.send(wire.INIT_FAILED, 0, *pickling.dump_error(error, f"{name}.__init__(), process {os.getpid()}"))
        return 1
    del first, make, args, kwargs
    link.send(wire.READY)
    while (frame := link.receive()) is not None and frame.kind != wire.STOP:
        _answer(link, instance, name, frame)
        del frame  # its buffers are not kept while waiting for the next one
    return 0


def _answer(link: _Link, instance: Any, name: str, frame: Frame) -> None:
    method, one_way = frame.text, frame.kind == wire.SEND
    try:
        args, kwargs = pickling.loads(frame.message)
        result = getattr(instance, method)(*args, **kwargs)
        if one_way:
            return
        message = pickling.dumps(result, f"the result of {name}.{method}()")
    except SystemExit:
        raise
    except BaseException as error:
        text, message = pickling.dump_error(error, f"{name}.{method}(), process {os.getpid()}")
        link.send(wire.SEND_FAILED if one_way else wire.ERROR, frame.call_id, text, message)
    else:
        link.send(wire.REPLY, frame.call_id, "", message)


def _settle_in(env: dict[str, str], cwd: str, path: list[str], threads: int) -> None:
    """Look like a process that the driver has started itself, at the moment of the spawn."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it decides what becomes of its actors
    # New seeds from the system's entropy, as a fresh process has them: forked siblings would all draw alike.
    if "numpy.random" in sys.modules:
        import numpy

        numpy.random.seed()
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
        torch.set_num_threads(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _exit_code(exit: SystemExit) -> int:
    """Return the code that the interpreter would end with."""
    if exit.code is None or isinstance(exit.code, int):
        return (exit.code or 0) & 0xFF
    print(exit.code, file=sys.stderr)
    return 1
