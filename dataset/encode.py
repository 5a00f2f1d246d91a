"""Documents -> token ids, and which of them are to be learned."""

import re
from collections.abc import Iterable
from functools import partial
from itertools import chain

import numpy as np
from jinja2 import TemplateError

from dataset.sources import BadSample, Document
from errors import UserError
from tokens import document_separator

SURROGATES = 0xD800  # no text has one, so each can stand for a control token's name inside a message
# Part of a document: a text or a control token's id, and whether it is learned.
Segment = tuple[str | int, bool]


class Encoder:
    """Encodes documents with a tokenizer; what looks like a control token inside a text stays text.

    With `join_tokens`, consecutive texts are joined into documents of at least so many tokens.
    """

    def __init__(self, tokenizer, join_tokens: int = 0):
        self.tokenizer = tokenizer
        self.join_tokens = join_tokens
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        first = tokenizer("a")["input_ids"][0]
        self.prefix = [first] if first == tokenizer.bos_token_id else []  # <|begin_of_text|>
        self.separator = document_separator(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self.control = {token.content: index for index, token in added if token.special}
        self.control_ids = list({*self.control.values()} - {tokenizer.unk_token_id})
        longest_first = map(re.escape, sorted(self.control, key=len, reverse=True))
        self.control_pattern = re.compile(f"({'|'.join(longest_first)})" if self.control else "(?!)()")
        self.hidden = {name: chr(SURROGATES + number) for number, name in enumerate(self.control)}
        self.shown = {ord(hidden): name for name, hidden in self.hidden.items()}
        self.chat_checked = False

    def encode(self, documents: Iterable[Document]) -> tuple:
        """Ids, mask (True: learned) and lengths of documents end to end, and problems. Raises UserError."""
        segments, problems = [], []
        for document in documents:
            try:
                segments.append(self._segments(document))
            except BadSample as error:
                problems.append(f"{document.where}: {error}")
        ids, mask, lengths = self._encode(segments)
        if self.join_tokens and len(ids):
            ids, lengths = self._joined(ids, lengths)
            mask = np.ones(len(ids), bool)
        return ids, mask, lengths, problems

    def _segments(self, document: Document) -> list[Segment]:
        if document.problem:
            raise BadSample(document.problem)
        if document.messages:
            return self.conversation(document.messages)
        if not document.text:
            return []
        if self.join_tokens:
            return [(document.text.strip() + "\n", True)]
        return [(part, True) for part in (*self.prefix, document.text, self.separator)]

    def _encode(self, documents: list[list[Segment]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        segments = list(chain.from_iterable(documents))
        self.backend.encode_special_tokens = True  # they stay text; transformers resets this
        texts = [content for content, _ in segments if isinstance(content, str)]
        encodings = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        parts = [next(encodings).ids if isinstance(content, str) else [content] for content, _ in segments]
        ids = np.fromiter(chain.from_iterable(parts), np.int32)
        wanted = [content for content, _ in segments if isinstance(content, int)]
        if np.isin(ids, self.control_ids).sum() != np.isin(wanted, self.control_ids).sum():
            raise UserError(
                "the tokenizer turns text into control tokens",
                "Mark these tokens as special in it",
            )
        ends = np.cumsum([0, *map(len, parts)])  # of segments
        mask = np.repeat(np.array([learned for _, learned in segments], bool), np.diff(ends))
        return ids, mask, np.diff(ends[np.cumsum([0, *map(len, documents)])])

    def _joined(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Consecutive rows as documents of at least `join_tokens`; the last one takes what is left over."""
        ends, cuts = np.cumsum(lengths), [0]
        while (row := np.searchsorted(ends, cuts[-1] + self.join_tokens)) < len(ends):
            cuts.append(int(ends[row]))
        texts = np.split(ids, cuts[1:-1])
        documents = [np.concatenate([self.prefix, text, [self.separator]]) for text in texts]
        joined = np.concatenate(documents).astype(np.int32)
        return joined, np.array([*map(len, documents), *lengths[lengths == 0]], np.int64)

    def conversation(self, messages: list[dict]) -> list[Segment]:
        """A chat in the tokenizer's template; assistant turns are learned. Raises BadSample, UserError."""
        if not self.tokenizer.chat_template:
            raise UserError(
                "the data are conversations, and the tokenizer has no chat template",
                "Name an Instruct model's tokenizer with --tokenizer_id",
            )
        # A control token's name inside a message must not reach the template as such.
        hide = partial(self.control_pattern.sub, lambda match: self.hidden[match[0]])
        hidden = [dict(message, content=hide(message["content"])) for message in messages]
        whole = self._render(hidden)
        segments, position = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(hidden[:number], add_generation_prompt=True)
            answered = self._render(hidden[: number + 1])
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise BadSample("the chat template does not write turn after turn: use another tokenizer")
            ends = [match.end() for match in self.control_pattern.finditer(answered, len(prompt))]
            end = ends[-1] if ends else len(answered)  # what follows the end of the turn is not learned
            segments += self._split(whole[position : len(prompt)], False)
            segments += self._split(whole[len(prompt) : end], True)
            position = end
        segments += self._split(whole[position:], False)
        if not self.chat_checked and hidden == messages:
            self._check_chat(segments, whole)
        return segments

    def _render(self, messages: list[dict], **options) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, TypeError) as error:
            raise BadSample(f"the chat template refuses it: {error}") from error

    def _split(self, rendered: str, learned: bool) -> list[Segment]:
        """Rendered text as control tokens and the text between them; hidden names are put back as text."""
        parts = filter(None, self.control_pattern.split(rendered))
        return [(self.control.get(part, part.translate(self.shown)), learned) for part in parts]

    def _check_chat(self, segments: list[Segment], rendered: str) -> None:
        """Segments are encoded apart: raises UserError if a text's tokens depend on what is around it."""
        ids, _, _ = self._encode([segments])
        if ids.tolist() != self.tokenizer(rendered, add_special_tokens=False)["input_ids"]:
            raise UserError(
                "this tokenizer's tokens of a text depend on the control tokens around it",
                "Use a byte-level tokenizer, such as Llama 3's",
            )
        self.chat_checked = True
