"""The data of a run: documents to rows of tokens, in memory or streamed, with the place in them after each batch."""

from titans_lm.training.data.blocks import Blocks, TBPTTSampler

__all__ = ["Blocks", "TBPTTSampler"]
