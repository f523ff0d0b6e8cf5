"""A real browser for tests: headless Chromium, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE_S = 120
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--disable-dev-shm-usage",
)  # fmt: skip


def run(profile: Path, *arguments: str) -> str:
    """What Chromium prints."""
    done = subprocess.run(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    return done.stdout


def measured(page: Path, width: int, folder: Path, script: str, *flags: str) -> dict:
    """What ``script``, an expression of the document ``d``, gives for a page that is as wide as a
    device of ``width`` CSS pixels."""
    around = folder / "around.html"
    around.write_text(f"""<!doctype html><body>
<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:2000px;border:0"></iframe>
<script>window.onload = () => setTimeout(() => {{
  const w = document.getElementById("f").contentWindow, d = w.document
  document.body.textContent = "measured:" + JSON.stringify({script})
}}, 300)</script>""")
    shown = run(folder / "profile", "--virtual-time-budget=8000", "--dump-dom", *flags,
                around.as_uri())  # fmt: skip
    return json.loads(re.search(r"measured:(\{.*?\})</body>", shown, re.DOTALL)[1])
