"""`ebt-serve`: OpenAI's completions with thinking; many at once lose nothing, and what is wrong leaves it healthy."""

import json

import pytest

import ebt_megatron as ebt
from ebt_megatron.parallel import setup
from tests import shared_models

testclient = pytest.importorskip("fastapi.testclient")
PROMPT = "Document 3 says"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = shared_models.text_runs(tmp_path_factory.mktemp("runs"), ["ebt"])["ebt"]
    yield ebt.load(run)
    setup.shutdown()


@pytest.fixture(scope="module")
def client(model):
    from ebt_megatron.serve.server import Limits, server

    with testclient.TestClient(server(model, "tiny", Limits(rows=4, length=64, waiting=300, body=20_000))) as client:
        yield client


def ask(client, **body):
    return client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5, "temperature": 0} | body)


def test_a_completion_is_what_the_api_gives(client, model):
    answer = ask(client, logprobs=2, steps=4).json()
    wanted = model.generate(PROMPT, max_tokens=5, temperature=0, steps=4)
    (choice,) = answer["choices"]
    assert choice["text"] == wanted.text and choice["finish_reason"] in ("length", "stop")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.log_p, abs=1e-5)
    assert choice["thinking"]["energies"] == pytest.approx(wanted.energies, rel=1e-4, abs=1e-5)
    assert choice["thinking"]["steps"] == wanted.steps
    assert answer["usage"]["completion_tokens"] == len(wanted.tokens) and answer["model"] == "tiny"
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_streaming_several_choices_with_a_seed(client, model):
    body = {"prompt": PROMPT, "max_tokens": 5, "n": 3, "seed": 7, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        events = [line[6:] for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    texts, counts = ["", "", ""], [0, 0, 0]
    for event in map(json.loads, events[:-1]):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        counts[choice["index"]] += len(choice["thinking"]["steps"])
    whole = ask(client, n=3, seed=7, temperature=1).json()["choices"]
    assert texts == [c["text"] for c in whole] and len(set(texts)) > 1
    assert counts == [len(c["thinking"]["steps"]) for c in whole]
    assert texts[0] == model.generate(PROMPT, max_tokens=5, seed=7).text


@pytest.mark.parametrize(("noise", "passes"), [(None, 5), (0.3, 20)])
def test_texts_of_several_users_share_passes_unless_each_has_a_noise_of_its_own(noise, passes, model, monkeypatch):
    from ebt_megatron.inference.options import ThinkingOptions
    from ebt_megatron.inference.pool import Growing, Pool
    from ebt_megatron.inference.predictor import EnergyPredictor
    from ebt_megatron.inference.sampling import Sampling
    from ebt_megatron.serve.server import Limits, read_request

    def grown(seeds):
        made = [Growing(model.encode(PROMPT), 5, (), Sampling(seed=s), thinking=thinking) for s in seeds]
        pool = Pool(model.predictor, model.texts, rows=4, length=64)
        for text in made:
            pool.add(text)
        while pool.busy:
            pool.step()
        return [text.draft.tokens for text in made]

    real, calls = EnergyPredictor.__call__, []
    monkeypatch.setattr(EnergyPredictor, "__call__", lambda *a: calls.append(1) or real(*a))
    thinking = ThinkingOptions(steps=2, langevin_noise=noise)
    together = grown(range(4))
    assert len(calls) == passes
    assert together == [grown([seed])[0] for seed in range(4)]
    unseeded = [t for _ in range(2) for t in read_request({"prompt": PROMPT, "n": 2}, model, Limits()).texts]
    assert len({t.sampling.seed for t in unseeded}) == 1 and len({t.number for t in unseeded}) == 4


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ({"prompt": None}, 400, "prompt: must be a text"),
        ({"prompt": [1, 2]}, 400, "prompt: must be a text"),
        ({"max_tokens": 0}, 400, "max_tokens=0: must be a whole number from 1 to 64"),
        ({"max_tokens": 63}, 400, "are more than 64"),
        ({"temperature": "hot"}, 400, "temperature='hot': must be a number"),
        ({"n": 5}, 400, "n=5: must be a whole number from 1 to 4"),
        ({"candidates": 3}, 400, "candidates=3: without noise every start"),
        ({"flops": 1e9}, 400, "flops is a budget of a batch"),
        ({"thoughts": 3}, 400, "thoughts: no such field"),
        ({"echo": True}, 400, "echo=True: is not supported"),
        ({"stop": [""]}, 400, "stop: must be a text"),
        ({"steps": 257}, 400, "steps=257: must be a whole number from 0 to 256"),
        ({"stop": 5}, 400, "stop: must be a text"),
        ({"prompt": ["a"] * 100, "n": 4}, 400, "100 prompts and n=4 are more than 300 texts"),
        ({"prompt": "word " * 10_000}, 413, "at most 20000 bytes"),
    ],
)
def test_what_does_not_do_is_one_line_and_leaves_it_healthy(body, status, line, client):
    answer = ask(client, **body)
    assert answer.status_code == status and line in answer.json()["error"]["message"]
    assert client.get("/health").json()["status"] == "ok"


def test_malformed_bodies(client):
    for content in (b"", b"{", b"[1]", b"\xff", b"[" * 15_000):
        answer = client.post("/v1/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert ask(client).status_code == 200


def test_no_value_of_any_field_is_an_error_of_the_server(client):
    from ebt_megatron.serve import server

    fields = {*server._NEUTRAL, *server._THINKING, "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stop"}
    for field in sorted(fields | {"seed", "stream", "logprobs", "energies"}):
        for value in (True, -1, 0, 1.5, 1e300, 1e29, "x", "", [], [[]], {}, ["\ud800"]):
            answer = client.post(
                "/v1/completions", content=json.dumps({"prompt": "a", "max_tokens": 1} | {field: value})
            )
            assert answer.status_code in (200, 400), (field, value, answer.text)
    assert ask(client).status_code == 200


def test_an_error_of_a_pass_is_told_and_the_next_request_served(client, model, monkeypatch):
    from ebt_megatron.inference.pool import Pool

    def broken(self):
        raise MemoryError("no memory")

    monkeypatch.setattr(Pool, "step", broken)
    monkeypatch.setattr(Pool, "busy", property(lambda self: any(t and not t.cancelled for t in self.rows)))
    answer = ask(client)
    assert answer.status_code == 500 and "no memory" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert ask(client).status_code == 200


def test_thinking_is_shown_step_by_step(client):
    thoughts = client.post("/v1/think", json={"prompt": PROMPT, "steps": 3, "top": 2}).json()["thoughts"]
    assert [t["step"] for t in thoughts] == [0, 1, 2, 3] and all(len(t["top"]) == 2 for t in thoughts)


def test_the_page_is_there(client):
    page = client.get("/").text
    assert 'id="steps"' in page and "/v1/completions" in page and "http://" not in page
