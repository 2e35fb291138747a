"""What is done about age: the updates between the weights that drew a token and those that learn from it."""

from typing import Literal

WhenOld = Literal["wait", "pace", "drop"]
"""How a largest age is kept. wait: runners begin no more than can be learned from in time, and learners wait for a slow
completion that would be too old in the next update; pace: nobody waits for that one, and it is dropped; drop: runners
are not held back either, and the oldest are dropped."""

OnNewWeights = Literal["finish", "keep_cache", "refresh_cache"]
"""What becomes of sequences under way. finish: they end with the old weights, and what waits begins after them;
keep_cache: they go on with the new ones beside keys and values of the old; refresh_cache: those are made anew."""
