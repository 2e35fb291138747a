"""Schedule: a setting that changes over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError, core_schema


@dataclass(frozen=True)
class Schedule:
    """A number that may change over the run: `start` to `end` in a straight line over `env_steps`, then `end`.

    Written as a plain number (constant) or as {start, end, env_steps}. A range on a field, such as gt=0, holds
    for the whole schedule.
    """

    start: float
    end: float
    env_steps: int

    def at(self, env_steps: int) -> float:
        """Return the value once the run has taken `env_steps` environment steps."""
        if env_steps >= self.env_steps:
            return self.end
        return self.start + (self.end - self.start) * max(env_steps, 0) / self.env_steps

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """Return the schedule that is `value` all the time."""
        return cls(float(value), float(value), env_steps=0)

    @classmethod
    def parse(cls, value: Any) -> Schedule:
        """Return the schedule that a number, a {start, end, env_steps} mapping or a schedule stands for."""
        if isinstance(value, Schedule):
            value = value.written()
        if _is_number(value):
            return cls.constant(value)
        if isinstance(value, dict) and value.keys() == {"start", "end", "env_steps"}:
            start, end, env_steps = value["start"], value["end"], value["env_steps"]
            if all(map(_is_number, (start, end, env_steps))) and env_steps > 0 and env_steps == int(env_steps):
                return cls(float(start), float(end), int(env_steps))
        raise PydanticCustomError("schedule", "Input should be a number or a mapping of start, end and env_steps")

    def written(self) -> float | dict[str, float]:
        """Return the form that YAML holds: a number where constant, else the mapping."""
        if self.env_steps == 0 and self.start == self.end:
            return self.end
        return {"start": self.start, "end": self.end, "env_steps": self.env_steps}

    # pydantic checks Field(gt=0, le=1, ...) with these.
    def __gt__(self, bound: float) -> bool:
        return min(self.start, self.end) > bound

    def __ge__(self, bound: float) -> bool:
        return min(self.start, self.end) >= bound

    def __lt__(self, bound: float) -> bool:
        return max(self.start, self.end) < bound

    def __le__(self, bound: float) -> bool:
        return max(self.start, self.end) <= bound

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        write = core_schema.plain_serializer_function_ser_schema(Schedule.written)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=write)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        number = {"type": "number"}
        keys = {"start": number, "end": number, "env_steps": {"type": "integer", "exclusiveMinimum": 0}}
        ramp = {"type": "object", "properties": keys, "required": [*keys], "additionalProperties": False}
        return {"anyOf": [number, ramp]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
