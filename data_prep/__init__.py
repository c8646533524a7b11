"""Offline data preparation: raw text in, HDF5 shards and a manifest out. Never imports torch."""
