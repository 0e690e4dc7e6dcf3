"""A store from which an adapter is removed while its names are looked through."""

from __future__ import annotations

from qpa.serve.store import Store


class LosesOne(Store):
    """A store that had one adapter more a moment ago."""

    def names(self) -> list[str]:
        """Return the names, and one whose file is gone."""
        return ["0-gone", *super().names()]
