"""What a real browser makes of a page of ours; tests of pages are skipped without one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
_MEASURE = """<script>
window.onload = () => {
  const pictures = [...document.images];
  document.title = JSON.stringify({
    pictures: pictures.length,
    broken: pictures.filter(picture => !picture.complete || !picture.naturalWidth).length,
    tooWide: document.documentElement.scrollWidth > window.innerWidth,
  });
};
</script>"""


def measured(page: Path, folder: Path, width: int) -> dict[str, object]:
    """pictures, broken ones and tooWide, in a window of `width` pixels; writes into `folder`.

    A script in a copy of the page measures what the browser made of it.
    """
    copy = folder / "page.html"
    copy.write_text(page.read_text("ascii").replace("</main>", "</main>" + _MEASURE))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={folder}/profile", "--dump-dom", f"file://{copy}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(\{.+\})</title>", done.stdout)
    assert found, done.stdout[:500]
    answer: dict[str, object] = json.loads(found[1])
    return answer
