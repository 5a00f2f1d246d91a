"""Text or chat -> token sequences of equal length on disk -> batches.

`prepare` tokenizes a source chunk by chunk into parts in `<dataset_path>.preparing`, in as many processes as there are cores. A
part is written once and kept, so that an interrupted preparation continues. Then the parts are split by document, packed in order
and saved; one rename makes the result visible. Every byte of it follows from the source, the tokenizer and the settings alone.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from filelock import FileLock, Timeout
from tqdm import tqdm

from llama3.assets import document_separator
from llama3.sources import Bad, BadSample, Chunk, Document, Source, documents, split_long

FORMAT = 1  # of the prepared folder; raised whenever the same input would give other bytes
ENCODE_BYTES = 1 << 18  # of text given to the tokenizer at once
KEY_TOKENS = 4096  # documents equal in their first so many tokens fall into the same split
IGNORED = -100  # label that carries no loss


class DataError(ValueError):
    """Data that is missing, unusable or prepared differently; the message says what to do."""


def prepare(
    dataset_id: str,
    tokenizer,
    dataset_path: str | Path,
    max_seq_len: int,
    validation_fraction: float = 0.01,
    seed: int = 0,
    text_column: str | None = None,
    skip_bad_samples: bool = False,
    num_proc: int | None = None,
) -> Path:
    """Tokenize, pack and split `dataset_id` into a DatasetDict at `dataset_path`, and print a summary.

    With the settings of an earlier preparation this does nothing, with others it refuses. Raises DataError and AssetError.
    """
    target = Path(dataset_path)
    if not 0 <= validation_fraction < 1:
        raise DataError(f"--validation_fraction is {validation_fraction}: give a fraction from 0 up to, but not, 1")
    if max_seq_len < 2:
        raise DataError(f"--max_seq_len is {max_seq_len}: a sample needs at least 2 tokens")
    source = Source(dataset_id)
    settings = dict(
        format=FORMAT,
        source=source.identity or dataset_id,
        tokenizer=_fingerprint(tokenizer),
        max_seq_len=max_seq_len,
        validation_fraction=validation_fraction,
        seed=seed,
        text_column=text_column,
    )
    if _already_prepared(target, settings):
        return target
    work = target.with_name(target.name + ".preparing")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{work} cannot be made ({error}): choose another --dataset_path") from error
    with _only_one(work):
        if not _already_prepared(target, settings):  # else another process did it while this one waited
            _prepare_alone(source, tokenizer, target, work, settings, skip_bad_samples, num_proc or _cores())
        shutil.rmtree(work, ignore_errors=True)
    return target


def open_split(dataset_path: str | Path, split: str, max_seq_len: int, vocab_size: int, max_samples: int | None = None):
    """Split 'train' or 'validation' as a datasets.Dataset of rows in numpy; of `max_samples`, always the same ones, evenly spaced.

    Raises DataError if it is not prepared, prepared with another sequence length, or with ids from `vocab_size` up.
    """
    path = Path(dataset_path)
    facts = _read_facts(path)
    fix = f"`python train.py --prepare_data --dataset_path={path} --max_seq_len={max_seq_len}` with this run's other data flags"
    if facts is None:
        raise DataError(f"{path} is not prepared: run {fix}")
    prepared = facts["settings"]["max_seq_len"]
    if prepared != max_seq_len:
        raise DataError(
            f"{path} holds samples of {prepared} tokens, --max_seq_len is {max_seq_len}: use --max_seq_len={prepared}, "
            f"or another --dataset_path, prepared by `python train.py --prepare_data --max_seq_len={max_seq_len}`"
        )
    if facts["max_token_id"] >= vocab_size:
        raise DataError(
            f"{path} has token id {facts['max_token_id']}, the model's vocabulary has {vocab_size}: "
            "prepare the data with the model's own tokenizer (--tokenizer_id, another --dataset_path)"
        )
    try:
        dataset = datasets.load_from_disk(str(path / split))
    except Exception as error:  # datasets raises all sorts of them for a damaged or newer folder
        raise DataError(f"{path}/{split} (datasets {facts['datasets']}) cannot be read: {error}. Prepare it again.") from error
    if max_samples is not None and len(dataset) > max_samples:
        dataset = dataset.select(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int))
    return dataset.with_format("numpy")


class Collator:
    """Rows -> a batch that is always (micro_batch_size, max_seq_len): missing rows become rows without targets."""

    def __init__(self, max_seq_len: int, micro_batch_size: int):
        self.max_seq_len = max_seq_len
        self.micro_batch_size = micro_batch_size

    def __call__(self, rows: list[dict]) -> dict:
        """Batch of B = micro_batch_size rows of T = max_seq_len tokens.

        input_ids, labels, position_ids: (B, T) int64; labels are shifted, IGNORED where there is no target. cu_seqlens: int32 bounds
        of the document pieces in the B * T tokens laid end to end. num_tokens: int, without the rows that were missing.
        """
        B, T = self.micro_batch_size, self.max_seq_len
        assert len(rows) <= B, f"{len(rows)} rows for a micro-batch of {B}"
        input_ids = np.zeros((B, T), dtype=np.int64)
        target = np.zeros((B, T), dtype=bool)  # may token t be predicted?
        starts = np.zeros((B, T), dtype=bool)
        starts[:, 0] = True
        for b, row in enumerate(rows):
            input_ids[b] = row["input_ids"]
            target[b] = row["loss_mask"] if "loss_mask" in row else True
            starts[b, row["document_starts"]] = True
        labels = np.full((B, T), IGNORED, dtype=np.int64)
        labels[:, :-1] = np.where((target & ~starts)[:, 1:], input_ids[:, 1:], IGNORED)
        bounds = np.flatnonzero(starts)  # row starts included
        cu_seqlens = np.append(bounds, B * T)
        position_ids = np.arange(B * T) - np.repeat(bounds, np.diff(cu_seqlens))
        return dict(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids.reshape(B, T)),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            num_tokens=len(rows) * T,
        )


# ---- preparation ----


def _prepare_alone(source: Source, tokenizer, target, work, settings, skip_bad_samples, num_proc) -> None:
    source.open()
    content = source.identity or source.rows._fingerprint
    key = _hash([settings, content, datasets.__version__])
    for stale in work.iterdir():
        if stale.name not in (key, "lock"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    folder = work / key
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    encoder = Encoder(tokenizer, settings["max_seq_len"] if source.joins_rows else 0)
    parts = _tokenize(source, encoder, folder, settings["text_column"], num_proc)
    bad = sum(part["bad"] for part in parts)
    if bad and not skip_bad_samples:
        examples = "\n  ".join([example for part in parts for example in part["bad_examples"]][:5])
        raise DataError(f"{source.dataset_id} has {bad} bad samples:\n  {examples}\nMend them, or leave them out with --skip_bad_samples.")
    result = folder / "result"
    shutil.rmtree(result, ignore_errors=True)
    facts = dict(
        settings=settings,
        dataset_id=source.dataset_id,
        datasets=datasets.__version__,
        max_token_id=max((part["max_token_id"] for part in parts), default=-1),
        empty_samples=sum(part["empty"] for part in parts),
        bad_samples=bad,
        **_pack(parts, folder, result, settings, key),
    )
    (result / "preparation.json").write_text(json.dumps(facts, indent=2) + "\n")
    for path in result.rglob("*"):  # on disk before it is visible
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    result.rename(target)
    print(summary(target, tokenizer))


def _tokenize(source: Source, encoder: "Encoder", folder: Path, text_column, num_proc: int) -> list[dict]:
    """Write the parts that are missing, in `num_proc` processes. Returns the facts of each part, in order."""
    parts: dict[int, dict] = {}
    warned = False
    began, new_tokens = time.monotonic(), 0
    bar = tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", dynamic_ncols=True)

    def done(part: dict) -> None:
        nonlocal warned
        parts[part["index"]] = part
        bar.update(part["progress"])
        bar.set_postfix_str(f"{new_tokens / max(1e-3, time.monotonic() - began):,.0f} tokens/s", refresh=False)
        if part["bad"] and not warned:
            bar.write(f"bad sample: {part['bad_examples'][0]}")
            warned = True

    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("fork"), _begin_worker, (encoder, source.rows, text_column, folder / "parts")
    )
    running = set()
    try:
        with bar:
            for index, chunk in enumerate(source.chunks(folder / "unpacked", encoder.join_tokens)):
                if part := _finished_part(folder / "parts", index):
                    done(part)
                    continue
                running.add(pool.submit(_tokenize_chunk, index, chunk))
                finished = set()
                if len(running) >= 2 * num_proc:  # what is read ahead stays bounded
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    new_tokens += future.result()["tokens"]
                    done(future.result())
            for future in running:
                new_tokens += future.result()["tokens"]
                done(future.result())
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process was killed, most likely for memory: use a smaller --num_proc; what is done is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return [parts[index] for index in range(len(parts))]


_worker: dict = {}  # of a tokenizing process


def _begin_worker(encoder, hub_rows, text_column, folder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    _worker.update(encoder=encoder, hub_rows=hub_rows, text_column=text_column, folder=folder)
    parent = os.getppid()

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _finished_part(folder: Path, index: int) -> dict | None:
    try:
        part = json.loads((folder / f"{index:08}.json").read_text())
        return part if os.path.getsize(part["path"]) == part["bytes"] else None
    except (OSError, ValueError):
        return None


def _tokenize_chunk(index: int, chunk: Chunk) -> dict:
    """Write part `index`: an Arrow file of document pieces, then its facts, whose presence says that the part is whole."""
    encoder, path = _worker["encoder"], _worker["folder"] / f"{index:08}.arrow"
    bad, empty, tokens, max_token_id, documents_begun, masked = [], 0, 0, -1, 0, False

    def usable() -> Iterator[Document]:
        nonlocal empty
        for document in documents(chunk, _worker["hub_rows"], _worker["text_column"]):
            if isinstance(document, Bad):
                bad.append(f"{document.where}: {document.reason}")
            elif document is None:
                empty += 1
            else:
                yield document

    beside = path.with_suffix(f".{os.getpid()}")
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())), ("starts", pa.bool_()), ("key", pa.uint64())]
    )
    with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for pieces in encoder.encode(usable(), bad):
            lengths = np.array([len(piece[0]) for piece in pieces])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            flat = np.concatenate([piece[0] for piece in pieces])
            has_mask = any(piece[1] is not None for piece in pieces)
            masks = [np.ones(n, np.uint8) if piece[1] is None else piece[1] for piece, n in zip(pieces, lengths, strict=True)]
            mask = np.concatenate(masks) if has_mask else np.empty(0, np.uint8)
            starts = [piece[2] for piece in pieces]
            keys = [xxhash.xxh64_intdigest(piece[0][:KEY_TOKENS].tobytes()) if piece[2] else 0 for piece in pieces]
            mask_offsets = offsets if has_mask else np.zeros_like(offsets)
            columns = [_lists(offsets, flat), _lists(mask_offsets, mask), pa.array(starts), pa.array(keys, pa.uint64())]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            tokens += len(flat)
            documents_begun += sum(starts)
            masked |= has_mask
            max_token_id = max(max_token_id, int(flat.max()))
    beside.rename(path)
    facts = dict(
        index=index,
        path=str(path),
        bytes=path.stat().st_size,
        progress=chunk.progress,
        documents=documents_begun,
        tokens=tokens,
        masked=masked,
        max_token_id=max_token_id,
        empty=empty,
        bad=len(bad),
        bad_examples=bad[:5],
    )
    beside.write_text(json.dumps(facts))
    beside.rename(path.with_suffix(".json"))
    return facts


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


class Encoder:
    """Documents -> token ids, with the tokenizer's own beginning and the document separator; raw text never yields a control token."""

    def __init__(self, tokenizer, join_tokens: int = 0):
        self.tokenizer = tokenizer
        self.join_tokens = join_tokens  # rows are sentences: join consecutive ones to at least so many tokens
        self.backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a").ids
        position = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.prefix = np.array(whole[:position], np.int32)  # <|begin_of_text|> where the tokenizer puts one
        self.separator = np.array([document_separator(tokenizer)], np.int32)
        self.backend.encode_special_tokens = True  # special strings in text are text
        self.control = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control_names = list(self.control)
        longest_first = sorted(self.control_names, key=len, reverse=True)
        self.control_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)()")
        ids = np.array(sorted(set(self.control.values()) - {tokenizer.unk_token_id}), np.int64)
        self.is_control = np.zeros(max([len(tokenizer), *(ids + 1)]), bool)
        self.is_control[ids] = True
        self.chat_checked = False

    def encode(self, stream: Iterator[Document], bad: list[str]) -> Iterator[list[tuple]]:
        """Pieces (ids int32, loss mask uint8 or None, starts a document) in lists of about ENCODE_BYTES of text.

        Conversations that cannot be rendered are appended to `bad`.
        """
        batches = self._batches(stream, bad)
        return self._joined(batches) if self.join_tokens else batches

    def _batches(self, stream, bad):
        batch, size = [], 0
        for document in stream:
            try:
                pieces = self._text(document) if isinstance(document.content, str) else [(True, self.conversation(document.content))]
            except BadSample as error:
                bad.append(f"{document.where}: {error}")
                continue
            for piece in pieces:
                batch.append(piece)
                size += sum(len(segment) for segment, _ in piece[1])
                if size >= ENCODE_BYTES:
                    yield self._encode(batch)
                    batch, size = [], 0
        if batch:
            yield self._encode(batch)

    def _text(self, document: Document) -> list[tuple]:
        """(starts a document, its segments) of each piece of a text; a segment is text or ids, and its mask value or None."""
        if self.join_tokens:
            return [(True, [(document.content.strip() + "\n", None)])]
        pieces = [[(text, None)] for text in split_long(document.content)]
        if document.starts:
            pieces[0].insert(0, (self.prefix, None))
        if document.ends:
            pieces[-1].append((self.separator, None))
        return [(document.starts and number == 0, segments) for number, segments in enumerate(pieces)]

    def conversation(self, messages: list[dict]) -> list[tuple]:
        """(text or control-token id, 1 where it is to be learned else 0) segments of a conversation in the tokenizer's chat template.

        Only assistant turns are learned, up to and with their last control token. What looks like a control token inside a message
        is hidden from the template and put back as text. Raises BadSample where the template refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise DataError("these are conversations, but the tokenizer has no chat template: name an Instruct model's with --tokenizer_id")
        if not self.chat_checked:
            self._check_chat_tokens()
        hidden = [dict(message, content=self._hide(message["content"])) for message in messages]
        whole = self._render(hidden, False)
        segments, position = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, answered = self._render(hidden[:number], True), self._render(hidden[: number + 1], False)
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise BadSample("the chat template does not write turn after turn, so that what is to be learned cannot be told")
            turn = whole[len(prompt) : len(answered)]
            ends = [match.end() for match in self.control_pattern.finditer(turn)]
            end = len(prompt) + (ends[-1] if ends else len(turn))
            segments += self._segments(whole[position : len(prompt)], 0) + self._segments(whole[len(prompt) : end], 1)
            position = end
        return segments + self._segments(whole[position:], 0)

    def _render(self, messages, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError) as error:
            raise BadSample(f"the chat template refuses it: {error}") from error

    def _hide(self, text: str) -> str:
        return self.control_pattern.sub(lambda match: f"\ufdd0{self.control_names.index(match[0])}\ufdd1", text)

    def _segments(self, text: str, target: int) -> list[tuple]:
        segments = []
        for part in self.control_pattern.split(text):
            if part in self.control:
                segments.append((np.array([self.control[part]], np.int32), target))
            elif part:
                segments.append((re.sub("\ufdd0(\\d+)\ufdd1", lambda match: self.control_names[int(match[1])], part), target))
        return segments

    def _check_chat_tokens(self) -> None:
        """Refuse a tokenizer whose text depends on the control tokens around it: it cannot be encoded segment by segment."""
        self.chat_checked = True
        messages = [dict(role="user", content="Is it so?"), dict(role="assistant", content="It is.")]
        ids = self._encode([(True, self.conversation(messages))])[0][0]
        if ids.tolist() != self.tokenizer(self._render(messages, False), add_special_tokens=False)["input_ids"]:
            raise DataError("this tokenizer's text depends on the control tokens around it: use a byte-level one, such as Llama 3's")

    def _encode(self, batch: list[tuple]) -> list[tuple]:
        texts = [segment for _, segments in batch for segment, _ in segments if isinstance(segment, str)]
        encoded = iter(self.text_ids(texts))
        pieces = []
        for starts, segments in batch:
            ids = [next(encoded) if isinstance(segment, str) else segment for segment, _ in segments]
            masked = segments[0][1] is not None
            mask = np.repeat([target for _, target in segments], [len(part) for part in ids]).astype(np.uint8) if masked else None
            pieces.append((np.concatenate(ids), mask, starts))
        return [piece for piece in pieces if len(piece[0])]

    def _joined(self, batches) -> Iterator[list[tuple]]:
        """Consecutive rows joined into documents of at least `join_tokens`; what is left over joins the last."""
        document, held, count = None, [], 0
        for batch in batches:
            for ids, _, _ in batch:
                held.append(ids)
                count += len(ids)
                if count >= self.join_tokens:
                    if document:
                        yield [(np.concatenate([self.prefix, *document, self.separator]), None, True)]
                    document, held, count = held, [], 0
        if document or held:
            yield [(np.concatenate([self.prefix, *(document or []), *held, self.separator]), None, True)]

    def text_ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, in one batch."""
        ids = [np.array(encoding.ids, dtype=np.int32) for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        if ids and self.is_control[np.concatenate(ids)].any():
            raise DataError("the tokenizer turns plain text into control tokens: mark its control tokens as special")
        return ids


# ---- splitting and packing ----


def _pack(parts: list[dict], folder: Path, result: Path, settings: dict, key: str) -> dict:
    """Split the parts' documents and save them, packed, as a DatasetDict at `result`. Returns the facts of what was done."""
    T = settings["max_seq_len"]
    total_documents, total_tokens = sum(part["documents"] for part in parts), sum(part["tokens"] for part in parts)
    if total_tokens < T:
        raise DataError(
            f"the source has {total_documents} documents with {total_tokens} tokens in all, "
            f"fewer than one sample of --max_seq_len={T}: give more text or a smaller --max_seq_len"
        )
    threshold, histogram = _split_threshold(parts, settings, total_documents, total_tokens)
    masked = any(part["masked"] for part in parts)
    packers = {split: _Packer(folder / f"{split}.arrow", T, masked) for split in ("train", "validation")}
    held_out = np.zeros(1, bool)  # is the document that goes on held out?
    for tokens, mask, lengths, starts, keys in _read_parts(parts):
        document = np.cumsum(starts)  # 0: the one that goes on
        held_out = np.concatenate([held_out[-1:], _mixed(keys[starts], settings["seed"]) <= threshold])
        piece_held_out = held_out[document]
        for split, chosen in (("train", ~piece_held_out), ("validation", piece_held_out)):
            if chosen.any():
                chosen_tokens = slice(None) if chosen.all() else np.repeat(chosen, lengths)
                packers[split].add(tokens[chosen_tokens], mask[chosen_tokens] if len(mask) else None, lengths[chosen], starts[chosen])
    rows = {}
    for split, packer in packers.items():
        packer.close()
        rows[split] = datasets.Dataset.from_file(str(packer.path), split=datasets.NamedSplit(split))
        rows[split]._fingerprint = _hash([key, split])  # else it would depend on the time
    with _no_progress_bars():
        datasets.DatasetDict(rows).save_to_disk(str(result))
    return dict(
        documents={split: packer.documents for split, packer in packers.items()},
        samples={split: packer.samples for split, packer in packers.items()},
        tokens={split: packer.samples * T for split, packer in packers.items()},
        dropped_tokens={split: packer.length for split, packer in packers.items()},
        target_tokens={split: packer.targets for split, packer in packers.items()},
        documents_by_length=histogram,
    )


def _read_parts(parts):
    """(token ids, loss mask or empty, lengths of the pieces, which start a document, their keys) of each batch of each part."""
    for part in parts:
        with pa.memory_map(part["path"]) as file:
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                ids, mask, starts, keys = reader.get_batch(index).columns
                lengths = np.diff(ids.offsets.to_numpy())
                yield ids.values.to_numpy(), mask.values.to_numpy(), lengths, starts.to_numpy(False), keys.to_numpy()


def _document_table(parts):
    """(keys, lengths in tokens) of whole documents, in order; one that goes on over several batches counts once."""
    open_key, open_length = np.empty(0, np.uint64), np.zeros(0, np.int64)
    for _, _, lengths, starts, keys in _read_parts(parts):
        begins = np.flatnonzero(starts)
        if len(open_length):
            open_length += lengths[: begins[0] if len(begins) else None].sum()
        if len(begins):
            keys = np.concatenate([open_key, keys[begins]])
            lengths = np.concatenate([open_length, np.add.reduceat(lengths, begins, dtype=np.int64)])
            yield keys[:-1], lengths[:-1]
            open_key, open_length = keys[-1:], lengths[-1:].copy()
    yield open_key, open_length


def _split_threshold(parts, settings, total_documents, total_tokens):
    """(largest key of a document held out for validation, documents by length).

    A document's key is a hash of its tokens and the seed, so that equal documents fall into the same split. Held out are the
    documents of smallest key: the wanted fraction, and more where they would not fill one sample.
    """
    T, fraction = settings["max_seq_len"], settings["validation_fraction"]
    wanted = max(1, round(fraction * total_documents))
    keys, lengths = np.empty(0, np.uint64), np.empty(0, np.int64)
    bins = np.zeros(64, np.int64)
    for more_keys, more_lengths in _document_table(parts):
        bins += np.bincount(np.frexp(more_lengths)[1], minlength=64)
        keys = np.concatenate([keys, _mixed(more_keys, settings["seed"])])
        lengths = np.concatenate([lengths, more_lengths])
        if len(keys) > 2 * (wanted + T) + 100_000:  # only the smallest matter: a document has a token at least
            order = np.argsort(keys)[: wanted + T]
            keys, lengths = keys[order], lengths[order]
    histogram = {f"{1 << max(0, i - 1)}-{(1 << i) - 1}": int(n) for i, n in enumerate(bins) if n}
    nothing = (np.int64(-1), histogram)  # below every key
    if fraction == 0:
        return nothing
    order = np.argsort(keys)
    keys, counted = keys[order], np.cumsum(lengths[order])
    enough = np.flatnonzero((np.arange(1, len(keys) + 1) >= wanted) & (counted >= T))
    threshold = keys[enough[0]] if len(enough) else keys[-1]
    if total_tokens - counted[np.flatnonzero(keys <= threshold)[-1]] < T:
        print("warning: too little text to hold documents out for validation, all of it is for training")
        return nothing
    return threshold, histogram


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Keys scattered anew for each seed (splitmix64's finisher)."""
    x = keys ^ np.uint64(xxhash.xxh64_intdigest(str(seed).encode()))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Packer:
    """Documents end to end, cut every T tokens, into an Arrow stream; what does not fill a last row stays in `length`."""

    def __init__(self, path: Path, T: int, masked: bool):
        self.path, self.T, self.masked = path, T, masked
        names = ["input_ids", "document_starts"] + ["loss_mask"] * masked
        types = [pa.list_(pa.int32()), pa.list_(pa.int32())] + [pa.list_(pa.uint8())] * masked
        self.schema = pa.schema(list(zip(names, types, strict=True)))
        self.writer = pa.ipc.new_stream(str(path), self.schema)
        self.tokens, self.masks, self.starts = [], [], []  # not yet written
        self.length = self.documents = self.samples = self.targets = 0

    def add(self, tokens, mask, lengths, starts) -> None:
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])[starts]
        self.tokens.append(np.array(tokens))  # a copy: the part is unmapped
        if self.masked:
            self.masks.append(np.ones(len(tokens), np.uint8) if mask is None else np.array(mask))
        self.starts.append(begins + self.length)
        self.length += len(tokens)
        self.documents += len(begins)
        if self.length >= max(self.T, 1 << 20):
            self._write()

    def _write(self) -> None:
        rows, T = self.length // self.T, self.T
        tokens = np.concatenate(self.tokens)
        starts = np.union1d(np.concatenate(self.starts), np.arange(rows) * T)  # a row begins a piece
        here = starts[starts < rows * T]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(here // T, minlength=rows))])
        row_bounds = np.arange(rows + 1) * T
        columns = [_lists(row_bounds, tokens[: rows * T]), _lists(bounds, (here % T).astype(np.int32))]
        if self.masked:
            mask = np.concatenate(self.masks)
            columns.append(_lists(row_bounds, mask[: rows * T]))
            self.masks = [mask[rows * T :]]
            self.targets += int(mask[: rows * T].sum())
        else:
            self.targets += rows * T
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self.tokens, self.starts = [tokens[rows * T :]], [starts[starts >= rows * T] - rows * T]
        self.length -= rows * T
        self.samples += rows

    def close(self) -> None:
        if self.length >= self.T:
            self._write()
        self.writer.close()


# ---- the prepared folder ----


def _already_prepared(target: Path, settings: dict) -> bool:
    """Is this preparation there already? Says so; raises DataError where something else is."""
    facts = _read_facts(target)
    if facts is None:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise DataError(f"{target} exists and is not a prepared data set: choose another --dataset_path")
        return False
    wanted = json.loads(json.dumps(settings))
    other = [name for name in wanted if facts["settings"].get(name) != wanted[name]]
    if other:
        short = {name: f"{name} {facts['settings'].get(name)}, now {wanted[name]}" for name in ("max_seq_len", "seed", "text_column")}
        short["source"] = f"another source or changed files (it was {facts['dataset_id']})"
        short["tokenizer"] = "another tokenizer"
        short["validation_fraction"] = f"validation_fraction {facts['settings'].get('validation_fraction')}"
        differences = "; ".join(short.get(name, name) for name in other)
        raise DataError(
            f"{target} is prepared with other settings ({differences}): choose another --dataset_path, or remove the folder to prepare anew"
        )
    left_out = f", {facts['bad_samples']} bad samples left out" if facts["bad_samples"] else ""
    print(f"{target} is already prepared with these settings ({facts['samples']['train']:,} training samples{left_out}): nothing to do")
    return True


def _read_facts(path: Path) -> dict | None:
    try:
        return json.loads((path / "preparation.json").read_text())
    except (OSError, ValueError):
        return None


def summary(path: Path, tokenizer) -> str:
    """What was prepared, for a reader: counts, lengths of the documents, and a sample in which what is learned stands in brackets."""
    facts = _read_facts(path)
    lines = [f"prepared {path}"]
    for split in ("train", "validation"):
        counts = [facts[name][split] for name in ("documents", "tokens", "samples", "dropped_tokens")]
        lines.append("  {:<10} {:>12,} documents {:>15,} tokens {:>10,} samples {:>8,} tokens dropped at the end".format(split, *counts))
    lines.append(f"  {facts['empty_samples']:,} empty samples skipped, {facts['bad_samples']:,} bad samples left out")
    lines.append("  documents by length in tokens:")
    most = max(facts["documents_by_length"].values())
    for name, count in facts["documents_by_length"].items():
        lines.append(f"    {name:>17} {count:>12,} {'#' * max(1, round(40 * count / most))}")
    row = datasets.load_from_disk(str(path / "train"))[0]
    learned = Collator(len(row["input_ids"]), 1)([row])["labels"][0].numpy() != IGNORED
    learned = np.concatenate([[False], learned[:-1]])[:160]
    lines.append("  the first sample begins (what is learned in [[ ]]):")
    changes = [0, *(np.flatnonzero(np.diff(learned)) + 1), len(learned)]
    runs = [(tokenizer.decode(row["input_ids"][a:b]), learned[a]) for a, b in zip(changes, changes[1:], strict=False)]
    sample = "".join(f"[[{text}]]" if is_learned else text for text, is_learned in runs)
    return "\n".join(lines + ["    " + line for line in sample.splitlines()])


def _fingerprint(tokenizer) -> str:
    """Hash of what decides the token ids, the same in every version of the libraries."""
    probe = "Hello, world!  1790's\n\tnaïve 中文 <|end_of_text|>"
    ids = tokenizer(probe)["input_ids"]
    facts = [sorted(tokenizer.get_vocab().items()), ids, document_separator(tokenizer), tokenizer.chat_template]
    return _hash(facts)


def _hash(facts) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _only_one(work: Path):
    """Wait for another process that prepares the same folder; the kernel releases the lock of one that dies."""
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is preparing in {work}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _no_progress_bars():
    enabled = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
