"""The fields of KubeRay's RayCluster (ray.io/v1) that `infra/kubernetes` uses.

Our own description, after KubeRay's public API reference: no package of a registry carries the
operator's schema. It refuses every field that it does not name. Pod templates are checked by
Kubernetes' own schema instead.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]  # noqa: N815 (KubeRay's name)
    idleTimeoutSeconds: Count  # noqa: N815
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"]  # noqa: N815
    resources: dict[str, Any]
    securityContext: dict[str, Any]  # noqa: N815
    volumeMounts: list[dict[str, Any]]  # noqa: N815


class Group(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class HeadGroup(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]  # noqa: N815


class WorkerGroup(Group):
    groupName: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]  # noqa: N815
    replicas: Count
    minReplicas: Count  # noqa: N815
    maxReplicas: Count  # noqa: N815

    @model_validator(mode="after")
    def in_order(self):
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("minReplicas <= replicas <= maxReplicas does not hold")
        return self


class Spec(Strict):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: AutoscalerOptions  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: Annotated[list[WorkerGroup], Field(min_length=1)]  # noqa: N815


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: dict[str, Any]
    spec: Spec
