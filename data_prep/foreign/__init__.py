"""Other projects' shards in, ours out."""
