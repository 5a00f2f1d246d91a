"""Documents -> token ids and loss masks, in parts on disk, by as many processes as there are cores.

A part is made from one chunk of the source, written once and kept, so that an interrupted preparation continues.
"""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from jinja2 import TemplateError
from tqdm import tqdm

from llama3.assets import document_separator
from llama3.sources import BadSample, Chunk, Document, Source, documents, split_long

ENCODE_BYTES = 1 << 18  # of text given to the tokenizer at once
KEY_TOKENS = 4096  # documents equal in their first so many tokens fall into the same split
# By what `tokenizers` cuts for ByteLevel(use_regex=True): GPT-2's own.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("starts", pa.bool_()),
        ("key", pa.uint64()),
    ]
)


class TokenizeError(ValueError):
    """Text and tokenizer that do not go together, or a process that died."""


@dataclass
class Batch:
    """Pieces of documents end to end: ids (n,) int32; mask (n,) uint8 or None; for each piece its length and whether a document starts."""

    ids: np.ndarray
    mask: np.ndarray | None
    lengths: np.ndarray
    starts: np.ndarray


class Encoder:
    """A tokenizer with its own beginning of a document and the document separator; raw text never yields a control token."""

    def __init__(self, tokenizer, join_tokens: int = 0):
        self.tokenizer = tokenizer
        self.join_tokens = (
            join_tokens  # rows are sentences: join consecutive ones to documents of at least so many tokens
        )
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        plain, whole = (self.backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.prefix = whole[
            : next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        ]  # <|begin_of_text|>, if any
        self.separator = [document_separator(tokenizer)]
        self.control = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.control_names = list(self.control)
        longest_first = sorted(self.control_names, key=len, reverse=True)
        self.control_pattern = re.compile(
            f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)()"
        )
        ids = np.array(sorted(set(self.control.values()) - {tokenizer.unk_token_id}), np.int64)
        self.is_control = np.zeros(max([len(tokenizer), *(ids + 1)]), bool)
        self.is_control[ids] = True
        self.chat_checked = False
        self.tiktoken = as_tiktoken(self.backend)

    def encode(self, stream: Iterator[Document], bad: list[str]) -> Iterator[Batch]:
        """Batches of about ENCODE_BYTES of text; conversations that cannot be rendered are appended to `bad`."""
        batches = self._batches(stream, bad)
        return self._joined(batches) if self.join_tokens else batches

    def _batches(self, stream, bad) -> Iterator[Batch]:
        held, held_kind, size = [], None, 0
        for document in stream:
            for kind, item, length in self._items(document, bad):
                if held and (kind != held_kind or size >= ENCODE_BYTES):
                    yield held_kind(held)
                    held, size = [], 0
                held.append(item)
                held_kind, size = kind, size + length
        if held:
            yield held_kind(held)

    def _items(self, document: Document, bad) -> Iterator[tuple]:
        """(method that encodes a list of such items, item, length of its text) of a document's pieces."""
        if isinstance(document.content, str):
            pieces = [document.content.strip() + "\n"] if self.join_tokens else split_long(document.content)
            for number, text in enumerate(pieces, 1):
                yield (
                    self._encode_texts,
                    (text, document.starts and number == 1, document.ends and number == len(pieces)),
                    len(text),
                )
            return
        try:
            yield (
                self._encode_chats,
                self.conversation(document.content),
                sum(len(message["content"]) for message in document.content),
            )
        except BadSample as error:
            bad.append(f"{document.where}: {error}")

    def _encode_texts(self, texts: list[tuple[str, bool, bool]]) -> Batch:
        """Pieces of text, with whether each starts and ends a document."""
        prefix, separator = ([], []) if self.join_tokens else (self.prefix, self.separator)
        ids, bounds = [], [0]
        encoded = self._encode([text for text, _, _ in texts])
        for text_ids, (_, starts, ends) in zip(
            encoded, texts, strict=True
        ):  # a list grows faster than arrays are joined
            if starts:
                ids += prefix
            ids += text_ids
            if ends:
                ids += separator
            bounds.append(len(ids))
        starts = np.array([starts for _, starts, _ in texts])
        control = starts.sum() * self._count_control(prefix) + sum(
            ends for _, _, ends in texts
        ) * self._count_control(separator)
        return Batch(self._checked(ids, control), None, np.diff(bounds), starts)

    def _encode_chats(self, chats: list[list[tuple]]) -> Batch:
        """Conversations, each in its segments."""
        segments = [segment for chat in chats for segment in chat]
        encoded = iter(self._encode([text for text, _ in segments if isinstance(text, str)]))
        parts = [next(encoded) if isinstance(text, str) else [text] for text, _ in segments]
        lengths = np.array([len(part) for part in parts])
        ids = self._checked(
            [index for part in parts for index in part],
            sum(not isinstance(text, str) for text, _ in segments),
        )
        mask = np.repeat(np.array([target for _, target in segments], np.uint8), lengths)
        chat_lengths = np.add.reduceat(lengths, np.cumsum([0] + [len(chat) for chat in chats[:-1]]))
        return Batch(ids, mask, chat_lengths, np.ones(len(chats), bool))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text: by tiktoken where it can and agrees on a sample of the batch, else by the tokenizer itself."""
        self.backend.encode_special_tokens = (
            True  # special strings in text are text; transformers sets it back for itself
        )
        if self.tiktoken:
            try:
                sample = max(texts, key=len, default="")[:1000]
                if self.tiktoken(sample) == self.backend.encode(sample, add_special_tokens=False).ids:
                    return [self.tiktoken(text) for text in texts]
            except BaseException as error:
                if (
                    type(error).__name__ != "PanicException"
                ):  # its regular expressions end so on very long runs of spaces
                    raise
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _count_control(self, ids: list[int] | np.ndarray) -> int:
        return np.count_nonzero(self.is_control[ids])

    def _checked(self, ids: list[int], control: int) -> np.ndarray:
        """The ids as int32, of which `control` are to be control tokens."""
        ids = np.array(ids, np.int32)
        if self._count_control(ids) != control:
            raise TokenizeError(
                "the tokenizer turns plain text into control tokens: mark its control tokens as special"
            )
        return ids

    def conversation(self, messages: list[dict]) -> list[tuple]:
        """segments (text or a control token's id, 1 where it is to be learned else 0) of a conversation in the tokenizer's chat template.

        Only assistant turns are learned, up to and with their last control token. What looks like a control token inside a message
        is hidden from the template and put back as text. Raises BadSample where the template refuses the conversation.
        """
        if not self.chat_checked:
            self._check_chat()
        hidden = [dict(message, content=self._hide(message["content"])) for message in messages]
        whole = self._render(hidden)
        segments, position = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answered = self._render(hidden[:number], prompt=True), self._render(hidden[: number + 1])
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise BadSample(
                    "the chat template does not write turn after turn, so that what is to be learned cannot be told"
                )
            turn = whole[len(prompt) : len(answered)]
            ends = [match.end() for match in self.control_pattern.finditer(turn)]
            end = len(prompt) + (ends[-1] if ends else len(turn))
            segments += self._segments(whole[position : len(prompt)], 0) + self._segments(
                whole[len(prompt) : end], 1
            )
            position = end
        return segments + self._segments(whole[position:], 0)

    def _render(self, messages, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError) as error:
            raise BadSample(f"the chat template refuses it: {error}") from error

    def _hide(self, text: str) -> str:
        if "\ufdd0" in text or "\ufdd1" in text:
            raise BadSample("a turn has U+FDD0 or U+FDD1 in it, which are no characters")
        return self.control_pattern.sub(
            lambda match: f"\ufdd0{self.control_names.index(match[0])}\ufdd1", text
        )

    def _segments(self, text: str, target: int) -> list[tuple]:
        segments = []
        for part in self.control_pattern.split(text):
            if part in self.control:
                segments.append((self.control[part], target))
            elif part:
                segments.append(
                    (
                        re.sub("\ufdd0([0-9]+)\ufdd1", lambda match: self.control_names[int(match[1])], part),
                        target,
                    )
                )
        return segments

    def _check_chat(self) -> None:
        """Refuse a tokenizer without a template, or whose text depends on the control tokens around it: segments are encoded apart."""
        if not self.tokenizer.chat_template:
            raise TokenizeError(
                "these are conversations, but the tokenizer has no chat template: name an Instruct model's --tokenizer_id"
            )
        self.chat_checked = True
        messages = [dict(role="user", content="Is it so?"), dict(role="assistant", content="It is.")]
        ids = self._encode_chats([self.conversation(messages)]).ids
        if ids.tolist() != self.tokenizer(self._render(messages), add_special_tokens=False)["input_ids"]:
            raise TokenizeError(
                "this tokenizer's text depends on the control tokens around it: use a byte-level one, such as Llama 3's"
            )

    def _joined(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Consecutive rows joined into documents of at least `join_tokens`; what is left over joins the last."""

        def document(rows):
            ids = np.concatenate([self.prefix, *rows, self.separator]).astype(np.int32)
            return Batch(ids, None, np.array([len(ids)]), np.array([True]))

        full, held, count = [], [], 0
        for batch in batches:
            for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1]):
                held.append(ids)
                count += len(ids)
                if count >= self.join_tokens:
                    if full:
                        yield document(full)
                    full, held, count = held, [], 0
        if full or held:
            yield document(full + held)


def as_tiktoken(backend) -> Callable[[str], list[int]] | None:
    """Text -> ids as `backend` gives, by tiktoken, which is five times as fast; None if it is not byte-level BPE as Llama 3's and GPT-2's.

    Those cut text into words by one regular expression, and merge in the order of the ids to every token that is longer than a byte.
    """
    facts = json.loads(backend.to_str())
    model, pattern = facts["model"], _word_pattern(facts["pre_tokenizer"] or {})
    added = {token["content"]: token["special"] for token in facts["added_tokens"]}
    if facts["normalizer"] or model["type"] != "BPE" or pattern is None or not all(added.values()):
        return None
    if model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_of = {chr(byte): byte for byte in printable}  # how the byte-level alphabet writes them
    bytes_of |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    try:
        import tiktoken

        merged = [
            model["vocab"]["".join(pair.split(" ") if isinstance(pair, str) else pair)]
            for pair in model["merges"]
        ]
        ranks = {
            bytes(map(bytes_of.__getitem__, token)): index
            for token, index in model["vocab"].items()
            if token not in added
        }
        encoding = tiktoken.Encoding("model's own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        # Both take a word that is a token as a whole, if merging would lead there: of itself with ignore_merges, else tried for each.
        whole = ranks if not model["ignore_merges"] else ()
        texts = [text for token in whole if (text := token.decode(errors="ignore")).encode() == token]
        same = [encoding.encode_ordinary(t) for t in texts] == [
            e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
        same &= merged == sorted(merged) and set(merged) == {
            index for token, index in ranks.items() if len(token) > 1
        }
    except (ImportError, KeyError, ValueError):  # not installed, or not that kind after all
        return None
    unknown = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)

    def encode(text: str) -> list[int]:
        if unknown and len((raw := text.encode()).translate(None, unknown)) < len(
            raw
        ):  # where tiktoken would panic
            return backend.encode(text, add_special_tokens=False).ids
        return encoding.encode_ordinary(text)

    return encode if same else None


def _word_pattern(cutting: dict) -> str | None:
    """The one regular expression by which a pre-tokenizer cuts text into words; None if it does more than that."""
    match cutting.get("pretokenizers", [cutting]):
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ]:
            return pattern
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return GPT2_WORDS
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            # A digit ends the text before it, spaces included. Digits knows some of a later Unicode than tiktoken does.
            digit = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
            return rf"[{digit}]|\s+(?=[{digit}])|" + GPT2_WORDS.replace(r"\p{N}]", digit + "]")
    return None


# ---- parts ----


def tokenize(source: Source, encoder: Encoder, folder: Path, num_proc: int) -> list[dict]:
    """Write the parts of `source` that `folder` lacks, in `num_proc` processes. Returns the facts of each part, in order."""
    parts: dict[int, dict] = {}
    folder.mkdir(parents=True, exist_ok=True)
    began, new_tokens = time.monotonic(), 0
    bar = tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", dynamic_ncols=True)

    def done(part: dict) -> None:
        if part["bad"] and not any(earlier["bad"] for earlier in parts.values()):
            bar.write(f"bad sample: {part['bad_examples'][0]}")
        parts[part["index"]] = part
        bar.update(part["progress"])
        bar.set_postfix_str(
            f"{new_tokens / max(1e-3, time.monotonic() - began):,.0f} tokens/s", refresh=False
        )

    # forked: the workers have the tokenizer at once, whatever it was made from
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_proc, fork, _begin_worker, (encoder, source.text_column, folder))
    running = set()
    try:
        for index, chunk in enumerate(source.chunks(folder.with_name("unpacked"), encoder.join_tokens)):
            if part := _finished_part(folder, index):
                done(part)
                continue
            running.add(pool.submit(_tokenize_chunk, index, chunk))
            while len(running) >= 2 * num_proc:  # what is read ahead stays bounded
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    new_tokens += future.result()["tokens"]
                    done(future.result())
        for future in running:
            new_tokens += future.result()["tokens"]
            done(future.result())
    except BrokenProcessPool as error:
        raise TokenizeError(
            "a tokenizing process was killed, most likely for want of memory; start again: what is done is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return [parts[index] for index in range(len(parts))]


_worker: dict = {}  # of a tokenizing process


def _begin_worker(encoder: Encoder, text_column: str | None, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # by which the pool ends the others when one died: not the parent's clean-up
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _worker.update(encoder=encoder, text_column=text_column, folder=folder)
    parent = os.getppid()

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _finished_part(folder: Path, index: int) -> dict | None:
    try:
        facts = json.loads((folder / f"{index:08}.json").read_text())
        return facts if (folder / f"{index:08}.arrow").stat().st_size == facts["bytes"] else None
    except (OSError, ValueError):
        return None


def _tokenize_chunk(index: int, chunk: Chunk) -> dict:
    """Write part `index`: an Arrow file of document pieces, then its facts, whose presence says that the part is whole."""
    encoder, folder = _worker["encoder"], _worker["folder"]
    facts = dict(
        index=index, progress=chunk.progress, documents=0, tokens=0, max_token_id=-1, masked=False, empty=0
    )
    bad = []

    def usable() -> Iterator[Document]:
        for document in documents(chunk, _worker["text_column"]):
            if isinstance(document.content, BadSample):
                bad.append(f"{document.where}: {document.content}")
            elif document.content is None:
                facts["empty"] += 1
            else:
                yield document

    beside = folder / f"{index:08}.{os.getpid()}"
    with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in encoder.encode(usable(), bad):
            if len(batch.lengths):  # a document may start with a piece that has no tokens
                writer.write_batch(_record_batch(batch))
                facts["documents"] += int(batch.starts.sum())
                facts["tokens"] += len(batch.ids)
                facts["max_token_id"] = max(facts["max_token_id"], int(batch.ids.max(initial=-1)))
                facts["masked"] |= batch.mask is not None
    facts |= dict(bad=len(bad), bad_examples=bad[:5], bytes=beside.stat().st_size)
    beside.rename(folder / f"{index:08}.arrow")
    beside.write_text(json.dumps(facts))
    beside.rename(folder / f"{index:08}.json")
    return facts


def _record_batch(batch: Batch) -> pa.RecordBatch:
    bounds = np.append(0, np.cumsum(batch.lengths))
    mask, mask_bounds = (
        (np.empty(0, np.uint8), np.zeros_like(bounds)) if batch.mask is None else (batch.mask, bounds)
    )
    raw = memoryview(batch.ids).cast("B")
    keys = [
        xxhash.xxh64_intdigest(raw[4 * begin : 4 * min(end, begin + KEY_TOKENS)]) if starts else 0
        for begin, end, starts in zip(
            bounds.tolist(), bounds[1:].tolist(), batch.starts.tolist(), strict=False
        )
    ]
    columns = [
        list_array(bounds, batch.ids),
        list_array(mask_bounds, mask),
        pa.array(batch.starts),
        pa.array(keys, pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def list_array(bounds: np.ndarray, values: np.ndarray) -> pa.ListArray:
    """The values between each two bounds as a list."""
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values))


def read_parts(folder: Path, parts: list[dict]) -> Iterator[tuple[Batch, np.ndarray]]:
    """(batch, keys of its pieces) of each batch of each part, in memory only while it is used."""
    for part in parts:
        with pa.memory_map(str(folder / f"{part['index']:08}.arrow")) as file:
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                ids, mask, starts, keys = reader.get_batch(index).columns
                masks = mask.values.to_numpy() if len(mask.values) else None
                batch = Batch(
                    ids.values.to_numpy(),
                    masks,
                    np.diff(ids.offsets.to_numpy()),
                    starts.to_numpy(zero_copy_only=False),
                )
                yield batch, keys.to_numpy()
