"""A tokenizer.json of the tokenizers library for vocabularies that were made here and that it knows in another form only."""

import os
import tempfile

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Pipeline

from ptm.text.base import Tokenizer
from ptm.text.bpe import SPELLING
from ptm.text.sentencepiece import SPACE

# What both must turn into the same ids before the file is believed: spaces at all places, signs, other scripts, what has no piece.
PROBES = (
    "", "a", " a", "a ", "The quick brown fox.", "  two  spaces ", "line\nbreak\n\n", "tab\tand\u00a0more", "don't stop-it (now)!", "3.14159 and 1,000",
    "Größe naïve ﬁ café", "中文字符与标点。", "日本語 한국어", "🙂🙃", "e\u0301 \u200b zero", "these are text that we know and more of the same words", "ＡＢＣ１２３",
)  # fmt: skip


def library_files(tokenizer: Tokenizer) -> dict[str, bytes] | None:
    """{tokenizer.json: content} of bytes, chars, and sentencepiece unigram models that were trained here; None where none gives the same ids."""
    build = {"bytes": _bytes, "chars": _chars, "sentencepiece": _unigram}.get(tokenizer.kind)
    pipeline = None if build is None else build(tokenizer)
    if pipeline is None:
        return None
    pipeline.add_special_tokens([AddedToken(tokenizer.pieces([i])[0], normalized=False, special=True) for i in sorted(tokenizer.special_ids)])
    pipeline.encode_special_tokens = True
    known = PROBES if tokenizer.kind != "chars" or tokenizer.unk_id is not None else ()
    if any(not np.array_equal(pipeline.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)) for text in known):
        return None
    return {"tokenizer.json": pipeline.to_str().encode()}


def _bytes(tokenizer: Tokenizer) -> Pipeline:
    spelled = {byte: char for char, byte in SPELLING.items()}
    first = int(tokenizer.encode("\0")[0])
    vocab = {tokenizer.pieces([i])[0]: i for i in sorted(tokenizer.special_ids)} | {spelled[byte]: first + byte for byte in range(256)}
    pipeline = Pipeline(models.BPE(vocab=vocab, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _chars(tokenizer: Tokenizer) -> Pipeline:
    names = tokenizer.pieces(range(tokenizer.vocab_size))
    unknown = "" if tokenizer.unk_id is None else names[tokenizer.unk_id]
    pipeline = Pipeline(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=unknown))
    pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    pipeline.decoder = decoders.Fuse()
    return pipeline


def _unigram(tokenizer: Tokenizer) -> Pipeline:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        model = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    added = tokenizer.pieces(range(len(pieces), tokenizer.vocab_size))
    pipeline = Pipeline(models.Unigram(pieces + [(name, 0.0) for name in added], unk_id=tokenizer.unk_id, byte_fallback=True))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    pipeline.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return pipeline
