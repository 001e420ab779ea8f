"""A real MLflow server in a process of its own, on loopback, that can be killed and started again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request


class Server:
    def __init__(self, folder, empty_store):
        self.folder, self.process = folder, None
        shutil.copy(empty_store, folder / "server.db")  # migrating a new one costs seconds
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"

    def start(self):
        port = self.url.rpartition(":")[2]
        words = ["server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1",
                 "--artifacts-destination", str(self.folder / "files"), "--port", port]  # fmt: skip
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("a") as log:
            command, env = [sys.executable, "-m", "mlflow", *words], os.environ | quiet
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 180
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.2)

    def kill(self):
        """SIGKILL for it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None

    def _answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False
