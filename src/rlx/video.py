"""Recording rgb frames into a .gif (Pillow) or an .mp4 (imageio with ffmpeg, extra `video`)."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlx.errors import ConfigError, EnvError, MissingExtra, RlxError

AddFrame = Callable[[np.ndarray], None]
"""Appends a frame [H, W, 3] uint8."""
DEFAULT_FPS = 30.0
GIF_COLORS = 128


def recording(file: Path, fps: float) -> AbstractContextManager[AddFrame]:
    """Return a context that yields a function taking frames; `file` is there, and complete, when the block ends well.

    Raises what `check_ending` raises, before the block begins.
    """
    check_ending(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    return _mp4(file, fps) if file.suffix.lower() == ".mp4" else _gif(file, fps)


def check_ending(file: Path) -> None:
    """Raise ConfigError for a name that is no video's, MissingExtra for an .mp4 without ffmpeg."""
    if file.suffix.lower() not in (".gif", ".mp4"):
        raise ConfigError(f"{file} is no video that rlx can write; end its name in .gif or .mp4.")
    if file.suffix.lower() == ".mp4":
        _ffmpeg_writer()


def check_renders(play: Callable[[AddFrame], Any]) -> None:
    """Raise EnvError unless `play`, which plays episodes and passes their frames on, gets as far as a first frame."""

    class Seen(Exception):
        pass

    def first(frame: np.ndarray) -> None:
        raise Seen

    try:
        play(first)
    except Seen:
        return
    except RlxError:
        raise
    except Exception as error:
        raise EnvError(f"the environment cannot be recorded, as rendering it raised {error!r}.") from error


def frames_per_second(env: Any) -> float:
    """Return the pace an environment states for its frames (metadata["render_fps"]), else 30."""
    from gymnasium.envs.registration import load_env_creator, spec

    from rlx.rollout.vector import resolve

    source, _ = resolve(env)
    if isinstance(source, str):
        entry_point = spec(source).entry_point
        source = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    return float(getattr(source, "metadata", {}).get("render_fps") or DEFAULT_FPS)


def render_without_display() -> None:
    """Let pygame draw where there is no screen and no sound card; a screen that is there stays in use."""
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # SIGTERM ends the program; SDL would make it an event
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
        # SDL asks for it even so, and complains on stderr where a container has none.
        os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")


@contextmanager
def _gif(file: Path, fps: float) -> Iterator[AddFrame]:
    from PIL import Image

    packed: list[bytes] = []  # as PNGs: the raw pixels of a long CartPole episode are a third of a gigabyte

    def add(frame: np.ndarray) -> None:
        image = Image.fromarray(frame).quantize(GIF_COLORS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
        packed.append(buffer.getvalue())

    yield add
    if not packed:
        raise ConfigError(f"{file} would be empty: the environment rendered no frame.")
    # A GIF counts in hundredths of a second, and viewers slow down what is faster than two of them.
    frame_ms = max(20, round(100 / fps) * 10)
    first = Image.open(io.BytesIO(packed[0]))
    rest = (Image.open(io.BytesIO(png)) for png in packed[1:])
    first.save(file, "GIF", save_all=True, append_images=rest, duration=frame_ms, loop=0)


@contextmanager
def _mp4(file: Path, fps: float) -> Iterator[AddFrame]:
    # macro_block_size: h264 needs even sides; imageio's default of 16 would stretch most environments' frames.
    writer = _ffmpeg_writer()(file, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    try:
        yield writer.append_data
    except BaseException:
        writer.close()
        file.unlink(missing_ok=True)
        raise
    writer.close()


def _ffmpeg_writer() -> Callable[..., Any]:
    try:
        import imageio_ffmpeg  # noqa: F401 - imageio itself finds out too late, at the first frame
        from imageio.v2 import get_writer
    except ImportError as error:
        raise MissingExtra(
            "writing an .mp4 needs imageio with ffmpeg: pip install 'rlx[video]', or write a .gif."
        ) from error
    return get_writer
