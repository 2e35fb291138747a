"""The spaces of an environment: what rlx makes of them, and how a checkpoint holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from rlx.errors import EnvError
from rlx.nets.actions import ActionLayout
from rlx.nets.observation import MASK_KEY, ObservationLayout, Space


def layouts(observation_space: Space, action_space: Space, name: str) -> tuple[ObservationLayout, ActionLayout]:
    """Return how observations and actions become rows; EnvError, naming environment `name`, where they cannot."""
    try:
        observations, actions = ObservationLayout(observation_space), ActionLayout(action_space)
    except EnvError as error:
        raise EnvError(f"{name}: {error}") from None
    mask, total = observations.mask_parts, sum(actions.sizes)
    if mask and mask not in ([((), total)], actions.parts):
        choices = f"{total} choices, {' + '.join(map(str, actions.sizes))}" if total else "none"
        entries = " + ".join(f"{size} at {'.'.join(map(str, path))!r}" if path else f"{size}" for path, size in mask)
        raise EnvError(
            f"{name}: the observation's {MASK_KEY!r} has {entries} entries and the action space {action_space} has "
            f"{choices}; give one entry for each choice (two for each bit of a MultiBinary), in one array or in the "
            "action's own structure and order."
        )
    return observations, actions


def space_to_state(space: Space) -> dict[str, Any]:
    """Return a space as plain values and arrays, for a checkpoint."""
    match space:
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.Box():
            return {"kind": "Box", "low": space.low.copy(), "high": space.high.copy(), "dtype": str(space.dtype)}
        case spaces.MultiDiscrete():
            return {
                "kind": "MultiDiscrete",
                "nvec": space.nvec.copy(),
                "start": space.start.copy(),
                "dtype": str(space.dtype),
            }
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
        case spaces.Text():
            lengths = {"min_length": space.min_length, "max_length": space.max_length}
            return {"kind": "Text", **lengths, "charset": "".join(sorted(space.character_set))}
        case spaces.Dict():
            parts = [space_to_state(part) for part in space.spaces.values()]
            return {"kind": "Dict", "keys": list(space.spaces), "parts": parts}
        case spaces.Tuple() | spaces.OneOf():
            return {"kind": type(space).__name__, "parts": [space_to_state(part) for part in space.spaces]}
    raise EnvError(f"rlx cannot save the space {space}.")


def space_from_state(state: dict[str, Any]) -> Space:
    """Return the space that `space_to_state` described."""
    parts = [space_from_state(part) for part in state.get("parts", ())]
    match state["kind"]:
        case "Discrete":
            return spaces.Discrete(state["n"], start=state["start"])
        case "Box":
            return spaces.Box(state["low"], state["high"], dtype=np.dtype(state["dtype"]).type)
        case "MultiDiscrete":
            return spaces.MultiDiscrete(state["nvec"], np.dtype(state["dtype"]).type, start=state["start"])
        case "MultiBinary":
            return spaces.MultiBinary(state["n"])
        case "Text":
            return spaces.Text(state["max_length"], min_length=state["min_length"], charset=state["charset"])
        case "Dict":
            # As pairs: a mapping would come back sorted, and the order decides where a part lies in its row.
            return spaces.Dict(list(zip(state["keys"], parts, strict=True)))
        case "Tuple":
            return spaces.Tuple(parts)
    return spaces.OneOf(parts)
