"""Modules as a grid: kinds of matrices by layers, for pictures and tables of what each has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def table_of(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """(rows, columns, rank by row and column) of a picture: kinds of matrices by layers."""
    cells = {kind_and_layer(path): rank for path, rank in ranks.items()}
    return *rows_and_columns(cells), cells


def kind_and_layer(path: str) -> tuple[str, str]:
    """(kind, layer) of a module: what stands behind the first number in its path, and the number.

    Of modules outside the layers, whose path has none, the layer is `-`.
    """
    number = re.search(r"\.(\d+)\.", f".{path}.")
    return (path, "-") if number is None else (f".{path}"[number.end() :], number[1])


def rows_and_columns(cells: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """The kinds in their order, and the layers by number, modules outside of them first."""
    places = list(cells)
    layers = {layer for _, layer in places}
    by_number = sorted(layers, key=lambda layer: -1 if layer == "-" else int(layer))
    return list(dict.fromkeys(kind for kind, _ in places)), by_number
