"""The site's side of the Flower app: `fedsafe_jax.flower.client:app`.

Its operator configures a site by `flower-supernode --node-config`; see `site.SiteSettings`.
"""

import functools
import json
import sys
import traceback
from collections.abc import Callable

import jax
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jax.flatten_util import ravel_pytree

from fedsafe_jax.flower import wire
from fedsafe_jax.flower.refusals import code_of
from fedsafe_jax.flower.site import Site
from fedsafe_jax.flower.site_policy import SiteSettings, settings_of
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import one_line

app = ClientApp()


@functools.cache
def _site(config_json: str, federation: str, settings: SiteSettings) -> Site:
    """Builds the site once a process: later rounds need not load and filter again."""
    prepare_libraries(settings.workdir)
    config = wire.config_of({"config": config_json})
    return Site(config, settings, _log, federation)


def _log(text: str) -> None:
    """Prints to the site's own log, which Flower does not send to the server."""
    print(text, file=sys.stderr, flush=True)


def _answer(message: Message, context: Context, work: Callable) -> Message:
    """Replies with `work(site, question) -> RecordDict`, or with the code of the site's error.

    Flower would send an exception's text to the server, and that text may quote the site's files;
    so no exception leaves this function but those that end the process.
    """
    try:
        settings = settings_of(dict(context.node_config))
        question = message.content.config_records.get("question", {})
        for key in ("config", "federation"):
            if not isinstance(question.get(key), str):
                raise wire.WireError(f"the server's question has no {key}.")
        content = work(_site(question["config"], question["federation"], settings), question)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries in Rust panic with an exception that is no Exception
        code = code_of(error)
        if code == "internal":
            _log(traceback.format_exc())
        _log(f"error, sent to the server as code {code}: {one_line(error)}")
        content = RecordDict({"refused": wire.refused(code)})
    return Message(content, reply_to=message)


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Describes the site before the first round: its pairs after filtering, its base model."""

    def work(site, question):
        del question
        return RecordDict({"site": ConfigRecord({"json": json.dumps(site.describe())})})

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the local steps of a round and replies with the update."""

    def work(site, question):
        server = wire.tree(message.content.array_records["server"], site.template())
        update = site.train(server, question.get("round"), question.get("steps"))
        sent, metrics = update.sent._asdict(), update.metrics._asdict()
        numbers = {"useful_tokens": update.useful_tokens, "finite": int(metrics["finite"][0])}
        _, unravel = ravel_pytree(server["adapter"])
        tree = {"update": unravel(sent["updates"][0]), "losses": metrics["losses"][0]}
        tree |= {"active": metrics["active"][0]}
        tree["control"] = jax.tree.map(lambda x: x[0], sent["controls"])
        return RecordDict({"update": wire.arrays(tree), "numbers": MetricRecord(numbers)})

    return _answer(message, context, work)
