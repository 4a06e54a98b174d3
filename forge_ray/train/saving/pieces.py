"""Checkpoints in pieces: each rank writes the rows that it holds; a reader takes any rows, whatever its own world size.

```
model-<k>-of-<n>.safetensors       the rows of the weights that rank k of n held
optimizer-<k>-of-<n>.safetensors   those of the optimizer's tensors
layout.json                        by piece and tensor: the whole's shape, the first row and the one after the last
```

Each tensor of a piece is a run of rows (dim 0) of the whole one; one without dimensions is one row. Several pieces may
have the same row. A whole-file checkpoint has no layout: each of its tensors is whole. Owns this layout and reading it.
Does not own who holds which rows (`sharded.py`), writing (`saving.py`), nor what makes files a checkpoint
(`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from forge_ray.artifact import Artifact
from forge_ray.errors import CorruptError

if TYPE_CHECKING:
    from torch import Tensor

    from forge_ray.train.sharded.worker import Rows

WEIGHTS, OPTIMIZER, LAYOUT = "model.safetensors", "optimizer.safetensors", "layout.json"


def piece_name(which: str, rank: int, size: int) -> str:
    """What a rank's piece of `WEIGHTS` or `OPTIMIZER` is called."""
    return which.replace(".", f"-{rank}-of-{size}.")


def layout_of(rows: Mapping[str, Rows]) -> dict[str, list[Any]]:
    """A piece's part of the layout."""
    return {
        name: [list(part.shape), part.first, part.first + (len(part.tensor) if part.shape else 1)]
        for name, part in rows.items()
    }


class Pieces:
    """The tensors of a checkpoint by rows; weights as `<parameter>`, the optimizer's as `<parameter>/<quantity>`.

    Cost: a file is read whole, to verify it, when its first row is asked for. Of an object store it is fetched then,
    once for all processes of a node. What has none of the rows that are asked for is not touched.
    """

    def __init__(self, checkpoint: Artifact) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, tuple[Any, Any]] = {}
        if LAYOUT in checkpoint.names():
            layout = checkpoint.read_json(LAYOUT)
        else:
            layout = {which: dict(self._whole(which)) for which in (WEIGHTS, OPTIMIZER)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[int, int, str]]] = {}
        for file, tensors in layout.items():
            for name, (shape, first, stop) in tensors.items():
                self._shapes[name] = tuple(shape)
                self._places.setdefault(name, []).append((first, stop, file))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor as a whole."""
        return dict(self._shapes)

    def rows(self, name: str, rows: range) -> Tensor:
        """These rows of a tensor; of one without dimensions, itself.

        Raises:
            CorruptError: A piece is damaged, or none has one of the rows.
        """
        import torch

        at, parts = rows.start, []
        while at < rows.stop or not parts:
            first, stop, file = self._having(name, at if rows else max(0, at - 1))
            if not self._shapes[name]:
                return self._file(file).get_tensor(name)
            end = max(at, min(rows.stop, stop))
            parts.append(self._file(file).get_slice(name)[at - first : end - first])
            at = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _having(self, name: str, row: int) -> tuple[int, int, str]:
        for place in self._places.get(name, ()):
            if place[0] <= row < place[1]:
                return place
        raise CorruptError(
            "no file of the checkpoint has a row that is wanted",
            got=f"{self._checkpoint.ref}: {', '.join(self._checkpoint.names('.safetensors'))}",
            wanted=f"row {row} of {name}",
            do="use a checkpoint of this model",
        )

    def _whole(self, which: str) -> Iterator[tuple[str, list[Any]]]:
        file = self._file(which)
        names = file.keys()
        for name in names:
            shape = file.get_slice(name).get_shape()
            yield name, [shape, 0, shape[0] if shape else 1]

    def _file(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            path = self._checkpoint.local_path(file)  # a copy keeps its name while this lives
            self._open[file] = path, safe_open(path, framework="pt")
        return self._open[file][1]


def assemble(checkpoint: Artifact) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer tensors as a whole-file checkpoint has them."""
    pieces = Pieces(checkpoint)
    shapes = pieces.shapes()
    whole = {name: pieces.rows(name, range(shape[0] if shape else 1)) for name, shape in shapes.items()}
    return (
        {name: tensor for name, tensor in whole.items() if "/" not in name},
        {name: tensor for name, tensor in whole.items() if "/" in name},
    )
