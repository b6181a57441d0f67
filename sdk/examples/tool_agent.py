"""An agent that uses tools.

    python tool_agent.py [gateway's host:port]

The model is asked a question and shown two Python functions. Whenever it asks for one of them, the
client calls it and sends the result; the loop ends when the model answers.
"""

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Literal

import sessile
from sessile import Finished, Sessile, Tokens, ToolEnded, ToolStarted

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")
DEGREES = {"Rome": 31.0, "Oslo": 12.0}


@dataclass
class Weather:
    degrees: float
    unit: str


# The schema that the model sees is made of the signature and the docstring. Errors go to the model,
# which may try again: here the KeyError of a city that nobody knows.
@sessile.tool
async def weather(city: str, unit: Literal["C", "F"] = "C") -> Weather:
    """The weather of a city, now.

    Args:
        city: name in English
        unit: of the temperature
    """
    degrees = DEGREES[city]
    return Weather(degrees if unit == "C" else degrees * 9 / 5 + 32, unit)


# A function that is not async runs in a thread, so it may block.
@sessile.tool
def difference(a: float, b: float) -> float:
    """a minus b."""
    return a - b


async def main(gateway: str) -> None:
    async with Sessile(gateway) as client:
        # The session is told of the tools when it is opened; they are part of its prefix.
        session = await client.open(system="Use the tools.", tools=[weather, difference])
        question = "How much warmer is Rome than Oslo?"
        async with session.run_tools(question, max_tokens=512) as run:
            async for event in run:
                match event:
                    case Tokens(text=text) | Finished(text=text):
                        print(text, end="", flush=True)
                    case ToolStarted(call=call):
                        print(f"\n[{call.name} {call.arguments_json}]", flush=True)
                    case ToolEnded(output=output):
                        print(f"[-> {output}]", flush=True)
        print()
        await session.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else GATEWAY))
