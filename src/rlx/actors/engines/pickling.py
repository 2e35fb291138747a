"""Objects to messages and back: pickle protocol 5 with large buffers out of band, cloudpickle where it must be.

A message is `(body, buffers)`. The buffers are views of the sender's own memory (no copy) and are what the receiver's
arrays will live in (no copy either).
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import cloudpickle
import numpy as np

from rlx.actors.future import Err
from rlx.errors import NotSupported, RemoteError

Buffer = bytes | bytearray | memoryview
Message = tuple[Buffer, Sequence[Buffer]]

EMPTY: Message = (b"", ())
OUT_OF_BAND_BYTES = 16 * 1024  # below, one more copy is cheaper than one more part; it may be written to
met_channels: ContextVar[dict[str, Any]] = ContextVar("rlx_met_channels")
"""By name: the channels among what is being pickled, where it can take them along."""
PLAIN = {type(None), bool, int, float, str, bytes}  # exactly these: neither buffers nor classes are in them
MAX_TEXT = 20_000  # characters of a traceback that travel


def dumps(value: Any, what: str) -> Message:
    """Return `value` as a message; TypeError naming the part of `what` that cannot be pickled."""
    if type(value) in PLAIN:
        return pickle.dumps(value, 5), ()
    try:
        return _dumps(value)
    except NotSupported:
        raise
    except Exception as error:
        raise TypeError(_blame(value, what, error)) from error


def dumps_with_channels(value: Any, what: str) -> tuple[Message, tuple[Any, ...]]:
    """Like `dumps`, for what goes to an actor; also return the channels that it will have to be given."""
    token = met_channels.set({})
    try:
        return dumps(value, what), tuple(met_channels.get().values())
    finally:
        met_channels.reset(token)


def loads(message: Message) -> Any:
    """Return the object of a message."""
    body, buffers = message
    return pickle.loads(body, buffers=buffers)


def dump_error(error: BaseException, where: str) -> tuple[str, Message]:
    """Return the text of the error's traceback, and the error itself as a message, empty if it cannot be pickled."""
    trace = error.__traceback__.tb_next if error.__traceback__ is not None else None  # without the frame of rlx's own
    lines = traceback.format_exception(type(error), error, trace)
    text = f"raised in {where}:\n{''.join(lines)}".rstrip()
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]}\n... {len(text) - MAX_TEXT} characters left out ...\n{text[-MAX_TEXT // 2 :]}"
    try:
        return text, _dumps(error)
    except Exception:  # nothing is lost: the text says it all, and the caller gets a RemoteError with it
        return text, EMPTY


def load_error(text: str, message: Message) -> Err:
    """Return the error that `dump_error` took apart, as itself if it can be rebuilt, else as a RemoteError."""
    error: Any = None
    if message[0]:
        try:
            error = loads(message)
        except Exception as failure:
            text = f"{text}\n(here it cannot be rebuilt: {type(failure).__name__}: {failure})"
    if not isinstance(error, BaseException):
        return Err(RemoteError(text))
    error.add_note(text)
    return Err(error)


def _dumps(value: Any) -> Message:
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_BYTES:
            return True
        buffers.append(view)
        return False

    try:
        body = _pickle(pickle.Pickler, value, keep_in_band, copyreg.dispatch_table)
        # What the other side cannot import by name goes by value, which plain pickle cannot do.
        by_value = cloudpickle.list_registry_pickle_by_value()
        if b"__main__" not in body and not (by_value and any(name.encode() in body for name in by_value)):
            return body, buffers
    except (pickle.PicklingError, AttributeError, TypeError):
        pass  # a lambda, a local class: cloudpickle's work; what it cannot do either, it reports
    buffers.clear()
    return _pickle(cloudpickle.Pickler, value, keep_in_band, cloudpickle.Pickler.dispatch_table), buffers


def _pickle(pickler_class: Any, value: Any, buffer_callback: Callable[..., bool], dispatch_table: Any) -> bytes:
    stream = io.BytesIO()
    pickler = pickler_class(stream, protocol=5, buffer_callback=buffer_callback)
    if "torch" in sys.modules:
        import torch

        own = {torch.Tensor: _reduce_tensor, torch.nn.Parameter: _reduce_parameter}
        pickler.dispatch_table = {**dispatch_table, **own}
    pickler.dump(value)
    return stream.getvalue()


def _reduce_tensor(tensor: Any) -> Any:
    """Reduce a dense CPU tensor to its bytes; torch's own reduction goes through torch.save and copies."""
    import torch

    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor.__reduce_ex__(5)
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if dense.numel() == 0:
        return _empty_tensor, (dense.dtype, tuple(dense.shape), tensor.requires_grad)
    flat = pickle.PickleBuffer(dense.view(-1).view(torch.uint8).numpy())
    return _tensor, (flat, dense.dtype, tuple(dense.shape), tensor.requires_grad)


def _reduce_parameter(parameter: Any) -> Any:
    return _parameter, (parameter.data, parameter.requires_grad)


def _tensor(buffer: Any, dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Any:
    import torch

    if isinstance(buffer, bytes):  # a small one, from within the pickle: a copy already, so it may be written to
        buffer = bytearray(buffer)
    _accept_read_only_memory()
    return torch.frombuffer(buffer, dtype=dtype).view(shape).requires_grad_(requires_grad)


@functools.cache
def _accept_read_only_memory() -> None:
    """Have torch say now, to nobody, what it says once a process: that it cannot protect read-only memory itself."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(8), dtype=torch.uint8)
        torch.from_numpy(np.frombuffer(bytes(8), np.uint8))


def _empty_tensor(dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Any:
    import torch

    return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)


def _parameter(data: Any, requires_grad: bool) -> Any:
    import torch

    return torch.nn.Parameter(data, requires_grad)


def _blame(value: Any, what: str, error: Exception) -> str:
    """Return a sentence that names the innermost part of `value` that cannot be pickled."""
    path, culprit = _find_culprit(value, what, depth=6)
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    return f"{path} is a {kind}, which cannot be sent to another process ({error}); leave it out, or make it there."


def _find_culprit(value: Any, path: str, depth: int) -> tuple[str, Any]:
    for name, part in _parts(value) if depth else ():
        try:
            _dumps(part)
        except Exception:
            return _find_culprit(part, path + name, depth - 1)
    return path, value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    else:
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
