"""`/v1/rollouts`: what the rollouts are doing, and what people may do to them. Every action says who and why."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError
from gateway.http import ORDERS_MAX, READ_TIMEOUT_S, answer, error
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.offload import in_thread
from gateway.rollouts.actions import Action, Person, act, create, name_of
from gateway.rollouts.controller import RolloutController
from gateway.rollouts.ordering import specified
from gateway.rollouts.telling import detail_json, event_json, rollout_json, tally_json
from lake.releases import ReleaseRefused, Releases
from lake.rollouts import RolloutRefused

_EXAMPLE = '{"spec": {"model": "NAME", "version": 2, "stages": ["10%", "100%"]}, "who": "ada", "why": "…"}'


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    who: str
    why: str
    spec: dict[str, Any] | None = None
    draft: bool = False
    supersede: bool = False
    rollback: bool = False


_decode = msgspec.json.Decoder(_Body).decode


class RolloutsHttp:
    """The routes.

    Args:
        controller: drives the rollouts, and knows them.
        open_releases: a fresh handle of the registry.
        metrics: counts actions.
        clock_us: wall clock, microseconds.
    """

    def __init__(
        self,
        controller: RolloutController,
        open_releases: Callable[[], Releases],
        metrics: GatewayMetrics,
        clock_us: Callable[[], int] = wall_us,
    ) -> None:
        self._controller, self._open_releases = controller, open_releases
        self._metrics, self._clock_us = metrics, clock_us
        self._asking = 0

    def routes(self) -> list[web.RouteDef]:
        """For `gateway.http.HttpApi`."""
        return [
            web.get("/v1/rollouts", self._list),
            web.post("/v1/rollouts", self._create),
            web.get("/v1/rollouts/{rollout}", self._show),
            web.get("/v1/rollouts/{rollout}/history", self._history),
            web.post("/v1/rollouts/{rollout}/{action}", self._act),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        return await self._asked(lambda: {"rollouts": [rollout_json(r) for r in self._newest_first()]})

    async def _show(self, request: web.Request) -> web.Response:
        name = request.match_info["rollout"]

        def work() -> dict[str, Any]:
            rollout = self._controller.look().get(name)
            return detail_json(rollout) | tally_json(rollout, self._controller.tally(rollout))

        return await self._asked(work)

    async def _history(self, request: web.Request) -> web.Response:
        name = request.match_info["rollout"]

        def work() -> dict[str, Any]:
            self._controller.look().get(name)
            events = [event for event in self._controller.history() if event.rollout == name]
            return {"events": [event_json(event) for event in events]}

        return await self._asked(work)

    async def _create(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        if isinstance(body, web.Response):
            return body

        def work() -> dict[str, Any]:
            if body.spec is None:
                raise ConfigurationError(f"spec is missing; send {_EXAMPLE}")
            spec = specified(body.spec, self._open_releases().look(), "spec: ")
            name = name_of(spec, secrets.token_hex(3))
            decide = create(name, spec, self._person(body), draft=body.draft, supersede=body.supersede)
            return detail_json(self._controller.act(decide).get(name))

        return await self._asked(work, "create", 201)

    async def _act(self, request: web.Request) -> web.Response:
        name, word = request.match_info["rollout"], request.match_info["action"]
        try:
            action = Action(word)
        except ValueError:
            return error(404, "no_such_action", f"action {word[:40]!r}", f"use one of: {', '.join(Action)}")
        body = await self._body(request)
        if isinstance(body, web.Response):
            return body

        def work() -> dict[str, Any]:
            person, releases = self._person(body), self._open_releases().look()
            decide = act(action, name, person, rollback=body.rollback, supersede=body.supersede, releases=releases)
            return detail_json(self._controller.act(decide).get(name))

        return await self._asked(work, action.value)

    def _newest_first(self) -> list[Any]:
        return list(reversed(self._controller.look().rollouts.values()))

    def _person(self, body: _Body) -> Person:
        return Person(body.who, body.why, self._clock_us())

    async def _body(self, request: web.Request) -> _Body | web.Response:
        if request.content_type != "application/json":
            # Also what keeps a page in a browser from sending it as a form.
            return error(
                415, "not_json", f"content type {request.content_type[:80]!r}", "send Content-Type: application/json"
            )
        async with asyncio.timeout(READ_TIMEOUT_S):
            content = await request.read()
        try:
            return _decode(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as mistake:
            return error(400, "bad_document", f"the body cannot be used: {str(mistake)[:200]}", f"send {_EXAMPLE}")

    async def _asked(self, work: Callable[[], Mapping[str, Any]], action: str = "", status: int = 200) -> web.Response:
        """Run what waits for the lake, and say what came of it."""
        if self._asking >= ORDERS_MAX:
            return error(503, "busy", f"{ORDERS_MAX} requests wait for the lake", "try again in a moment")
        self._asking += 1
        try:
            response = answer(await in_thread(work, "http-rollouts"), status)
        except HeadwaterError as refusal:
            response = _refused(refusal)
        finally:
            self._asking -= 1
        if action:
            self._metrics.rollout_actions.labels(action, "done" if response.status < 300 else "refused").inc()
        return response


def _refused(refusal: HeadwaterError) -> web.Response:
    message, _, remedy = str(refusal).rpartition("; ")
    if isinstance(refusal, TemporaryError):
        return error(
            503,
            "lake_unreachable",
            f"the lake did not answer, so it is not known whether anything was changed: {str(refusal)[:300]}",
            "look at GET /v1/rollouts, then try again",
        )
    if isinstance(refusal, RolloutRefused):
        return error(404 if refusal.code == "unknown_rollout" else 409, refusal.code, message, remedy)
    if isinstance(refusal, ReleaseRefused):
        return error(404, "unknown_release", message, remedy)
    return error(422, "bad_order", message, remedy)
