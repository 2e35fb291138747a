"""What a fragment must not hold: numbers that are not finite, and observations that leave nothing legal to do."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from rlx.errors import EnvError
from rlx.rollout.fragment import Fragment
from rlx.rollout.vector import Envs


class FragmentChecks:
    """Looks at whole fragments, and at actions before they are taken.

    EnvError says which environment, step and fragment. `number` is the fragment's.
    """

    def __init__(self, envs: Envs, first_env_index: int) -> None:
        self._envs, self._first = envs, first_env_index
        self._acts_in_floats = envs.actions.dtype.kind == "f"

    def finite(self, fragment: Fragment, number: int) -> None:
        """Raise EnvError if an observation or a reward of the fragment is NaN or infinite."""
        end, floats = len(fragment.reward), self._envs.layout.floats
        fields = (
            ("reward", fragment.reward, 0),
            ("observation", floats(fragment.raw), 0),
            ("observation", floats(self._envs.obs_B)[None], end),
        )
        for name, values, first in fields:
            if not np.isfinite(values).all():
                t, index = (int(i) for i in np.argwhere(~np.isfinite(values))[0][:2])
                self._raise_not_finite(name, values[t, index], first + t, index, number)
        for t, index, obs in fragment.cuts:
            if not np.isfinite(floats(obs)).all():
                self._raise_not_finite("final observation", floats(obs), t, index, number)

    def action(self, action_B: np.ndarray, t: int, number: int) -> None:
        """Raise EnvError where the policy's floats are not finite: no environment should have to act on them."""
        if self._acts_in_floats and not np.isfinite(action_B).all():
            index = int(np.argwhere(~np.isfinite(action_B))[0][0])
            raise EnvError(
                f"{self._envs.name}, environment {self._first + index}: the policy's action {action_B[index]} at step "
                f"{t} of fragment {number} is not finite, so the policy has diverged; lower training.lr."
            )

    def legal(self, fragment: Fragment, mask_T_B: np.ndarray, number: int) -> None:
        """Raise EnvError where an observation that was acted on leaves nothing legal to do."""
        legal = self._envs.layout.mask(fragment.raw)
        if legal is None:
            return
        for t, index in np.argwhere(self._envs.actions.is_stuck(legal) & mask_T_B).tolist():
            raise EnvError(
                f"{self._envs.name}, environment {self._first + index}: the action mask {legal[t, index]} at step {t} "
                f"of fragment {number} leaves no legal action; end the episode there, or allow one."
            )

    def _raise_not_finite(self, name: str, value: Any, t: int, index: int, number: int) -> NoReturn:
        raise EnvError(
            f"{self._envs.name}, environment {self._first + index}: {name} {value} at step {t} of fragment {number}; "
            "it must be finite: clip or repair it in the environment or a wrapper."
        )
