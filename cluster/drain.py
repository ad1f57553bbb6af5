"""Tell Ray that this machine is about to go, and wait while it leaves: the preStop hook of every worker's container.

    python cluster/drain.py --seconds 90

A pod that is taken away (a spot machine, a drain of its node, a deletion) has its terminationGracePeriodSeconds left.
Ray is told at once that the node goes, and when: training saves a checkpoint, Serve moves its replicas and sends no
more requests here, and nothing new is placed on it. The hook ends when the node is idle or gone, or the seconds are
over; then Kubernetes ends the container.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import NodeInfo

LOOK_SECONDS = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Drain this machine's node; the exit code."""
    parser = argparse.ArgumentParser(description="Tell Ray that this machine is about to go, and wait while it leaves.")
    parser.add_argument("--seconds", type=int, required=True, help="until the machine is gone")
    parser.add_argument("--address", help="of the cluster's GCS; this machine's own cluster when left out")
    request = parser.parse_args(arguments)
    deadline = time.monotonic() + request.seconds

    from ray._private.services import canonicalize_bootstrap_address_or_die

    address = canonicalize_bootstrap_address_or_die(request.address)
    if not (nodes := [node.node_id for node in nodes_here(address) if node.node_id]):
        say("no live worker node on this machine; nothing to drain")
        return 0
    for node in nodes:
        drain(address, node, request.seconds)
    while time.monotonic() < deadline:
        if not any(node.node_id in nodes and is_busy(node) for node in nodes_here(address)):
            say("the node is idle")
            return 0
        time.sleep(LOOK_SECONDS)
    say(f"the node still works after {request.seconds} s")
    return 0


def drain(address: str, node_id: str, seconds: int) -> None:
    """Announce that a node goes away in `seconds`."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    accepted, reason = GcsClient(address=address).drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,  # type: ignore[attr-defined]
        "the machine is taken away",
        int((time.time() + seconds) * 1000),
    )
    say(f"node {node_id} is leaving" if accepted else f"node {node_id} does not leave: {reason}")


def nodes_here(address: str) -> Iterator[NodeInfo]:
    """The live nodes with this machine's address, but for the head: there is one in a pod."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.util import get_node_ip_address

    status, here = get_cluster_status(address), get_node_ip_address()
    for node in [*status.active_nodes, *status.idle_nodes]:
        is_head = "node:__internal_head__" in node.total_resources()
        if node.ip_address == here and not is_head:
            yield node


def is_busy(node: NodeInfo) -> bool:
    """Whether something still runs on it: tasks and actors, with or without resources."""
    return node.node_status != "IDLE"


def say(text: str) -> None:
    """To the pod's events, which show what a failed hook wrote, and to whoever runs this by hand."""
    print(f"drain: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
