"""200 chats from 20 connections against the same prompts as one batch, on one server.

    python benchmarks/serving.py [--model=FOLDER] [--requests=200] [--connections=20] [--repeats=7]

Starts `fedsafe serve` and asks it for greedy answers in two ways: all prompts in one request, which
is computed in whole batches, and each in a request of its own, over as many connections, each of
which asks again once it is answered. Both run in turn, so that noise of the machine meets both;
answers must be the same. Medians, programs compiled by two runs before; the last line is a JSON
object.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time

from absl import app, flags

from fedsafe_jax import load_pretrained
from fedsafe_jax.data import sources

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_REQUESTS = flags.DEFINE_integer("requests", 200, "How many.")
_CONNECTIONS = flags.DEFINE_integer("connections", 20, "At once.")
_NEW = flags.DEFINE_integer("max_new_tokens", 32, "Of an answer.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Of the server.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each side.")
_SOURCE = flags.DEFINE_string("source", "chat:package/cai_red_team.jsonl", "Of the prompts.")


def ask(connection, path, content):
    body = json.dumps({"model": _MODEL.value, "temperature": 0, **content})
    connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    read = json.loads(reply.read())
    assert reply.status == 200, read
    return read["choices"]


def one_batch(port, rows):
    """Answers to all prompts, and seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    started = time.perf_counter()
    choices = ask(connection, "completions", {"prompt": rows, "max_tokens": _NEW.value})
    seconds = time.perf_counter() - started
    connection.close()
    return [choice["text"] for choice in choices], seconds


def many(port, prompts):
    """Answers to all prompts, seconds, and seconds of each request."""
    texts, waited = [""] * len(prompts), [0.0] * len(prompts)

    def client(number):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for i in range(number, len(prompts), _CONNECTIONS.value):
            began = time.perf_counter()
            messages = [{"role": "user", "content": prompts[i]}]
            asked = {"messages": messages, "max_tokens": _NEW.value}
            (choice,) = ask(connection, "chat/completions", asked)
            texts[i], waited[i] = choice["message"]["content"], time.perf_counter() - began
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(_CONNECTIONS.value)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return texts, time.perf_counter() - started, waited


def main(argv):
    del argv
    found = [e.prompt for e in sources.load(_SOURCE.value, "")]
    prompts = [found[i % len(found)] for i in range(_REQUESTS.value)]
    lm = load_pretrained(_MODEL.value)
    rows = lm.render([(("user", prompt),) for prompt in prompts], 0, truncate=False)
    command = [sys.executable, "-m", "fedsafe_jax", "serve", f"--model={_MODEL.value}", "--port=0"]
    command.append(f"--batch_size={_BATCH.value}")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        lines = iter(server.stdout.readline, "")
        port = next(int(m[1]) for line in lines if (m := re.search(r":(\d+)/v1", line)))
        batches, loads, ratios, latencies = [], [], [], []
        for repeat in range(-2, _REPEATS.value):
            expected, batch = one_batch(port, rows)
            texts, load, waited = many(port, prompts)
            assert texts == expected, "the answers differ"
            if repeat >= 0:
                batches.append(batch)
                loads.append(load)
                ratios.append(load / batch)
                latencies += waited
            print(f"one batch {batch:.2f} s, {_CONNECTIONS.value} connections {load:.2f} s")
    finally:
        server.terminate()
        server.wait()
    result = {
        "requests": len(prompts),
        "connections": _CONNECTIONS.value,
        "one_batch_s": round(statistics.median(batches), 3),
        "connections_s": round(statistics.median(loads), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        "latency_s": round(statistics.median(latencies), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
