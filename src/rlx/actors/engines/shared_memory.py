"""Memory that several processes map: a file without a name, sparse, gone when the last process that has it is gone.

Its virtual size costs nothing. Only touched pages count, and `release` gives those back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

from rlx.errors import ObjectMemoryFull

Span = tuple[int, int]  # where in an array of bytes, how many

PAGE_BYTES = mmap.PAGESIZE
POPULATE_CHUNK_BYTES = 64 << 20  # between two chunks a Ctrl-C gets through
MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not know it yet

# From fcntl.h; the fcntl module of some builds lacks them.
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4

# ctypes and not the mmap module, for three reasons: mmap.mmap keeps a duplicate of the descriptor for each mapping,
# its madvise holds the interpreter lock while gigabytes of pages are zeroed, and it cannot tell its address.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class SharedMemory:
    """An unnamed sparse file in memory, and its descriptor. Its size never changes: no mapping of it can fault."""

    def __init__(self, fd: int) -> None:
        """Take over a descriptor, one that `create` made or that another process sent."""
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def create(cls, size: int, posix: bool = not hasattr(os, "memfd_create")) -> SharedMemory:
        """Return new memory of `size` virtual bytes, all zero; `posix` asks for shm_open where memfd_create exists.

        A POSIX one lives in /dev/shm, which may be small (64 MiB in a container): `populate` says when it is full.
        """
        fd = _open_posix() if posix else os.memfd_create("rlx", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, -(-size // PAGE_BYTES) * PAGE_BYTES)
            if not posix:
                # Not F_SEAL_FUTURE_WRITE: it also forbids the owner to punch holes, so that no byte could ever be
                # given back. Readers get a descriptor that cannot be mapped for writing: see reader_fd.
                fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    def reader_fd(self) -> int:
        """Return a new descriptor of the same memory, read-only: mapping it for writing is refused by the kernel."""
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # no /proc: macOS
            return os.dup(self.fd)

    def map(self, offset: int = 0, size: int | None = None, *, writable: bool = False) -> np.ndarray:
        """Return the bytes [offset, offset + size) as a flat uint8 array; offset a multiple of the page size.

        The mapping lives as long as any view of it, whatever becomes of the descriptor and of the other processes.
        """
        size = self.size - offset if size is None else size
        if offset % PAGE_BYTES or offset < 0 or size <= 0 or offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} cannot be mapped of a memory of {self.size} bytes.")
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        address = _libc.mmap(None, size, protection, mmap.MAP_SHARED, self.fd, offset)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"{size} bytes of shared memory cannot be mapped: {os.strerror(code)}")
        pages = (ctypes.c_char * size).from_address(address)
        # Not at exit: a daemon thread may still be reading then.
        weakref.finalize(pages, _libc.munmap, address, size).atexit = False
        data = memoryview(pages)
        return np.frombuffer(data if writable else data.toreadonly(), np.uint8)

    def close(self) -> None:
        """Close the descriptor; mappings live on."""
        self._close()


def populate(memory: SharedMemory, data: np.ndarray, offset: int = 0) -> None:
    """Have real pages behind `data`, a writable part of a mapping that starts at byte `offset` of `memory`.

    In one call per chunk: a page fault each would make the first copy some ten times slower than the second.
    ObjectMemoryFull where the system has no room for them; without this the first write would end the process.
    """
    address = address_of(data)
    try:
        for start in range(0, len(data), POPULATE_CHUNK_BYTES):
            _madvise(address + start, min(POPULATE_CHUNK_BYTES, len(data) - start), MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EFAULT where a write would be a SIGBUS, ENOMEM
            raise _no_room(data) from error
        _populate_by_hand(memory, data, offset)


def _populate_by_hand(memory: SharedMemory, data: np.ndarray, offset: int) -> None:
    """Do it as before Linux 5.14: reserve, then write to each page."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(memory.fd, offset, len(data))
        except OSError as error:
            raise _no_room(data) from error
    data[::PAGE_BYTES] = 0


def _no_room(data: np.ndarray) -> ObjectMemoryFull:
    return ObjectMemoryFull(
        f"the system has no room for {len(data)} more bytes of shared memory; "
        f"free memory (or enlarge /dev/shm), or set a lower object_memory."
    )


def release(data: np.ndarray) -> None:
    """Give the pages behind `data`, a writable part of a mapping, back to the system; it reads as zeros then."""
    with contextlib.suppress(AttributeError):  # macOS has no such thing: the pages stay until the memory goes
        _madvise(address_of(data), len(data), mmap.MADV_REMOVE)


class Borrowed(np.ndarray):
    """A view of mapped bytes that, when it dies, stores one value in memory that another process watches.

    Views for the user are made through its memoryview, by `cut`: numpy skips over arrays when it notes whose memory a
    view is, and a memoryview of a memoryview outlives the first. Only so does this object live exactly as long as all
    that is made from it: slices, unpickled arrays, torch tensors.
    """

    _watched: memoryview | None = None
    _index: int
    _value: int
    _pid: int

    @classmethod
    def of(cls, data: np.ndarray, watched: memoryview, index: int, value: int) -> Borrowed:
        """Return all of `data`, read-only; `watched[index] = value` follows when it is no longer in use."""
        base = data.view(cls)
        base.flags.writeable = False
        base._index, base._value, base._pid = index, value, os.getpid()
        base._watched = watched
        return base

    def __del__(self) -> None:
        if self._watched is not None and self._pid == os.getpid():  # a fork's copy dies without a word
            self._watched[self._index] = self._value


def cut(base: np.ndarray, spans: Sequence[Span]) -> list[memoryview]:
    """Return a view of each span, all through one memoryview of `base`: it lives as long as any of them."""
    whole = base.data
    return [whole[start : start + size] for start, size in spans]


def address_of(data: np.ndarray) -> int:
    """Return where in this process the array's first byte lies."""
    return data.__array_interface__["data"][0]


def _madvise(address: int, size: int, advice: int) -> None:
    while _libc.madvise(address, size, advice):
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def _open_posix() -> int:
    """Return a descriptor from shm_open, its name already removed: it cannot outlive the processes that have it."""
    import _posixshmem  # pyright: ignore[reportMissingImports]  # what multiprocessing.shared_memory uses, without its tracker process

    name = f"/rlx-{os.urandom(8).hex()}"
    fd = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    _posixshmem.shm_unlink(name)
    return fd
