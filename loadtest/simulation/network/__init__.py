"""The network between simulated processes: calls, streams and the KV data channel, with faults.

A handler runs in a task of the server's process, so a stopped server is silent and a killed one
resets its connections. Messages are serialised on the way, errors go through the production
mapping to gRPC status and back, and streams have a window, as on the wire.

Connections can be reset while both ends live, or be half open: then one side hears nothing more and
neither knows, until its keep-alive does. Cuts may be of one direction only. A call may be delivered
twice, the second time late: where a caller repeats what it got no answer to, that happens.
"""

from loadtest.simulation.network.call import Call, Handler, Listener
from loadtest.simulation.network.clients import SimReplicaClient, SimReplicaClients
from loadtest.simulation.network.data import KvPort
from loadtest.simulation.network.network import STORE, Network

__all__ = [
    "STORE",
    "Call",
    "Handler",
    "KvPort",
    "Listener",
    "Network",
    "SimReplicaClient",
    "SimReplicaClients",
]
