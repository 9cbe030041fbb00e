"""
CSV tables through pandas, for every script but the trainers.

    heads = read_csv("out/demo/heads.csv", ["layer", "head", "product"])    # a DataFrame
    write_csv("out/demo/heads.csv", rows)                                   # rows: dicts, or a DataFrame
"""
import pandas as pd

from nanorank.errors import UserError
from nanorank.files import write_atomic


def read_csv(path, columns=()):
    """A CSV file as a DataFrame, every digit kept. Raises UserError where it lacks rows or `columns`."""
    try:
        table = pd.read_csv(path, float_precision="round_trip")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} is no CSV table: {error}") from None
    for name in columns:
        if name not in table:
            raise UserError(f"{path}: no column {name}")
    if table.empty:
        raise UserError(f"{path}: no rows")
    return table


def write_csv(path, rows):
    """Writes a list of dicts, or a DataFrame, as CSV, whole or not at all. Returns the path.

    Of dicts, numbers are written as Python prints them (NaN as nan), None and what a row lacks is left empty.
    """
    table = rows
    if not isinstance(rows, pd.DataFrame):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
        table = pd.DataFrame(cells, columns=columns)
    text = table.to_csv(index=False, lineterminator="\n")
    write_atomic(path, lambda file: file.write(text.encode()))
    return path


def undetermined(table, given, always=()):
    """The columns that the columns `given` do not settle: rows equal in `given` differ in them.

    always: columns that are named in any case.
    """
    n_groups = len(table[given].drop_duplicates())
    others = [name for name in table if name not in given]
    return [name for name in others
            if name in always or len(table[[*given, name]].drop_duplicates()) > n_groups]
