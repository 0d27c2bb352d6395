"""From rows to batches: reading, schemas, conversations, images, encoding, data set, sampler, collator."""
