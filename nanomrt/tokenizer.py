"""Text to token ids and back: a thin layer over `tokenizers`, whose `tokenizer.json` travels with each checkpoint."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from nanomrt.config import UserError


class Tokenizer:
    """`encode` and `decode` by the vocabulary of one `tokenizer.json`."""

    def __init__(self, inner: HFTokenizer):
        self._inner = inner

    @classmethod
    def from_words(cls, words: Sequence[str], special: Sequence[str]) -> "Tokenizer":
        """A word-level tokenizer: one id per word, special tokens first, words separated by blanks in the text."""
        vocab = {word: i for i, word in enumerate((*special, *words))}
        if len(vocab) != len(special) + len(words):
            raise ValueError("the words of a tokenizer must be distinct")
        inner = HFTokenizer(models.WordLevel(vocab, unk_token=special[0]))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return cls(inner).with_special(special)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError if there is no such file, or it is no tokenizer."""
        try:
            inner = HFTokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"{path} is no tokenizer ({error}): take another model") from None
        inner.no_truncation()  # settings of whoever trained it, which would cut or pad what is encoded
        inner.no_padding()
        return cls(inner)

    def with_special(self, special: Sequence[str]) -> "Tokenizer":
        """The same, and each of these words is one token: where it was none, the vocabulary grows by it. Raises UserError if the
        ids had holes, which new tokens don't fill: they would collide with old ones."""
        inner = HFTokenizer.from_str(self._inner.to_str())
        inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
        ids = inner.get_vocab().values()
        if len(set(ids)) < len(ids):
            raise UserError("the ids of this vocabulary have holes, so tokens can't be added: take another model")
        return Tokenizer(inner)

    def save(self, path: Path) -> None:
        self._inner.save(str(path))

    @cached_property
    def _size(self) -> int:
        return 1 + max(self._inner.get_vocab().values())

    def __len__(self) -> int:
        """The ids there are, 0 … len - 1; somebody else's vocabulary may have holes."""
        return self._size

    def id(self, word: str) -> int:
        """The id of one token. Raises KeyError if the vocabulary lacks it."""
        token_id = self._inner.token_to_id(word)
        if token_id is None:
            raise KeyError(f"{word!r} is not in the vocabulary of {len(self)} tokens")
        return token_id

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included: they carry the structure that a grader reads."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self._inner.decode_batch([list(row) for row in rows], skip_special_tokens=False)
