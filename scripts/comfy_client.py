"""ComfyUI's own HTTP and websocket interface, as plain synchronous calls.

Every wait has a deadline in seconds. Inside, one thread runs an asyncio loop that holds the HTTP session and reads the
websocket, so events are recorded while a caller waits for something else.
"""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

Graph = Mapping[str, Mapping[str, Any]]
"""A workflow in API format: node id -> {class_type, inputs}."""
T = TypeVar("T")

PREVIEW, PREVIEW_WITH_METADATA = 1, 4
"""Kinds of binary websocket message (ComfyUI's protocol.py)."""


class ServerError(RuntimeError):
    """The server did not start, did not answer in time, or left something running."""


class PromptError(RuntimeError):
    """A prompt that was refused or failed. `details` is ComfyUI's own record of it."""

    def __init__(self, message: str, details: Mapping[str, Any]):
        super().__init__(message)
        self.details = details


class PromptInterrupted(PromptError):
    """A prompt that was cancelled."""


@dataclass(frozen=True)
class Event:
    """One websocket message. `kind` is ComfyUI's type, or 'preview' for a picture; `time` is time.monotonic()."""

    time: float
    kind: str
    data: Mapping[str, Any]
    image: bytes = field(default=b"", repr=False)


class ComfyClient:
    """One connection to a ComfyUI at `url`, whose pictures land in the folders `output` and `temp`."""

    def __init__(self, url: str, output: Path, temp: Path):
        self.url = url
        self.output = output
        self.temp = temp
        self.client_id = uuid.uuid4().hex
        self._events: list[Event] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._reader: asyncio.Task[None] | None = None

    def connect(self, timeout: float = 30) -> None:
        """Wait until the server accepts the websocket. Raises ServerError after `timeout`, or what `_check` raises."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="ComfyClient", daemon=True).start()
        try:
            self._call(self._connect(time.monotonic() + timeout), timeout + 10)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._loop is not None:
            self._call(self._disconnect(), 10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    # -- prompts ------------------------------------------------------------------------------------------------------

    def queue(self, graph: Graph, preview: str = "default") -> str:
        """Queue a graph and return its prompt id. `preview` is 'latent2rgb', 'taesd', 'none' or the server's 'default'.

        Raises PromptError when ComfyUI refuses the graph.
        """
        body = {"prompt": graph, "client_id": self.client_id, "extra_data": {"preview_method": preview}}
        status, answer = self._request("POST", "/prompt", body)
        if status != 200:
            raise PromptError(_refusal(answer), answer if isinstance(answer, dict) else {})
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """The history entry of a prompt once it has ended well.

        Raises PromptError with the failing node's words, PromptInterrupted when it was cancelled, and ServerError after
        `timeout` or when ComfyUI no longer answers.
        """
        deadline = time.monotonic() + timeout
        while (entry := self.get(f"/history/{prompt_id}").get(prompt_id)) is None:
            if time.monotonic() > deadline:
                raise ServerError(f"prompt {prompt_id} did not end within {timeout:g} s{self._context()}")
            time.sleep(0.02)
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                where = f"node {data['node_id']} ({data['node_type']})"
                raise PromptError(f"{where}: {data['exception_type']}: {data['exception_message'].strip()}", data)
            if kind == "execution_interrupted":
                raise PromptInterrupted(f"prompt {prompt_id} was interrupted", data)
        return entry

    def run(self, graph: Graph, timeout: float = 120, preview: str = "default") -> dict[str, Any]:
        """`queue`, then `wait`."""
        return self.wait(self.queue(graph, preview), timeout)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the running prompt, or only the one named."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Ask ComfyUI to unload its models and drop its caches. It does so between prompts, soon after this returns."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def outputs(self, entry: Mapping[str, Any]) -> list[Path]:
        """The picture files of a history entry, in node order."""
        folders = {"output": self.output, "temp": self.temp}
        pictures = [picture for node in entry["outputs"].values() for picture in node.get("images", [])]
        return [folders[one["type"]] / one["subfolder"] / one["filename"] for one in pictures]

    @staticmethod
    def seconds(entry: Mapping[str, Any]) -> float:
        """How long ComfyUI worked on a prompt, by its own clock."""
        at = {kind: data["timestamp"] for kind, data in entry["status"]["messages"] if "timestamp" in data}
        return (at["execution_success"] - at["execution_start"]) / 1000

    # -- events -------------------------------------------------------------------------------------------------------

    def events(self, prompt_id: str | None = None, kind: str | None = None) -> list[Event]:
        """Websocket messages so far, in order, of one prompt or kind or all."""
        return [
            one
            for one in tuple(self._events)
            if kind in (None, one.kind) and prompt_id in (None, one.data.get("prompt_id"))
        ]

    def forget_events(self) -> None:
        """Drop what has been recorded so far: a client that stays for hours."""
        self._events.clear()

    def wait_event(
        self, kind: str, prompt_id: str | None = None, timeout: float = 60, where: Callable[[Event], bool] | None = None
    ) -> Event:
        """The first message of that kind and prompt for which `where` holds, past or to come."""
        deadline = time.monotonic() + timeout
        while True:
            for one in self.events(prompt_id, kind):
                if where is None or where(one):
                    return one
            if time.monotonic() > deadline:
                raise ServerError(f"no {kind!r} event within {timeout:g} s{self._context()}")
            time.sleep(0.005)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def get(self, route: str) -> Any:
        """What ComfyUI answers to GET: parsed JSON, or bytes. Raises ServerError on any status but 200."""
        return self._expect_200("GET", route, None)

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """The same for POST of a JSON body."""
        return self._expect_200("POST", route, body)

    def _expect_200(self, method: str, route: str, body: Mapping[str, Any] | None) -> Any:
        status, answer = self._request(method, route, body)
        if status != 200:
            raise ServerError(f"{method} {route}: status {status}: {answer!r:.500}")
        return answer

    def _request(self, method: str, route: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
        try:
            return self._call(self._send(method, route, body), 60)
        except (aiohttp.ClientError, asyncio.TimeoutError, TimeoutError) as error:
            raise ServerError(f"{method} {route}: ComfyUI does not answer ({error!r}){self._context()}") from error

    # -- for a subclass that owns the process -------------------------------------------------------------------------

    def _check(self) -> None:
        """Called while the server is awaited; raises when waiting on is pointless."""

    def _context(self) -> str:
        """What else to say in an error message."""
        return ""

    # -- inside the loop's thread -------------------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        if self._loop is None:
            coroutine.close()
            raise ServerError(f"not connected to {self.url}")
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout), self._loop).result(timeout + 5)

    async def _connect(self, deadline: float) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        while True:
            self._check()
            try:
                websocket = await self._session.ws_connect(f"{self.url}/ws?clientId={self.client_id}", max_msg_size=0)
                break
            except aiohttp.ClientError:
                if time.monotonic() > deadline:
                    raise ServerError(f"no ComfyUI answers at {self.url}{self._context()}") from None
                await asyncio.sleep(0.1)
        await websocket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        self._reader = asyncio.create_task(self._read(websocket))

    async def _read(self, websocket: aiohttp.ClientWebSocketResponse[Any]) -> None:
        async for message in websocket:
            now = time.monotonic()
            if message.type is aiohttp.WSMsgType.TEXT:
                content = json.loads(message.data)
                self._events.append(Event(now, content["type"], content.get("data") or {}))
            elif message.type is aiohttp.WSMsgType.BINARY:
                self._events.append(_binary_event(now, message.data))

    async def _send(self, method: str, route: str, body: Mapping[str, Any] | None) -> tuple[int, Any]:
        assert self._session is not None
        async with self._session.request(method, self.url + route, json=body) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.read()

    async def _disconnect(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        if self._session is not None:
            await self._session.close()


def _binary_event(now: float, data: bytes) -> Event:
    (kind,) = struct.unpack_from(">I", data)
    if kind == PREVIEW_WITH_METADATA:
        (size,) = struct.unpack_from(">I", data, 4)
        return Event(now, "preview", json.loads(data[8 : 8 + size]), data[8 + size :])
    if kind == PREVIEW:
        return Event(now, "preview", {}, data[8:])
    return Event(now, f"binary {kind}", {}, data[4:])


def _refusal(answer: Any) -> str:
    """ComfyUI's complaints about a graph, one per line."""
    if not isinstance(answer, dict):
        return f"ComfyUI refused the prompt: {answer!r:.500}"
    lines = [answer.get("error", {}).get("message", "ComfyUI refused the prompt")]
    for node_id, node in (answer.get("node_errors") or {}).items():
        said = (f"{one['message']}: {one['details']}" for one in node["errors"])
        lines += [f"node {node_id} ({node['class_type']}): {one}" for one in said]
    return "\n".join(lines)
