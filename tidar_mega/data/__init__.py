"""Text to rows: tokenizer, webdataset shards with an index, and the stream of packed rows."""

from tidar_mega.config import UserError


class DataError(UserError):
    """A corpus, a tokenizer or a prepared folder that cannot be used; the message names the file and the way out."""
