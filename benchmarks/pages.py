"""What benchmarks write into the documentation: text between two marks of a page."""

from __future__ import annotations

END = "<!-- to here -->\n"


def between_marks(page: str, script: str, text: str) -> str:
    """The page with another text between the marks of a script, "<!-- written by SCRIPT -->" and END.

    Raises:
        ValueError: the page has no such marks, or several.
    """
    begin = f"<!-- written by {script} -->\n"
    before, rest = page.split(begin)
    _, after = rest.split(END, 1)
    return before + begin + text + END + after
