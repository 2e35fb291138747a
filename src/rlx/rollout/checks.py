"""What a fragment must not hold: numbers that are not finite, and observations that leave nothing legal to do."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from rlx.errors import EnvError
from rlx.rollout.fragment import Fragment
from rlx.rollout.vector import Envs


class FragmentChecks:
    """Looks at whole fragments; EnvError says which environment, step and fragment. `number` is the fragment's."""

    def __init__(self, envs: Envs, first_env_index: int) -> None:
        self._envs, self._first = envs, first_env_index

    def finite(self, fragment: Fragment, number: int) -> None:
        """Raise EnvError if an observation or a reward of the fragment is NaN or infinite."""
        end, floats = len(fragment.reward), self._envs.layout.floats
        # Field, first step of the array, and which action came before: observation t follows action t - 1.
        fields = (
            ("reward", fragment.reward, 0, 0),
            ("observation", floats(fragment.raw), 0, -1),
            ("observation", floats(self._envs.obs_B)[None], end, -1),
        )
        for name, values, first, shift in fields:
            if not np.isfinite(values).all():
                t, index = (int(i) for i in np.argwhere(~np.isfinite(values))[0][:2])
                actions_T_B = fragment.action[: first + t + shift + 1]
                self._raise_not_finite(name, values[t, index], first + t, index, actions_T_B, number)
        for t, index, obs in fragment.cuts:
            if not np.isfinite(floats(obs)).all():
                self._raise_not_finite("final observation", floats(obs), t, index, fragment.action[: t + 1], number)

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

    def _raise_not_finite(
        self, name: str, value: Any, t: int, index: int, actions_T_B: np.ndarray, number: int
    ) -> NoReturn:
        blame = "clip or repair it in the environment or a wrapper."
        if len(actions_T_B) and not np.isfinite(actions_T_B[-1, index]).all():
            blame = (
                f"the action before it was {actions_T_B[-1, index]}: the policy has diverged; lower the learning rate."
            )
        raise EnvError(
            f"{self._envs.name}, environment {self._first + index}: {name} {value} at step {t} of fragment {number}; "
            f"it must be finite: {blame}"
        )
