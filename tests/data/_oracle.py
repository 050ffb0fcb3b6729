"""A corpus as plain Python makes it: sentence by sentence, token by token, all in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from fastbert.data.tokenizer import SPECIAL_TOKENS, make_tokenizer

_WORDS = (
    "the cat sat on mat new york city a dog in of and ##s ##ing ##ly un ##able I b c d e é ## # "
    ". , ! ? [ ] ( ) ' \" - 1 9 ##0 ##1 pad sep mask 猫 ##b ##c ##d ##e"
)
WORDS = _WORDS.split(" ")


def bert_tokenizer(words: Sequence[str] = WORDS, lowercase: bool = True) -> Tokenizer:
    """BERT's special tokens, then ``words``."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *words)))}
    return make_tokenizer(vocabulary, lowercase)


class Token(NamedTuple):
    id: int
    capitalised: bool


def encode(sentence: str, tokenizer: Tokenizer) -> list[Token]:
    """The tokens of a sentence, special tokens taken for plain text."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    encoding = plain.encode(sentence, add_special_tokens=False)
    found: list[Token] = []
    capital = False
    for i, text, (start, _) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
        if not text.startswith("##") or not found:
            capital = sentence[start].isupper() or sentence[start].istitle()
        found.append(Token(i, capital))
    return found


def encode_documents(
    documents: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> list[list[list[Token]]]:
    """Documents of sentences of tokens; what has none is left out."""
    encoded = [[encode(sentence, tokenizer) for sentence in document] for document in documents]
    kept = [[sentence for sentence in document if sentence] for document in encoded]
    return [document for document in kept if document]


def find_units(
    ids: Sequence[int], phrases: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Iterator[tuple[int, int]]:
    """(first, end) of the phrases in a sentence: at each place the longest that fits."""

    def begins_word(place: int) -> bool:
        return place == len(ids) or not tokenizer.id_to_token(ids[place]).startswith("##")

    place = 0
    while place < len(ids):
        ends = [
            place + len(phrase)
            for phrase in phrases
            if phrase
            and list(ids[place : place + len(phrase)]) == list(phrase)
            and begins_word(place + len(phrase))
        ]
        if begins_word(place) and ends:
            yield place, max(ends)
            place = max(ends)
        else:
            place += 1
