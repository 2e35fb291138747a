"""Train PPO on CartPole-v1, evaluate it, save it, and use the policy alone: some 5 seconds on 2 cores.

python examples/01_ppo_cartpole.py
"""

import tempfile

import gymnasium

import rlx
from rlx.algorithms.ppo import PPOConfig

config = (
    PPOConfig()
    .environment("CartPole-v1")
    .env_runners(num_envs_per_env_runner=32, rollout_fragment_length=32)
    .training(lr={"start": 3e-3, "end": 3e-4, "env_steps": 100_000}, gamma=0.98, lambda_=0.9, minibatch_size=128)
    .stop(env_steps=100_000, episode_return_mean=475)
)

with tempfile.TemporaryDirectory() as folder:
    run = f"{folder}/cartpole"
    with config.build(run) as algo:  # every process ends with the block
        metrics = algo.fit()
        print(f"training   return {metrics['episode_return_mean']:.0f} after {metrics['env_steps']} env steps")
        evaluation = algo.evaluate(num_episodes=20)
        print(f"evaluation return {evaluation['evaluation/episode_return_mean']:.0f}")
    policy = rlx.load_policy(run)  # the newest checkpoint of the run folder

env = gymnasium.make("CartPole-v1")
obs, _ = env.reset(seed=0)
steps, done = 0, False
while not done:
    obs, _, terminated, truncated, _ = env.step(policy.act(obs))
    steps, done = steps + 1, terminated or truncated
env.close()
print(f"the policy alone balanced the pole for {steps} steps")
