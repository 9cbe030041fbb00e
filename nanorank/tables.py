"""
CSV tables through pandas, for every script but the trainers.

    heads = read_csv("out/demo/heads.csv", ["layer", "head", "product"])    # a DataFrame
    write_csv("out/demo/heads.csv", rows)                                   # rows: dicts, or a DataFrame
"""
import pandas as pd

from nanorank.errors import UserError
from nanorank.files import write_atomic


def read_csv(path, columns=()):
    """The table in a CSV file as a DataFrame, every digit kept; empty cells are NaN.

    Raises UserError that names the file where it cannot be read, has no rows or lacks one of `columns`.
    """
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
    """Writes rows (a list of dicts, or a DataFrame) as CSV, whole or not at all. Returns the path.

    Columns stand in the order in which they first appear; numbers are written as Python prints them.
    Of dicts, None and what a row lacks are left empty, and NaN is written nan.
    """
    if isinstance(rows, pd.DataFrame):
        table = rows
    else:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name) for name in columns] for row in rows]
        texts = [["" if x is None else str(x) for x in row] for row in cells]
        table = pd.DataFrame(texts, columns=columns)
    text = table.to_csv(index=False, lineterminator="\n")
    write_atomic(path, lambda file: file.write(text.encode()))
    return path


def undetermined(table, given, always=()):
    """The columns that the columns `given` do not settle: rows equal in `given` differ in them.

    always: columns that are named in any case.
    """
    n_groups = len(table[given].drop_duplicates())
    names = []
    for name in table:
        if name in given:
            continue
        n_with_it = len(table[[*given, name]].drop_duplicates())
        if name in always or n_with_it > n_groups:
            names.append(name)
    return names
