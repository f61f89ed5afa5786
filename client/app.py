"""Flower ClientApp: message -> site -> message, nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site import Site
from common.errors import WireError
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_to_content, request_from_message

log = logging.getLogger("wardround.app")

SiteOf = Callable[[Context], Site]
Answer = Callable[[Site, Request], Reply]


def build_app(site_of: SiteOf) -> ClientApp:
    """A ClientApp that answers TRAIN and EVALUATE messages with the site that `site_of` finds for the context.

    Every such message is answered with content; no exception of ours, hence no text, reaches Flower.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answered(site_of, Site.train, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answered(site_of, Site.tell_metrics, message, context)

    return app


def _answered(site_of: SiteOf, how: Answer, message: Message, context: Context) -> Message:
    reply = _answer(site_of, how, message, context)
    return Message(reply_to_content(reply, message.metadata.message_type), reply_to=message)


def _answer(site_of: SiteOf, how: Answer, message: Message, context: Context) -> Reply:
    try:
        request = request_from_message(message)
    except WireError:
        return Reply(Header("", code_digest(), 0), Status.MALFORMED)
    try:
        return how(site_of(context), request)
    except Exception as error:  # opening a site reads records, and Flower would send the exception's text on
        log.error("the site could not be opened: %s", type(error).__name__)
        return Reply(Header("", code_digest(), request.header.round_number), Status.LOCAL_FAILURE)
