"""The site's side of the Flower app: `fedsafe_jax.flower.client:app`.

Its operator configures a site by `flower-supernode --node-config`; see `site.SiteSettings`.
"""

import functools
import json
import sys
from collections.abc import Callable

import jax
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jax.flatten_util import ravel_pytree

from fedsafe_jax.config import ConfigError
from fedsafe_jax.flower import wire
from fedsafe_jax.flower.site import Site, SiteSettings, settings_of
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import input_errors, one_line

app = ClientApp()


@functools.cache
def _site(config_json: str, settings: SiteSettings) -> Site:
    """Builds the site once a process: later rounds need not load and filter again."""
    prepare_libraries(settings.workdir)
    config = wire.config_of({"config": config_json})
    return Site(config, settings, lambda text: print(text, file=sys.stderr, flush=True))


def _answer(message: Message, context: Context, work: Callable) -> Message:
    """Replies with `work(site, question) -> RecordDict`, or with the site's error in one line."""
    question = message.content.config_records["question"]
    try:
        site = _site(question["config"], settings_of(dict(context.node_config)))
        content = work(site, question)
    except (ConfigError, wire.WireError, *input_errors()) as error:
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        content = RecordDict({"refused": ConfigRecord({"reason": one_line(error)})})
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
        update = site.train(server, question["round"], question["steps"])
        sent, metrics = update.sent._asdict(), update.metrics._asdict()
        numbers = {"useful_tokens": update.useful_tokens, "finite": int(metrics["finite"][0])}
        _, unravel = ravel_pytree(server["adapter"])
        tree = {"update": unravel(sent["updates"][0]), "losses": metrics["losses"][0]}
        tree |= {"active": metrics["active"][0]}
        tree["control"] = jax.tree.map(lambda x: x[0], sent["controls"])
        return RecordDict({"update": wire.arrays(tree), "numbers": MetricRecord(numbers)})

    return _answer(message, context, work)
