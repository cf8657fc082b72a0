"""The small world: drawn figures whose truth is known, and models of the real structure that were trained on them."""
