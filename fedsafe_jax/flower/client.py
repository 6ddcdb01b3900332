"""The site's side of the Flower app: `fedsafe_jax.flower.client:app`.

A site is configured by its operator, `flower-supernode --node-config`; see `site.Settings`.
"""

import functools
import json
import sys

import jax
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from jax.flatten_util import ravel_pytree

from fedsafe_jax.config import ConfigError
from fedsafe_jax.flower import wire
from fedsafe_jax.flower.site import Settings, Site, settings_of
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.validation import input_errors

app = ClientApp()


@functools.cache
def _site(config_json: str, own: Settings) -> Site:
    """Kept while the process lives: rounds that follow need not load and filter again."""
    prepare_libraries(own.workdir)
    config = wire.config_of({"config": config_json})
    return Site(config, own, lambda text: print(text, file=sys.stderr, flush=True))


def _answer(message: Message, context: Context, work) -> Message:
    """`work(site, question) -> RecordDict`, or what is wrong at this site, in one line."""
    question = message.content.config_records["question"]
    try:
        site = _site(question["config"], settings_of(dict(context.node_config)))
        content = work(site, question)
    except (ConfigError, wire.WireError, *input_errors()) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        content = RecordDict({"refused": ConfigRecord({"reason": str(error)})})
    return Message(content, reply_to=message)


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Before the first round: what the site holds after filtering, and its base model."""

    def work(site, question):
        del question
        return RecordDict({"site": ConfigRecord({"json": json.dumps(site.describe())})})

    return _answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Local steps of a round."""

    def work(site, question):
        server = wire.tree(message.content.array_records["server"], site.template())
        update = site.train(server, question["round"], question["steps"])
        sent, metrics = update.sent._asdict(), update.metrics._asdict()
        numbers = {"useful_tokens": update.useful_tokens, "steps": float(sent["steps"][0])}
        numbers |= {"norm": float(metrics["norms"][0]), "finite": int(metrics["finite"][0])}
        _, unravel = ravel_pytree(server["adapter"])
        tree = {"update": unravel(sent["updates"][0]), "losses": metrics["losses"][0]}
        tree |= {"active": metrics["active"][0], "sketch": metrics["sketches"][0]}
        tree["control"] = jax.tree.map(lambda x: x[0], sent["controls"])
        return RecordDict({"update": wire.arrays(tree), "numbers": MetricRecord(numbers)})

    return _answer(message, context, work)
