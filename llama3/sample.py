"""Samples text from a model: a prompt's continuation, or a conversation, turn after turn."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, TextStreamer, set_seed

from errors import UserError
from llama3.export import DTYPES, generation_config

LEAVE = "/exit"


def load(folder: Path, dtype: str) -> LlamaForCausalLM:
    """Reads a Hugging Face folder, onto the GPU if there is one. Raises UserError."""
    # A .bin file would be a pickle, so only safetensors are read.
    options = {"torch_dtype": DTYPES[dtype], "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are told below
    try:
        model, loading = LlamaForCausalLM.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many kinds for damaged weights
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be read: {reason}", "Download or save it again") from error
    kinds = {"missing": "lack", "unexpected": "have a surplus", "mismatched": "have another shape of"}
    for kind, difference in kinds.items():
        names = sorted(loading[f"{kind}_keys"])[:3]
        if names:
            raise UserError(
                f"the weights of {folder} {difference} {', '.join(map(str, names))}",
                "Save the weights with their own configuration: these are another model's",
            )
    return model.eval().to("cuda" if torch.cuda.device_count() else "cpu")


def generate_text(
    model, tokenizer, prompt: str, max_new_tokens: int, seed: int, temperature: float, chat=False
) -> str:
    """Returns the prompt and its continuation. Temperature 0 is greedy, any other samples with top-p 0.9.

    chat: the prompt is a user's message in the tokenizer's template, and what is returned is the answer.
    """
    if chat:
        ids = chat_ids(tokenizer, [dict(role="user", content=prompt)])
    else:
        ids = tokenizer(prompt, return_tensors="pt", split_special_tokens=True).input_ids  # (1, T)
    if not ids.shape[1]:
        raise UserError("--generate got a prompt without tokens", "Give a prompt of at least one token")
    set_seed(seed)
    output = _continued(model, ids, _options(model, tokenizer, temperature), max_new_tokens)
    return tokenizer.decode(output[ids.shape[1] if chat else 0 :], skip_special_tokens=True)


def chat_ids(tokenizer, messages: list[dict]) -> torch.Tensor:
    """The conversation in the tokenizer's template, up to where the assistant answers: (1, T)."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def _options(model, tokenizer, temperature: float) -> GenerationConfig:
    options = generation_config(model.config, tokenizer)
    if temperature:
        options.do_sample, options.temperature, options.top_p = True, temperature, 0.9
    return options


@torch.no_grad()
def _continued(model, ids, options, max_new_tokens: int, streamer=None) -> torch.Tensor:
    """The ids (1, T) with what follows them, without the batch's dim."""
    ids, options.max_new_tokens = ids.to(model.device), max_new_tokens
    named = dict(attention_mask=torch.ones_like(ids), generation_config=options, streamer=streamer)
    return model.generate(ids, **named)[0]


def _ask() -> str:
    """A line from the keyboard or a pipe. Raises EOFError at the end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets input() edit the line, and remember earlier ones
    return input("> " if sys.stdin.isatty() else "")


def chat(
    model, tokenizer, max_new_tokens: int, seed: int, temperature: float, ask: Callable[[], str] = _ask
) -> None:
    """Answers what `ask` returns, word by word on stdout, until that is /exit, ends, or is interrupted.

    Raises UserError if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template, and --chat needs one",
            "Continue a text with --generate, or name an Instruct model or one trained on conversations",
        )
    set_seed(seed)
    limit, messages = model.config.max_position_embeddings, []
    options = _options(model, tokenizer, temperature)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (text := ask()).strip() != LEAVE:
            asked = [*messages, dict(role="user", content=text)]
            kept, ids = _fitting(tokenizer, asked, limit - min(max_new_tokens, limit // 4))
            if (room := limit - ids.shape[1]) < 1:
                print(f"(the model holds {limit} tokens, this message has more: make it shorter)")
                continue
            if len(kept) < len(asked):
                turns = (len(asked) - len(kept)) // 2
                print(f"(the model holds {limit} tokens: it forgets the {turns} oldest of your messages)")
            output = _continued(model, ids, options, min(max_new_tokens, room), streamer)
            answer = tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)
            messages = [*kept, dict(role="assistant", content=answer)]
    if sys.stdin.isatty():
        print()  # the shell's prompt begins a line


def _fitting(tokenizer, messages: list[dict], limit: int) -> tuple[list[dict], torch.Tensor]:
    """The last turns of at most so many tokens, but always the last message; and their ids."""
    while (ids := chat_ids(tokenizer, messages)).shape[1] > limit and len(messages) > 1:
        messages = messages[2:]
    return messages, ids
