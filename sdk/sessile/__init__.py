"""Client of Sessile: durable agent sessions with an exactly-once token stream.

    import asyncio
    from sessile import Sessile

    async def main() -> None:
        async with Sessile("localhost:8470") as client:
            session = await client.open(system="You are brief.")
            async for text in session.run("What is 6 * 7?", max_tokens=32).text_stream():
                print(text, end="", flush=True)

    asyncio.run(main())

``sessile.sync`` has the same for code without an event loop, ``sessile.v1`` the generated stubs.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sessile._exports import *  # noqa: F403
    from sessile._exports import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """Loads the client at its first use: servers need the stubs in ``sessile.v1`` only."""
        # A module of this package is imported by whoever names it, and may be the first of all.
        is_module = find_spec(f"{__name__}.{name}") is not None
        if is_module or (name.startswith("_") and name != "__all__"):
            raise AttributeError(f"module 'sessile' has no attribute {name!r}")
        from sessile import _exports

        # From here on they are found without this function, also by tools that read the module.
        globals().update({each: getattr(_exports, each) for each in _exports.__all__})
        globals()["__all__"] = _exports.__all__
        return getattr(_exports, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
