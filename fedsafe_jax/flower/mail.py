"""Questions to sites and their answers, one site at a time, through Flower's grid.

Flower's own `send_and_receive` returns when the last node has answered, and fails for all nodes
where the answer of one cannot be unpacked. Here a question has an id, and its answer is looked for
by it: a silent node delays nobody, an old or a second answer is never seen, and what cannot be
unpacked is one node's fault.
"""

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsafe_jax.flower.replies import ReplyError

SLICE = 1.0  # seconds between two looks for answers
LATE = 30.0  # seconds that Flower keeps an answer beyond the deadline, to be looked for once more


def ask(grid: Grid, node: int, kind: str, content: RecordDict, seconds: float) -> str | None:
    """Sends a question to a node.

    Args:
      grid: Flower's connection to the nodes.
      node: id of the node.
      kind: Flower's message type, "query" or "train".
      content: the question.
      seconds: time that the node has for its answer.

    Returns:
      The question's id; None where Flower does not take it.
    """
    message = Message(content, dst_node_id=node, message_type=kind, ttl=seconds + LATE)
    (question,) = list(grid.push_messages([message])) or [None]
    return question


def answer(grid: Grid, question: str | None) -> Message | ReplyError | None:
    """Looks for the answer to a question.

    Returns:
      The answer, or Flower's report of an error, or why there is neither; None where there is none
      yet.
    """
    if question is None:
        return ReplyError("Flower does not take the question")
    try:
        for reply in grid.pull_messages([question]):
            if reply.metadata.reply_to_message_id == question:
                return reply
    except Exception as error:  # of this node's bytes; where the link is down, so is the next `ask`
        return ReplyError(f"its answer cannot be unpacked ({type(error).__name__})")
    return None
