"""Tokens with a meaning of their own: the end of a document, and the label of a position without a target."""

from errors import UserError

IGNORED = -100  # the label of a position without a target, as torch's cross entropy has it
# The first of these that a tokenizer has ends a document. The eos of an Instruct tokenizer only ends a turn.
DOCUMENT_SEPARATORS = ("<|end_of_text|>", "<|endoftext|>")


def document_separator(tokenizer) -> int:
    """Return the id of the token that ends a document: one of DOCUMENT_SEPARATORS, or else the eos token."""
    for name in (*DOCUMENT_SEPARATORS, tokenizer.eos_token):
        if name in tokenizer.get_vocab():
            return tokenizer.convert_tokens_to_ids(name)
    raise UserError("the tokenizer has no token that ends a document", "Give it an eos_token")
