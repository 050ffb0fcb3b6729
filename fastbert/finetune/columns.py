"""Which column of a table is the text, which the label: guessed by name, then by content."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastbert.finetune.formats import is_number
from fastbert.finetune.table import Table

Columns = dict[str, str | tuple[str, ...]]
"""Role -> its column, or its columns where several make one: a column a choice, or a label."""

_TEXT = ("text", "sentence", "content", "document", "review", "tweet", "body", "question", "query")
_FIRST = (*_TEXT, "premise", "anchor")
_CLASS = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "y")
_NUMBER = ("score", "rating", "stars", "value", "relatedness", "similarity")
_TAGS = ("tags", "ner_tags", "pos_tags", "ner", "pos", "upos", "labels")

# Names that two texts of a row go by together, first and second.
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("anchor", "positive"),
)
_ID = re.compile(r"(.*_)?(id|ids|idx|index|guid|uid)|unnamed_?[0-9]*")


class Role(NamedTuple):
    """What a task reads from a column.

    names: that the column may have, the likeliest first.  needed: whether a task can do without.
    by_content: finds the column among those that are left where no name tells it.
    """

    names: tuple[str, ...]
    needed: bool = True
    by_content: Callable[[Table, Sequence[str]], list[str]] | None = None


def _texts(table: Table, left: Sequence[str]) -> list[str]:
    """The column of the longest texts."""
    lengths = {name: _mean_length(table.columns[name]) for name in left}
    longest = max(lengths, key=lambda name: lengths[name], default=None)
    return [longest] if longest is not None and lengths[longest] > 0 else []


def _mean_length(values: Sequence[Any]) -> float:
    """In characters; 0 for a column that holds something other than texts, or numbers."""
    seen = values[:1000]
    texts = [v for v in seen if isinstance(v, str) and not is_number(v)]
    return sum(map(len, texts)) / len(seen) if 2 * len(texts) > len(seen) else 0.0


def _only_one(table: Table, left: Sequence[str]) -> list[str]:
    return list(left)


def _numbers(table: Table, left: Sequence[str]) -> list[str]:
    def numeric(value: Any) -> bool:
        return isinstance(value, int | float) or (isinstance(value, str) and is_number(value))

    return [n for n in left if sum(map(numeric, table.columns[n])) > 0.9 * len(table)]


_LABEL = Role(_CLASS, by_content=_only_one)

ROLES: dict[str, dict[str, Role]] = {
    "classify": {"text": Role(_TEXT, by_content=_texts), "label": _LABEL},
    "regress": {
        "text": Role(_TEXT, by_content=_texts),
        "label": Role((*_CLASS, *_NUMBER), by_content=_numbers),
    },
    "pairs": {
        "text": Role(_FIRST, by_content=_texts),
        "text_pair": Role(("text_pair",), by_content=_texts),
        "label": Role((*_CLASS, *_NUMBER), by_content=_only_one),
    },
    "multilabel": {
        "text": Role(_TEXT, by_content=_texts),
        "labels": Role(("labels", "tags", "categories", "topics", "genres", "label")),
    },
    "tag": {"tokens": Role(("tokens", "words", "text", "sentence")), "tags": Role(_TAGS)},
    "qa": {
        "question": Role(("question", "query")),
        "context": Role(("context", "passage", "paragraph")),
        "answers": Role(("answers", "answer")),
        "answer_start": Role(("answer_start",), needed=False),
    },
    "choice": {
        "text": Role(("text", "context", "passage", "article", "sent1", "premise", "startphrase")),
        "question": Role(("question", "sent2"), needed=False),
        "choices": Role(("choices", "options", "endings", "answers")),
        "label": Role((*_CLASS, "answer"), by_content=_only_one),
    },
    "similarity": {
        "text": Role(_FIRST, by_content=_texts),
        "text_pair": Role(("text_pair",), by_content=_texts),
        "label": Role((*_CLASS, *_NUMBER), needed=False),
    },
}
"""Task -> role -> how its column is found."""

TARGETS = ("label", "labels", "tags", "answers", "answer_start")
"""The roles that are learnt: a table to be predicted on does without."""

# Several columns with numbered names that make up one role.
_SERIES = {"choices": re.compile(r"(choice|ending|option|answer)_?([0-9]|[a-e])")}


def guess_columns(
    table: Table,
    task: str,
    given: Mapping[str, str | Sequence[str]] | None = None,
    *,
    labelled: bool = True,
) -> Columns:
    """The column, or columns, of each role that ``task`` reads: what is given wins.

    given: role -> name of a column, or several, in a list or with commas between them.
    labelled: whether what is learnt has to be there; False: it is not looked for.

    Raises ValueError that names the role and the columns there are: for a role that no column, or
    more than one, may be meant by, and for a given name that is none.
    """
    roles = _roles_of(task)
    columns: Columns = {}
    for role, name in (given or {}).items():
        if role not in roles:
            raise ValueError(
                f"columns: got the role {role!r}, expected one of {', '.join(roles)} for {task}"
            )
        columns[role] = _existing(table, role, name)
    wanted = {
        role: how
        for role, how in roles.items()
        if role not in columns and (labelled or role not in TARGETS)
    }
    _pair(table, wanted, columns)
    for role, how in wanted.items():
        if role not in columns:
            _by_name(table, role, how, columns)
    for role, how in wanted.items():
        if role not in columns and how.by_content is not None:
            found = how.by_content(table, _left(table, columns))
            if len(found) == 1:
                columns[role] = found[0]
            elif len(found) > 1 and how.needed:
                raise _ambiguous(table, role, found)
        if role not in columns and how.needed:
            raise ValueError(
                f"{table.name}: no column for {role!r}, which {task} needs, expected one called "
                f"{' or '.join(how.names[:3])}, or to be told which; its columns are "
                f"{', '.join(table.columns)}"
            )
    return {role: columns[role] for role in roles if role in columns}


def as_roles(table: Table, columns: Mapping[str, str | Sequence[str]]) -> Table:
    """The table with its columns named by role. Several columns become one, of dicts by name."""
    renamed: dict[str, list[Any]] = {}
    for role, name in columns.items():
        if isinstance(name, str):
            renamed[role] = table.columns[name]
        else:
            values = zip(*(table.columns[one] for one in name), strict=True)
            renamed[role] = [dict(zip(name, row, strict=True)) for row in values]
    return Table(table.name, table.unit, table.numbers, renamed)


def _roles_of(task: str) -> dict[str, Role]:
    if task not in ROLES:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(ROLES)}")
    return ROLES[task]


def _existing(table: Table, role: str, name: str | Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(name, str) and name in table.columns:
        return name
    names = name.split(",") if isinstance(name, str) else list(name)
    for one in names:
        if one not in table.columns:
            near = difflib.get_close_matches(one, table.columns, n=1)
            meant = f" (is {near[0]!r} meant?)" if near else ""
            raise ValueError(
                f"{table.name}: no column {one!r} for {role!r}{meant}; its columns are "
                f"{', '.join(table.columns)}"
            )
    return names[0] if len(names) == 1 else tuple(names)


def _plain(name: str) -> str:
    """In lower case, with _ for all that is no letter or digit."""
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")


def _left(table: Table, columns: Columns) -> list[str]:
    """Columns without a role, but for those whose names say that they number the rows."""
    taken = set(_flat(columns.values()))
    return [n for n in table.columns if n not in taken and not _ID.fullmatch(_plain(n))]


def _flat(names: Iterable[str | tuple[str, ...]]) -> Iterable[str]:
    for name in names:
        yield from (name,) if isinstance(name, str) else name


def _pair(table: Table, wanted: Mapping[str, Role], columns: Columns) -> None:
    """Two texts under names that go together."""
    if "text" not in wanted or "text_pair" not in wanted:
        return
    by_plain = {_plain(name): name for name in _left(table, columns)}
    for first, second in _PAIRS:
        if first in by_plain and second in by_plain:
            columns["text"], columns["text_pair"] = by_plain[first], by_plain[second]
            return


def _by_name(table: Table, role: str, how: Role, columns: Columns) -> None:
    """The column with one of the role's names or else, if only one does, with it as a word."""
    left = _left(table, columns)
    for name in how.names:
        for column in left:
            if _plain(column) == name:
                columns[role] = column
                return
    series = _SERIES.get(role)
    if series is not None:
        numbered = sorted((n for n in left if series.fullmatch(_plain(n))), key=_plain)
        if len(numbered) > 1:
            columns[role] = tuple(numbered)
            return
    within = [n for n in left if any(name in _plain(n).split("_") for name in how.names)]
    if len(within) > 1 and how.needed:
        raise _ambiguous(table, role, within)
    if within:
        columns[role] = within[0]


def _ambiguous(table: Table, role: str, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{table.name}: {role!r} may be {' or '.join(names)}; expected to be told which; its "
        f"columns are {', '.join(table.columns)}"
    )
