"""A local chat model behind an OpenAI-compatible endpoint, whose replies a test scripts."""

import http.server
import json
import threading
import time
from collections import Counter

SLEEP = time.sleep
DROP = object()  # a connection that ends without a reply


class Server:
    """A chat model behind an endpoint; `reply(text, count)` says what the count-th request to say
    something about a text gets: a content, a status, or `DROP`."""

    def __init__(self, reply, seconds=0.0):
        self.asked, self.at_once, self.most = Counter(), 0, 0
        self.lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet a reply: two of them wait for an acknowledgement

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with server.lock:
                    server.asked[text] += 1
                    count = server.asked[text]
                    server.at_once += 1
                    server.most = max(server.most, server.at_once)
                SLEEP(seconds)
                said = reply(text, count)
                with server.lock:
                    server.at_once -= 1
                if said is DROP:
                    self.close_connection = True
                    return
                status = said if isinstance(said, int) else 200
                content = {"choices": [{"message": {"content": said}}]}
                sent = said if isinstance(said, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.spec = f"chat:m@{self.url}#xstest"

    @property
    def requests(self) -> int:
        return sum(self.asked.values())

    def close(self):
        self.http.shutdown()
        self.http.server_close()
