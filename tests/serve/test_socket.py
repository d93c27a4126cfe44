"""`ebt-serve` as it is started: over a socket, against the other ways to use the folder, in a browser, to its end."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import ebt_megatron as ebt
from benchmarks import serving
from ebt_megatron.parallel import setup
from tests import shared_models

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
PROMPT = "Document 3 says"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model, moved away from its run."""
    root = tmp_path_factory.mktemp("models")
    runs = shared_models.text_runs(root, ["ebt"])
    exported = shared_models.exported(runs, root / "exported")["ebt"]
    yield exported.rename(root / "moved")
    setup.shutdown()


@contextlib.contextmanager
def started(folder, *options):
    """A server in a process of its own; yields its address and the process."""
    command = [sys.executable, "-m", "ebt_megatron.serve.command", folder, "--port", "0", *options]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stderr.readline()
            found = re.search(r"http://\S+?:\d+", line)
            assert found, f"{line!r} is said before it serves"
            yield found[0], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(folder):
    with started(folder, "--rows", "4", "--length", "2000") as (url, _):
        yield url


def body(**more):
    return {"prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more


def ask(address, **more):
    return httpx.post(f"{address}/v1/completions", json=body(**more), timeout=60)


def load_of(address):
    return httpx.get(f"{address}/health").json()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_the_same_continuation_by_api_transformers_and_server(address, folder):
    transformers = pytest.importorskip("transformers")
    import ebt_megatron.hf  # noqa: F401, registers the architecture

    wanted = ebt.load(folder).generate(PROMPT, max_tokens=8, temperature=0).text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given.input_ids.shape[1] :]
    assert tokenizer.decode(made) == wanted
    assert ask(address).json()["choices"][0]["text"] == wanted
    if curl := shutil.which("curl"):
        command = [curl, "-s", f"{address}/v1/completions", "-d", json.dumps(body())]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["text"] == wanted


def test_openais_client(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
    (model,) = client.models.list()
    answer = client.completions.create(model=model.id, **body(), logprobs=1, extra_body={"steps": 3})
    assert answer.choices[0].text == ask(address, steps=3).json()["choices"][0]["text"]
    assert answer.choices[0].thinking["steps"] == [3] * len(answer.choices[0].logprobs.tokens)
    pieces = client.completions.create(model=model.id, **body(), stream=True, extra_body={"steps": 3})
    assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text
    with pytest.raises(openai.BadRequestError, match="max_tokens=0"):
        client.completions.create(model=model.id, **body(max_tokens=0))


def test_clients_that_go_away_leave_nothing_behind(address):
    long = body(max_tokens=1900, temperature=1, seed=1)
    for stream in (True, False):
        with (
            contextlib.suppress(httpx.TimeoutException),
            httpx.Client(timeout=1) as client,
            client.stream("POST", f"{address}/v1/completions", json=long | {"stream": stream}) as answer,
        ):
            next(answer.iter_lines())
        wait_for(lambda: load_of(address)["growing"] == 0)
    assert ask(address).status_code == 200


def test_what_is_too_large_or_no_http_is_refused_and_the_next_one_served(address):
    answer = httpx.post(f"{address}/v1/completions", content=b'{"prompt": "' + b"a" * (3 << 20) + b'"}', timeout=60)
    assert answer.status_code == 413 and "at most 1048576 bytes" in answer.json()["error"]["message"]
    host, port = re.search(r"//(.+):(\d+)", address).groups()
    for junk in (
        b"\x16\x03\x01 no http\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port)), 10) as stranger:
            stranger.sendall(junk)
    assert ask(address).status_code == 200 and load_of(address)["growing"] == 0


def test_many_at_once_lose_nothing(address):
    async def several():
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            asked = [body(prompt=f"Document {i}", max_tokens=1 + i % 3) for i in range(48)]
            return await asyncio.gather(*(client.post(f"{address}/v1/completions", json=one) for one in asked))

    before = load_of(address)["served"]
    answers = asyncio.run(several())
    assert {a.status_code for a in answers} == {200}
    assert [len(a.json()["choices"][0]["thinking"]["steps"]) for a in answers] == [1 + i % 3 for i in range(48)]
    assert load_of(address) == {"status": "ok", "growing": 0, "waiting": 0, "served": before + 48}


@pytest.mark.slow
def test_two_hundred_at_sixteen_at_a_time_lose_nothing_and_are_faster_than_one_at_a_time(folder):
    found = serving.measure(folder, 200, 8, [1, 16])
    assert [found[n]["lost"] for n in ("1", "16")] == [0, 0]
    assert found["16"]["tokens a second"] > 2 * found["1"]["tokens a second"]


def test_the_page_by_keyboard_on_a_narrow_screen(address):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, said = browser.new_page(viewport={"width": 400, "height": 800}), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        key = page.keyboard.press

        def focused():
            return page.evaluate("document.activeElement.id || document.activeElement.className")

        def until(condition):
            page.wait_for_function(condition, timeout=30_000)

        until("document.title.includes('watch it think')")
        order = [key("Tab") or focused() for _ in range(5)]
        assert order == ["prompt", "steps", "tokens", "temperature", "main"]
        page.fill("#prompt", PROMPT)
        page.fill("#tokens", "6")
        key("Control+Enter")
        until("document.querySelector('#stop').disabled && document.querySelectorAll('.token').length")
        wanted = ask(address, max_tokens=6).json()["choices"][0]
        assert page.text_content("#out") == PROMPT + wanted["text"]
        colours = page.evaluate("[...document.querySelectorAll('.token')].map(t => t.style.background)")
        energies = wanted["thinking"]["energies"]
        assert len(set(colours)) == len(set(energies)) > 1, "a colour for each energy"
        assert all(page.evaluate("[...document.querySelectorAll('.token')].map(t => t.style.borderBottomWidth)"))

        page.focus(".token")
        key("ArrowRight")
        key("Enter")
        until("document.querySelectorAll('#thoughts h2').length === 2")
        assert page.text_content("#thoughts h2:last-of-type >> nth=1") == "After 2 steps"
        page.focus("#steps")
        key("ArrowRight")
        until("document.querySelector('#thoughts').textContent.includes('After 3 steps')")
        assert page.evaluate("document.querySelectorAll('#thoughts tr').length") == 1 + 4
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.fill("#tokens", "5000")
        page.evaluate("document.querySelector('#tokens').max = 5000")
        key("Control+Enter")
        until("document.querySelector('#out .error')")
        assert "max_tokens=5000: must be a whole number from 1 to 2000" in page.text_content("#out .error")
        browser.close()
    assert said == [] or all("400 (Bad Request)" in line for line in said), said


def test_ctrl_c_ends_it_while_a_request_is_under_way(folder):
    with started(folder, "--length", "2000") as (url, process):
        port = re.search(r":(\d+)$", url)[1]
        taken = subprocess.run(
            [sys.executable, "-m", "ebt_megatron.serve.command", str(folder), "--port", port],
            capture_output=True,
            text=True,
            check=False,
        )
        assert taken.returncode == 2 and f"--port {port} cannot be listened at" in taken.stderr
        assert len(taken.stderr.strip().splitlines()) == 1, taken.stderr
        long = body(max_tokens=1900, stream=True)
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            *_, error, end = filter(None, lines)
        assert "the server is being stopped" in error and end == "data: [DONE]"
        assert process.wait(30) == 0
        said = process.stderr.read()
        assert said.strip() == "stopped: no request is under way", said
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
