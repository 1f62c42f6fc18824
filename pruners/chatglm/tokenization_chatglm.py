"""ChatGLM-6B's tokenizer around its SentencePiece file, from the published tokenizer's conventions.

Newlines, tabs and runs of spaces become pieces of their own before SentencePiece sees the text; special tokens are
appended, not prepended: `text [gMASK] <sop>`, and with a second text `text [gMASK] <sop> second <eop>`.
"""

import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

Token = str | AddedToken
LONGEST_BLANK = 80
PIECES = {"\n": "<n>", "\t": "<|tab|>"}


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Ids are SentencePiece's, shifted by `num_image_tokens` (20,000 in the first release, 0 in the later one).

    Padding is on the left.  The attention mask is [batch, tokens], 0 at padding; the published tokenizer's
    [1, tokens, tokens] and its positions, which the model makes itself, would not fit into memory for a long text.
    Raises ValueError without a vocabulary, and for one that lacks a special token.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: Token = "<sop>",
        eos_token: Token = "<eop>",
        end_token: Token = "</s>",
        mask_token: Token = "[MASK]",
        gmask_token: Token = "[gMASK]",
        pad_token: Token = "<pad>",
        unk_token: Token = "<unk>",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(f"ChatGLM-6B's tokenizer needs ice_text.model in its folder; found {vocab_file}.")
        self.vocab_file = vocab_file
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        self.num_image_tokens = num_image_tokens
        self.pieces = SentencePieceProcessor(model_file=str(vocab_file))
        images = {f"<image_{index}>": index for index in range(num_image_tokens)}
        size = self.pieces.get_piece_size()
        self._vocabulary = images | {self.pieces.id_to_piece(i): num_image_tokens + i for i in range(size)}
        needed = (bos_token, eos_token, mask_token, gmask_token, pad_token, unk_token)
        if lacking := [str(token) for token in needed if str(token) not in self._vocabulary]:
            raise ValueError(f"{vocab_file} has no piece {lacking[0]}; it is not ChatGLM-6B's ice_text.model.")
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=bos_token,
            eos_token=eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            num_image_tokens=num_image_tokens,
            **kwargs,
        )

    @property
    def text_prefix(self) -> tuple[int, ...]:
        """`[gMASK] <sop>`, which must stand in front of plain text."""
        return (self._vocabulary[str(self.gmask_token)], self.bos_token_id)

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        return self.pieces.encode(encode_blanks(text), out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, self._vocabulary[str(self.unk_token)])

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.pieces.id_to_piece(index - self.num_image_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = {*self.all_special_tokens, str(self.gmask_token)}
        parts: list[str] = []
        ordinary: list[str] = []
        for token in [*tokens, ""]:
            if token and token not in special:
                ordinary.append(token)
                continue
            parts += [self.pieces.decode_pieces(ordinary), token]
            ordinary = []
        return decode_blanks("".join(parts))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        second = [] if token_ids_1 is None else [*token_ids_1, self.eos_token_id]
        return [*token_ids_0, *self.text_prefix, *second]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        path = Path(save_directory, name)
        path.write_bytes(self.pieces.serialized_model_proto())
        return (str(path),)


def encode_blanks(text: str) -> str:
    """`<n>`, `<|tab|>` and `<|blank_k|>`, k = 2 to 80, for newlines, tabs and runs of k spaces, the longest first."""
    for blank, piece in PIECES.items():
        text = text.replace(blank, piece)
    return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run.group())}|>", text)


def decode_blanks(text: str) -> str:
    for blank, piece in PIECES.items():
        text = text.replace(piece, blank)
    return re.sub(r"<\|blank_(\d+)\|>", _run, text)


def _run(found: re.Match[str]) -> str:
    length = int(found.group(1))
    return " " * length if 2 <= length <= LONGEST_BLANK else found.group()
