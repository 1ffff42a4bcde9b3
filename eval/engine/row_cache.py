"""Tensors whose rows come and go while columns are added: all rows end in the same column.

Each row of a batch begins in its own column; what is left of it is padding that a mask hides. So a new
row can take the place of one that has ended, and nothing else is moved.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Columns that are reserved ahead: without them every new token would copy all that is there.
_RESERVE = 128
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


class Columns:
    """A tensor of rows (dimension 0) and columns (dimension ``dim``), in a buffer with room for more."""

    def __init__(self, first: Tensor, dim: int) -> None:
        self._dim = dim
        self._begin, self._end = 0, first.shape[dim]
        self._buffer = self._new(first, len(first), self._end + _RESERVE)
        self._part(self._buffer, 0, self._end).copy_(first)

    @property
    def whole(self) -> Tensor:
        """All rows and columns: a view."""
        return self._part(self._buffer, self._begin, self._end)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self._end - self._begin

    def append(self, columns: Tensor) -> None:
        """Adds columns on the right."""
        n = columns.shape[self._dim]
        if self._end + n > self._buffer.shape[self._dim]:
            self._move(self.whole, 0, n + _RESERVE)
        self._part(self._buffer, self._end, self._end + n).copy_(columns)
        self._end += n

    def crop(self, width: int) -> None:
        """Forgets all but the last ``width`` columns."""
        self._begin = max(self._begin, self._end - width)

    def select(self, rows: Tensor) -> None:
        """Forgets all rows but these."""
        self._move(self.whole[rows.to(self._buffer.device)], 0, _RESERVE)

    def put(self, rows: Tensor, others: Tensor) -> None:
        """Overwrites the right end of some rows; what is left of it is to be hidden."""
        n = others.shape[self._dim]
        if n > self.width:
            missing = n - self.width
            if missing > self._begin:
                self._move(self.whole, missing, _RESERVE)
            self._begin -= missing
        place = self._part(self._buffer, self._end - n, self._end)
        place.index_copy_(0, rows.to(place.device), others)

    def _move(self, old: Tensor, left: int, right: int) -> None:
        """To a new buffer, with so many free columns on both sides."""
        width = old.shape[self._dim]
        self._buffer = self._new(old, len(old), left + width + right)
        self._begin, self._end = left, left + width
        self.whole.copy_(old)

    def _new(self, like: Tensor, n_rows: int, n_columns: int) -> Tensor:
        shape = list(like.shape)
        shape[0], shape[self._dim] = n_rows, n_columns
        return like.new_zeros(shape)  # hidden columns are multiplied by 0, and must be finite

    def _part(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        return tensor.narrow(self._dim, begin, end - begin)


class RowLayer(DynamicLayer):
    """Keys and values of one block.

    It keeps all columns where attention slides over a window, too: the mask decides what is seen, and so
    every layer's rows can be replaced alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns: tuple[Columns, Columns] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends columns; gives all that there are."""
        if self.columns is None:
            self.lazy_initialization(key_states, value_states)
            self.columns = (Columns(key_states, 2), Columns(value_states, 2))
        else:
            for columns, states in zip(self.columns, (key_states, value_states), strict=True):
                columns.append(states)
        self.show()
        return self.columns[0].whole, self.columns[1].whole

    def show(self) -> None:
        """Sets what transformers reads."""
        if self.columns is not None:  # a layer that shares another one's keys has none
            self.keys, self.values = (columns.whole for columns in self.columns)


class RowCache(Cache):
    """The key/value cache of a batch, in the layout of ``Columns``."""

    def __init__(self, n_layers: int) -> None:
        self._rows = [RowLayer() for _ in range(n_layers)]
        super().__init__(layers=list(self._rows))

    def crop_left(self, width: int) -> None:
        """As ``Columns.crop``."""
        for columns in self._all():
            columns.crop(width)
        self._show()

    def select(self, rows: Tensor) -> None:
        """As ``Columns.select``."""
        for columns in self._all():
            columns.select(rows)
        self._show()

    def put(self, rows: Tensor, others: "RowCache") -> None:
        """As ``Columns.put``."""
        for columns, theirs in zip(self._all(), others._all(), strict=True):
            columns.put(rows, theirs.whole)
        self._show()

    @property
    def n_bytes(self) -> int:
        """Of what is in it."""
        return sum(columns.whole.nbytes for columns in self._all())

    def _all(self) -> list[Columns]:
        return [columns for layer in self._rows for columns in layer.columns or ()]

    def _show(self) -> None:
        for layer in self._rows:
            layer.show()


def n_cache_layers(model: Any) -> int | None:
    """Layers of the cache that the model's decoder wants; None where its rows cannot be replaced.

    That is so for states that are no list of columns: recurrent and linear attention, windows in
    chunks, and caches of a model's own.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False) or not model._supports_default_dynamic_cache():
        return None
    if not set(getattr(config, "layer_types", None) or ()) <= _PLAIN_LAYERS:
        return None
    layers = DynamicCache(config=config).layers
    is_plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return len(layers) if layers and is_plain else None
