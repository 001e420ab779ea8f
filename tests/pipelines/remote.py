"""Real servers for tests of what lies elsewhere: S3 and Google endpoints (processes) and a web server with bad days."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.buckets import place


@contextlib.contextmanager
def s3_server(**environment):
    """An S3 endpoint in a process of its own; yields host:port."""
    with _server(["-m", "moto.server", "-H", "127.0.0.1", "-p"], environment) as address:
        yield address


@contextlib.contextmanager
def gcs_server(bucket):
    """A Google Cloud Storage endpoint in a process of its own, with one bucket; yields host:port."""
    words = ["-m", "gcp_storage_emulator", "start", "-M", "-H", "127.0.0.1", "--default-bucket", bucket, "--port"]
    with _server(words, {}) as address:
        yield address


@contextlib.contextmanager
def _server(words, environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, *words, str(port)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, **environment})  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def make_bucket(endpoint, name):
    import boto3

    boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1").create_bucket(Bucket=name)
    return f"s3://{name}", f"?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def on_small_disk(folder, script, size="64k"):
    """Runs a Python script in which `folder` is a file system of its own, of a few kilobytes.

    `remount(size)` in the script makes it another size.
    """
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    remount = f"""
import subprocess
def remount(size):
    subprocess.run(["mount", "-o", f"remount,size={{size}}", {str(folder)!r}], check=True)
"""
    command = f'mount -t tmpfs -o size={size} none {folder} && exec "$0" -c "$1"'
    words = ["unshare", "-Urm", "sh", "-c", command, sys.executable, remount + script]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def upload(folder: Path, uri: str, options: str):
    """Copies a folder's files below a URI; returns the URI with its options."""
    for path in folder.rglob("*"):
        if path.is_file():
            place(f"{uri}/{path.relative_to(folder)}{options}").upload(path)
    return uri + options


class Web(http.server.ThreadingHTTPServer):
    """Serves a folder, counts requests, and answers badly where told: `troubles[path]` is a list used up in order.

    A trouble is a status, "cut" (half of the body), or "stall" (a byte a second).
    """

    def __init__(self, folder):
        self.folder, self.troubles, self.asked = Path(folder), {}, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        web = self.server
        name = http.server.urllib.parse.unquote(self.path).partition("?")[0]
        web.asked.append((self.command, name))
        waiting = web.troubles.get(name, [])
        trouble = waiting.pop(0) if waiting else None
        path = web.folder / name.lstrip("/")
        if isinstance(trouble, int) or not path.is_file():
            self.send_error(trouble or 404)
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data)}"')
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send(data, trouble)

    def send(self, data, trouble):
        if trouble == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif trouble == "stall":
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.3)
        else:
            self.wfile.write(data)

    def log_message(self, *words):
        pass
