"""From source records to packed batches: documents, tokenizers, media, storage."""
