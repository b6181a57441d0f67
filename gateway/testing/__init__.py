"""A whole Sessile inside a test: gateway, replicas and a private store, with a model that says
what it is told. ``sessile-server`` brings pytest fixtures (see ``plugin``); without pytest:

    with LocalServer() as server:
        server.will_say("Let me see.", tool_call("weather", city="Rome"))
        server.will_say("It is warm.")
        with server.sync_client() as client:
            ...
"""

from typing import TYPE_CHECKING

__all__ = ["LocalServer", "ToolCallText", "tool_call"]

if TYPE_CHECKING:
    from gateway.testing.server import LocalServer, ToolCallText, tool_call
else:

    def __getattr__(name: str) -> object:
        """Loads the server at its first use: pytest loads the plugin beside it at every start."""
        if name not in __all__:
            raise AttributeError(f"module 'gateway.testing' has no attribute {name!r}")
        from gateway.testing import server

        return getattr(server, name)
