"""Every frame between a driver and a node, by name: lost, doubled, late, and the connection cut at it.

Whatever happens, no call runs twice, nothing hangs, and who waits hears of it in a sentence.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import pickle
import re
import subprocess
import sys

import pytest

from rlx import actors, cluster_inspection
from rlx.actors import Restart
from rlx.actors.cluster import daemon, engine
from rlx.actors.cluster.daemon import NodeDaemon, Options
from rlx.actors.cluster.handshake import Role
from rlx.actors.cluster.heartbeat import Patience
from rlx.errors import ActorBusy, ActorDied, ActorError, CallTimeout, RlxError
from tests.actors.cluster.faults import BEFORE, BEHIND, CUTS, DELAY, DOUBLE, GARBLE, INSIDE, LOSE, Fault, Faults
from tests.actors.cluster.scenarios import FRAMES, FROM_NODE, TO_NODE, Stage, T, beats, calls, lives
from tests.polling import until

WATCH_S = 45.0
pytestmark = pytest.mark.timeout(WATCH_S + 5)
SOON_S = 0.3  # for an answer that has been lost
HURRY_S = 3.0  # of the system's own calls, while something is lost
PATIENCE = Patience(every_s=0.05, suspect_s=30.0, dead_s=60.0)


@pytest.fixture(autouse=True)
def watchdog():
    """A hang shows where every thread is."""
    with open(os.dup(sys.stderr.fileno()), "w") as stderr:
        faulthandler.dump_traceback_later(WATCH_S, file=stderr)
        yield
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def faults():
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults()
        faults.install(patch)
        patch.setattr(engine, "RELINK_EVERY_S", 0.02)
        patch.setattr(engine, "CLOSE_GRACE_S", 0.2)
        patch.setattr(daemon, "CLOSE_TIMEOUT_S", 1.0)
        yield faults


@pytest.fixture(scope="module")
def alone(start):
    return start("alone")


@pytest.fixture
def open_runtime(key, alone, faults):
    with contextlib.ExitStack() as stack:

        def open_one(system_timeout_s=T):
            options = {"address": alone.address, "token_file": key.path, "preload": (), "object_memory": 8 * 2**20}
            return stack.enter_context(
                actors.runtime("cluster", patience=PATIENCE, system_timeout_s=system_timeout_s, **options)
            )

        yield open_one


@pytest.fixture(scope="module")
def shared(key, alone, faults):
    """A runtime for faults that no link dies of."""
    options = {"address": alone.address, "token_file": key.path, "preload": (), "object_memory": 8 * 2**20}
    with actors.runtime("cluster", patience=PATIENCE, **options) as rt:
        yield rt


@pytest.fixture
def stage(shared, faults, tmp_path):
    stage = Stage(shared, faults, tmp_path)
    yield stage
    stage.clear()


@pytest.fixture
def hasty(open_runtime, faults, tmp_path):
    """A stage with a runtime of its own."""
    return Stage(open_runtime(), faults, tmp_path)


@pytest.fixture
def quick(shared, faults, tmp_path):
    """Like `stage`; whatever lives ends with the link."""
    return Stage(shared, faults, tmp_path)


EVERY_FRAME = pytest.mark.parametrize(("kind", "to_node"), FRAMES)
AT_ONCE = ("CALL", "REPLY", "ITEM")  # others are lost in slow tests: most wait for a timeout


def scenario(kind, to_node):
    return (TO_NODE if to_node else FROM_NODE)[kind]


LATE = r"worker/\d+\.{}\(\) on alone has not answered within 0\.3 s"
LOST = {
    ("SPAWN", True): (ActorDied, r"worker/\d+ \(pid unknown: not started on alone\) was not started within 3 s"),
    ("CALL", True): (CallTimeout, LATE.format("run")),
    ("SEND", True): (AssertionError, None),  # nobody has waited for it
    ("STREAM", True): (CallTimeout, r"worker/\d+\.count_up\(\) on alone has yielded nothing for 0\.3 s"),
    ("CREDIT", True): (CallTimeout, r"worker/\d+\.count_up\(\) on alone has yielded nothing for 0\.3 s"),
    ("CANCEL", True): (CallTimeout, LATE.format("wait")),
    ("KILL", True): (CallTimeout, r"actor worker/\d+ \(pid \d+ on alone\) is not gone 3 s after kill\(\)"),
    ("KEEP", True): (ActorError, "what was sent as number 0, and it was not sent"),
    ("CHANNEL", True): (CallTimeout, LATE.format("newest")),
    ("PUBLISH", True): (AssertionError, None),  # older versions are what readers live with
    ("READERS", True): (CallTimeout, r"alone\.readers\(\) has not answered within 3 s"),
    ("READY", False): (CallTimeout, r"worker/\d+.__init__\(\) has not answered within 4 s"),
    ("INIT_FAILED", False): (ActorDied, r"worker/\d+ \(pid \d+ on alone\) ended with exit code 1 in __init__\(\)"),
    ("REPLY", False): (CallTimeout, LATE.format("run")),
    ("ERROR", False): (CallTimeout, LATE.format("fail")),
    ("SEND_FAILED", False): (AssertionError, None),
    ("CANCELLED", False): (CallTimeout, LATE.format("wait")),
    ("ITEM", False): (ActorDied, r"its node alone .* \(item 0 of worker/\d+\.count_up\(\) is missing"),
    ("EXITED", False): (CallTimeout, r"actor worker/\d+ \(pid \d+ on alone\) is not gone 3 s after kill\(\)"),
    ("STALLED", False): (AssertionError, None),
    ("PRINTED", False): (AssertionError, None),
    ("PUBLISH", False): (AssertionError, None),
    ("READERS", False): (CallTimeout, r"alone\.readers\(\) has not answered within 3 s"),
    ("ROOM", False): (ActorBusy, r"worker/\d+ has read nothing for 3 s"),
}
"""What who waits for it gets when a frame is lost, which takes a bug: TCP loses none."""


@pytest.mark.parametrize("do", [DOUBLE, DELAY])
@EVERY_FRAME
def test_a_frame_that_comes_twice_or_late_changes_nothing(stage, kind, to_node, do):
    worker = stage.living()
    with stage.faults(Fault(do, kind, to_node, nth=0 if do == DOUBLE else 1)) as faults:
        scenario(kind, to_node)(stage, worker)
        calls(stage, worker)
        assert faults.done
    stage.check()
    assert len(stage.failures) <= 2  # each time that it is said


@pytest.mark.parametrize(
    ("kind", "to_node"), [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] not in AT_ONCE)) for one in FRAMES]
)
def test_who_waits_for_a_lost_frame_is_told_in_time_and_nobody_else_notices(hasty, kind, to_node):
    stage, worker, other = hasty, hasty.living(), hasty.living()
    _hurry(stage)
    with stage.faults(Fault(LOSE, kind, to_node, nth=kind != "CREDIT")) as faults:  # one less is a smaller window
        kind_of_error, says = LOST.get((kind, to_node), (None, None))
        if kind_of_error is None:
            scenario(kind, to_node)(stage, worker)
        else:
            with pytest.raises(kind_of_error, match=says):
                scenario(kind, to_node)(stage, worker)
        assert faults.done
    _hurry(stage, T, T)
    if (kind, to_node) != ("ITEM", False):  # which ends the link
        assert not stage.rt._engine._nodes[1].lost
        calls(stage, other)
    calls(stage, stage.living())
    stage.check()
    _close(stage)


def _hurry(stage, patience_s=SOON_S, system_timeout_s=HURRY_S):
    stage.patience_s, stage.birth_s = patience_s, system_timeout_s + 1.0
    stage.rt.system_timeout_s = stage.rt._engine.system_timeout_s = system_timeout_s


def _close(stage):
    """Close the runtime; no process is left, whatever has been lost."""
    stage.rt.close()
    until(lambda: not any(map(lives, stage.processes())))


@pytest.mark.parametrize("do", [INSIDE, *(pytest.param(do, marks=pytest.mark.slow) for do in (BEFORE, BEHIND))])
@EVERY_FRAME
def test_a_connection_that_is_cut_at_a_frame_ends_its_actors_and_is_made_again(quick, kind, to_node, do):
    stage, worker = quick, quick.living()
    again = quick.spawn(restart=Restart(max=5, backoff_s=0.01))
    calls(stage, again)
    before = stage.processes()
    held = stage.begin(worker, "run" if scenario(kind, to_node) is not beats else "wait")
    with stage.faults(Fault(do, kind, to_node)) as faults:
        error = None
        try:
            scenario(kind, to_node)(stage, stage.living() if kind in ("SPAWN", "STARTED", "READY") else worker)
        except (RlxError, AssertionError) as caught:  # what it asserts needs the node
            error = caught
        assert faults.done
    if isinstance(error, RlxError):
        assert isinstance(error, ActorDied) and "lost with its node alone (127.0.0.1:" in str(error), error
    died = held[1].exception(T) or worker.run.call(stage.token()).exception(T)
    assert isinstance(died, ActorDied) and "lost with its node alone (127.0.0.1:" in str(died)
    until(lambda: not any(map(lives, before)))
    answer = None
    while answer is None:  # until the timeout of this test: it may not have heard of its end yet
        with contextlib.suppress(ActorDied):
            answer = stage.ask(again)
    calls(stage, stage.living())
    stage.check()


@pytest.mark.slow
@EVERY_FRAME
def test_what_is_not_understood_ends_the_link_at_most(hasty, kind, to_node):
    stage, worker = hasty, hasty.living()
    _hurry(stage)
    with stage.faults(Fault(GARBLE, kind, to_node)) as faults:
        with contextlib.suppress(RlxError, AssertionError, ValueError, pickle.UnpicklingError):
            scenario(kind, to_node)(stage, worker)
        assert faults.done
    _hurry(stage, T, T)
    node = stage.rt._engine._nodes.get(1)
    with contextlib.suppress(ActorDied):  # of a link that is about to be lost
        calls(stage, stage.living())
    until(lambda: node is None or node.lost or stage.rt._engine._nodes.get(1) is node)
    calls(stage, stage.living())
    stage.check()


# Before and after all calls. ------------------------------------------------------------------------------------------

ALL = [DOUBLE, INSIDE, *(pytest.param(do, marks=pytest.mark.slow) for do in (LOSE, DELAY, GARBLE, BEFORE, BEHIND))]


@pytest.mark.parametrize("do", ALL)
def test_a_runtime_closes_whatever_becomes_of_its_last_word(hasty, do):
    stage, worker = hasty, hasty.living()
    calls(stage, worker)
    with stage.faults(Fault(do, "STOP", True)) as faults:
        _close(stage)
        assert faults.done


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project that no node has seen."""
    (tmp_path / "new.py").write_text(f"where = {str(tmp_path)!r}")
    for words in (["init", "-q"], ["add", "new.py"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("do", ALL)
@pytest.mark.parametrize(
    ("kind", "to_node", "role"),
    [
        *((kind, to_node, Role.DRIVER) for kind in ("OPEN", "PROJECT") for to_node in (True, False)),
        ("NODES", False, Role.VIEWER),
    ],
)
def test_a_runtime_opens_or_says_why_not(open_runtime, faults, project, tmp_path, do, kind, to_node, role):
    with faults(Fault(do, kind, to_node, role=role)):
        try:
            stage = Stage(open_runtime(system_timeout_s=HURRY_S), faults, tmp_path)
        except ActorError as error:
            assert do in {LOSE, GARBLE, *CUTS}
            assert re.match(r"the (head of the cluster \(127|daemon at 127)\.0\.0\.1:", str(error))
        else:
            with contextlib.suppress(ActorDied):  # where the link is cut behind its first word
                calls(stage, stage.living())
            calls(stage, stage.living())
            stage.check()
        assert faults.done


@pytest.mark.parametrize("do", ALL)
@pytest.mark.parametrize("to_head", [True, False])
def test_a_node_joins_once_or_says_why_not(key, faults, alone, open_runtime, tmp_path, do, to_head):
    name = f"{do} {to_head}"
    options = Options(name, str(key.path), "127.0.0.1", head=alone.address, patience=dataclasses.asdict(PATIENCE))
    node, rt, error = NodeDaemon.__new__(NodeDaemon), None, None
    try:
        with faults(Fault(do, "JOIN", to_head, role=Role.NODE)):
            try:
                node.__init__(options)
            except ActorError as caught:
                error = caught
            assert faults.done
        if error is None:
            rt = open_runtime()
            until(lambda: name in {one.name for one in rt._engine._nodes.values()})
            assert sum(one.name == name for one in rt._engine._nodes.values()) == 1
            for worker in [(stage := Stage(rt, faults, tmp_path)).living() for _ in range(2)]:
                calls(stage, worker)
        else:
            assert do in {LOSE, GARBLE, *CUTS} and "head" in str(error), error
    finally:
        node.close()
    if rt is not None:
        until(lambda: name not in {one.name for one in rt._engine._present.values()})


@pytest.mark.parametrize("do", ALL)
@pytest.mark.parametrize("to_node", [True, False])
def test_who_asks_a_node_to_look_is_told_if_it_does_not_answer(
    key, faults, stage, alone, monkeypatch, capsys, do, to_node
):
    stage.living()
    monkeypatch.setattr(cluster_inspection, "TIMEOUT_S", 1.0)
    options = argparse.Namespace(address=alone.address, token_file=key.path, json=False)
    with faults(Fault(do, "ASK", to_node)) as faults:
        said = list(cluster_inspection._ask(options, ["logs"]))
        assert faults.done
    if not said:
        why = "it has not answered in time|it closed the connection|it cannot tell|Expecting value"
        assert re.search(rf"rlx: node alone \(127\.0\.0\.1:\d+\): ({why})", capsys.readouterr().err)
