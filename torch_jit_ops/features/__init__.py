"""What PyTorch's own machinery asks of an op beyond its call: derivatives, batches, shards, planned outputs, early builds."""
