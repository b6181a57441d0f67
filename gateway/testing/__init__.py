"""A whole Sessile inside a test: gateway, replicas and a private store, with a model that says
what it is told. ``pip install sessile-server`` brings the pytest fixtures (see ``plugin``); without
pytest:

    with LocalServer() as server:
        server.will_say("Let me see.", tool_call("weather", city="Rome"))
        server.will_say("It is warm.")
        with server.sync_client() as client:
            ...
"""

from gateway.testing.server import LocalServer, ToolCallText, tool_call

__all__ = ["LocalServer", "ToolCallText", "tool_call"]
