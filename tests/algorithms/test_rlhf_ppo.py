"""PPO on text: a whole iteration against numbers worked out by torch alone, and what must make no difference."""

import copy

import numpy as np
import pytest
import torch

from rlx.checkpoint import load_state

TRAINING = {"kl_coef": 0.3, "lambda_": 0.9, "gamma": 0.97, "epochs": 1, "minibatch_sequences": None, "clip_range": 0.1}


def moved(model):
    """Return the model with all its parameters moved a bit, always by the same."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


def row_of(model, row, batch):
    """Return the logits and last hidden states of a row's steps that act with its completion, and these tokens."""
    length = int(batch.length[row])
    tokens = torch.cat([batch.obs[row, :length], batch.action[row, length - 1 :][:1]])
    out = model(input_ids=tokens[None], output_hidden_states=True)
    mask = batch.mask[row, :length]
    return out.logits[0, :-1][mask], out.hidden_states[-1][0, :-1][mask], tokens[1:][mask]


def logp_of(model, row, batch):
    logits, _, tokens = row_of(model, row, batch)
    return torch.log_softmax(logits, -1).gather(1, tokens[:, None]).squeeze(1)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_one_update_is_what_the_papers_say(bootstrap, tiny_text):
    """KL by k1 in the reward, GAE by its definition, whitening, PPO's eq. 7, and the values' squared error."""
    made = tiny_text("rlhf_ppo", training={**TRAINING, "lr": 0.0, "bootstrap_truncated": bootstrap})
    with made.build() as algorithm:
        policy = algorithm.learners.local_policy
        reference = copy.deepcopy(policy.model)
        draw = algorithm.sample

        def sample_and_move():
            batch = draw()
            for part in (policy.model, policy.value_model, policy.value_head):
                moved(part)
            return batch

        algorithm.sample = sample_and_move
        twin, critic, head = (
            moved(copy.deepcopy(part)) for part in (policy.model, policy.value_model, policy.value_head)
        )
        row = algorithm.train()
        batch, score = algorithm._batch, torch.from_numpy(algorithm._rollout.score)
        stopped = algorithm._rollout.completions.stopped

    advantages, returns, values, news, olds = [], [], [], [], []
    for index in range(24):
        with torch.no_grad():
            old = logp_of(reference, index, batch)
            value = head(row_of(critic, index, batch)[1]).squeeze(1)
        reward = -0.3 * (old - old)  # who drew is the reference as yet
        reward[-1] += score[index]
        if bootstrap and not stopped[index]:
            reward[-1] += 0.97 * value[-1]
        count = len(value)
        delta = [reward[t] + (0.97 * value[t + 1] if t + 1 < count else 0) - value[t] for t in range(count)]
        advantage = torch.stack([sum((0.97 * 0.9) ** k * delta[t + k] for k in range(count - t)) for t in range(count)])
        advantages.append(advantage)
        returns.append(advantage + value)
        news.append(logp_of(twin, index, batch))
        olds.append(old)
        values.append(head(row_of(critic, index, batch)[1]).squeeze(1))
    advantage, return_, value, new, old = map(torch.cat, (advantages, returns, values, news, olds))
    whitened = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    ratio = (new - old).exp()
    policy_loss = -torch.min(ratio * whitened, ratio.clamp(0.9, 1.1) * whitened).mean()
    value_loss = (value - return_).square().mean()
    loss = policy_loss + 0.5 * value_loss
    loss.backward()
    parts = [*twin.parameters(), *critic.parameters(), *head.parameters()]
    norm = torch.cat([parameter.grad.flatten() for parameter in parts if parameter.grad is not None]).norm()
    explained = 1 - (return_ - value).var(correction=0) / return_.var(correction=0)
    outside = ((ratio - 1).abs() > 0.1).float().mean()
    assert 0 < outside < 1
    assert not stopped.all() and value.std() > 0.01
    assert row["learner/policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-5)
    assert row["learner/value_loss"] == pytest.approx(value_loss.item(), rel=1e-4)
    assert row["learner/loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert row["learner/explained_variance"] == pytest.approx(explained.item(), abs=1e-4)
    assert row["learner/clip_fraction"] == pytest.approx(outside.item(), abs=1e-6)


def test_kl_is_paid_by_the_reward_and_its_coefficient_adapts(tiny_text, tmp_path):
    """A reference of its own: the KL is known from the start, and the coefficient follows Ziegler et al."""
    made = tiny_text(
        "rlhf_ppo", training={**TRAINING, "kl_target": 0.05, "kl_horizon": 48, "lambda_": 1.0, "gamma": 1.0}
    )
    with made.build() as algorithm:
        policy = algorithm.learners.local_policy
        moved(policy.reference)
        first = algorithm.train()
        batch, score = algorithm._batch, torch.from_numpy(algorithm._rollout.score)
        difference = (batch.logp - batch.ref_logp).masked_fill(~batch.mask, 0)
        for index in range(24):  # values are 0 at first: a return is the rewards to come
            expected = score[index] - 0.3 * difference[index].flip(0).cumsum(0).flip(0)
            counted = batch.mask[index]
            torch.testing.assert_close(batch.return_[index][counted], expected[counted], rtol=0, atol=1e-5)
        kl = difference.sum().item() / 24
        assert first["ref_kl_sequence"] == pytest.approx(kl, abs=1e-5)
        error = min(max(kl / 0.05 - 1, -0.2), 0.2)
        second = algorithm.train()
        assert (first["learner/kl_coef"], second["learner/kl_coef"]) == (
            0.3,
            pytest.approx(0.3 * (1 + error * 24 / 48)),
        )
        algorithm.save(tmp_path / "saved")
        assert load_state(tmp_path / "saved")["numbers"]["kl_coef"] == algorithm.numbers["kl_coef"] != 0.3


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_warm_up_teaches_the_value_function_alone(value, tiny_text):
    training = {"value_warmup_iterations": 2, "weight_decay": 0.1}
    made = tiny_text("rlhf_ppo", model={"value": value}, training=training)
    with made.build() as algorithm:
        size = sum(parameter.numel() for parameter in algorithm.learners.local_policy.model.parameters())
        before = algorithm.learners.weights()
        algorithm.train()
        algorithm.train()
        warm = algorithm.learners.weights()
        algorithm.train()
        after = algorithm.learners.weights()
    if value == "separate":
        np.testing.assert_array_equal(warm[:size], before[:size])
    assert (warm[size:] != before[size:]).any()
    assert (after[:size] != warm[:size]).any()


@pytest.mark.parametrize("still", ["policy", "value"])
def test_the_value_function_has_a_step_size_of_its_own(still, tiny_text):
    rates = {"lr": 0.0, "value_lr": 1e-3} if still == "policy" else {"lr": 1e-3, "value_lr": 0.0}
    with tiny_text("rlhf_ppo", model={"value": "separate"}, training=rates).build() as algorithm:
        size = sum(parameter.numel() for parameter in algorithm.learners.local_policy.model.parameters())
        before = algorithm.learners.weights()
        algorithm.train()
        after = algorithm.learners.weights()
    moved = [(after[part] != before[part]).any() for part in (slice(size), slice(size, None))]
    assert moved == ([False, True] if still == "policy" else [True, False])


def test_step_sizes_rise_during_the_warm_up(tiny_text):
    with tiny_text("rlhf_ppo", training={"lr": 1e-3, "lr_warmup": 100}).build() as algorithm:
        for _ in range(3):
            metrics = algorithm.train()
            expected = 1e-3 * min(1.0, algorithm.env_steps / 100)
            assert metrics["learner/lr"] == pytest.approx(expected)
        assert algorithm.env_steps > 100


VARIANTS = {
    "kl in the reward": {"kl_coef": 0.1, "kl_target": 0.1, "value_clip": 0.2, "bootstrap_truncated": True},
    "kl in the loss": {"kl_coef": 0.1, "kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.01},
    "no kl": {"kl_coef": 0.0, "normalize_advantage": False},
}


@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("training", VARIANTS.values(), ids=VARIANTS)
def test_what_does_not_count_has_no_influence(training, value, tiny_text, ragged, garbage, computed):
    made = tiny_text("rlhf_ppo", training={**training, "epochs": 2}, model={"value": value})
    made.prompts(ragged, kwargs={})
    outcomes = []
    for fill in (lambda batch: batch, garbage):
        with made.copy().build() as algorithm:
            draw = algorithm.sample
            algorithm.sample = lambda draw=draw, fill=fill: fill(draw())
            rows = [computed(algorithm.train()) for _ in range(2)]
            outcomes.append((rows, algorithm.learners.weights().tobytes()))
    assert outcomes[0] == outcomes[1]
