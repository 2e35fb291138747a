"""VllmGenerator: completions by a vLLM server that runs already, token for token as rlx's own generator gives them.

It speaks the interface of vLLM's OpenAI-compatible server, with token ids in place of text. The server is vLLM 0.16 or
newer (`reload_weights` from a path), started with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from rlx.errors import ConfigError, RlxError
from rlx.generation.request import Completion, Request, Sampling, check_requests
from rlx.generation.server import Ask, Server

CHECK_S = 30.0
"""Longest time for the server to answer what it is asked at the start."""
MOST_AT_ONCE = 64
"""Requests, each for all samples of a prompt, that are on their way together."""
PLAIN = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""What the server would else take from the model's generation_config.json."""
START = "start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


class VllmGenerator:
    """Generates whole batches with a server; has of `Generator` what whole batches need.

    vocabulary, context: of the model that is trained; longest: tokens that a prompt and its completion can have.
    max_slots: samples that the server is asked for at a time. timeout_s: for all requests of a call, and for weights.
    ConfigError: the server is not there, cannot do what is needed, or has another vocabulary or a shorter context.
    """

    def __init__(
        self,
        url: str,
        *,
        vocabulary: int,
        context: int | None,
        longest: int,
        max_slots: int = 256,
        timeout_s: float = 600.0,
    ) -> None:
        self._server = Server(url.rstrip("/").removesuffix("/v1"), "vLLM server")
        self._vocabulary, self._context = vocabulary, context
        self._max_slots, self._timeout_s = max_slots, timeout_s
        try:
            self._meet(longest if context is None else min(longest, context))
        except ConfigError:
            raise
        except RlxError as error:
            raise ConfigError(f"token_runners.url: {error}") from None

    def generate(self, requests: Sequence[Request], sampling: Sampling | None = None) -> list[list[Completion]]:
        """Return the n completions of every request, in order; their versions are 0.

        RlxError names the server and the request where one fails, is late, or is answered with less than was asked for.
        """
        self.check(requests)
        law = sampling or Sampling()
        asks = [self._ask(number, request, law) for number, request in enumerate(requests)]
        most = max((request.n for request in requests), default=1)
        at_once = min(MOST_AT_ONCE, max(1, self._max_slots // most))
        return self._server.post_all("/v1/completions", asks, at_once=at_once, deadline=self._deadline())

    def check(self, requests: Sequence[Request]) -> None:
        """Raise ConfigError at the first request that the model cannot serve."""
        check_requests(requests, self._vocabulary, self._context)

    def load(self, folder: str) -> None:
        """Have the server generate with the weights in a folder of safetensors that it can read, too."""
        what, deadline = f"the weights in {folder}", self._deadline()
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self._server.json("POST", "/collective_rpc", body, what=what, deadline=deadline)
        # Keys and values of the old weights must not serve the prompts that are asked again.
        self._server.json("POST", "/reset_prefix_cache", what=what, deadline=deadline)

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    # At the start ------------------------------------------------------------------------------------------------

    def _meet(self, longest: int) -> None:
        """Ask the server who it is; ConfigError where it is no vLLM that this model can be trained with."""
        server, deadline = self._server, time.monotonic() + CHECK_S
        health = server.exchange("GET", "/health", what="its health", deadline=deadline)
        if health.status != 200:
            raise ConfigError(f"{server.name} is not ready: status {health.status}; wait for it, or start it again.")
        listed = server.json("GET", "/v1/models", what="its models", deadline=deadline)
        try:
            model = listed["data"][0]
            self._model, room = model["id"], model.get("max_model_len")
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ConfigError(f"{server.name} lists no model, so it is no vLLM server; {START}.") from None
        self.root: str = str(model.get("root") or self._model)
        """Folder or hub id of the model that the server was started with."""
        if room is not None and room < longest:
            raise ConfigError(
                f"{server.name} takes {room} tokens of prompt and completion together, and this run needs {longest}; "
                "start it with a larger --max-model-len, or lower generation.max_new_tokens."
            )
        self._check_vocabulary(deadline)
        law = server.exchange("POST", "/v1/completions", self._likeliest(), what="a token", deadline=deadline)
        made = self._completions(server.parsed(law, "a token"), Request([0], 1, 1), "a token")
        if abs(float(made[0].logp[0])) > 1e-4:
            raise ConfigError(
                f"{server.name} gives log-probabilities of the raw logits, without temperature and top-k; {START}."
            )
        if server.exchange("GET", "/collective_rpc", what="how weights come", deadline=deadline).status == 404:
            raise ConfigError(f"{server.name} takes no new weights; {START}.")

    def _likeliest(self, **options: Any) -> dict[str, Any]:
        """Return what asks for the likeliest token alone: in the law that is left, its log-probability is 0."""
        return self._body(Request([0], 1, 1), Sampling(top_k=1)) | options

    def _check_vocabulary(self, deadline: float) -> None:
        """Ask for a bias on the token after the last one, which vLLM refuses by naming the size of its vocabulary."""
        body = self._likeliest(logit_bias={str(self._vocabulary): 0.0})
        what = "a token outside the vocabulary"
        answer = self._server.exchange("POST", "/v1/completions", body, what=what, deadline=deadline)
        told = re.search(r"Vocabulary size: (\d+)", answer.body.decode(errors="replace"))
        if answer.status == 200 or (told and int(told[1]) != self._vocabulary):
            size = told[1] if told and answer.status != 200 else "more"
            raise ConfigError(
                f"{self._server.name} serves {self._model} with a vocabulary of {size} tokens, and the model that is "
                f"trained has {self._vocabulary}; start it with the model of this run."
            )
        if not told:
            self._server.parsed(answer, what)

    # Requests and answers ----------------------------------------------------------------------------------------

    def _ask(self, number: int, request: Request, law: Sampling) -> Ask:
        what = f"request {number} ({len(request.prompt)} prompt tokens, n={request.n})"

        def read(answer: Any) -> list[Completion]:
            made = self._completions(answer, request, what)
            if law.temperature == 0:
                for one in made:
                    one.logp[:] = 0
            return made

        return Ask(what, self._body(request, law), read)

    def _body(self, request: Request, law: Sampling) -> dict[str, Any]:
        """Return a request as the server takes it; what ends a completion is said by the request alone."""
        return {
            "model": self._model,
            "prompt": [int(token) for token in request.prompt],
            "n": request.n,
            "max_tokens": self._limit(request),
            "seed": request.seed % 2**63,  # of sample i: seed + i
            "temperature": law.temperature,
            "top_k": law.top_k,
            "top_p": law.top_p,
            "min_p": law.min_p,
            **PLAIN,
            "ignore_eos": True,
            "stop_token_ids": sorted(int(token) for token in request.stop_ids),
            "logprobs": 0,  # of the token that was drawn, and of no others
            "return_token_ids": True,
        }

    def _limit(self, request: Request) -> int:
        room = math.inf if self._context is None else self._context - len(request.prompt)
        return int(min(request.max_new_tokens, room))

    def _completions(self, answer: Any, request: Request, what: str) -> list[Completion]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            self._refuse(what, "no list of choices")
        by_index = {choice.get("index"): choice for choice in choices}
        if len(choices) != request.n or by_index.keys() != set(range(request.n)):
            self._refuse(what, f"{len(choices)} samples in place of {request.n}")
        return [self._completion(by_index[index], request, f"sample {index} of {what}") for index in range(request.n)]

    def _completion(self, choice: dict[str, Any], request: Request, what: str) -> Completion:
        tokens, logps = choice.get("token_ids"), choice.get("logprobs")
        logps = logps.get("token_logprobs") if isinstance(logps, dict) else None
        if not isinstance(tokens, list) or not tokens:
            self._refuse(what, "no token_ids, which vLLM 0.10.2 was the first to give")
        if not isinstance(logps, list) or len(logps) != len(tokens):
            found = f"{len(logps)} log-probabilities" if isinstance(logps, list) else "no log-probabilities"
            self._refuse(what, f"{found} for {len(tokens)} tokens")
        if not all(type(token) is int and 0 <= token < self._vocabulary for token in tokens):
            self._refuse(what, f"token ids that are not from 0 to {self._vocabulary - 1}")
        if not all(isinstance(logp, float | int) and math.isfinite(logp) for logp in logps):
            self._refuse(what, "log-probabilities that are no finite numbers")
        if choice.get("prompt_token_ids") not in (None, [int(token) for token in request.prompt]):
            self._refuse(what, "a completion of another prompt")
        stopped, limit = tokens[-1] in request.stop_ids, self._limit(request)
        if not request.stop_ids.isdisjoint(tokens[:-1]) or len(tokens) > limit or (len(tokens) < limit and not stopped):
            self._refuse(
                what,
                f"a completion of {len(tokens)} tokens that ends neither with its first stop token nor at the limit of "
                f"{limit} (finish_reason {choice.get('finish_reason')!r}; try --generation-config vllm)",
            )
        size = len(tokens)
        return Completion(np.array(tokens, np.int64), np.array(logps, np.float32), np.zeros(size, np.int64), stopped)

    def _refuse(self, what: str, found: str) -> NoReturn:
        raise RlxError(
            f"{self._server.name} answered {what} with {found}; nothing is learned from what would have to be guessed, "
            "so look at the server's version, flags and log."
        )
