"""A running ComfyUI server: queue a workflow once, wait, fetch its pictures (ComfyUI's server.py has the routes)."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request

# how long a server may be away (starting, restarting) before a job fails
PATIENCE = 120.0
POLL = 0.25
# what a proxy answers in place of a server that is away
AWAY = (502, 503, 504)


class WorkflowError(RuntimeError):
    """The server refused a workflow, or a node failed: trying again would not help."""


class ComfyClient:
    """Runs workflows on one server.

    Args:
        url: such as http://127.0.0.1:8188
        patience: seconds that the server may be unreachable before `ConnectionError`.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url = url.rstrip("/")
        self.patience = patience

    def named_image(self, workflow: dict, job: str) -> tuple[str, bytes]:
        """`job` and the first picture that the workflow's one saving node saves.

        `job` is the queue's own id for it, so that the same job is not computed twice while the server lives: one that
        is queued, running or finished is waited for and fetched. One that failed earlier is tried again.

        Raises:
            WorkflowError: with the server's message.
            ConnectionError: the server was away for longer than `patience`.
        """
        if (earlier := self._history(job)) is not None:
            try:
                return job, self._picture(earlier)
            except WorkflowError:
                self._post("/history", {"delete": [job]})
        while (entry := self._history(job)) is None:
            if not self._queued(job):
                # it may have finished between the two questions
                if (entry := self._history(job)) is not None:
                    break
                self._post("/prompt", {"prompt": workflow, "prompt_id": job})
            time.sleep(POLL)
        return job, self._picture(entry)

    def attempt(self, workflow: dict, job: str) -> tuple[str, bytes | ConnectionError]:
        """`named_image`, but a server that is away is an answer, so that others can take the job."""
        try:
            return self.named_image(workflow, job)
        except ConnectionError as error:
            return job, error

    def inputs(self, node: str) -> set[str] | None:
        """The inputs of a kind of node; None where the server has no such node."""
        known = json.loads(self._get(f"/object_info/{node}")).get(node)
        return None if known is None else {name for kind in known["input"].values() for name in kind}

    def versions(self) -> dict[str, str]:
        """What it runs on, and nothing that tells whose machine it is."""
        stats = json.loads(self._get("/system_stats"))
        system = stats["system"]
        return {
            "comfyui": system["comfyui_version"], "pytorch": system["pytorch_version"],
            "device": stats["devices"][0]["type"],
        }  # fmt: skip

    def _picture(self, entry: dict) -> bytes:
        if entry["status"]["status_str"] != "success":
            raise WorkflowError(_message(entry))
        saved = {
            node: [image for image in output.get("images", []) if image["type"] == "output"]
            for node, output in entry["outputs"].items()
        }
        saved = {node: images for node, images in saved.items() if images}
        if len(saved) != 1:
            nodes = ", ".join(sorted(saved)) or "none"
            raise WorkflowError(f"exactly one node of the workflow must save a picture (Save Image); here: {nodes}")
        ((image, *_),) = saved.values()
        return self._get("/view?" + urllib.parse.urlencode(image))

    def _history(self, job: str) -> dict | None:
        return json.loads(self._get(f"/history/{job}")).get(job)

    def _queued(self, job: str) -> bool:
        queue = json.loads(self._get("/queue"))
        return any(item[1] == job for item in (*queue["queue_running"], *queue["queue_pending"]))

    def _get(self, path: str) -> bytes:
        return self._request(path, None)

    def _post(self, path: str, body: dict) -> bytes:
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, data: bytes | None) -> bytes:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with urllib.request.urlopen(self.url + path, data, timeout=60) as response:
                    return response.read()
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code not in AWAY:
                    said = error.read().decode(errors="replace")
                    raise WorkflowError(f"{self.url}{path}: {error} {said}") from None
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"no answer from {self.url} for {self.patience:g} s ({error}): is ComfyUI running there?"
                    ) from None
                time.sleep(min(1.0, self.patience / 4))


def _message(entry: dict) -> str:
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"node {details['node_id']} ({details['node_type']}): {details['exception_message'].strip()}"
    return f"the run ended with {entry['status']['status_str']}"
