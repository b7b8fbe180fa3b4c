"""Tokenise: text in, token ids and shards out. Documents are encoded once; arms only select and order.

tokenizer.py  which tokenizer, its EOS, the encoder, training
tokens.py     the ids of a part's representatives, and where each document is among them
shards.py     Nanotron and Megatron files: writers, readers, the check of what was written
"""

from curation.tokenise.tokenizer import Encoder, TokenizerSpec, check_fastokens, resolve, train
from curation.tokenise.tokens import tokens_table

STAGE_VERSION = 1

__all__ = ["STAGE_VERSION", "Encoder", "TokenizerSpec", "check_fastokens", "resolve", "tokens_table", "train"]
