"""A receiver of callbacks with aiohttp: ``CALLBACK_SECRETS=whsec_… python examples/receivers/aiohttp_receiver.py``.

``CALLBACK_SECRETS`` is the text of the Secret that ``callback.secretRef`` of a task names.
"""

import os

from aiohttp import web
from inbox import Inbox, keep_document

from service_client import CallbackReceiver, CallbackRefused


def make_app(receiver: CallbackReceiver, inbox: Inbox) -> web.Application:
    """Return the application."""

    async def callback(request: web.Request) -> web.Response:
        try:
            event = receiver.receive(await request.read(), request.headers)
        except CallbackRefused as refusal:
            return web.json_response({"detail": refusal.message}, status=refusal.status)
        # Any 2xx ends the deliveries; for everything else the callback comes again.
        return web.json_response({"done": inbox.once(event, keep_document)})

    app = web.Application(client_max_size=1024 * 1024)
    app.router.add_post("/api/v1/tasks/{task_id}/callback", callback)
    return app


if __name__ == "__main__":
    web.run_app(make_app(CallbackReceiver(os.environ["CALLBACK_SECRETS"]), Inbox("callbacks.db")), port=8082)
