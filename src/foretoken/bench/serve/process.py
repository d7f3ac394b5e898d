"""`foretoken serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foretoken.errors import ForetokenError

STARTUP_S = 600.0  # a large model is read from disk, and its costs are measured once
STOP_S = 20.0
POLL_S = 0.05
LAST_WORDS = 300  # characters of a log that an error shows


class ServerProcess:
    """A server on a free port of this machine; it begins to start at once.

    Args:
        name: For messages.
        options: Of `foretoken serve`, but for address and log.
    """

    def __init__(self, name: str, options: Sequence[str]) -> None:
        self._name = name
        self._folder = TemporaryDirectory(prefix="foretoken-serve-")
        self._log = Path(self._folder.name) / "log"
        words = ["--port", "0", "--drain", "1", *options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "foretoken", "serve", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.base_url = ""  # until it is ready

    def wait(self) -> None:
        """Wait until it takes requests.

        Raises:
            ForetokenError: It ended, or did not start in time.
        """
        end_s = time.monotonic() + STARTUP_S
        while not self._is_ready():
            if self._process.poll() is not None:
                raise self._failed(f"ended with status {self._process.returncode}")
            if time.monotonic() > end_s:
                raise self._failed(f"did not start within {STARTUP_S:.0f} s")
            time.sleep(POLL_S)

    def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            ForetokenError: There is none.
        """
        import httpx

        try:
            answer = httpx.get(f"{self.base_url}{path}", timeout=60, trust_env=False)
            return answer.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._failed(f"did not answer {path}: {error}") from error

    def cpu_s(self) -> float | None:
        """Return the processor seconds that it has used; None where the system does not tell."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return None
        # The name in the second field may hold spaces; user and system time are fields 14 and 15.
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    def _is_ready(self) -> bool:
        import httpx

        if not self.base_url:
            found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", self._read_log())
            if found is None:
                return False
            self.base_url = found[0]
        try:
            answer = httpx.get(f"{self.base_url}/ready", timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    def _read_log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _failed(self, how: str) -> ForetokenError:
        said = " ".join(self._read_log().split())[-LAST_WORDS:]
        return ForetokenError(
            f"the server of {self._name} {how}; it said: {said or 'nothing'}",
            hint="try the same options with foretoken serve",
        )


__all__ = ["ServerProcess"]
