"""The texts of TinyModel's token ids, which its weights come without.

The PyPI package tinymodel holds `ts_tok_ids_to_neo.pt`, a tensor of the id that each token has in
the vocabulary of GPT-Neo, which is GPT-2's. That vocabulary, `vocab.json`, is read from beside it
or from GPT-2's repo on the hub.
"""

import json
from pathlib import Path

import huggingface_hub
import torch

from matryoshka.errors import UserError

VOCABULARY = "vocab.json"  # token to id; a space is written as U+0120
GPT2 = "openai-community/gpt2"  # on the hub


def load_texts(path: Path) -> list[str]:
    """The text of each of TinyModel's ids, the space before it included; "" of special tokens.

    path: `ts_tok_ids_to_neo.pt`. Raises `UserError` where it is none, or there is no vocabulary.
    """
    try:
        gpt2_ids = torch.load(path, weights_only=True).tolist()
        vocabulary = json.loads(vocabulary_beside(path).read_text(encoding="utf-8"))
        tokens = {i: token for token, i in vocabulary.items()}
        return [decode(tokens[i]) if i in tokens else "" for i in gpt2_ids]
    except UserError:
        raise
    except Exception as error:  # torch.load's are of many classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(
            f"--tokenizer {path} cannot be read ({reason}): expected ts_tok_ids_to_neo.pt of the "
            f"package tinymodel, and GPT-2's {VOCABULARY} beside it"
        ) from None


def vocabulary_beside(path: Path) -> Path:
    """GPT-2's vocabulary in the folder of `path`, else the hub's, downloaded. Raises `UserError`"""
    beside = path.parent / VOCABULARY
    if beside.is_file():
        return beside
    try:
        return Path(huggingface_hub.hf_hub_download(GPT2, VOCABULARY))
    except Exception as error:  # of many classes
        raise UserError(
            f"there is no {VOCABULARY} beside {path}, and {GPT2} on the hub gives none "
            f"({type(error).__name__}): put GPT-2's there"
        ) from None


def decode(token: str) -> str:
    """The text of one of GPT-2's tokens. A part of a character is U+FFFD."""
    from tokenizers import decoders  # only here: it comes with transformers

    text: str = decoders.ByteLevel().decode([token])
    return text
