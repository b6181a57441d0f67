"""The client in code without an event loop: the same names, no ``await``.

python without_async.py [gateway's host:port]
"""

import os
import sys

import sessile
from sessile.sync import Sessile

GATEWAY = os.environ.get("SESSILE_GATEWAY", "127.0.0.1:8470")


@sessile.tool
def letters(word: str) -> int:
    """How many letters a word has."""
    return len(word)


def main(gateway: str) -> None:
    with Sessile(gateway) as client:
        session = client.open(system="Be brief.", tools=[letters])
        # The text as it comes (the turn itself gives all its events) …
        for text in session.run("Name a sea animal that cannot move.", max_tokens=48).text_stream():
            print(text, end="", flush=True)
        print()
        # … or the whole at once, here with tools.
        result = session.run_tools("How many letters is that?", max_tokens=256).result()
        print(result.text)
        for turn in session.transcript():
            print(f"turn {turn.turn_index}: {turn.usage.output_tokens} tokens")
        session.close()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else GATEWAY)
