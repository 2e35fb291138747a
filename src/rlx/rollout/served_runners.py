"""ServedRunners: a server in the place of token runners."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

from rlx.errors import ConfigError
from rlx.generation.request import Request, Sampling
from rlx.generation.vllm import VllmGenerator
from rlx.rollout.token_runner import Completions, packed


class ServedRunners:
    """Generates with a server, which gets the weights as a folder.

    export: writes the model as it is now into a folder. weights_path: where folders are made, which the server has to
    find under the same path; None: with the temporary files of this machine.
    """

    def __init__(
        self, generator: VllmGenerator, export: Callable[[Path], object], weights_path: str | None = None
    ) -> None:
        self._generator, self._export = generator, export
        self._weights_path = None if weights_path is None else os.path.expanduser(weights_path)
        self.version = 0

    def publish(self, version: int, weights: Callable[[], Any]) -> int:
        """Have the server generate with the weights as they are now; return the bytes of their files.

        A folder holds them for as long as it reads.
        """
        try:
            if self._weights_path is not None:
                Path(self._weights_path).mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix="rlx-weights-", dir=self._weights_path)
        except OSError as error:
            raise ConfigError(
                f"token_runners.weights_path={self._weights_path} cannot be written to: {error}"
            ) from error
        with folder as name:  # a new one each time, so that nothing of the last weights can be taken for these
            os.chmod(name, 0o755)  # the server may be another user's
            self._export(Path(name))
            size = sum(file.stat().st_size for file in Path(name).rglob("*.safetensors"))
            self._generator.load(os.path.abspath(name))
        self.version = version
        return size

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Completions:
        """Return the completions of all requests, in their order."""
        started = perf_counter()
        made = [one for samples in self._generator.generate(requests, sampling) for one in samples]
        for one in made:
            one.version[:] = self.version
        return packed(made, perf_counter() - started)

    def arrive(self, *arguments: Any, **limits: Any) -> NoReturn:
        """Raise ConfigError: whole batches only."""
        raise ConfigError("a server generates whole batches: set training.max_age=0.")

    arrive_in_turns = arrive

    def take_restarts(self) -> int:
        """Return 0: nobody here starts the server."""
        return 0

    def close(self) -> None:
        """Nothing to close: the server goes on."""
