"""TRL's GRPO on a job of benchmarks/grpo.py: a step whenever it is asked for one, each answered with its seconds."""

import contextlib
import itertools
import os
import sys
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from measured import read_job
from stepping import ALPHABET, Turns, reward
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

EOS = "<eos>"
NO_LIMIT = 1_000_000


def main() -> None:
    """Train until no more steps are asked for."""
    job, turns = read_job(), Turns("trl")
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    tokenizer = tokenizer_of(ALPHABET)
    ends = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), **job.model}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes, **ends))
    rows = job.prompts * job.samples
    at_once = rows if job.device == "cpu" else divisor(rows, job.microbatch // (6 + job.new_tokens))
    sums = itertools.product(range(100), repeat=2)
    questions = Dataset.from_list([{"prompt": f"{a:02}+{b:02}="} for a, b in sums])
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=rows // at_once,
            num_generations=job.samples,
            max_completion_length=job.new_tokens,
            max_steps=NO_LIMIT,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            temperature=1.0,
            beta=0.0,
            # By default it would compute in bfloat16 and twice, which is slower on a CPU.
            bf16=job.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=job.device == "cpu",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=job.seed,
        )
        trainer = GRPOTrainer(model, reward, settings, questions, processing_class=tokenizer)
        if not job.stops:
            # EOS becomes a token like any other.
            trainer.eos_token_ids = [-1]
            trainer.generation_config.eos_token_id = model.generation_config.eos_token_id = None
        trainer.add_callback(Steps(turns, trainer))
        with contextlib.redirect_stdout(sys.stderr):  # where it prints every step's metrics
            trainer.train()


def divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is not above `most`."""
    return max(part for part in range(1, max(1, most) + 1) if number % part == 0)


def tokenizer_of(alphabet: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each character, behind EOS, which is padding as well."""
    tokens = {EOS: 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, padding_side="left")


class Steps(TrainerCallback):
    """Tells of every step when its metrics are there."""

    def __init__(self, turns: Turns, trainer: GRPOTrainer) -> None:
        self._turns, self._trainer, self._output = turns, trainer, sys.stdout

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the step; stop the training where no other is asked for."""
        lengths = self._trainer._metrics["train"]["completions/mean_length"]  # what the step's log will show
        with contextlib.redirect_stdout(self._output):
            control.should_training_stop = not self._turns.end_step(float(lengths[-1]))


if __name__ == "__main__":
    main()
