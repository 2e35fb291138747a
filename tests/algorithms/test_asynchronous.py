"""IMPALA, APPO and PPO one version behind: what is reproducible is exact, and what is not keeps its bounds."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlx.algorithms.appo import APPO, APPOConfig, APPOTraining
from rlx.algorithms.impala import IMPALA, IMPALAConfig, IMPALATraining, corrected
from rlx.algorithms.ppo import PPOConfig
from rlx.errors import ConfigError
from rlx.functional.advantages import gae
from rlx.functional.masking import sample_weight
from rlx.nets.policy import build_policy
from rlx.rollout.env_runner import EnvRunner
from rlx.trajectory import Batch

CONFIGS = {"ppo": PPOConfig, "impala": IMPALAConfig, "appo": APPOConfig}


def config(name, num_env_runners=2, engine="local", **training):
    made = CONFIGS[name]().environment("CartPole-v1").reporting(progress="none")
    made.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=3, rollout_fragment_length=16)
    if name == "ppo":
        training = {"epochs": 2, "minibatch_size": 32} | training
    else:
        training = {"updates_per_iteration": 2} | training
    return made.training(**training).runtime(engine=engine)


def computed(row):
    """Return what a run computes: all but times."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "env_steps_per_s"))}


def train(made, iterations):
    with made.build() as algorithm:
        return [computed(algorithm.train()) for _ in range(iterations)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["impala", "appo"])
def test_age_0_is_the_synchronous_algorithm(name):
    """The same numbers where runners are in processes, in the driver's own, and where nothing can run at once."""
    processes = train(config(name, max_age=0), 4)
    assert [row["age_max"] for row in processes] == [0] * 4
    assert processes == train(config(name, max_age=0, engine="inline"), 4)
    alone = config(name, num_env_runners=0).training(max_age=0)
    assert train(alone, 4) == train(config(name, num_env_runners=0), 4)  # without runners there is nothing else


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("ppo", marks=SLOW), pytest.param("impala", marks=SLOW), "appo"])
def test_one_version_behind_is_reproducible(name):
    first, second = train(config(name, max_age=1), 5), train(config(name, max_age=1), 5)
    assert first == second == train(config(name, max_age=1, engine="inline"), 5)
    assert first[0]["age_mean"] < 1  # the very first batch is fresh
    assert [(row["age_mean"], row["age_max"]) for row in first[1:]] == [(1.0, 1)] * 4
    assert first != train(config(name, max_age=0), 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "impala", "appo"])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_version_behind_resumes_exactly(name, normalize, tmp_path):
    def made():
        return config(name, max_age=1).environment(normalize_obs=normalize, normalize_reward=normalize)

    straight = train(made(), 6)
    with made().build() as algorithm:
        for _ in range(3):
            algorithm.train()
        algorithm.save(tmp_path / "checkpoint")
        kept = [computed(algorithm.train()) for _ in range(3)]  # saving has changed nothing
    with made().build() as algorithm:
        algorithm.restore(tmp_path / "checkpoint")
        resumed = [computed(algorithm.train()) for _ in range(3)]
    assert kept == resumed == straight[3:]


@pytest.mark.slow
@pytest.mark.parametrize("max_age", [2, 5])
@pytest.mark.parametrize("name", ["impala", "appo"])
def test_no_sample_is_older_than_allowed(name, max_age):
    rows = train(config(name, max_age=max_age, batch_size=48, updates_per_iteration=20), 4)
    assert all(0 <= row["age_mean"] <= row["age_max"] <= max_age for row in rows)
    assert rows[-1]["env_steps"] + rows[-1]["dropped_env_steps"] >= 4 * 20 * 48 * 0.9  # reset rows are no steps
    assert rows[-1]["weights_version"] == 80


def test_batches_of_several_fragments_and_of_fewer_than_there_are_runners():
    rows = train(config("impala", batch_size=4 * 48, max_age=3), 2)
    assert rows[-1]["gradient_steps"] == 4
    with pytest.raises(ConfigError, match=r"training.batch_size=100 is no multiple of a fragment's 48 .*set it to 96"):
        config("impala", batch_size=100).build()
    with pytest.raises(ConfigError, match=r"training.batch_size=48 has to be 2 x 48 .*training.max_age is 1"):
        config("impala", batch_size=48, max_age=1).build()
    with pytest.raises(ConfigError, match=r"training.max_age=1 .* set env_runners.num_env_runners to 1 or more"):
        config("ppo", num_env_runners=0, max_age=1).build()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"minibatch_size": 48, "epochs": 2, "target_update_interval": 2}])
@pytest.mark.parametrize("name", ["impala", "appo"])
def test_two_learners_make_the_steps_of_one(name, options):
    if name == "impala" and options:
        pytest.skip("of APPO alone")
    one, two = (train(config(name, max_age=1, **options).learners(num_learners=n), 3) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5, nan_ok=False)


def test_each_batch_is_used_as_often_as_set_and_ages_meanwhile():
    rows = train(config("appo", updates_per_batch=3, max_age=9, updates_per_iteration=6, batch_size=96), 3)
    assert [row["weights_version"] for row in rows] == [6, 12, 18]
    assert rows[-1]["env_steps"] <= 6 * 96  # 18 updates on 6 batches
    assert rows[-1]["age_max"] <= 9 and rows[-1]["age_mean"] >= 1
    with pytest.raises(ConfigError, match=r"training.updates_per_batch=3 .* training.max_age=2 .* set max_age to 3"):
        config("appo", updates_per_batch=3, max_age=2).build()


def collected(steps=24):
    """Return a fragment of CartPole with ends of episodes in it, by a policy, and another policy."""
    runner = EnvRunner("CartPole-v1", 4, build_policy, seed=1)
    acting, learning = (build_policy(*runner.spaces(), seed=seed, log_std_init=0.0) for seed in (1, 2))
    with torch.no_grad():
        learning.action_head.weight.mul_(50)
    runner.set_weights(0, torch.cat([p.detach().flatten() for p in acting.parameters()]).numpy())
    t = runner.sample(steps).trajectory.tensors()
    assert t.terminated.any()
    fields = ("obs", "action", "logp", "next_value", "reward", "terminated", "truncated", "mask", "weights_version")
    batch = t.fragments(*fields)
    return Batch(**batch.tensors, weight=sample_weight(batch.mask)), acting, learning


def gradients(loss, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def test_on_policy_the_loss_of_impala_is_actor_critic_with_n_step_returns():
    """With pi = mu and lambda 1: grad of -(log pi)(R - V) + c (R - V)^2, R and the advantage constants."""
    batch, policy, _ = collected()
    training = IMPALATraining(entropy_coef=0.0, value_coef=0.3)
    loss, stats = IMPALA.loss(policy, batch, {}, training)
    logp, _, value = policy.evaluate(batch)
    t = batch.map(lambda field: field.transpose(0, 1))
    done = t.terminated | t.truncated
    following = torch.cat([torch.where(done[:-1], t.next_value[:-1], value.detach().T[1:]), t.next_value[-1:]])
    advantage, return_ = gae(t.reward, value.detach().T, following, t.terminated, t.truncated, training.gamma, 1.0)
    expected = (batch.weight * (-logp * advantage.T + 0.3 * (value - return_.T).square())).sum()
    torch.testing.assert_close(gradients(loss, policy), gradients(expected, policy), rtol=1e-4, atol=1e-5)
    assert stats["kl"].item() == pytest.approx(0.0, abs=1e-6)


def test_off_policy_the_importance_weights_are_cut_and_get_no_gradient():
    batch, _, policy = collected()
    loss, stats = IMPALA.loss(policy, batch, {}, IMPALATraining(entropy_coef=0.0, value_coef=0.0))
    logp, _, _ = policy.evaluate(batch)
    assert 0 < stats["rho_clip_fraction"] < 1
    huge, _ = IMPALA.loss(policy, batch, {}, IMPALATraining(entropy_coef=0.0, value_coef=0.0, pg_rho_clip=1e9))
    ratio = (logp - batch.logp).exp().detach()
    assert (ratio > 1).any()
    # Each sample's part of the gradient is its advantage times d log pi; only those above the cut differ.
    differs = gradients(huge, policy) - gradients(loss, policy)
    assert differs.abs().max() > 1e-6
    assert not any(tensor.requires_grad for tensor in batch.tensors.values())


def test_the_importance_weight_is_of_the_joint_action():
    """With gamma 0 an advantage is min(1, rho) (r - V), and rho the product of the ratios of all parts of an action."""
    space = spaces.Dict({"a": spaces.Discrete(3, start=1), "b": spaces.MultiDiscrete([2, 4])})
    acting, learning = (build_policy(spaces.Box(-1, 1, (5,)), space, seed=seed) for seed in (1, 2))
    for policy in (acting, learning):
        with torch.no_grad():
            policy.action_head.weight.mul_(100)
    generator = torch.Generator().manual_seed(3)
    obs = torch.randn(2, 6, 5, generator=generator)
    action = torch.stack([torch.randint(n, (2, 6), generator=generator) for n in (3, 2, 4)], -1)
    nothing = torch.zeros(2, 6)
    reward = torch.randn(2, 6, generator=generator)
    batch = Batch(
        obs=obs, action=action, reward=reward, next_value=nothing, terminated=nothing > 0, truncated=nothing > 0
    )
    with torch.no_grad():
        heads = [policy(obs.flatten(0, 1))[0] for policy in (acting, learning)]
        logp, (new_logp, _, value) = acting.evaluate(batch)[0], learning.evaluate(batch)
        rho = torch.ones(12)
        for part, columns in enumerate((slice(0, 3), slice(3, 5), slice(5, 9))):
            mu, pi = (head[:, columns].softmax(-1).gather(1, action[..., part].reshape(-1, 1)) for head in heads)
            rho *= (pi / mu)[:, 0]
        complete = Batch(**batch.tensors, logp=logp)
        _, advantage = corrected(new_logp, value, complete, IMPALATraining(gamma=0.0))
    assert (rho < 1).any() and (rho > 1).any()
    expected = rho.clamp(max=1).view(2, 6) * (reward - value)
    torch.testing.assert_close(advantage, expected, rtol=1e-4, atol=1e-6)


def test_appo_prepares_by_the_policy_that_learns_or_by_the_target():
    batch, acting, learning = collected()
    with torch.no_grad():
        plain = APPO.prepare(learning, batch, APPOTraining(normalize_advantage=False))
        target = APPO.prepare(learning, batch, APPOTraining(normalize_advantage=False, target_update_interval=4))
        new_logp, _, _ = learning.evaluate(batch)
    torch.testing.assert_close(plain.old_logp, batch.logp.flatten())
    torch.testing.assert_close(target.old_logp, new_logp.flatten())
    torch.testing.assert_close(plain.return_, target.return_)
    rho = (new_logp - batch.logp).exp().clamp(max=1).flatten()
    torch.testing.assert_close(target.advantage, rho * plain.advantage)
    assert np.prod(batch.mask.shape) == len(plain)
    coefficients = {"clip_range": 0.2}
    weighted = Batch(**plain.tensors, weight=sample_weight(plain.mask))
    loss, stats = APPO.loss(acting, weighted, coefficients, APPOTraining(entropy_coef=0.0, value_coef=0.0))
    # The policy that acted: the ratio is one, so the surrogate is the mean advantage, and nothing is clipped.
    assert loss.item() == pytest.approx(-(plain.advantage * weighted.weight).sum().item(), rel=1e-4)
    assert stats["clip_fraction"] == 0 and stats["kl"].item() == pytest.approx(0, abs=1e-6)
