"""Where memory runs out, in this process or another one, a sentence has the plan's figures and what to lower."""

import re

import pytest
import torch

from rlx.actors.engines.pickling import dump_error, load_error
from rlx.errors import RlxError
from rlx.out_of_memory import out_of_memory_told

pytestmark = pytest.mark.usefixtures("shared_processes")

ABSURD = 1 << 50
"""Numbers that no machine has memory for."""


def raise_as_cuda_does(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def allocate_far_too_much(*arguments, **options):
    torch.empty(ABSURD)


def notes(error) -> str:
    return "\n".join(error.__notes__)


@pytest.mark.parametrize("fail", [raise_as_cuda_does, allocate_far_too_much])
def test_the_sentence_has_the_figures_and_the_cures(fail):
    with (
        pytest.raises(RlxError, match=r"memory ran out in an update \(.*allocate") as error,
        out_of_memory_told("an update", "memory a learner: 3 MB\nmemory a generator: 1 MB", ["lower a", "set b=1"]),
    ):
        fail()
    assert str(error.value).endswith(
        "planned was memory a learner: 3 MB, memory a generator: 1 MB: lower a; or set b=1."
    )
    assert isinstance(error.value.__cause__, RuntimeError) and "\n" not in str(error.value)


def test_any_other_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), out_of_memory_told("an update", "", []):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("fail", [raise_as_cuda_does, allocate_far_too_much])
def test_an_update_in_the_driver_says_it_and_the_run_can_go_on(fail, tiny_text, monkeypatch):
    with tiny_text("grpo").build() as algorithm:
        with monkeypatch.context() as patched, pytest.raises(RlxError) as error:
            patched.setattr(algorithm.learners.local_policy, "evaluate", fail)
            algorithm.train()
        message = str(error.value)
        assert message.startswith("memory ran out in an update (")
        assert re.search(r"memory a learner: \d+ MB of .*activations \d+ MB.*keys and values 98 kB", message)
        for cure in ("learners.max_tokens_per_microbatch=4096", "learners.activation_checkpointing=true"):
            assert cure in message
        assert algorithm.train()["iteration"] == 1


@pytest.mark.parametrize("fail", [raise_as_cuda_does, allocate_far_too_much])
def test_a_generator_in_the_driver_says_it_in_training_and_in_evaluations(fail, tiny_text, monkeypatch):
    """24 slots, of the 24 samples of an iteration."""
    source = {"source": "rlx.envs.addition:rows", "kwargs": {"split": "eval"}, "num_rows": 4}
    with tiny_text("grpo", evaluation=source).build() as algorithm:
        monkeypatch.setattr(algorithm.runners._local._generator, "generate", fail)
        for call in (algorithm.train, algorithm.evaluate):
            with pytest.raises(RlxError, match="memory ran out in generation") as error:
                call()
            assert "lower generation.max_slots below 24; or lower generation.max_new_tokens" in str(error.value)
            assert "keys and values 98 kB; 24 slots of 11 tokens" in str(error.value)


@pytest.mark.parametrize("fail", [raise_as_cuda_does, allocate_far_too_much])
def test_what_came_from_another_process_is_known_again(fail):
    with pytest.raises(RuntimeError) as raised:
        fail()
    came = load_error(*dump_error(raised.value, "learner/0.update()")).error
    with pytest.raises(RlxError) as told, out_of_memory_told("an update", "", []):
        raise came
    assert told.value.__cause__ is came and "raised in learner/0.update()" in notes(came)


@pytest.mark.slow
def test_a_learner_s_process_says_it_with_its_traceback(tiny_text, monkeypatch):
    def loss(policy, minibatch, coefficients, training):
        torch.empty(1 << 50)

    monkeypatch.setattr("rlx.algorithms.grpo.GRPO.loss", staticmethod(loss))
    made = tiny_text("grpo", learners={"num_learners": 1})
    with made.build() as algorithm, pytest.raises(RlxError, match="memory ran out in an update") as error:
        algorithm.train()
    assert "memory a learner: 13 MB" in str(error.value)
    assert "raised in learner/0" in notes(error.value.__cause__)


@pytest.mark.slow
def test_a_token_runner_s_process_says_it_with_its_traceback(tiny_text, monkeypatch):
    """The model fails on more rows than are in the trial at its start."""

    def build_model(*arguments):
        from rlx.text_models import build_model

        def check(module, inputs, options):
            if len(options["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        model = build_model(*arguments)
        model.register_forward_pre_hook(check, with_kwargs=True)
        return model

    monkeypatch.setattr("rlx.text_algorithm.build_model", build_model)
    made = tiny_text("grpo", token_runners={"num_token_runners": 1, "torch_threads": 1})
    with made.build() as algorithm, pytest.raises(RlxError, match="memory ran out in generation") as error:
        algorithm.train()
    assert "memory a generator: 143 kB (weights 45 kB, keys and values 98 kB" in str(error.value)
    assert "raised in token_runner/0" in notes(error.value.__cause__)
