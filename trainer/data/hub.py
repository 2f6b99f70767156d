"""How are the documents of a Hugging Face dataset streamed, forward only, and read on after the network
failed?
"""

from collections.abc import Callable, Iterator

from trainer.data.sources import Document, from_field, hashed


class HubSource:
    """A Hugging Face dataset (hub name or local directory), streamed; after its end it begins again.

    It reads forward only. `source[i]` reads on to document i and keeps those documents on the way that are
    `wanted` later. A TokenStream wants the documents between the slowest and the fastest stream of its rank,
    which bounds the memory; documents of other ranks are dropped. For a document further back the source
    starts over, which is right but slow. Opening at document n reads n documents, unless `datasets` can skip
    whole files. Any failure of the dataset becomes an OSError, and `source[i]` may be tried again.
    """

    def __init__(
        self, name: str, split: str = "train", field: str = "text", subset: str | None = None
    ) -> None:
        import datasets

        try:
            self.dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
        except Exception as error:  # a dozen kinds: no network, no such name, subset or split
            remedy = "check name=, subset= and split=, the network and HF_HUB_OFFLINE"
            raise ValueError(f"{name}: cannot open the dataset ({error}); {remedy}") from error
        if (columns := self.dataset.column_names) and field not in columns:
            raise ValueError(f"{name}: no column {field!r}; field= is one of {columns}")
        self.name, self.field, self.split = name, field, split
        self.num_rows: int | None = None  # N, known as soon as the end was seen
        self.fingerprint = hashed(name, split, field, subset)
        self.seek(0, wanted=lambda i: False)

    def seek(self, first: int, *, wanted: Callable[[int], bool]) -> None:
        """Starts over at document `first`; of what it passes, it keeps what is `wanted`."""
        self.position, self.wanted, self.kept = first, wanted, dict[int, object]()
        self.rows = self.rows_from(first)

    def rows_from(self, start: int) -> Iterator[dict[str, object]]:
        while True:
            start = start % self.num_rows if self.num_rows else start
            end = start
            for row in self.dataset.skip(start):
                yield row
                end += 1
            self.num_rows = end if end > start else sum(1 for _ in self.dataset)  # `start` may lie beyond N
            if not self.num_rows:
                raise ValueError(f"{self.name}: the dataset holds no row; check split={self.split}")
            start = 0 if end > start else start % self.num_rows

    def next_row(self) -> dict[str, object]:
        try:
            return next(self.rows)
        except Exception as error:  # network, hub and file formats have dozens of kinds
            self.rows = self.rows_from(self.position)  # a generator that raised is at its end
            if self.num_rows == 0:
                raise
            raise OSError(
                f"{self.name}: row {self.position + 1} cannot be read ({type(error).__name__}: {error})"
            ) from error

    def __getitem__(self, i: int) -> Document:
        if i < self.position and i not in self.kept:
            self.seek(i, wanted=self.wanted)
        while i not in self.kept:
            row = self.next_row()
            if self.position == i or self.wanted(self.position):
                self.kept[self.position] = row.get(self.field)
            self.position += 1
        return from_field(self.kept.pop(i), field=self.field, where=f"{self.name}:{i + 1}")
