"""A local server that plays the Hub and GitHub's server of files."""

import contextlib
import http.server
import re
import threading


class Server(http.server.ThreadingHTTPServer):
    """Replies by path: `(status, headers, body)`, of which `cut` bytes come before it hangs up."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.cut, self.ranges = {}, [], None, True
        self.lengths = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.asked.append((self.command, self.path, dict(self.headers)))
        gone = (404, {"X-Error-Code": "RevisionNotFound"}, b"gone")
        status, headers, body = server.replies.get(self.path, gone)
        total, asked = len(body), re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status == 200 and asked and server.ranges:
            first = int(asked[1])
            status, span = (206, f"{first}-{total - 1}") if first < total else (416, "*")
            headers = headers | {"Content-Range": f"bytes {span}/{total}"}
            body = body[first:]
        self.send_response(status)
        length = {"Content-Length": str(len(body))} if server.lengths else {}
        for name, value in (headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if server.cut is None else body[: server.cut])
            self.close_connection = True


@contextlib.contextmanager
def serving():
    """A server that answers in a thread of its own."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
