"""Prints by how many MB the memory of this process peaks above the model and its gradient: see test_chunked_head.py."""

import torch

from rlx.nets.flat import FlatParameters
from rlx.nets.language_model import load_language_model
from rlx.nets.transformer import TransformerPolicy
from rlx.trajectory import Batch

CONFIG = {
    "model_type": "llama", "vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def resident(name: str) -> float:
    """Return VmRSS (now) or VmHWM (the peak) in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))


def step(policy: TransformerPolicy, rows: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    obs, action = torch.randint(0, CONFIG["vocab_size"], (2, rows, length), generator=generator)
    batch = Batch(
        obs=obs, action=action, mask=torch.ones(rows, length, dtype=torch.bool), length=torch.full((rows,), length)
    )
    logp, entropy, _ = policy.evaluate(batch)
    (logp.sum() + 0.01 * entropy.sum()).backward()


torch.set_num_threads(1)
policy = TransformerPolicy(load_language_model(config=CONFIG))
flat = FlatParameters(policy)
gradient = torch.ones_like(flat.data)  # ones: pages that were never written are not resident
for parameter, view in zip(flat.parameters, flat.views(gradient), strict=True):
    parameter.grad = view
step(policy, 1, 8)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak starts again from here
before = resident("VmRSS")
step(policy, 16, 256)
print(resident("VmHWM") - before)
