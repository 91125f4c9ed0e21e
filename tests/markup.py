"""Is a page well-formed, and what does it hold?"""

from __future__ import annotations

import html.parser

VOID = {"meta", "img", "br", "link", "hr"}


class Page(html.parser.HTMLParser):
    """Which elements a page has; raises where one is not closed, or an address is elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.ids: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of {tag} twice"
        self.tags.append((tag, found))
        if "id" in found:
            assert found["id"] not in self.ids, f"{found['id']} is there twice"
            self.ids.add(found["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def of(self, tag):
        return [found for name, found in self.tags if name == tag]

    @property
    def alts(self):
        return [image["alt"] for image in self.of("img")]
