"""Links to files outside docs/ work in the repository; on the site their text is left."""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)")


def on_page_markdown(markdown: str, **_) -> str:
    return OUTSIDE.sub(r"\1", markdown)
