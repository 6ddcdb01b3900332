"""Which node sits in which client's seat: admission, and who keeps silent.

A seat belongs to a node, and where nodes authenticate, Flower binds a node's id to its registered
public key. Who has a seat is written down in the workdir, so that neither a restart nor another
node takes it.
"""

import json
import time
from typing import NamedTuple

import ml_collections
from etils import epath
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.flower import mail, wire
from fedsafe_jax.flower.replies import MOST, ReplyError, checked, read_description
from fedsafe_jax.flower.site import base_fingerprint
from fedsafe_jax.runtime.progress import Progress
from fedsafe_jax.whole_files import WorkdirError, read, to_json, write

AGAIN = 60.0  # seconds after which a node that was refused is asked again: it may have been mended
MISSES = 2  # rounds in a row that a site may miss before it is benched
FILE = "seats.json"


class SitesError(RuntimeError):
    """Too few sites take part."""


class _Asked(NamedTuple):
    question: str | None
    until: float  # by the monotonic clock


def read_seats(path: epath.Path) -> dict[int, int]:
    """Reads which node has which client's seat; {} where nothing is written down.

    Raises:
      WorkdirError: the file is damaged; another beginning would let anyone take a seat.
    """
    content = read(path)
    if content is None:
        return {}
    try:
        seats = {int(client): node for client, node in json.loads(content).items()}
        if all(type(node) is int for node in seats.values()):
            return seats
    except (AttributeError, RecursionError, ValueError):
        pass
    raise WorkdirError(
        f'{path}: expected the node of each client, such as {{"0": 123}}; put it right, or remove '
        "it, so that the first node to claim a seat gets it."
    )


class Seats:
    """The sites that take part, by client.

    Args:
      grid: Flower's connection to the nodes.
      config: config of the run.
      given: node of each client, from the run config; {} to give seats to the first that come.
      patience: seconds that a node has for its description.
      file: where seats are written down.
      progress: reports the sites that take part, and those left out.

    Attributes:
      nodes: node of each client that was admitted in this process.
      sizes: what each client learns from; 0 for clients that were not admitted.
      counts: `FilterCounts` of each client.
      pairs: pairs of all clients, after filtering.
    """

    def __init__(
        self,
        grid: Grid,
        config: ml_collections.ConfigDict,
        given: dict[int, int],
        patience: float,
        file: epath.Path,
        progress: Progress,
    ):
        self._grid, self._config, self._given, self._patience = grid, config, given, patience
        self._file, self._progress = file, progress
        self._owners = dict(given) or read_seats(file)
        self._base = base_fingerprint(config.model)
        self._asked: dict[int, _Asked] = {}
        self._rest: dict[int, float] = {}  # until when a node is not asked again
        self._told: dict[int, str] = {}  # what was last said of a node
        self._misses: dict[int, int] = {}
        clients = range(config.num_clients)
        self.nodes: dict[int, int] = {}
        self.sizes = [0.0] * config.num_clients
        self.counts = {i: FilterCounts(*[0] * len(FilterCounts._fields)) for i in clients}
        self.pairs = 0

    def gather(self, wait_s: float) -> None:
        """Waits until all `num_clients` sites have answered.

        Args:
          wait_s: seconds to wait; after that `clients_per_round` suffice.

        Raises:
          SitesError: fewer than `clients_per_round` take part.
        """
        until, most = time.monotonic() + wait_s, self._config.num_clients
        self.poll()
        while len(self.nodes) < most and (left := until - time.monotonic()) > 0:
            time.sleep(min(mail.SLICE, left))
            self.poll()
        if len(self.nodes) < self._config.clients_per_round:
            raise SitesError(
                f"{len(self.nodes)} of {most} sites take part, a round needs "
                f"clients_per_round={self._config.clients_per_round}."
            )
        self._progress.note(f"{len(self.nodes)} sites, {self.pairs} pairs after filtering")

    def poll(self) -> None:
        """Asks nodes that were not asked yet, and hears those that have answered; never waits."""
        now = time.monotonic()
        seated = {node for client, node in self.nodes.items() if not self.benched(client)}
        for node in self._grid.get_node_ids():
            if node not in seated | self._asked.keys() and now >= self._rest.get(node, 0.0):
                content = RecordDict({"question": wire.config_record(self._config)})
                question = mail.ask(self._grid, node, "query", content, seconds=self._patience)
                self._asked[node] = _Asked(question, now + self._patience)
        for node, asked in list(self._asked.items()):
            message = mail.answer(self._grid, asked.question)
            if message is None and now < asked.until:
                continue
            del self._asked[node]
            if message is not None:  # a silent node has had its time
                self._rest[node] = time.monotonic() + AGAIN
            self._hear(node, message or ReplyError("no answer in time"))

    def benched(self, client: int) -> bool:
        """Returns whether no round waits for a client any more, as it missed the last ones."""
        return self._misses.get(client, 0) >= MISSES

    def answered(self, client: int, in_time: bool) -> None:
        """Notes whether a client that was asked to train answered, with whatever, in time.

        One that is benched is asked for its description, beside the rounds, and comes back with it.
        """
        self._misses[client] = 0 if in_time else self._misses.get(client, 0) + 1
        if self.benched(client):
            self._progress.warn(f"client {client} is benched: no answer in {MISSES} rounds.")

    def _hear(self, node: int, message: Message | ReplyError) -> None:
        """Admits a node, or says why it is left out, unless that was said last."""
        try:
            self._admit(node, checked(message, read_description))
            self._told.pop(node, None)
        except ReplyError as error:
            reason = f"node {node} is left out: {error}"
            if self._told.get(node) != reason:
                self._told[node] = reason
                self._progress.warn(reason)

    def _admit(self, node: int, description: dict) -> None:
        """Gives a node the seat of the client that it says it is.

        Raises:
          ReplyError: it is not to have it.
        """
        client = description["client"]
        owner = self._owners.get(client)
        other = [c for c, n in self._owners.items() if n == node and c != client]
        if client >= self._config.num_clients:
            raise ReplyError(f"client {client} is not in this run.")
        if description["base"] != self._base:
            raise ReplyError(
                f"client {client}'s base model differs from the server's {self._config.model}; "
                "the files of model and tokenizer must be the same."
            )
        if self._given and client not in self._given:
            raise ReplyError(f"the run config's seats have none for client {client}.")
        if owner not in (None, node):
            raise ReplyError(
                f"the seat of client {client} is node {owner}'s; {self._file}, or the run config's "
                "seats, say so."
            )
        if other:
            raise ReplyError(f"it says that it is client {client}, and has the seat of {other[0]}.")
        if owner is None:
            # Written first: a seat that is lost with the process was never given.
            write(
                self._file, to_json({str(c): n for c, n in (self._owners | {client: node}).items()})
            )
            self._owners[client] = node
        back = client in self.nodes
        self.nodes[client], self._misses[client] = node, 0
        if back:
            self._progress.note(f"client {client} is back")
            return
        self.sizes[client], self.counts[client] = description["learned"], description["counts"]
        self.pairs += description["examples"]
        near = description["near"]
        self._progress.note(
            f"client {client}: {description['examples']} pairs"
            + (f", {near} dropped, near evaluation prompts" if near else "")
            + ("" if description["learned"] else ", none of which it learns: it weighs 0")
        )


def parse_seats(text: str) -> dict[int, int]:
    """Parses the run config's seats, such as "0=7812,1=4410"; {} of "".

    Raises:
      ValueError: it is written otherwise, or a client or node is there twice.
    """
    seats = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        client, _, node = part.partition("=")
        if not (client.isdecimal() and node.isdecimal()) or int(client) > MOST:
            raise ValueError(f"{part!r:.60}: expected CLIENT=NODE, such as 0=7812")
        seats[int(client)] = int(node)
    if len(set(seats.values())) < text.count("="):
        raise ValueError("a client or a node is there twice")
    return seats
