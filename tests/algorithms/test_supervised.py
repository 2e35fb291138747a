"""SFT, reward models and DPO: losses by torch alone, what must make no difference, LoRA, and where the data is."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlx.errors import CheckpointError
from rlx.text.order import order
from rlx.trajectory import Batch

ALGORITHMS = ["sft", "dpo", "reward_model"]
UNKNOWN = {"episode_return_mean", "episode_return_min", "episode_return_max", "episode_length_mean"}  # no completions
LORA = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"]}


def history(made, iterations=3, fill=None):
    """Return the rows of some iterations, without times, and the weights after them."""
    with made.build() as algorithm:
        if fill is not None:
            batch_of = algorithm.batch_of
            algorithm.batch_of = lambda rows: fill(batch_of(rows))
        rows = [algorithm.train() for _ in range(iterations)]
        weights = algorithm.learners.weights()
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}
        for row in rows
    ], weights


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_does_not_count_has_no_influence(algorithm, tiny_text, garbage):
    made = tiny_text(algorithm, training={"epochs": 2, "minibatch_sequences": 5})
    rows, weights = history(made.copy())
    others, other_weights = history(made, fill=garbage)
    assert others == rows
    assert other_weights.tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    "learners",
    [
        {"max_tokens_per_microbatch": 12},
        {"layout": "padded", "max_tokens_per_microbatch": 100_000},
        {"layout": "packed"},
        pytest.param({"num_learners": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_how_it_is_learned_makes_no_difference(learners, algorithm, tiny_text):
    made = tiny_text(algorithm, training={"adam_eps": 1e-3, "lr": 1e-3, "minibatch_sequences": 5})
    rows, weights = history(made.copy())
    others, other_weights = history(made.learners(**learners))
    np.testing.assert_allclose(other_weights, weights, rtol=0, atol=2e-6)
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - UNKNOWN:
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=2e-6), name


def test_a_checkpoint_beside_another_reference_is_refused(tiny_text):
    with tiny_text("dpo").build() as algorithm:
        state = algorithm.learners.get_state()
        algorithm.learners.set_state(state)
    with (
        tiny_text("dpo", runtime={"seed": 1}).build() as other,
        pytest.raises(CheckpointError, match="beside other weights that are not learned"),
    ):
        other.learners.set_state(state)


@pytest.mark.parametrize("runners", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluations_complete_with_the_newest_weights(runners, tiny_text):
    made = tiny_text("sft", training={"lr": 0.1}, token_runners={"num_token_runners": runners})
    made.reward("rlx.envs.addition:random_reward")
    made.evaluation(source="rlx.envs.addition:rows", kwargs={"split": "eval", "limit": 8})
    with made.build() as algorithm:
        told = []
        publish = algorithm.runners.publish
        algorithm.runners.publish = lambda version, weights: told.append(version) or publish(version, weights)
        algorithm.evaluate()
        for _ in range(2):
            algorithm.train()
            algorithm.evaluate()
            assert told[-1] == algorithm.learners.version
        algorithm.evaluate()
        assert len(told) == 3  # nothing new, nothing sent


def completion_logp(model, batch, index):
    """Return the log-probabilities of what counts in the row at `index` by the model's own forward pass."""
    length = int(batch.length[index])
    tokens = torch.cat([batch.obs[index][:length], batch.action[index][length - 1 :][:1]])
    logp = torch.log_softmax(model(input_ids=tokens[None]).logits[0, :-1], -1)
    return logp.gather(1, tokens[1:, None]).squeeze(1)[batch.mask[index][:length]]


def test_the_loss_of_sft_is_the_mean_over_all_tokens(tiny_text):
    with tiny_text("sft").build() as algorithm:
        twin = copy.deepcopy(algorithm.learners.local_policy.model)
        row = algorithm.train()
        batch = algorithm._batch
        logp = torch.cat([completion_logp(twin, batch, index) for index in range(16)])
    loss = -logp.mean()
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    assert len(logp) == row["env_steps"] == int(batch.mask.sum())
    assert row["learner/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("train_on_prompt", "mask", "loss"),
    [
        (False, [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]], (4 + 5 + 7) / 3),
        (True, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7),
    ],
)
def test_tokens_of_prompts_are_learned_where_that_is_set(train_on_prompt, mask, loss, tiny_text):
    rows = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "9=", "completion": ""}]
    made = tiny_text("sft", data={"source": rows, "kwargs": {}, "rows_per_iteration": 2, "shuffle": False})
    with made.data(train_on_prompt=train_on_prompt).build() as algorithm:
        twin = copy.deepcopy(algorithm.learners.local_policy.model)
        row = algorithm.train()
        batch = algorithm._batch
        weight = algorithm.weigh(batch.mask, algorithm.training, 1)
        logp = -torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 99, 99, 99]])
        policy = SimpleNamespace(evaluate=lambda minibatch, entropy: (logp, None, None))
        by_hand, _ = algorithm.loss(policy, Batch(**batch.tensors, weight=weight), {}, algorithm.training)
    assert batch.mask.int().tolist() == mask
    assert row["env_steps"] == np.sum(mask)
    assert by_hand.item() == pytest.approx(loss, rel=1e-6)
    losses = []
    for tokens, first in (([2, 11, 3, 12, 4, 0], 4), ([10, 12, 0], 2)):  # characters one by one: 0 is EOS, "0" is 1
        law = torch.log_softmax(twin(input_ids=torch.tensor([tokens])).logits[0], -1)
        losses += [-law[at - 1, tokens[at]] for at in range(1 if train_on_prompt else first, len(tokens))]
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    assert row["learner/loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_the_loss_of_preferences_is_the_papers(objective, tiny_text):
    with tiny_text("dpo", training={"objective": objective, "beta": 0.4, "label_smoothing": 0.0}).build() as algorithm:
        policy = algorithm.learners.local_policy
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model, reference = copy.deepcopy(policy.model), policy.reference
        row = algorithm.train()
        batch, losses = algorithm._batch, []
        for pair in range(16):
            margin = 0.0
            for side, sign in ((0, 1), (1, -1)):
                new, ref = (completion_logp(one, batch, (pair, side)) for one in (model, reference))
                log_ratio = new - ref.detach()
                margin = margin + sign * (log_ratio.mean() if objective == "ipo" else log_ratio.sum())
            losses.append((margin - 1 / 0.8) ** 2 if objective == "ipo" else torch.log1p(torch.exp(-0.4 * margin)))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert row["learner/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# Data ------------------------------------------------------------------------------------------------------------


def test_every_row_is_taken_once_a_pass_and_a_resumed_run_takes_the_next(tiny_text, tmp_path):
    """40 rows by 16: passes end within iterations."""
    taken = []

    def watch(algorithm):
        collate = algorithm.batch_of

        def batch_of(rows):
            taken.extend(algorithm.rows.index(row) for row in rows)
            return collate(rows)

        algorithm.batch_of = batch_of

    made = tiny_text("sft", runtime={"seed": 3})
    with made.copy().build() as algorithm:
        watch(algorithm)
        for _ in range(2):
            algorithm.train()
        algorithm.save(tmp_path / "saved")
    with made.build() as algorithm:
        watch(algorithm)
        algorithm.restore(tmp_path / "saved")
        for _ in range(3):
            algorithm.train()
    assert len(taken) == 80
    assert sorted(taken[:40]) == sorted(taken[40:]) == list(range(40))
    assert taken[:40] != taken[40:]
    assert taken == [int(index) for index in order(40, 0, 80, 3)]


def test_what_an_error_kept_from_being_learned_is_taken_again(tiny_text):
    made = tiny_text("sft")
    rows, weights = history(made.copy(), 2)
    with made.build() as algorithm:
        algorithm.train()
        update = algorithm.update

        def fails(batch, **options):
            raise KeyboardInterrupt

        algorithm.update = fails
        with pytest.raises(KeyboardInterrupt):
            algorithm.train()
        algorithm.update = update
        row = algorithm.train()
        assert (algorithm.learners.weights() == weights).all()
        assert row["env_steps"] == rows[1]["env_steps"]


# LoRA ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_all_that_is_learned_and_merges_into_what_is_exported(tiny_text, tmp_path):
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    made = tiny_text("dpo", model=LORA, training={"lr": 0.02})
    with made.copy().build() as algorithm:
        policy = algorithm.learners.local_policy
        frozen = {name: p.detach().clone() for name, p in policy.model.named_parameters() if not p.requires_grad}
        assert policy.reference is None
        first = algorithm.train()
        assert first["learner/loss"] == pytest.approx(np.log(2), abs=1e-6)  # the adapter begins as nothing
        for _ in range(4):
            row = algorithm.train()
        assert row["learner/loss"] < 0.69
        for name, p in policy.model.named_parameters():
            assert p.requires_grad == ("lora_" in name)
            if name in frozen:
                assert torch.equal(p, frozen[name]), name
        batch = algorithm._batch
        plain = copy.deepcopy(policy.model)
        with plain.disable_adapter():
            expected = torch.cat([completion_logp(plain, batch, (pair, 0)) for pair in range(16)])
        found = torch.cat([batch.ref_logp[pair, 0][batch.mask[pair, 0]] for pair in range(16)])
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
        tokens = batch.obs[:, 0, :6]
        before = policy.model(input_ids=tokens).logits
        algorithm.export(tmp_path / "model")
        assert torch.equal(policy.model(input_ids=tokens).logits, before)  # exporting merges a copy
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(merged(input_ids=tokens).logits, before, rtol=0, atol=1e-5)
        algorithm.save(tmp_path / "saved")
        expected_row = algorithm.train()
        weights = algorithm.learners.weights()
    with made.build() as again:
        again.restore(tmp_path / "saved")
        assert again.train()["learner/loss"] == expected_row["learner/loss"]
        assert (again.learners.weights() == weights).all()


def test_the_whole_model_is_exported_to_the_bit(tiny_text, tmp_path):
    from transformers import AutoModelForCausalLM

    with tiny_text("sft").build() as algorithm:
        algorithm.train()
        tokens = algorithm._batch.obs[:4, :6]
        model = algorithm.learners.local_policy.model
        algorithm.export(tmp_path / "model")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(read(input_ids=tokens).logits, model(input_ids=tokens).logits)
