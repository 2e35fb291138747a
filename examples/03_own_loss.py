"""PPO with a KL penalty in place of the clipping (Schulman et al. 2017, arXiv:1707.06347, eq. 8): a loss of your own.

python examples/03_own_loss.py              or, as any algorithm:
rlx train examples/03_own_loss.yaml         (it says `algorithm: ./03_own_loss.py`)
"""

from pydantic import NonNegativeFloat

from rlx.algorithms.ppo import PPO, PPOConfig, PPOTraining
from rlx.functional.kl import k3
from rlx.functional.losses import squared_error
from rlx.functional.masking import weighted_sum


class PenaltyTraining(PPOTraining):
    """Hyper-parameters of PPO with a KL penalty; clip_range has no effect."""

    kl_coef: NonNegativeFloat = 1.0
    """Weight of KL(old || new) in the loss."""


class PenaltyConfig(PPOConfig, training=PenaltyTraining):
    """Settings of a run of PPO with a KL penalty."""


class PenaltyPPO(PPO, config=PenaltyConfig):
    """PPO whose steps are held back by a penalty; `training_step` stays PPO's."""

    @staticmethod
    def loss(policy, minibatch, coefficients, training):
        """Return the loss and its stats; every mean is a sum weighted by `minibatch.weight`."""
        new_logp, entropy, value = policy.evaluate(minibatch)
        ratio = (new_logp - minibatch.logp).exp()
        policy_loss = -weighted_sum(ratio * minibatch.advantage, minibatch.weight)
        value_loss = weighted_sum(squared_error(value, minibatch.return_), minibatch.weight)
        entropy = weighted_sum(entropy, minibatch.weight)
        kl = weighted_sum(k3(minibatch.logp, new_logp), minibatch.weight)
        total = policy_loss + training.value_coef * value_loss - training.entropy_coef * entropy + training.kl_coef * kl
        stats = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}
        return total, {name: stat.detach() for name, stat in stats.items()}


if __name__ == "__main__":  # `rlx train` imports this file: only a script trains
    config = (
        PenaltyConfig()
        .environment("CartPole-v1")
        .env_runners(num_envs_per_env_runner=32, rollout_fragment_length=32)
        .training(lr=3e-3, gamma=0.98, lambda_=0.8, kl_coef=1.0)
        .stop(env_steps=60_000)
    )
    with config.build() as algo:
        metrics = algo.fit()
        print(f"return {metrics['episode_return_mean']:.0f}, KL of the last update {metrics['learner/kl']:.4f}")
