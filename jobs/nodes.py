"""The machines of the cluster, and what of them is left for a job's workers beside its driver."""

from __future__ import annotations

import json
import logging
import os

import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException

log = logging.getLogger(__name__)

SUPERVISOR = "_ray_internal_job_actor_{}"
"""Name of the actor that runs a submitted job's command, and holds what `ray job submit --entrypoint-…` reserved."""


def nodes_for_workers() -> list[dict[str, float]]:
    """The resources of every machine that is alive, less what is reserved for this driver."""
    place, reserved = reserved_for_driver()
    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            less = reserved if place and node.get("NodeID") == place else {}
            nodes.append({name: amount - less.get(name, 0) for name, amount in node["Resources"].items()})
    return nodes


def reserved_for_driver() -> tuple[str, dict[str, float]]:
    """The machine on which this driver runs by reservation, and what is reserved; "" and nothing without one."""
    text = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    submission = json.loads(text).get("metadata", {}).get("job_submission_id") if text else None
    if submission is None:
        return "", {}
    try:
        (actor,) = list_actors(filters=[("name", "=", SUPERVISOR.format(submission))], detail=True)
    except (RayStateApiException, ValueError) as error:
        log.warning("what is reserved for the driver cannot be found out (%s); leave some CPUs free", error)
        return "", {}
    return str(actor.node_id), {name: float(amount) for name, amount in (actor.required_resources or {}).items()}
