"""Connect to a Ray cluster, and wait until it has room for the workers of a run."""

import logging
import os
import time
from collections.abc import Callable, Mapping

from trainer.errors import ConfigError
from trainer.training.stop_signals import sighup_ignored

log = logging.getLogger("tutelage.launch")

ROOM_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ROOM_TIMEOUT_S = 60.0  # default of Ray Train for the same wait
POLL_S = 0.5
REPORT_S = 5.0
MAX_SHOWN_NODES = 8

Nodes = Mapping[str, Mapping[str, float]]  # resources by name of the node


def connect(address: str | None) -> bool:
    """Connect to the cluster at `address`, or start a local Ray. Return whether the Ray is local.

    An existing connection is used as it is. Raises ConfigError if there is no cluster at the address.
    """
    if address is None:  # a local Ray listens on all interfaces and runs submitted code; ray reads this on import
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    if ray.is_initialized():
        return address is None
    try:
        with sighup_ignored():  # a closed terminal sends SIGHUP to a local Ray too, which has to save a checkpoint
            ray.init(address or "local")
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise ConfigError(f"cannot use {where} ({error})") from error
    return address is None


def wait_for_room(workers: int, resource: str, is_local: bool, is_stopped: Callable[[], bool]) -> None:
    """Wait until `workers` processes, each with one CPU or GPU, fit on the nodes of the cluster.

    A pending placement group tells an autoscaler what is needed. A local Ray does not grow, so a request that exceeds
    it is rejected at once. Returns early if `is_stopped`. Raises ConfigError that names what is missing.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    timeout_s = float(os.environ.get(ROOM_TIMEOUT_VARIABLE, ROOM_TIMEOUT_S))
    group = placement_group([{resource: 1}] * workers)
    try:
        began, reported = time.monotonic(), False
        while not group.wait(POLL_S) and not is_stopped():
            free, total = _nodes()
            is_final = is_local and _num_fitting(total, resource) < workers
            message = missing_room(workers, resource, free, total, is_final)
            waited_s = time.monotonic() - began
            if is_final or waited_s > timeout_s:
                raise ConfigError(
                    message if is_final else f"{message}, within {timeout_s:g} s ({ROOM_TIMEOUT_VARIABLE})"
                )
            if not reported and waited_s > REPORT_S:
                log.warning("%s; waiting up to %g s", message, timeout_s)
                reported = True
    finally:
        remove_placement_group(group)


def missing_room(workers: int, resource: str, free: Nodes, total: Nodes, is_final: bool) -> str:
    """Return one sentence that compares the request with what each node has. Both mappings have the same keys.

    is_final: the nodes are too small even if nothing else used them.
    """
    fitting = _num_fitting(free, resource)
    nodes = [f"{free[name].get(resource, 0):g} of {total[name].get(resource, 0):g} free on {name}" for name in total]
    if len(nodes) > MAX_SHOWN_NODES:
        nodes[MAX_SHOWN_NODES:] = [f"and {len(nodes) - MAX_SHOWN_NODES} more nodes"]
    remedies = [f"use --ray-workers {fitting}"] if fitting else []
    remedies += ["set student.device to cpu"] if resource == "GPU" and not fitting else []
    remedies.append("use a larger Ray cluster (--address)" if is_final else f"free {resource}s or add nodes")
    return (
        f"--ray-workers {workers} needs {workers} {resource}s, one per worker, and this Ray has room for {fitting} of "
        f"the workers ({resource}s: {', '.join(nodes)}): {', or '.join(remedies)}"
    )


def _num_fitting(nodes: Nodes, resource: str) -> int:
    """Return how many workers with one unit of the resource fit. A worker runs on one node."""
    return sum(int(resources.get(resource, 0)) for resources in nodes.values())


def _nodes() -> tuple[Nodes, Nodes]:
    """Return the free and the total resources of every node, by address."""
    import ray
    from ray._private.state import available_resources_per_node  # `ray.available_resources` is of the whole cluster

    alive = [node for node in ray.nodes() if node["Alive"]]
    addresses = [node["NodeManagerAddress"] for node in alive]
    names = [
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for address, node in zip(addresses, alive, strict=True)
    ]
    free_by_id = available_resources_per_node()
    free = {name: free_by_id.get(node["NodeID"], {}) for name, node in zip(names, alive, strict=True)}
    return free, {name: node["Resources"] for name, node in zip(names, alive, strict=True)}
