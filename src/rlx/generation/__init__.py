"""Token generation with transformers: slots of keys and values, batches that refill themselves, sampling."""
