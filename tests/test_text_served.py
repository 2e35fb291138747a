"""Runs whose completions a vLLM server draws: one that speaks its protocol and generates with rlx's own generator."""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from rlx.errors import ConfigError, RlxError
from rlx.generation.generator import Generator
from rlx.generation.request import Request, Sampling
from rlx.generation.vllm import VllmGenerator
from rlx.nets.language_model import export_language_model, load_language_model
from rlx.policy_distance import mismatch_kl, old_policy
from rlx.trajectory import Batch

LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
STOPS = frozenset({0})
MANY = [Request([1, 2 + number], 3, 6, seed=2**62 + number, stop_ids=STOPS) for number in range(8)]


class FakeVllm(ThreadingHTTPServer):
    """The endpoints that rlx uses, as vLLM 0.25 answers them, over the model in a folder."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.room, self.has_dev_mode, self.is_raw = str(folder), 32, True, False
        self.paths, self.bodies, self.weights_seen = [], [], []
        self.fault, self.after = None, 0  # of completions, from the one after so many on
        self.answered, self.under_way, self.most_under_way = 0, 0, 0
        self.lock, self.is_ending, self.is_dead = threading.Lock(), threading.Event(), False
        self.load(folder)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Nothing: clients hang up."""

    def verify_request(self, request, client_address):
        return not self.is_dead

    def load(self, folder):
        model = load_language_model(path=str(folder))
        self.weights_seen.append(model.get_input_embeddings().weight.detach().clone())
        self.generator = Generator(model)

    def complete(self, body):
        """Return status and answer of /v1/completions."""
        size = self.generator.architecture.vocabulary
        if bad := [int(token) for token in body.get("logit_bias", {}) if int(token) >= size]:
            told = f"token_id(s) {bad} in logit_bias contain out-of-vocab token ids. Vocabulary size: {size}"
            return 400, {"error": {"message": told, "type": "BadRequestError", "code": 400}}
        if len(body["prompt"]) + body["max_tokens"] > self.room:
            return 400, {"error": {"message": f"maximum context length is {self.room}", "code": 400}}
        assert body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0, body
        stops = frozenset(body["stop_token_ids"])
        request = Request(body["prompt"], body["n"], body["max_tokens"], body["seed"], stops)
        law = Sampling(body["temperature"], 0 if self.is_raw else body["top_k"], body["top_p"], body["min_p"])
        with self.lock, torch.inference_mode():
            made = self.generator.generate([request], law)[0]
        choices = [
            {
                "index": index,
                "text": "",
                "token_ids": one.tokens.tolist(),
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": one.logp.astype(float).tolist(), "tokens": ["?"] * len(one.tokens)},
                "finish_reason": "stop" if one.stopped else "length",
                "stop_reason": int(one.tokens[-1]) if one.stopped else None,
            }
            for index, one in enumerate(made)
        ]
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def log_message(self, *arguments):
        pass

    def answer(self, status, value=None, body=None):
        body = (b"" if value is None else json.dumps(value).encode()) if body is None else body
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server = self.server
        if self.path == "/health":
            self.answer(200)
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "policy", "root": server.root, "max_model_len": server.room}]})
        else:
            self.answer(405 if self.path == "/collective_rpc" and server.has_dev_mode else 404, {"detail": "no"})

    def do_POST(self):
        server = self.server
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else None
        server.paths.append(self.path)
        if self.path == "/collective_rpc":
            assert body["method"] == "reload_weights", body
            if server.fault == "reload":
                self.answer(500, {"detail": "shape [13, 32] does not fit"})
                return
            server.load(body["kwargs"]["weights_path"])
            self.answer(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.answer(200)
        else:
            self.complete(body)

    def complete(self, body):
        server = self.server
        with server.lock:
            server.bodies.append(body)
            self.samples = body["n"]
            server.under_way += self.samples
            server.most_under_way = max(server.most_under_way, server.under_way)
            server.answered += 1
            fault = server.fault if server.answered > server.after else None
        try:
            getattr(self, f"_{fault}", self._well)(body)
        finally:
            self.leave()

    def leave(self):
        """Be under way no more; before the answer, as who has it may send the next request at once."""
        with self.server.lock:
            self.server.under_way -= self.samples
            self.samples = 0

    def _well(self, body, change=lambda choices: choices):
        status, answer = self.server.complete(body)
        if status == 200:
            answer["choices"] = change(answer["choices"])
        self.leave()
        self.answer(status, answer)

    def _hangs(self, body):
        self.server.is_ending.wait(60)

    def _trickles(self, body):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not self.server.is_ending.wait(0.05):
            self.wfile.write(b" ")

    def _dies(self, body):
        """As where the process is killed: half an answer, and nobody there any more."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.server.is_dead = True

    def _fails(self, body):
        self.answer(500, {"error": {"message": "EngineCore encountered an issue", "code": 500}})

    def _garbles(self, body):
        self.answer(200, body=b'{"choices": [{"index": 0, "tok')

    def _gives_no_list(self, body):
        self.answer(200, ["choices"])

    def _leaves_out_logprobs(self, body):
        self._well(body, lambda choices: [choice | {"logprobs": None} for choice in choices])

    def _leaves_out_tokens(self, body):
        self._well(body, lambda choices: [choice | {"token_ids": None} for choice in choices])

    def _leaves_out_a_sample(self, body):
        self._well(body, lambda choices: choices[:-1])

    def _gives_one_sample_twice(self, body):
        self._well(body, lambda choices: [choices[0]] * len(choices))

    def _gives_one_logprob_less(self, body):
        def less(choice):
            return choice | {"logprobs": {"token_logprobs": choice["logprobs"]["token_logprobs"][:-1]}}

        self._well(body, lambda choices: [less(choice) for choice in choices])

    def _gives_no_number(self, body):
        def none(choice):
            return choice | {"logprobs": {"token_logprobs": [None] * len(choice["token_ids"])}}

        self._well(body, lambda choices: [none(choice) for choice in choices])

    def _gives_another_vocabulary(self, body):
        self._well(
            body, lambda choices: [choice | {"token_ids": [13] * len(choice["token_ids"])} for choice in choices]
        )

    def _computes_otherwise(self, body):
        """Every log-probability is 0.1 lower than the learner's."""

        def lower(choice):
            logps = [logp - 0.1 for logp in choice["logprobs"]["token_logprobs"]]
            return choice | {"logprobs": {"token_logprobs": logps}}

        self._well(body, lambda choices: [lower(choice) for choice in choices])

    def _stops_by_itself(self, body):
        def one(choice):
            return choice | {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}

        self._well(body, lambda choices: [one(choice) for choice in choices])

    def _reads_another_prompt(self, body):
        self._well(body, lambda choices: [choice | {"prompt_token_ids": [1, 1]} for choice in choices])


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory):
    """Write a model of the addition's 13 characters, sharp enough for its completions to differ; return its folder."""
    from rlx.envs.addition import tokenizer

    def make(**config):
        folder = tmp_path_factory.mktemp("served") / "model"
        model = load_language_model(config={"vocab_size": 13, **LLAMA, **config}, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 4 if parameter.ndim > 1 else 1
        export_language_model(model, tokenizer(), folder)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder()


@pytest.fixture
def serve():
    """Start fake servers: serve(folder) -> FakeVllm."""
    servers = []

    def start(folder):
        server = FakeVllm(folder)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.is_ending.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve, folder):
    return serve(folder)


def client(server, **options):
    return VllmGenerator(server.url, **{"vocabulary": 13, "context": 32, "longest": 8, "timeout_s": 20.0} | options)


def mine(folder, requests, sampling):
    return Generator(load_language_model(path=str(folder))).generate(requests, sampling)


# Completions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(1.3, top_k=5, top_p=0.9, min_p=0.02), Sampling(temperature=0)],
)
def test_completions_are_those_of_rlx_s_own_generator(sampling, server, folder):
    """Tokens, log-probabilities under the law that was sampled, and whether a stop token ended them, in order."""
    theirs, ours = client(server).generate(MANY, sampling), mine(folder, MANY, sampling)
    assert [len(samples) for samples in theirs] == [3] * 8
    stopped = 0
    for sent, samples, expected in zip(MANY, theirs, ours, strict=True):
        for one, other in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)
            assert (one.tokens.dtype, one.logp.dtype, one.version.dtype) == (np.int64, np.float32, np.int64)
            assert one.stopped == other.stopped == (one.tokens[-1] in sent.stop_ids)
            stopped += one.stopped
    assert sampling.temperature == 0 or 0 < stopped < 24


def test_what_is_asked_for_is_in_token_ids_and_leaves_no_default_to_the_server(server):
    generator = client(server)
    server.bodies.clear()
    generator.generate([Request([1, 2, 3], 2, 40, seed=2**63 + 5, stop_ids=frozenset({12, 0}))], Sampling(0.7))
    assert server.bodies == [
        {
            **{"model": "policy", "prompt": [1, 2, 3], "n": 2, "max_tokens": 29, "seed": 5, "temperature": 0.7},
            **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0},
            **{"frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": [0, 12], "logprobs": 0},
            **{"return_token_ids": True},
        }
    ]


def test_no_more_samples_are_asked_for_at_a_time_than_there_are_slots(server):
    generator = client(server, max_slots=7)
    server.most_under_way = 0
    generator.generate(MANY)
    assert server.most_under_way in (3, 6)


def test_a_prompt_that_is_too_long_or_of_other_tokens_is_refused_before_anything_is_asked(server):
    generator = client(server)
    asked = len(server.bodies)
    with pytest.raises(ConfigError, match=r"request 1: the prompt has 32 tokens, but .* have 32 at most"):
        generator.generate([Request([1]), Request([1] * 32)])
    with pytest.raises(ConfigError, match="token id 13, but the model's vocabulary has ids from 0 to 12"):
        generator.check([Request([13])])
    assert len(server.bodies) == asked


# Faults ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "hangs": r"has not answered in time, asked for request \d \(2 prompt tokens, n=3\); .*generate_timeout_s",
    "trickles": r"has not answered in time, asked for request \d",
    "dies": r"cannot be reached or ended the connection, asked for request \d .*go on with the run",
    "fails": r"answered status 500, asked for request \d .*EngineCore encountered an issue.*log",
    "garbles": r"answered what is no JSON, asked for request \d",
    "gives_no_list": r"answered request \d .* with no list of choices",
    "leaves_out_logprobs": r"answered sample 0 of request \d .* with no log-probabilities for \d tokens",
    "leaves_out_tokens": r"with no token_ids, which vLLM 0.10.2 was the first to give",
    "leaves_out_a_sample": r"answered request \d .* with 2 samples in place of 3",
    "gives_one_sample_twice": r"with 3 samples in place of 3|in place of 3",
    "gives_one_logprob_less": r"with \d log-probabilities for \d tokens",
    "gives_no_number": r"log-probabilities that are no finite numbers",
    "gives_another_vocabulary": r"token ids that are not from 0 to 12",
    "stops_by_itself": r"1 tokens that ends neither with its first stop token nor at the limit of 6 .*'stop'",
    "reads_another_prompt": r"a completion of another prompt",
}


@pytest.mark.parametrize("fault, message", FAULTS.items(), ids=FAULTS)
def test_a_server_that_fails_in_the_midst_of_a_batch_is_one_sentence_and_no_hang(fault, message, server):
    is_late = fault in ("hangs", "trickles")
    generator = client(server, timeout_s=0.6 if is_late else 60.0, max_slots=9)
    server.fault, server.after = fault, server.answered + 3
    began = time.perf_counter()
    with pytest.raises(RlxError, match=f"^the vLLM server at {server.url} .*{message}") as caught:
        generator.generate(MANY)
    assert time.perf_counter() - began < 30
    assert "\n" not in str(caught.value)
    server.fault, server.is_dead = None, False
    assert len(client(server).generate(MANY)) == 8


def test_what_is_under_way_is_given_up_when_one_request_fails(server, monkeypatch):
    """The others hang, with a deadline far away: who asked does not wait for it."""
    generator = client(server, timeout_s=60.0)
    first = server.answered

    def one_fails(handler, body):
        handler._fails(body) if server.answered == first + 8 else server.is_ending.wait(60)

    monkeypatch.setattr(Handler, "_mixed", one_fails, raising=False)
    server.fault = "mixed"
    began = time.perf_counter()
    with pytest.raises(RlxError, match="status 500"):
        generator.generate(MANY)
    assert time.perf_counter() - began < 30


# The start -------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"^token_runners.url: the vLLM server at {url} cannot be reached"):
        VllmGenerator(url, vocabulary=13, context=32, longest=8)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://there", "http://", "http://there:port", "http://a:1?b=2"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="is no address of a vLLM server; write it as http://localhost:8000"):
        VllmGenerator(url, vocabulary=13, context=32, longest=8)


def test_an_address_may_end_as_that_of_the_openai_interface(server):
    assert len(VllmGenerator(f"{server.url}/v1/", vocabulary=13, context=32, longest=8).generate(MANY)) == 8


def test_a_server_that_cannot_do_what_training_needs_is_refused(server):
    server.has_dev_mode = False
    with pytest.raises(ConfigError, match=r"takes no new weights; start it with: VLLM_SERVER_DEV_MODE=1 vllm serve"):
        client(server)
    server.has_dev_mode, server.is_raw = True, True
    with pytest.raises(ConfigError, match=r"log-probabilities of the raw logits.*--logprobs-mode processed_logprobs"):
        client(server)
    server.is_raw, server.room = False, 7
    with pytest.raises(
        ConfigError, match=r"takes 7 tokens .* and this run needs 8; start it with a larger --max-model"
    ):
        client(server)


@pytest.mark.parametrize("mine, theirs", [(12, "13"), (14, "13")])
def test_another_vocabulary_is_refused_by_number(mine, theirs, server):
    text = f"vocabulary of ({theirs}|more) tokens, and the model that is trained has {mine}"
    with pytest.raises(ConfigError, match=text):
        client(server, vocabulary=mine)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token_runners": {"url": None}}, "engine=vllm: token_runners.url is not set; give the address of a running"),
        ({"token_runners": {"num_token_runners": 2}}, "num_token_runners=2 would generate in place of the server"),
        ({"token_runners": {"on_new_weights": "keep_cache"}}, "on_new_weights=keep_cache .* set it to finish"),
        ({"training": {"max_age": 1}}, "training.max_age=1 .* set it to 0, or set engine to rlx"),
        ({"generation": {"exact": True}}, "generation.exact=true cannot be had from a server"),
        ({"token_runners": {"engine": "rlx"}}, "used by no engine but vllm; set token_runners.engine=vllm"),
        ({"token_runners": {"engine": "sglang"}}, "engine"),
    ],
)
def test_settings_that_a_server_cannot_do_are_refused_in_a_sentence(changes, message, tiny_text):
    with pytest.raises(ConfigError, match=message):
        made = tiny_text("grpo", token_runners={"engine": "vllm", "url": "http://localhost:1"})
        for section, values in changes.items():
            getattr(made, section)(**values)
        made.build()


def test_a_server_with_another_model_than_the_run_s_is_refused(serve, make_folder, tiny_text, folder):
    other = serve(make_folder(num_hidden_layers=2))
    with pytest.raises(
        ConfigError, match="with num_hidden_layers 2, and the model that is trained has 1; start it with"
    ):
        run(tiny_text, folder, other).build()


# Runs ------------------------------------------------------------------------------------------------------------


def run(tiny_text, folder, server=None, algorithm="grpo", **sections):
    made = tiny_text(algorithm, model={"path": str(folder), "config": {}, "tokenizer": None}, **sections)
    return made if server is None else made.token_runners(engine="vllm", url=server.url)


def computed(row):
    apart = ("time/", "env_steps_per_s", "sync_bytes")  # a server reads files, which have a head
    return {name: value for name, value in row.items() if not name.startswith(apart)}


@pytest.mark.parametrize("algorithm", ["grpo", "rlhf_ppo"])
@pytest.mark.parametrize("minibatch", [8, None])
def test_a_run_with_a_server_is_that_of_rlx_s_own_engine(algorithm, minibatch, server, folder, tiny_text, tmp_path):
    """Completions to the token, metrics and weights within rounding, over updates that change the weights."""
    settings = {"training": {"minibatch_sequences": minibatch, "epochs": 1, "lr": 3e-3}}
    sync = str(tmp_path / "weights")
    served = run(tiny_text, folder, server, algorithm, **settings).token_runners(weights_path=sync).build()
    with run(tiny_text, folder, algorithm=algorithm, **settings).build() as own, served as other:
        for iteration in range(4):
            expected, row = computed(own.train()), computed(other.train())
            a, b = own.rollout.completions, other.rollout.completions
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.stopped, b.stopped)
            np.testing.assert_array_equal(b.version, iteration)
            assert row["learner/mismatch_kl"] == pytest.approx(0, abs=1e-9)
            assert expected.keys() | {"learner/mismatch_kl"} == row.keys()
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            assert ("learner/mismatch_kl" in expected) == (minibatch is None)
        np.testing.assert_allclose(own.learners.weights(), other.learners.weights(), atol=2e-4)
        assert np.abs(own.learners.weights() - np.float32(0)).max() > 0
    seen = server.weights_seen  # at the start of the server, of the run, and after each of four updates
    assert len(seen) == 6
    assert torch.equal(seen[0], seen[1])
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(seen[1:]))
    assert server.paths.count("/reset_prefix_cache") == 5
    assert list(Path(sync).iterdir()) == []


@pytest.mark.parametrize("cap, weight", [(2.0, np.exp(0.1)), (1.05, 1.05), (None, 1.0)])
def test_a_server_that_computes_otherwise_is_measured_and_made_up_for(cap, weight, server, folder, tiny_text):
    """All tokens are exp(0.1) times as likely to the learner as to the server, and so much weighs their gradient."""
    settings = {"minibatch_sequences": None, "lr": 0.0, "importance_cap": cap}
    served = run(tiny_text, folder, server, training=settings).build()
    server.fault, server.after = "computes_otherwise", server.answered
    with run(tiny_text, folder, training=settings).build() as own, served as other:
        expected, row = own.train(), other.train()
    assert row["learner/mismatch_kl"] == pytest.approx(np.exp(0.1) - 1 - 0.1, rel=1e-3)
    assert row["learner/grad_norm"] == pytest.approx(weight * expected["learner/grad_norm"], rel=1e-4)
    assert row["learner/clip_fraction"] == 0


def test_learners_in_processes_send_their_weights_to_the_server_as_well(server, folder, tiny_text):
    with run(tiny_text, folder, server, learners={"num_learners": 1}).build() as algorithm:
        row = algorithm.train()
        assert 0 < row["time/sync_s"] < row["time/iteration_s"]
        sent = server.weights_seen[-1].numpy()
        np.testing.assert_array_equal(sent.ravel(), algorithm.learners.weights()[: sent.size])


def test_supervised_training_is_evaluated_with_a_server(server, folder, tiny_text):
    watched = {"source": "rlx.envs.addition:rows", "kwargs": {"split": "eval"}, "num_rows": 4}
    made = run(tiny_text, folder, server, "sft", evaluation=watched, reward={"function": "rlx.envs.addition:reward"})
    with made.build() as algorithm:
        algorithm.train()
        assert algorithm.evaluate()["evaluation/episodes"] == 4
    assert len(server.weights_seen) == 2


def test_weights_that_the_server_does_not_take_end_the_run_in_a_sentence(server, folder, tiny_text, tmp_path):
    with run(tiny_text, folder, server).token_runners(weights_path=str(tmp_path)).build() as algorithm:
        server.fault = "reload"
        with pytest.raises(RlxError, match=r"answered status 500, asked for the weights in .*does not fit"):
            algorithm.train()
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_server_died_goes_on_with_another_as_if_it_had_not(serve, folder, tiny_text, tmp_path):
    first, second = serve(folder), serve(folder)
    whole = run(tiny_text, folder, first).build()
    with whole:
        rows = [computed(whole.train()) for _ in range(3)]
    with run(tiny_text, folder, second).build() as broken:
        assert computed(broken.train()) == rows[0]
        second.fault, second.after = "dies", second.answered + 2
        with pytest.raises(RlxError, match="cannot be reached or ended the connection"):
            broken.train()
        second.fault, second.is_dead = None, False
        second.load(folder)  # started again, with the weights of the beginning
        assert [computed(broken.train()) for _ in range(2)] == rows[1:]


def test_memory_and_placement_have_no_generator_of_the_run_s_own(folder, server, tiny_text):
    made = run(tiny_text, folder, server)
    assert f"generates, at {server.url}" in made.network()
    with made.build() as algorithm:
        assert "keys and values" not in str(algorithm._plan)


# What lies between -----------------------------------------------------------------------------------------------


class Training:
    max_age, importance_cap = 0, 2.0


def batch(**columns):
    rows = {"logp": [[-1.0, -2.0, -9.0]], "old_logp": [[-1.5, -1.0, -3.0]], "weights_version": [[4, 4, 4]]}
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    return Batch(mask=torch.tensor([[True, True, False]]), **tensors | columns)


def test_what_a_server_drew_is_weighted_by_a_truncated_ratio_of_the_policy_to_the_server():
    old, weight = old_policy(torch.zeros(1, 3), batch(), Training)
    torch.testing.assert_close(old, batch().old_logp)
    torch.testing.assert_close(weight, torch.tensor([[np.exp(-0.5), 2.0, 2.0]], dtype=torch.float32))


def test_the_mismatch_is_the_mean_of_k3_over_tokens_drawn_with_these_weights():
    first, second = np.exp(-0.5) - 1 + 0.5, np.exp(1) - 1 - 1
    assert mismatch_kl(batch(), 4) == pytest.approx((first + second) / 2)
    assert mismatch_kl(batch(weights_version=torch.tensor([[3, 4, 4]])), 4) == pytest.approx(second)
    assert mismatch_kl(batch(), 5) is None


def test_the_mismatch_of_a_step_on_sums_is_the_mean_over_tokens_as_the_loss_weighs_them(folder, tiny_text):
    """Weights that are moved after the draw stand for an engine that computes otherwise."""
    made = run(tiny_text, folder, training={"minibatch_sequences": None, "lr": 0.0, "aggregation": "sequence_sum"})
    with made.build() as algorithm:
        draw = algorithm.sample

        def sample_and_move():
            rows = draw()
            with torch.no_grad():
                for parameter in algorithm.learners.local_policy.model.parameters():
                    parameter *= 1.02
            again = algorithm.with_columns(Batch(**rows.tensors), "logp")
            ratio = (again.logp - rows.logp)[rows.mask].double()
            algorithm.expected = (ratio.exp() - 1 - ratio).mean().item()
            return rows

        algorithm.sample = sample_and_move
        row = algorithm.train()
        assert row["learner/mismatch_kl"] == pytest.approx(algorithm.expected, rel=1e-3)
        assert row["learner/mismatch_kl"] > 1e-5
