"""What `make docs` builds the site from: the tracked files that a page may link to, as they lie.

    python .ci/site.py && mkdocs build --strict

MkDocs wants a folder of its own. Links of pages lead to code and to measurements all over the
repository, so all of that is in it; a folder that a link names is shown by its README,
or by a list of what is in it.
"""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "docs"
MOST_BYTES = 1_000_000  # raw rows and weights stay where they are
_LINK = re.compile(r"(\]\()(?!https?://|#)([^)#\s]+)")


def stage() -> None:
    """Copy the files, and let links to folders lead to a page."""
    shutil.rmtree(SITE, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and file.stat().st_size <= MOST_BYTES:
            (SITE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, SITE / name)
    for page in list(SITE.rglob("*.md")):
        parts = _LINK.split(page.read_text())  # text, "](", link, text, …
        parts[2::3] = [_target(page, link) for link in parts[2::3]]
        page.write_text("".join(parts))


def _target(page: Path, link: str) -> str:
    """A link, or the page of the folder that it names."""
    folder = (page.parent / link).resolve()
    original = ROOT / folder.relative_to(SITE)
    if not original.is_dir():
        return link
    readme = folder / "README.md"
    if not readme.exists():
        folder.mkdir(exist_ok=True)
        names = "".join(f"- `{one.name}`\n" for one in sorted(original.iterdir()))
        readme.write_text(f"# {folder.name}\n\nIn the repository:\n\n{names}")
    return f"{link.rstrip('/')}/README.md"


if __name__ == "__main__":
    stage()
