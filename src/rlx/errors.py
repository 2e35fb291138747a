"""Every exception rlx raises on purpose.

RlxError
├── ConfigError        a setting is unknown, mistyped or impossible            (also a ValueError)
├── DataError          a data file or a row of it does not fit; names file and number  (also a ValueError)
├── EnvError           an environment breaks the gymnasium API or returns NaN
├── RewardError        a reward function raises, hangs, or returns what is no score; names the sample
├── CheckpointError    a checkpoint or run folder is missing, torn, foreign or from another config
├── MissingExtra       an optional package is needed; the message says which   (also an ImportError)
├── NotSupported       this engine cannot do that                              (also a NotImplementedError)
└── ActorError         something about an actor
    ├── ActorDied      its process ended: says which signal or exit code, and during which method
    ├── RemoteError    its method raised an exception that could not be rebuilt here
    ├── ActorBusy      it has as many unanswered calls as it may, and finishes none
    ├── CallTimeout    no reply within the deadline; the call goes on           (also a TimeoutError)
    ├── CallCancelled  the call was cancelled before it ran
    ├── HandshakeError two machines do not become one cluster: says why         (also a ConnectionError)
    ├── ObjectMemoryFull   no shared memory for a message: says who holds how much
    └── Infeasible     it asks for resources that this runtime does not have, whoever ends

A message is one sentence that says what is wrong, the value seen, what is allowed, and what to do.
An exception raised inside an actor's method arrives as itself, with the remote traceback as a note;
`RemoteError` stands in only where the original cannot be unpickled.
An exception in a callback arrives as itself, too, with a note that names callback and point.
"""

CALLBACK_NOTE = "in the callback"
"""How that note begins."""


class RlxError(Exception):
    """Base of all errors that rlx raises on purpose."""


class ConfigError(RlxError, ValueError):
    """A setting is unknown, mistyped or impossible."""


class EnvError(RlxError):
    """An environment breaks the gymnasium API, or returns NaN."""


class DataError(RlxError, ValueError):
    """A data file is missing or torn, or a row of it does not fit."""


class RewardError(RlxError):
    """A reward function raises, takes too long, or returns something that is no score."""


class CheckpointError(RlxError):
    """A checkpoint or run folder is missing, torn, foreign, or belongs to another config."""


class MissingExtra(RlxError, ImportError):
    """An optional package is not installed."""


class NotSupported(RlxError, NotImplementedError):
    """The chosen engine cannot do this."""


class ActorError(RlxError):
    """Something went wrong with an actor."""


class ActorDied(ActorError):
    """The actor's process ended before the call was answered."""


class RemoteError(ActorError):
    """The actor's method raised an exception that cannot be rebuilt here; the remote traceback is in the message."""


class ActorBusy(ActorError):
    """The actor has as many unanswered calls as it may have, and finishes none."""


class CallTimeout(ActorError, TimeoutError):
    """No reply within the deadline. The call itself goes on in the actor."""


class CallCancelled(ActorError):
    """The call was cancelled before it ran."""


class HandshakeError(ActorError, ConnectionError):
    """A connection to another machine of the cluster did not come about; `reason` is the why in one word."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ObjectMemoryFull(ActorError):
    """There is no shared memory left for a message; the receivers that hold it are in the message."""


class Infeasible(ActorError):
    """It asks for more resources than this runtime has in all; no waiting would help."""
