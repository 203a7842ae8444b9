"""A receiver of callbacks with FastAPI; see main() for how it is started.

``CALLBACK_SECRETS`` is the text of the Secret that ``callback.secretRef`` of a task names.
"""

import os

from fastapi import FastAPI, HTTPException, Request
from inbox import Inbox, keep_document

from service_client import CallbackReceiver, CallbackRefused


def make_app(receiver: CallbackReceiver, inbox: Inbox) -> FastAPI:
    """Return the application."""
    app = FastAPI()

    @app.post("/api/v1/tasks/{task_id}/callback")
    async def callback(request: Request) -> dict[str, bool]:
        # The body as it came, not a model: what is signed are its bytes.
        try:
            event = receiver.receive(await request.body(), request.headers)
        except CallbackRefused as refusal:
            raise HTTPException(refusal.status, refusal.message) from refusal
        # Any 2xx ends the deliveries; for everything else the callback comes again.
        return {"done": inbox.once(event, keep_document)}

    return app


def main() -> FastAPI:
    """Return the application as the environment has it: ``uvicorn --factory --port 8082 fastapi_receiver:main``."""
    return make_app(CallbackReceiver(os.environ["CALLBACK_SECRETS"]), Inbox("callbacks.db"))
