"""What the gateway's own parts promise, without a model: one question for all who wait, and the engine's counter."""

from __future__ import annotations

import asyncio
import json

from prometheus_client import CollectorRegistry, generate_latest

from thrifty.engines.meter import Meter
from thrifty.serve.app import Metered
from thrifty.serve.keys import Limits
from thrifty.serve.upstream import Upstream


async def test_requests_that_come_together_ask_the_upstream_for_its_models_once():
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while await reader.readuntil(b"\r\n\r\n"):
            asked += 1
            await asyncio.sleep(0.2)
            body = json.dumps({"data": [{"id": "one"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream(f"http://127.0.0.1:{port}/v1", Limits(), None, None, 16)
        names = [asyncio.ensure_future(upstream.names()) for _ in range(8)]
        await asyncio.sleep(0.05)
        names[0].cancel()  # a client that goes leaves the others their answer
        assert [await one for one in names[1:]] == [["one"]] * 7
        assert asked == 1
        await upstream.close()


def test_metrics_tell_what_the_model_here_did_cancelled_rows_too():
    meter, registry = Meter(), CollectorRegistry()
    registry.register(Metered(meter))
    meter.count("main", thought=5, answer=2)
    meter.count("verifier", thought=3, discarded=3)
    page = generate_latest(registry).decode()
    assert 'thrifty_engine_tokens_total{kind="thought"} 8.0' in page
    assert 'thrifty_engine_tokens_total{kind="discarded"} 3.0' in page
