"""Flower ClientApp: message -> site -> message, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site
from common.errors import WireError
from common.provenance import code_digest
from common.records import Reply, Status, Terms, reply_to_content, request_from_message


def build_app(site_of: Callable[[Context], Site]) -> ClientApp:
    """A ClientApp that answers TRAIN messages with the site that `site_of` finds for the context.

    Every message is answered with content; no exception of ours, hence no text, reaches Flower.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            request = request_from_message(message)
        except WireError:
            refusal = Reply(Terms("", code_digest(), 0), Status.MALFORMED)
            return Message(reply_to_content(refusal), reply_to=message)
        return Message(reply_to_content(site_of(context).train(request)), reply_to=message)

    return app
