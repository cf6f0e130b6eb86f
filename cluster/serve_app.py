"""The application that a RayService runs, or `serve run`: `cluster.serve_app:build`.

Its one deployment finds the cluster's supervisor or starts it, tells it the sizes that its
`user_config` names, and puts HTTP in front of the gateways. A replica of it that dies leaves
nothing behind and stops nothing: the next one finds all as it was. What ends the actors is that the
application is deleted.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from starlette.applications import Starlette

from cluster.access import access
from cluster.actors import log_to_stderr
from cluster.config import SettingsError, load_settings
from cluster.detached import DetachedHandle, Sizes
from cluster.members import DeploymentError, MemberState
from cluster.preflight import checked_model, model_directory
from cluster.topology import Role
from services.http.app import http_app
from services.http.gateways import Gateways

log = logging.getLogger(__name__)

APPLICATION_STATUS_TIMEOUT_SECONDS = 30.0
# Between two looks whether the sizes were applied, which a supervisor that is new has not.
APPLY_AGAIN_SECONDS = 5.0
# To drain a deployment that is deleted; Serve ends the replica after that.
END_SECONDS = 600.0
# Of the supervisor, to a question that it answers from memory.
HEALTH_SECONDS = 20.0


class Arguments(BaseModel):
    """Of the application."""

    model_config = ConfigDict(extra="forbid")

    config: Path = Field(description="the settings, a YAML file of each node")


class UserConfig(BaseModel):
    """What may change while the deployment serves."""

    model_config = ConfigDict(extra="forbid")

    expert_replicas: int = Field(ge=1, le=1024, description="of each group")
    attention_workers: int = Field(ge=1, le=1024)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Raises `SettingsError`. The file is read where the deployment runs."""
    try:
        arguments = Arguments.model_validate(args)
    except ValidationError as error:
        raise SettingsError(_first("args", error)) from None
    application: serve.Application = Model1.bind(str(arguments.config))
    return application


class _Model1:
    def __init__(self, config: str) -> None:
        log_to_stderr()
        self._settings = load_settings(Path(config))
        num_experts = checked_model(self._settings.model).n_routed_experts
        self._supervisor = DetachedHandle.find_or_create(self._settings, num_experts)
        self._front = Gateways(self._gateways, access(self._settings).tls)
        self._sizes: Sizes | None = None
        self._why_not_applied: str | None = None
        self._wake = asyncio.Event()
        self._applying: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        return http_app(self._front, model_directory(self._settings.model).name)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """The first one returns once the deployment serves, which may take until there are nodes.
        Later ones return at once, since Serve sends a replica no request meanwhile."""
        try:
            wanted = UserConfig.model_validate(user_config)
        except ValidationError as error:
            raise SettingsError(_first("user_config", error)) from None
        self._sizes = Sizes(wanted.attention_workers, wanted.expert_replicas)
        if self._applying is None:
            await self._apply()
            await self._front.refresh()  # the supervisor may be away when the first request comes
            self._applying = asyncio.create_task(self._keep_applied())
        self._wake.set()

    async def check_health(self) -> None:
        async with asyncio.timeout(HEALTH_SECONDS):
            why = await self._supervisor.missing()
        if why is not None:
            raise DeploymentError(f"the deployment does not serve: {why}")

    async def __del__(self) -> None:
        if self._applying is not None:
            self._applying.cancel()
        if await asyncio.to_thread(_is_deleted):
            log.info("ending the deployment: its application is deleted")
            await self._supervisor.end()

    async def _keep_applied(self) -> None:
        """Until they are: what fails for want of nodes is tried again, and a supervisor that was
        started again is told anew."""
        while True:
            try:
                async with asyncio.timeout(APPLY_AGAIN_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._apply()
            except DeploymentError as error:
                log.warning("sizes_not_applied sizes=%s why=%s", self._sizes, error)

    async def _apply(self) -> None:
        assert self._sizes is not None
        change = await self._supervisor.apply(self._sizes)
        if change is not None:
            added, removed = ",".join(change.added), ",".join(change.removed)
            log.info("sizes_applied sizes=%s added=%s removed=%s", self._sizes, added, removed)

    async def _gateways(self) -> Sequence[str]:
        """Who is ready."""
        members = (await self._supervisor.snapshot()).members
        return [
            member.address
            for member in members
            if member.spec.role is Role.GATEWAY and member.state is MemberState.READY
        ]


def _is_deleted() -> bool:
    """Rather than the replica alone, which is replaced when it dies, moves or gets another config.
    If nobody can say, it is not."""
    name = serve.get_replica_context().app_name
    try:
        found = serve.status().applications.get(name)
    except Exception as error:
        log.warning("application_unknown why=%s", error)
        return False
    return found is None or found.status == "DELETING"


def _first(where: str, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (where, *first["loc"]))
    return f"{key}: {first['msg']}"


Model1 = serve.deployment(
    name="Model1",
    graceful_shutdown_timeout_s=END_SECONDS,
    health_check_timeout_s=2 * HEALTH_SECONDS,
)(serve.ingress()(_Model1))
