"""A real headless Chromium, driven through its DevTools protocol over two pipes: nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --window-size=1600,1200"
# All text of the page, also inside of web components, and the widths of its pictures.
_TEXT = """(() => {
  const words = [], widths = [];
  const walk = (node) => {
    if (node.nodeType === 3) words.push(node.data);
    if (['STYLE', 'SCRIPT'].includes(node.tagName)) return;
    if (node.tagName === 'IMG' && node.naturalWidth) widths.push(node.naturalWidth);
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return JSON.stringify({text: words.join(' '), widths});
})()"""


class Browser:
    """One page. Use as a context; `profile` is a new folder."""

    def __init__(self, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        command = f"exec {CHROMIUM} {_FLAGS} --remote-debugging-pipe --user-data-dir={profile} about:blank"
        self._process = subprocess.Popen(
            ["bash", "-c", f"{command} 3<&{read_there} 4>&{write_there}"],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._from, self._to = os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb")
        self._number, self._session = 0, None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(30)

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url="about:blank")  # else a new #fragment would load nothing
        self._ask("Page.navigate", url=url)

    def wait_for(self, words: list[str], pictures: int = 0, seconds: float = 180) -> dict:
        """{"text": .., "widths": of all pictures} once the page shows all `words` and so many pictures."""
        deadline = time.monotonic() + seconds
        while True:
            value = self._ask("Runtime.evaluate", expression=_TEXT)["result"].get("value")
            seen = json.loads(value) if value else {"text": "", "widths": []}
            missing = [word for word in words if word not in seen["text"]]
            if not missing and len(seen["widths"]) >= pictures:
                return seen
            assert time.monotonic() < deadline, f"the page lacks {missing or 'pictures'}: {seen}"
            time.sleep(0.5)

    def screenshot(self) -> bytes:
        return base64.b64decode(self._ask("Page.captureScreenshot")["data"])

    def _ask(self, method: str, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> bytes:
        read = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser has ended"
            read += byte
        return bytes(read)
