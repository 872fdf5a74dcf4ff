"""Addresses such as `gs://bucket/folder`: what is read from stores, and runs that live on them."""
