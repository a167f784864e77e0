"""The texts of TinyModel's token ids, which are not part of its weights.

The PyPI package tinymodel has `ts_tok_ids_to_neo.pt`, a tensor with the id of each token in the
vocabulary of GPT-Neo, which is GPT-2's. This vocabulary, `vocab.json`, is read from the same folder
or from GPT-2's repo on the hub.
"""

import json
from pathlib import Path

import huggingface_hub
import torch

from matryoshka.errors import UserError

VOCABULARY = "vocab.json"  # from tokens to ids; a space is written as U+0120
GPT2 = "openai-community/gpt2"  # its name on the hub


def load_texts(path: Path) -> list[str]:
    """The text of each of TinyModel's token ids, with its leading space; "" for special tokens.

    path: `ts_tok_ids_to_neo.pt`. Raises `UserError` if it cannot be read, or GPT-2's vocabulary
    cannot be found.
    """
    try:
        gpt2_ids = torch.load(path, weights_only=True).tolist()
        vocabulary = json.loads(vocabulary_beside(path).read_text(encoding="utf-8"))
        tokens = {i: token for token, i in vocabulary.items()}
        return [decode(tokens[i]) if i in tokens else "" for i in gpt2_ids]
    except UserError:
        raise
    except Exception as error:  # torch.load raises errors of many classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise UserError(
            f"--tokenizer {path} cannot be read ({reason}): expected ts_tok_ids_to_neo.pt of the "
            f"package tinymodel, and GPT-2's {VOCABULARY} beside it"
        ) from None


def vocabulary_beside(path: Path) -> Path:
    """GPT-2's vocabulary in the folder of `path`, or else downloaded. Raises `UserError`."""
    beside = path.parent / VOCABULARY
    if beside.is_file():
        return beside
    try:
        return Path(huggingface_hub.hf_hub_download(GPT2, VOCABULARY))
    except Exception as error:  # the client raises errors of many classes
        raise UserError(
            f"there is no {VOCABULARY} beside {path}, and it could not be downloaded from {GPT2} "
            f"({type(error).__name__}): put GPT-2's {VOCABULARY} there"
        ) from None


def decode(token: str) -> str:
    """The text of one of GPT-2's tokens; U+FFFD for a part of a character."""
    from tokenizers import decoders  # imported here because only `transformers` brings it

    text: str = decoders.ByteLevel().decode([token])
    return text
