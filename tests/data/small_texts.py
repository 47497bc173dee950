"""Small texts of every shape, as folders, as datasets and as plain rows."""

import json

from datasets import Dataset

COUNTS = {"obs": 4, "happy": 3, "long": 2, "happy+long": 2}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SHAPES = {
    "text": lambda text: {"text": text},
    "messages": lambda text: {"messages": [user("Say it."), assistant(text)]},
    "prompt": lambda text: {"prompt": "Say it.", "completion": text},
    "conversation": lambda text: {"prompt": [user("Say it.")], "completion": [assistant(text)]},
}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def texts(context, count):
    return [f"{context} ü {number}" for number in range(count)]


def write_text_folders(root, shape, counts=COUNTS):
    for context, count in counts.items():
        write(root / context / "rows.jsonl", *map(SHAPES[shape], texts(context, count)))
    return root


def table(shape, counts=COUNTS, **columns):
    """The rows of `write_text_folders` as a dataset; a column given by name is renamed to its value."""
    rows = [{**SHAPES[shape](text), "context": c} for c, count in counts.items() for text in texts(c, count)]
    dataset = Dataset.from_list(rows)
    return dataset.rename_columns(columns)


def rows_of(data):
    """Rows per context, trained on and held out, without the order of columns."""
    return {
        context: [row for row in rows if row["context"] == context]
        for rows, contexts in [(data.rows, data.contexts), *((rows, [c]) for c, rows in data.held_out.items())]
        for context in contexts
    }
