"""A turn inside the trace of an application.

    pip install 'sessile[otel]' opentelemetry-sdk
    python traced.py [gateway's host:port]

The client continues the span that is current, and hands the trace to the gateway and the replicas:
with an exporter to the same collector, their spans are below these. Here the spans are printed.
"""

import asyncio
import os
import sys

import sessile
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from sessile import Sessile

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")

# An application that traces has this already: the client takes what is set globally.
provider = TracerProvider(resource=Resource.create({"service.name": "my-agent"}))
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
trace.set_tracer_provider(provider)
tracer = trace.get_tracer("my-agent")


@sessile.tool
async def search(query: str) -> list[str]:
    """Searches."""
    # Spans of a tool's own are below the span of its call.
    with tracer.start_as_current_span("look into the index"):
        return [f"something about {query}"]


async def main(gateway: str) -> None:
    async with Sessile(gateway) as client:
        with tracer.start_as_current_span("handle a request"):
            session = await client.open(tools=[search])
            await session.run_tools("What is sessile?", max_tokens=256).result()
            await session.close()
    provider.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else GATEWAY))
