"""HTTP in front of a real gateway: a client's requests, its errors, and its leaving."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from services.http.app import http_app
from services.http.gateways import Gateways
from services.tokens import TokenFile
from tests.services import tiny_model
from tests.services.gateway.deployed import Deployment, deployed

PROMPT = list(tiny_model.prompt(12))
NOBODY = "127.0.0.1:1"


@asynccontextmanager
async def over_http(*addresses: str) -> AsyncIterator[aiohttp.ClientSession]:
    async def known() -> tuple[str, ...]:
        return addresses

    app = http_app(Gateways(known), "tiny")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    server.should_exit = True
    await serving


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as running:
        yield running


@pytest.fixture
async def http(deployment: Deployment) -> AsyncIterator[aiohttp.ClientSession]:
    async with over_http(deployment.gateway.address) as session:
        yield session


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "temperature": 0, "return_token_ids": True, "max_tokens": 8, **fields}


async def events(response: aiohttp.ClientResponse) -> list[str]:
    lines = (await response.text()).split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line]


async def test_an_answer_is_that_of_one_process(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/completions", json=body()) as response:
        answer = await response.json()
    assert response.status == 200
    assert answer["choices"][0]["token_ids"] == tiny_model.model().generate(PROMPT, 8)
    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 8, "total_tokens": 20}
    async with http.get("/v1/models") as response:
        assert [each["id"] for each in (await response.json())["data"]] == ["tiny"]
    async with http.get("/healthz") as response:
        assert response.status == 200


async def test_a_stream_says_the_same_and_that_it_is_done(http: aiohttp.ClientSession) -> None:
    asked = body(stream=True, stream_options={"include_usage": True})
    async with http.post("/v1/completions", json=asked) as response:
        assert response.content_type == "text/event-stream"
        *chunks, done = await events(response)
    assert done == "[DONE]"
    *told, usage = [json.loads(chunk) for chunk in chunks]
    tokens = [token for chunk in told for token in chunk["choices"][0]["token_ids"]]
    assert tokens == tiny_model.model().generate(PROMPT, 8)
    assert told[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 20)


@pytest.mark.parametrize(
    ("asked", "status", "kind", "words"),
    [
        ("no json", 400, "invalid_request_error", "the body is not JSON"),
        (body(n=3), 400, "invalid_request_error", "n is not supported"),
        (body(prompt=[10**6]), 400, "invalid_request_error", "1000000"),
        (body(max_tokens=10**6, stream=True), 400, "invalid_request_error", "1000000"),
        (body(model="other"), 404, "not_found_error", "the model 'other' is not served here"),
    ],
)
async def test_an_error_has_its_status_and_openais_form(
    http: aiohttp.ClientSession, asked: Any, status: int, kind: str, words: str
) -> None:
    sent = {"data": asked} if isinstance(asked, str) else {"json": asked}
    async with http.post("/v1/completions", **sent) as response:
        error = (await response.json())["error"]
    assert (response.status, error["type"]) == (status, kind)
    assert words in error["message"]


async def test_what_is_not_served_is_said_in_the_same_form(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/completions") as response:
        assert response.status == 405
        assert (
            "GET /v1/completions is not served here" in (await response.json())["error"]["message"]
        )
    async with http.get("/v2") as response:
        assert response.status == 404


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_request(
    deployment: Deployment, http: aiohttp.ClientSession, stream: bool
) -> None:
    asked = body(max_tokens=100, ignore_eos=True, stream=stream)
    leaving = asyncio.create_task(http.post("/v1/completions", json=asked).__aenter__())
    async with asyncio.timeout(30):
        while not deployment.num_sequences:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    if stream:
        (await leaving).close()
    else:
        leaving.cancel()
    await deployment.freed()


async def test_a_gateway_that_is_away_is_passed_over(deployment: Deployment) -> None:
    async with over_http(NOBODY, deployment.gateway.address) as http:
        for _ in range(4):
            async with http.post("/v1/completions", json=body()) as response:
                assert response.status == 200
            async with http.get("/healthz") as response:
                assert response.status == 200


async def test_without_a_gateway_a_client_is_to_come_again() -> None:
    async with over_http(NOBODY) as http:
        async with http.post("/v1/completions", json=body()) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        async with http.get("/healthz") as response:
            assert response.status == 503


async def test_a_token_is_passed_on_and_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("a-token-of-some-length-0123456789\n")
    async with (
        deployed(tmp_path, tokens=TokenFile(file)) as deployment,
        over_http(deployment.gateway.address) as http,
    ):
        async with http.post("/v1/completions", json=body()) as response:
            assert response.status == 401
            assert (await response.json())["error"]["type"] == "authentication_error"
        shown = {"Authorization": f"Bearer {file.read_text().strip()}"}
        async with http.post("/v1/completions", json=body(), headers=shown) as response:
            assert response.status == 200
