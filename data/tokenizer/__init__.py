"""Tokenizer and chat template: the public names."""

from .tokenizer import ChatTokenizer, train_bpe

__all__ = ["ChatTokenizer", "train_bpe"]
