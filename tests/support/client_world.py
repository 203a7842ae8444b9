"""What a client speaks to, all real but the kubelet: an API server, an operator with PostgreSQL, and a gateway."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from task_platform.kubernetes import Access
from tests.support.gateway_lab import GatewayProcess, account
from tests.support.operator_lab import Kube, Kubelet, OperatorProcess, Place

SECRETS = "whsec_c2VjcmV0\n"
VERBS = ("get", "list", "watch", "create", "patch", "update", "delete")


@dataclass
class World:
    """A namespace in which tasks run and complete with seven chunks; those that are suspended wait.

    Callbacks may go to loopback, signed by the key ``secret`` of the Secret ``processing-task-callbacks``, :data:`SECRETS`.
    """

    place: Place
    gateway: GatewayProcess
    token: str
    """Of somebody who may do everything with tasks of the namespace."""
    cluster: Endpoints

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, cluster: Endpoints, *, postgres: str, folder: Path, trusting: bool = False
    ) -> AsyncIterator["World"]:
        kube = Kube(Access.from_kubeconfig(cluster.kubeconfig))
        given: dict[str, Any] = {"kubeconfig": cluster.kubeconfig, "folder": folder}
        try:
            async with Place.fresh(kube) as place:
                token = await account(kube, place.namespace, "caller", verbs=VERBS)
                secret = {"metadata": {"name": "processing-task-callbacks"}, "stringData": {"secret": SECRETS}}
                await kube.do("POST", place.path("secrets"), secret)
                told = {"OPERATOR_POSTGRES_URL": postgres, "OPERATOR_CALLBACKS_ALLOW": "127.0.0.1"}
                operator = OperatorProcess(**given | told, namespaces=[place.namespace])
                gateway = GatewayProcess(**given, namespaces=[place.namespace], postgres=postgres, trusting=trusting)
                done = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, result=Result(documents=1, chunks=7))
                kubelet = Kubelet(place, outcomes={1: done})
                async with operator.at_work(), gateway.at_work(), kubelet.at_work():
                    yield cls(place, gateway, token, cluster)
        finally:
            await kube.aclose()

    def api(self) -> kubernetes.client.CustomObjectsApi:
        """Return the API of an administrator."""
        api: Any = kubernetes.config.new_client_from_config(str(self.cluster.kubeconfig))
        return kubernetes.client.CustomObjectsApi(api)
